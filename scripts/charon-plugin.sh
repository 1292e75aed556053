#!/bin/bash
# charon-plugin.sh: build the charon plugin for the strongSwan installed here.
#
# usage: scripts/charon-plugin.sh OUTDIR       makes OUTDIR/libstrongswan-qipsec.so
#        scripts/charon-plugin.sh --flags      prints the compiler's flags, one a line
#        scripts/charon-plugin.sh --libraries  and what it is linked with
#
# The last two are for scripts/plugin-check.sh and build nothing; --flags takes a
# source of any version.
#
# Distributions ship no headers for charon plugins, and a plugin fits one
# version only. So this fetches the source of exactly the installed version
# through apt (package lists and download are private to this script: /etc/apt and
# the system's lists are not touched), checks it against the signed index,
# configures it (half a minute, once) and compiles ike/charon/*.c with its
# headers. It refuses a source of another version. Whether charon was built with
# mediation, which moves fields of its structs, is read from the installed library.
#
# environment (name: meaning, default)
#   STRONGSWAN_SRC    use this source tree; nothing is fetched, nothing written there
#   XDG_CACHE_HOME    the source is kept in its q-ipsec directory; ~/.cache
#   CHARON_PLUGIN_SRC directory of the plugin's source; ike/charon
#   CHARON_PLUGIN_DEFINES  more flags of the preprocessor, for builds of tests; none
#   CC                gcc
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
cache=${XDG_CACHE_HOME:-${HOME:?}/.cache}/q-ipsec
plugin=${CHARON_PLUGIN_SRC:-$root/ike/charon}
work=
trap '[ -z "$work" ] || rm -rf -- "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf 'charon-plugin: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# find_charon: sets libdir, libraries and version (of upstream) from what is installed.
find_charon() {
    for libdir in /usr/lib/ipsec /usr/lib/strongswan /usr/lib64/strongswan /usr/local/lib/ipsec; do
        [ ! -e "$libdir/libcharon.so.0" ] || break
    done
    [ -e "$libdir/libcharon.so.0" ] || die "strongSwan is not installed: run scripts/deps.sh tunnel"
    # charon-systemd itself has no --version: it would start.
    local package
    package=$(dpkg-query -W -f='${Version}' strongswan-libcharon 2>/dev/null || true)
    if [ -n "$package" ]; then
        version=${package#*:}
        version=${version%-*}
        version=${version%%[+~]*}
    else
        version=$(swanctl --version 2>/dev/null | sed -n 's/^strongSwan swanctl \([0-9.]*\).*/\1/p')
    fi
    [ -n "$version" ] || die "cannot tell the version of the installed strongSwan"
    libraries=("$libdir/libcharon.so.0" "$libdir/libstrongswan.so.0")
}

# source_lists: apt sources for the source packages, at the mirrors that offer
# the installed package.
source_lists() {
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg option=
    [ ! -e "$keyring" ] || option="[signed-by=$keyring] "
    LC_ALL=C apt-cache policy strongswan-libcharon |
        awk -v option="$option" '$1 ~ /^[0-9]+$/ && $2 ~ /:\// && $5 == "Packages" {
            split($3, part, "/"); print "deb-src " option $2 " " part[1] " " part[2] }' | sort -u
}

# fetch DIR: the upstream tarball, verified, as DIR/orig.tar.*
fetch() {
    local dir=$1 log=$1/apt.log file='' want
    mkdir -p "$dir/lists/partial"
    source_lists >"$dir/sources.list"
    [ -s "$dir/sources.list" ] ||
        die "apt knows no source of strongswan-libcharon (apt-get update?). Name a source tree: STRONGSWAN_SRC=DIR"
    local -a apt=(-qq -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$dir/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
        -o APT::Sandbox::User=root -o Acquire::Retries=3 -o Acquire::Languages=none)
    say "fetching the source of strongSwan $version"
    apt-get "${apt[@]}" update >"$log" 2>&1 || true
    # "version hash file" of every upstream tarball of that version in the index
    apt-cache "${apt[@]}" showsrc strongswan 2>>"$log" | awk -v version="$version" '
        /^Version: / { v = $2 }
        /^Checksums-Sha256:/ { sums = 1; next }
        /^[^ ]/ { sums = 0 }
        sums && $3 ~ "^strongswan_" version "(\\+[^_]*)?\\.orig\\.tar\\.[a-z0-9]+$" { print v, $1, $3 }' |
        sort -u >"$dir/tarballs"
    while read -r package want file; do
        # A security mirror may have dropped the packaging of an older revision; the
        # tarball alone is enough, so only the tarball decides.
        (cd "$dir" && apt-get "${apt[@]}" source --download-only "strongswan=$package") >>"$log" 2>&1 || true
        if [ -e "$dir/$file" ] && sha256sum --status -c <<<"$want  $dir/$file"; then
            tarball=$dir/$file
            return 0
        fi
    done <"$dir/tarballs"
    tail -n 5 "$log" >&2
    die "no source of strongSwan $version to be had. Name a source tree: STRONGSWAN_SRC=DIR"
}

