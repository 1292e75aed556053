#!/usr/bin/env bash
# testbed.sh up | shell NODE | down: the demo's two gateways, in the background.
#
#   up           starts them, waits for the tunnel (a minute) and says what to try
#   shell NODE   a shell on a gateway (a, b), a host behind one (ha, hb) or the wire.
#                Without a terminal: its standard input is run there as a script;
#                output and exit status are the script's
#   down         ends them; nothing stays but logs in $TESTBED_OUT
#
# They end by themselves after TESTBED_HOURS (12). TESTBED_OUT (out/testbed) is
# for a second one beside the first.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m -- "${TESTBED_OUT:-out/testbed}")
hours=${TESTBED_HOURS:-12}
# shellcheck source=testenv/node.sh
. testenv/node.sh # for started

die() { printf 'testbed: %s\n' "$*" >&2; exit 1; }

# running: sets pid to that of our testenv/run; fails if it is not there.
running() {
    local since
    read -r pid since 2>/dev/null <"$out/pid" && [ "$(started "$pid")" = "$since" ]
}

hints() {
    cat <<-'END'
	In a shell on gateway a (make testbed-shell NODE=a; or b):
	  qipsec tunnels                 the tunnel, its keys' ids and age
	  qipsec explain a-b             what it rests on, check by check
	  qipsec tunnels rekey a-b       a fresh key now
	  qipsec keys                    how many quantum keys are left
	  ping -I 10.1.0.1 10.2.0.2      through the tunnel, from behind a to behind b
	  ip -s xfrm state               the kernel's SAs; CAREFUL: it shows their keys
	  swanctl --list-sas             charon's view
	NODE=ha, hb: the hosts behind; NODE=wire: tcpdump -ni port-a, what an eavesdropper sees.
	make testbed-down ends it.
	END
}

up() {
    if running; then
        if [ -e "$out/ready" ]; then echo "The testbed is up already."; else echo "The testbed is starting already."; fi
        hints
        return 0
    fi
    [ "$(id -u)" = 0 ] || die "needs root (network namespaces)"
    rm -rf -- "$out"
    mkdir -p "$out"
    echo "Two gateways start; the tunnel is up in about a minute."
    TESTENV_OUT=$out TESTENV_ATTACH=1 TESTENV_TIMEOUT=$((hours * 3600)) \
        setsid testenv/run testenv/testbed.sh </dev/null >"$out/log" 2>&1 &
    pid=$!
    trap 'down; exit 130' INT TERM
    echo "$pid $(started "$pid")" >"$out/pid"
    local shown=0 lines
    until [ -e "$out/ready" ]; do
        running || { cat "$out/log" >&2; rm -f "$out/pid"; die "did not come up; the nodes' logs are in $out"; }
        sleep 0.5
        lines=$(wc -l <"$out/log")
        [ "$lines" = "$shown" ] || sed -n "$((shown + 1)),${lines}p" "$out/log"
        shown=$lines
    done
    trap - INT TERM
    hints
}

# shell NODE: on a terminal testenv/attach does it all. A script goes in and its
# output comes back by files, which keep both streams apart and unchanged.
shell() {
    local node=$1 rc=0 box
    running && [ -e "$out/ready" ] || die "is not up: make testbed"
    local rc_file="TESTBED_NODE=$node TESTBED_REPO=$PWD exec bash --noprofile"
    if [ -t 0 ]; then
        exec testenv/attach "$out" "$node" "$rc_file --rcfile $PWD/testenv/testbed.rc -i"
    fi
    box=$(mktemp -d "$out/script.XXXXXX")
    # shellcheck disable=SC2064 # this box
    trap "rm -rf -- '$box'" EXIT
    cat >"$box/in"
    printf '. %q\n. %q\n' "$PWD/testenv/testbed.rc" "$box/in" >"$box/run"
    : >"$box/out" && : >"$box/err"
    testenv/attach "$out" "$node" "$rc_file $box/run </dev/null >$box/out 2>$box/err" </dev/null >"$box/console" 2>&1 || rc=$?
    cat "$box/out"
    cat "$box/err" "$box/console" >&2
    return "$rc"
}

down() {
    local _
    if running; then
        : >"$out/stop"
        for _ in $(seq 300); do # the nodes' orderly end, with their logs
            running || break
            [ "$_" != 200 ] || kill -TERM "$pid" 2>/dev/null || true
            sleep 0.2
        done
        ! running || die "does not end; process $pid"
        echo "The testbed is down; logs: $out"
    fi
    rm -rf -- "$out"/{pid,ready,stop} "$out"/script.*
}

case ${1:-} in
up) up ;;
down) down ;;
shell)
    case ${2:-} in
    a | b | ha | hb | wire) shell "$2" ;;
    *) die "shell wants a NODE: a, b, ha, hb or wire (make testbed-shell NODE=a)" ;;
    esac
    ;;
*) echo "usage: testbed.sh up|shell NODE|down" >&2; exit 2 ;;
esac
