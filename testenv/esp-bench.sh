#!/bin/bash
# esp-bench.sh: the rounds of `make bench` that need a kernel with ESP: a Q-IPsec
# tunnel and a stock one of the same two charons by turns. It judges nothing;
# bench -samples reads $TESTENV_OUT/samples and does.
#
# usage: TESTENV_PASS="ROUNDS SLICES" testenv/run testenv/esp-bench.sh
#
#   COUNT   rekeys in a round, one each second, under numbered UDP packets (10)
#   ROUNDS  of either tunnel (3); fewer if 150 s have passed, but one
#   SLICES  of half a second of TCP through either tunnel (40): short, so that both
#           of a pair see the same of what else the machine does
#
# To see a row missed: TESTENV_BREAK=loss (a gateway drops an ESP packet of the Q-IPsec
# tunnel each second), slow (one of a hundred, which rekey-loss shows too).
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"
# shellcheck source=testenv/two-tunnels.sh
. "$here/two-tunnels.sh"

count=${COUNT:-10} rounds=${ROUNDS:-3} slices=${SLICES:-40}
samples=$TESTENV_OUT/samples

# algorithms: what the SAs of both tunnels have, with the lengths of key and tag in bits.
algorithms() {
    node a ip xfrm state | awk '$1 ~ /^(aead|enc|auth|auth-trunc)$/ { print $1, $2, 4 * (length($3) - 2), $4 }' | sort -u
}

# drop WHAT HOW...: ESP packets of the Q-IPsec tunnel, if TESTENV_BREAK is WHAT.
drop() {
    local what=$1
    shift
    [ "${TESTENV_BREAK:-}" = "$what" ] || return 0
    node b iptables -I INPUT -p esp -s 192.0.2.1 "$@" -j DROP || fail "cannot break"
}

throughput() {
    node_start hb sink "$BIN/bench" sink -listen 0.0.0.0:7000
    await 20 grep -qs listening "$GW/hb/log/sink.log" || fail "sink: $(cat "$GW/hb/log/sink.log")"
    node ha "$BIN/bench" push -ours 10.2.0.2:7000 -stock 10.12.0.2:7000 -rounds "$slices" -slice 500ms >"$GW/a/log/push.log" 2>&1 ||
        fail "push: $(tail -n 3 "$GW/a/log/push.log")"
    node_stop hb sink || fail "sink: $(tail -n 3 "$GW/hb/log/sink.log")"
    note "$slices slices of TCP through either tunnel"
    sed 's/^/esp-throughput /' "$GW/a/log/push.log" >>"$samples"
}

# drops: what may have happened to a packet that is lost: the machine's own queues were
# full, or a gateway's IPsec dropped it.
drops() {
    local n queue=0 d
    while read -r _ d _; do queue=$((queue + 16#$d)); done </proc/net/softnet_stat
    note "dropped since the start: $queue by the machine's queues"
    for n in a b; do
        # shellcheck disable=SC2046 # words
        note "dropped since the start by IPsec of $n:" $(node "$n" awk '$2 { print $1 "=" $2 }' /proc/net/xfrm_stat)
    done
}

# loss KIND SERIES ROUND: also packets/s each way and ms between rekeys, as they were.
loss() {
    local name=$1-$3 lost took
    traffic "$1" "$name" "$rate" "$count"
    note "$1, round $3, $rate/s each way: $told"
    lost=$(sum "$name" lost)
    [ "$lost" != unknown ] || fail "$name: a host did not hear how many packets the other sent"
    [ "$lost" = 0 ] || drops
    echo "rekey-loss $2 $lost" >>"$samples"
    [ "$2" = ours ] || return 0
    took=$(sum "$name" took_ms) # of both
    echo "rekey-loss rate $(($(sum "$name" sent) * 1000 / took))" >>"$samples"
    echo "rekey-loss interval $((took / 2 / count))" >>"$samples"
}

main() {
    local rate why='' told r
    tunnels_up
    : >"$samples"
    check "the SAs of both tunnels are AES-GCM-256" [ "$(algorithms)" = "aead rfc4106(gcm(aes)) 288 128" ]
    drop slow -m statistic --mode random --probability 0.01
    throughput
    find_rate
    drop loss -m limit --limit 1/second
    for ((r = 1; r <= rounds && (r == 1 || SECONDS < 150); r++)); do
        loss qipsec ours "$r"
        loss stock stock "$r"
    done
    capture_stop clear
    check "nothing of it was in clear on the wire" [ "$(wire clear)" = 0 ]
    ok "$((r - 1)) rounds of $count rekeys at $rate/s each way$why"
}

main
