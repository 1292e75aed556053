#!/bin/bash
# plugin-check.sh: what can be said about the charon plugin's C without a tunnel.
#
# usage: scripts/plugin-check.sh [SOURCE-TREE...]
#
# For each source tree of strongSwan, by default that of the installed version:
# the plugin compiles without a warning, by gcc and by clang, with mediation and
# without, clang's analyser finds nothing, and what that version's SAs may ask for
# beyond the protocol with qipsecd is refused. Then testenv/plugin-asan runs the
# plugin under AddressSanitizer, LeakSanitizer and UBSan, always with the installed
# version, whose source STRONGSWAN_SRC may name. Every check is a line "ok - ..."
# or "not ok - ...". A tree out of git needs autoconf, automake, libtool and gperf.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
tmp=$(mktemp -d)
trap 'rm -rf -- "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
failed=0

say() { printf 'plugin-check: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
# result STATUS NAME
result() {
    if [ "$1" = 0 ]; then echo "ok - $2"; else echo "not ok - $2" && failed=1; fi
}

# read_flags [TREE]: sets flags and version.
read_flags() {
    STRONGSWAN_SRC=${1:-${STRONGSWAN_SRC:-}} "$root/scripts/charon-plugin.sh" --flags >"$tmp/flags" || return 1
    mapfile -t flags <"$tmp/flags"
    version=$(sed -n '/^-include$/{n;p}' "$tmp/flags" |
        xargs -d '\n' sed -n 's/^#define PACKAGE_VERSION "\(.*\)"$/\1/p')
}

# compiles: one tree's flags, every compiler, both forms of charon's structs.
compiles() {
    local cc me file rc=0
    for me in -DME -UME; do
        for file in ike/charon/*.c testenv/plugin-asan/*.c testenv/plugin-asan/fields/*.c; do
            for cc in gcc clang; do
                "$cc" "${flags[@]}" "$me" -c -o "$tmp/object" "$file" || rc=1
            done
        done
    done
    return "$rc"
}

# analyse: -I, because the analyser takes functions of system headers for ones that
# keep no pointer, and then sees leaks in every chunk_t; the headers' own warnings
# are off, reports are errors.
analyse() {
    local file rc=0
    for file in ike/charon/*.c; do
        clang --analyze --analyzer-output text -Xclang -analyzer-werror \
            "${flags[@]/#-isystem/-I}" -w -o "$tmp/report" "$file" || rc=1
    done
    return "$rc"
}

# fields: testenv/plugin-asan/fields by the flags of one tree, no library needed; and
# a tree whose SAs have one field more gets no plugin.
fields() {
    local header tree=$tmp/tree rc=0
    gcc "${flags[@]}" -o "$tmp/fields" ike/charon/qipsec_fields.c testenv/plugin-asan/fields/main.c || return 1
    "$tmp/fields" || rc=1
    header=$(sed -n '/^-isystem$/{n;/libcharon$/p}' "$tmp/flags")
    rm -rf -- "$tree"
    mkdir -p "$tree/src/libcharon/kernel"
    touch "$tree/config.h" "$tree/src/libcharon/daemon.h"
    sed '/^struct kernel_ipsec_add_sa_t {/a\\tbool new_field;' "$header/kernel/kernel_ipsec.h" \
        >"$tree/src/libcharon/kernel/kernel_ipsec.h"
    if STRONGSWAN_SRC=$tree scripts/charon-plugin.sh --flags >"$tmp/out" 2>&1; then
        echo "a field that the plugin does not know is not refused"
        rc=1
    fi
    grep -q 'add_sa_t.new_field is new to the plugin' "$tmp/out" || { cat "$tmp/out"; rc=1; }
    return "$rc"
}

# link NAME [FLAG]: the harness as $tmp/NAME, the plugin compiled with FLAG besides.
link() {
    local name=$1 file dir=$tmp/$1.o
    local -a sanitise=(-O1 -fno-omit-frame-pointer -U_FORTIFY_SOURCE
        -fsanitize=address,undefined -fno-sanitize-recover=all)
    mapfile -t libraries < <("$root/scripts/charon-plugin.sh" --libraries)
    shift
    mkdir "$dir"
    for file in ike/charon/*.c; do
        gcc "${flags[@]}" "${sanitise[@]}" "$@" -c -o "$dir/$(basename "$file" .c).o" "$file" || return 1
    done
    for file in testenv/plugin-asan/*.c; do
        gcc "${flags[@]}" "${sanitise[@]}" -c -o "$dir/$(basename "$file" .c).o" "$file" || return 1
    done
    # -rdynamic: charon's plugin loader finds the plugin in the program
    gcc "${sanitise[@]}" -rdynamic -o "$tmp/$name" "$dir"/*.o "${libraries[@]}" \
        "-Wl,-rpath,$(dirname "${libraries[0]}")"
}

# run PROGRAM MODE: its own result lines, and one more if it ends otherwise.
run() {
    local rc=0 log=$tmp/$2.log
    timeout 120 "$tmp/$1" "$2" "$tmp/socket" >"$log" 2>&1 || rc=$?
    cat "$log"
    if [ "$rc" != 0 ]; then
        failed=1
        grep -q '^not ok - ' "$log" || echo "not ok - plugin-asan $2: exit $rc, see the report above"
    fi
}

cd "$root"
command -v gcc clang >/dev/null || die "no gcc or no clang: run scripts/deps.sh build plugincheck"
[ $# -gt 0 ] || set -- ''
for tree in "$@"; do
    read_flags "$tree" || { result 1 "${tree:-the installed version} has no usable source"; continue; }
    rc=0
    compiles || rc=1
    result "$rc" "the plugin compiles without a warning for strongSwan $version"
    rc=0
    analyse || rc=1
    result "$rc" "clang's analyser finds nothing in the plugin for strongSwan $version"
    rc=0
    fields || rc=1
    result "$rc" "the plugin knows every field of an SA of strongSwan $version"
done

read_flags || die "the source of the installed strongSwan is not to be had"
other=-DME
! grep -qx -- -DME "$tmp/flags" || other=-UME
if link same && link other "$other"; then
    for mode in fit limits unfit hang; do run same "$mode"; done
    run other other-build
else
    result 1 "testenv/plugin-asan compiles"
fi
exit "$failed"
