#!/usr/bin/env bash
# testbed-test.sh: make testbed, testbed-shell and testbed-down as a user runs
# them, beside a testbed that may be up. Prints lines for testrun.
set -euo pipefail
cd "$(dirname "$0")/.."
export TESTBED_OUT=$PWD/out/testenv/testbed
work=$(mktemp -d)
trap 'scripts/testbed.sh down >/dev/null; rm -rf -- "$work"' EXIT
trap 'exit 130' INT TERM

ok() { printf 'ok - %s\n' "$*"; }
die() {
    printf 'not ok - %s\n' "$*"
    tail -n 20 "$work"/* >&2
    exit 1
}
# on NODE LINES: runs them there; output in out and err, status in rc.
on() {
    rc=0
    printf '%s\n' "$2" | timeout 60 scripts/testbed.sh shell "$1" >"$work/out" 2>"$work/err" || rc=$?
}
key_id() { grep -oE -m 1 '[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}' "$work/out"; }

on a true
[ "$rc" != 0 ] && grep -q 'not up' "$work/err" || die "a shell on a testbed that is not up: status $rc"
timeout 300 scripts/testbed.sh up >"$work/up" 2>&1 || die "testbed does not come up"
grep -q 'ip -s xfrm state.*shows their keys' "$work/up" || die "up does not warn of what ip xfrm state shows"
read -r pid _ <"$TESTBED_OUT/pid"
ok "testbed is up, and in the background"
timeout 60 scripts/testbed.sh up >"$work/again" 2>&1 && grep -q 'up already' "$work/again" || die "a second up: $(head -n 1 "$work/again")"
read -r same _ <"$TESTBED_OUT/pid"
[ "$same" = "$pid" ] || die "a second up started another one"
ok "a second up says so and starts nothing"

on a 'qipsec tunnels; echo to stderr >&2; exit 7'
[ "$rc" = 7 ] || die "exit 7 in a script on a gives status $rc"
[ "$(cat "$work/err")" = "to stderr" ] || die "standard error is not kept apart"
grep -q INSTALLED "$work/out" || die "qipsec tunnels shows no CHILD_SA"
first=$(key_id)
ok "lines on standard input run on gateway a: output, errors and status come back"
on b 'qipsec tunnels'
[ "$rc" = 0 ] && [ "$(key_id)" = "$first" ] || die "b shows another Key-ID than a, $first"
on ha 'ping -q -c 3 -i 0.2 -W 5 10.2.0.2'
grep -q ' 0% packet loss' "$work/out" || die "no ping from behind a to behind b"
ok "both gateways show the same Key-ID; ping from behind a to behind b"

rc=0
: >"$work/tty"
# typed at the prompt, as a person does
{ for _ in $(seq 300); do ! grep -q '\[b\].*#' "$work/tty" || break; sleep 0.1; done; printf 'tty && qipsec tunnels\nexit 5\n'; sleep 1; } |
    timeout 60 script -qec 'scripts/testbed.sh shell b' /dev/null >"$work/tty" 2>&1 || rc=$?
[ "$rc" = 5 ] || die "exit 5 in a shell on a terminal gives status $rc"
grep -q INSTALLED "$work/tty" || die "the shell on a terminal shows no CHILD_SA"
if grep -q 'not a tty' "$work/tty"; then die "the shell has no terminal"; fi
on a 'qipsec tunnels'
[ "$rc" = 0 ] || die "the testbed has ended with a shell"
ok "a shell on a terminal; leaving it leaves the testbed"

timeout 120 scripts/testbed.sh down >"$work/down" 2>&1 || die "down fails"
# a zombie has ended: it waits for whoever has inherited it
[ ! -e "/proc/$pid" ] || grep -q '^State:.*Z' "/proc/$pid/status" || die "process $pid is still there after down"
[ ! -e "$TESTBED_OUT/pid" ] && [ ! -e "$TESTBED_OUT/ready" ] || die "down leaves its files"
[ -s "$TESTBED_OUT/a/qipsecd.log" ] || die "the logs are gone"
timeout 20 scripts/testbed.sh down >"$work/down" 2>&1 || die "a second down fails"
ok "down ends it, keeps the logs; a second down finds nothing to do"