# prepare_tree: sets src, a source tree, and config, its config.h.
prepare_tree() {
    local kept=$cache/strongswan-$version from=${STRONGSWAN_SRC:-}
    mkdir -p "$cache"
    if [ -n "$from" ]; then
        from=$(realpath -e -- "$from") || die "STRONGSWAN_SRC=$STRONGSWAN_SRC: no such directory"
        [ -e "$from/src/libcharon/daemon.h" ] || die "$from is not a strongSwan source tree"
        kept=$cache/tree-$(printf '%s' "$from" | sha256sum | cut -c1-12)
        if [ -e "$from/config.h" ]; then
            src=$from config=$from/config.h
            return
        fi
    fi
    exec {lock}>"$cache/lock"
    flock -w 300 "$lock" || die "another build holds $cache/lock"
    if [ ! -e "$kept/done" ]; then
        work=$(mktemp -d "$cache/work.XXXXXX")
        mkdir "$work/src"
        if [ -n "$from" ]; then
            cp -a -- "$from/." "$work/src/"
        else
            fetch "$work"
            tar -xf "$tarball" -C "$work/src" --strip-components=1
        fi
        rm -rf "$work"/lists "$work"/*.tar.*
        configure "$work"
        find "$work/src" -type f ! -name '*.h' ! -name COPYING -delete
        rm -rf -- "$kept"
        mv -- "$work" "$kept"
        work=
        touch "$kept/done"
    fi
    exec {lock}>&-
    src=$kept/src config=$kept/config.h
}

# configure DIR: DIR/config.h. What is enabled does not matter for headers, but for
# the two that Debian has; mediation is a definition of the compiler, see compiler_flags.
configure() {
    say "configuring the source of strongSwan (once, about half a minute)"
    [ -x "$1/src/configure" ] || (cd "$1/src" && ./autogen.sh) >"$1/configure.log" 2>&1 ||
        die "$1/src has no configure, and autogen.sh failed"
    if ! (mkdir "$1/build" && cd "$1/build" &&
        ../src/configure -q --disable-defaults --enable-ikev1 --enable-ikev2) >>"$1/configure.log" 2>&1; then
        tail -n 15 "$1/configure.log" >&2
        die "strongSwan's configure failed"
    fi
    mv -- "$1/build/config.h" "$1/config.h"
    rm -rf -- "$1/build"
}

# sa_fields: adds to flags a QI_SA_<field> for each field of charon's SAs that not
# every version has. A field that the plugin does not know would be lost on the way
# to the kernel, so it is refused here.
sa_fields() {
    local field
    local -a fields
    mapfile -t fields < <(awk '
        /^struct kernel_ipsec_(sa_id|add_sa|update_sa|query_sa)_t \{/ { struct = $2; sub(/^kernel_ipsec_/, "", struct) }
        /^\}/ { struct = "" }
        struct && /;$/ { sub(/;$/, ""); sub(/.*[ *]/, ""); print struct "." $0 }
        ' "$src/src/libcharon/kernel/kernel_ipsec.h")
    [ "${#fields[@]}" -gt 30 ] || die "cannot read the fields of an SA in $src"
    for field in "${fields[@]}"; do
        case $field in
        sa_id_t.src | sa_id_t.dst | sa_id_t.spi | sa_id_t.proto | sa_id_t.mark | sa_id_t.if_id) ;;
        add_sa_t.reqid | add_sa_t.mode | add_sa_t.src_ts | add_sa_t.dst_ts | add_sa_t.interface | add_sa_t.lifetime) ;;
        add_sa_t.enc_alg | add_sa_t.enc_key | add_sa_t.int_alg | add_sa_t.int_key | add_sa_t.replay_window) ;;
        add_sa_t.tfc | add_sa_t.ipcomp | add_sa_t.cpi | add_sa_t.encap | add_sa_t.hw_offload | add_sa_t.mark) ;;
        add_sa_t.label | add_sa_t.esn | add_sa_t.copy_df | add_sa_t.copy_ecn | add_sa_t.copy_dscp) ;;
        add_sa_t.initiator | add_sa_t.inbound | add_sa_t.update) ;;
        update_sa_t.cpi | update_sa_t.new_src | update_sa_t.new_dst | update_sa_t.encap | update_sa_t.new_encap) ;;
        update_sa_t.new_reqid | query_sa_t.cpi) ;;
        add_sa_t.seq | add_sa_t.cpu | add_sa_t.iptfs_dont_frag | add_sa_t.forward_icmp)
            flags+=("-DQI_SA_${field#*.}") ;;
        *) die "this strongSwan's kernel_ipsec_$field is new to the plugin: see ike/charon/qipsec_fields.c" ;;
        esac
    done
}

# compiler_flags: sets flags, for the headers of the tree and the installed build.
compiler_flags() {
    flags=(-O2 -g -fPIC -std=gnu11 -fvisibility=hidden -fstack-protector-strong
        -D_FORTIFY_SOURCE=2 -Wall -Wextra -Werror
        # strongSwan's printf hooks and METHOD() need these three
        -Wno-format -Wno-unused-parameter -Wno-pointer-sign
        -DHAVE_CONFIG_H -include "$config" -isystem "$src/src/libstrongswan" -isystem "$src/src/libcharon"
        "-ffile-prefix-map=$root=." "-ffile-prefix-map=$cache=strongswan")
    local symbols
    symbols=$(nm -D --defined-only "$libdir/libcharon.so.0") || die "cannot read $libdir/libcharon.so.0"
    if grep -q ' connect_manager_create$' <<<"$symbols"; then flags+=(-DME); fi
    sa_fields
    # Versions that keep the replacement's SPI forget it in collisions; see delete_in().
    if grep -q 'get_rekey_spi' "$src/src/libcharon/sa/child_sa.h"; then flags+=(-DQI_REKEY_SPI); fi
    # shellcheck disable=SC2206
    flags+=(${CHARON_PLUGIN_DEFINES:-})
}

# compile OUTDIR
compile() {
    local out=$1/libstrongswan-qipsec.so have
    have=$(sed -n 's/^#define PACKAGE_VERSION "\(.*\)"$/\1/p' "$config")
    [ "$have" = "$version" ] ||
        die "the source is strongSwan $have, installed is $version. A plugin of another version would crash charon; refused."
    local -a sources=("$plugin"/*.c)
    [ -e "${sources[0]}" ] || die "no C source in $plugin"
    mkdir -p -- "$1"
    # Linked against the installed libraries, so that a symbol they lack is found
    # here and not when charon starts.
    "${CC:-gcc}" "${flags[@]}" -shared -o "$out.tmp.$$" "${sources[@]}" "${libraries[@]}" \
        -Wl,-z,defs,-z,relro,-z,now,--allow-shlib-undefined || { rm -f -- "$out.tmp.$$"; die "the plugin does not compile"; }
    mv -- "$out.tmp.$$" "$out"
}

[ $# = 1 ] || die "usage: scripts/charon-plugin.sh OUTDIR | --flags | --libraries"
command -v "${CC:-gcc}" nm >/dev/null || die "no compiler: run scripts/deps.sh build"
find_charon
case $1 in
--libraries)
    printf '%s\n' "${libraries[@]}"
    ;;
--flags)
    prepare_tree
    compiler_flags
    printf '%s\n' "${flags[@]}"
    ;;
*)
    prepare_tree
    compiler_flags
    compile "$1"
    ;;
esac
