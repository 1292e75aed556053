#!/bin/bash
# rekeys.sh: COUNT (100) CHILD_SA rekeys under a ping every 5 ms, by either side
# in turn: no packet lost, no Key-ID twice, both ends' SAs equal.
#
# usage: testenv/run testenv/rekeys.sh
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

main() {
    local n i count=${COUNT:-100} ping lost sent last
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    for n in a b; do gateway_up "$n" || fail "gateway $n does not start"; done
    qkdsim_start "" "first_keys = 5000"
    await 90 tunnel_up || fail "no tunnel"
    note "tunnel is up"

    node ha ping -q -i 0.005 -W 2 10.2.0.2 >"$GW/a/log/ping.log" &
    ping=$!
    for ((i = 0; i < count; i++)); do
        n=a
        [ $((i % 2)) = 0 ] || n=b
        last=$(newest_key a)
        qipsec "$n" tunnels rekey a-b >>"$GW/$n/log/rekey.log" 2>&1 || fail "rekey $i by $n: $(tail -n 1 "$GW/$n/log/rekey.log")"
        await 30 fresh "$last" || fail "rekey $i by $n: no fresh SA on both sides"
        [ $(((i + 1) % 25)) != 0 ] || note "$((i + 1)) rekeys"
    done
    kill -INT "$ping"
    wait "$ping"
    sent=$(awk '/packets transmitted/ { print $1 }' "$GW/a/log/ping.log")
    lost=$(awk '/packets transmitted/ { print $1 - $4 }' "$GW/a/log/ping.log")
    check "$count rekeys under a ping every 5 ms, by either side in turn: $lost of $sent packets lost" [ "${lost:-1}" -eq 0 ]
    check "as many pings as that takes were sent" [ "${sent:-0}" -gt $((count * 10)) ]
    check "no Key-ID twice: $(installed_keys a | sort -u | wc -l) of them" [ -z "$(installed_keys a | sort | uniq -d)" ]
    check "both ends used the same Key-IDs in the same order" [ "$(installed_keys a)" = "$(installed_keys b)" ]
    check "both ends hold the same SAs with equal keys" await 20 states_equal
}

installed_keys() { grep -E 'msg="SA installed"' "$GW/$1/log/qipsecd.log" | sed -nE 's/.* key_id=([0-9a-f-]{36}).*/\1/p' | uniq; }
newest_key() { installed_keys "$1" | tail -n 1; }
# fresh KEY-ID: both sides have installed a newer one than KEY-ID.
fresh() {
    local a
    a=$(newest_key a)
    [ "$a" != "$1" ] && [ "$a" = "$(newest_key b)" ] && tunnel_up
}

main
