#!/bin/bash
# rekeys.sh: COUNT (100) CHILD_SA rekeys under a ping every 5 ms, by either side
# in turn: no packet lost, no Key-ID twice, both ends' SAs equal; memory and file
# descriptors of all four daemons stay as they were after the first fifth.
#
# usage: testenv/run testenv/rekeys.sh
# To see it fail, with status 1: TESTENV_BREAK=leak (more is held at the end).
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

rekey_both() { # COUNT
    "$BIN/rekeyer" -a "$GW/a/run/q-ipsec/operator.sock" -b "$GW/b/run/q-ipsec/operator.sock" -count "$1"
}

main() {
    local n count=${COUNT:-100} ping lost sent first
    first=$(((count + 4) / 5))
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    for n in b a; do gateway_up "$n" || fail "gateway $n does not start"; done
    qkdsim_start "" "first_keys = 5000"
    await 90 tunnel_up || fail "no tunnel"
    note "tunnel is up"

    # its own process, not a function's subshell: SIGINT must reach ping itself
    nsenter --net=/run/netns/ha ping -q -i 0.005 -W 2 10.2.0.2 >"$GW/a/log/ping.log" &
    ping=$!
    check "$first rekeys by either side in turn, each with a fresh Key-ID, both ends' SAs equal" rekey_both "$first"
    held >"$GW/held.first"
    check "and $((count - first)) more" rekey_both $((count - first))
    held >"$GW/held.last"
    check_flat
    kill -INT "$ping"
    wait "$ping"
    sent=$(awk '/packets transmitted/ { print $1 }' "$GW/a/log/ping.log")
    lost=$(awk '/packets transmitted/ { print $1 - $4 }' "$GW/a/log/ping.log")
    check "a ping every 5 ms meanwhile: $lost of $sent packets lost" [ "${lost:-1}" -eq 0 ]
    check "as many pings as that takes were sent" [ "${sent:-0}" -gt $((count * 10)) ]
    # a machine that stands still may have a set-up refused, after one end has begun it
    cat "$GW"/[ab]/log/qipsecd.log | sed -nE 's/.*msg="set-up failed after.* Key-ID ([0-9a-f-]{36}) .*/\1/p' >"$GW/failed"
    check "both ends used the same Key-IDs in the same order, but for $(wc -l <"$GW/failed") set-ups that failed" same_keys
    check "no Key-ID came twice" [ -z "$(installed_keys a | sort | uniq -d)" ]
    check "both kernels hold the same SAs with equal keys" await 20 states_equal
}

installed_keys() { grep -E 'msg="SA installed"' "$GW/$1/log/qipsecd.log" | sed -nE 's/.* key_id=([0-9a-f-]{36}).*/\1/p' | uniq | grep -vxFf "$GW/failed"; }
same_keys() { [ "$(installed_keys a | wc -l)" -gt "$count" ] && [ "$(installed_keys a)" = "$(installed_keys b)" ]; }

main
