#!/bin/bash
# udp-rekeys.sh: numbered UDP packets both ways through CHILD_SA rekeys by either
# side in turn, one each second: none of a Q-IPsec tunnel's may be lost. The same
# by turns through a stock tunnel of the same two charons, for comparison.
#
# usage: testenv/run testenv/udp-rekeys.sh
#
#   COUNT     rekeys in a round (30); a round's traffic lasts as many seconds
#   ROUNDS    of either tunnel (2)
#   INTERVAL  between rekeys of the Q-IPsec tunnel (1s; 0s: as fast as both ends allow)
#   STOCK     rekeys of the stock tunnel in a round (COUNT)
#
# TESTENV_PASS="ROUNDS INTERVAL STOCK" hands the last three in. From two rounds on the
# memory and descriptors of all daemons must be at the end what they were after the first.
#
# The rate is 1,000 packets/s each way, or else the highest of a few that the stock
# tunnel carries without loss, under rekeys, while the senders keep their schedule.
# To see it fail: TESTENV_BREAK=loss (a gateway drops an ESP packet each second), leak.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"
# shellcheck source=testenv/two-tunnels.sh
. "$here/two-tunnels.sh"

count=${COUNT:-30} rounds=${ROUNDS:-2} interval=${INTERVAL:-1s}

# in_all KIND: what its rounds lost.
in_all() {
    local r n lost=0 sent=0
    for ((r = 1; r <= rounds; r++)); do
        n=$(sum "$1-$r" lost)
        if [ "$n" = unknown ] || [ "$lost" = unknown ]; then lost=unknown; else lost=$((lost + n)); fi
        sent=$((sent + $(sum "$1-$r" sent)))
    done
    echo "$lost of $sent"
}

main() {
    local rate why='' told r
    tunnels_up
    find_rate
    [ "${TESTENV_BREAK:-}" != loss ] ||
        node b iptables -I INPUT -p esp -s 192.0.2.1 -m limit --limit 1/second -j DROP || fail "cannot break"
    for ((r = 1; r <= rounds; r++)); do
        traffic qipsec "qipsec-$r" "$rate" "$count" "$interval"
        check "Q-IPsec, round $r, $rate/s each way: $told" lossless "qipsec-$r"
        traffic stock "stock-$r" "$rate" "${STOCK:-$count}"
        note "stock, round $r, $rate/s each way: $told"
        [ "$r" != 1 ] || held >"$GW/held.first"
    done
    held >"$GW/held.last"
    [ "$rounds" = 1 ] || check_flat
    capture_stop clear
    check "none of them was in clear on the wire" [ "$(wire clear)" = 0 ]
    check "both kernels hold the same SAs with equal keys" await 20 states_equal
    ok "lost under $((rounds * count)) rekeys, $interval apart at least, at $rate/s each way$why: Q-IPsec $(in_all qipsec), stock $(in_all stock)"
}

main
