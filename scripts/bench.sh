#!/usr/bin/env bash
# bench.sh: the table of measurements, behind `make bench`; numbers in
# out/bench.json, the README's section as it should read in out/bench.md. Arguments
# go to testenv/bench (-rounds, -slice, ...; -h lists them). A quiet machine gives
# narrow quartiles; on a busy one look at the ratios.
#
# The rows rekey-loss and esp-throughput are measured first, in testenv/run, and take
# three minutes. They are left out with BENCH_ESP=0, or where what they need is not
# installed; nothing is installed here. Their log: out/bench-esp/log.
set -euo pipefail
cd "$(dirname "$0")/.."
esp=out/bench-esp

# esp_missing: what the rows need and this machine lacks.
esp_missing() {
    local c
    [ "$(id -u)" = 0 ] || { echo "root, for network namespaces"; return; }
    for c in ip charon-systemd swanctl sshd tcpdump gcc; do
        command -v "$c" >/dev/null || { echo "$c (scripts/deps.sh build tunnel installs it)"; return; }
    done
    testenv/esp-probe || command -v linux.uml >/dev/null ||
        echo "a kernel with ESP, or user-mode-linux (scripts/deps.sh tunnel installs it)"
}

# esp_rows: 0 if $esp/samples is there.
esp_rows() {
    local lack
    [ "${BENCH_ESP:-1}" != 0 ] || { echo "rekey-loss, esp-throughput: left out, BENCH_ESP=0"; return 1; }
    lack=$(esp_missing)
    [ -z "$lack" ] || { echo "rekey-loss, esp-throughput: left out, they need $lack"; return 1; }
    mkdir -p "$esp"
    rm -f "$esp/samples"
    { CGO_ENABLED=0 go build -trimpath -o bin/ ./testenv/rekeyer ./testenv/udpnum && scripts/charon-plugin.sh bin &&
        TESTENV_TIMEOUT=300 TESTENV_OUT=$esp testenv/run testenv/esp-bench.sh; } >"$esp/log" 2>&1 && return
    echo "rekey-loss, esp-throughput: left out, the measurement failed ($esp/log):"
    tail -n 3 "$esp/log"
    failed=1
    return 1
}

CGO_ENABLED=0 go build -trimpath -o bin/bench ./testenv/bench
commit=$(git rev-parse --short HEAD 2>/dev/null) || commit=unknown
[ -z "$(git status --porcelain -uno 2>/dev/null)" ] || commit+=" and changes"
what="$(date -u +%Y-%m-%d), commit $commit"
echo "$what"
failed=0
case ${1:-} in -h | -help | --help) BENCH_ESP=0 ;; esac
if esp_rows; then set -- -samples "$esp/samples" "$@"; fi
bin/bench -markdown out/bench.md -of ", $what" "$@" || failed=1
exit "$failed"
