#!/bin/bash
# late.sh: late, lost, cut and repeated frames on the plugin's socket, at every step
# of a rekey, under traffic. Each cell spoils one frame at the gateway that starts
# the exchange (i) or at the one that answers it (r), and must end with a fresh
# CHILD_SA of equal keys on both gateways, nothing beside it, and no packet lost.
#
# usage: testenv/run testenv/late.sh [CELL...] [storm]
#   storm  COUNT (20) rekeys by either side in turn, while either qipsecd is stopped for
#         1 to 4 s again and again
#   CELL  SIDE:STEP:NTH:ACTION[:TIMES], see testenv/plugproxy; TIMES: in that many
#         attempts, one after the other. Default: a few; ALL=1: all, and storm
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

late=7s # more than any limit of a call with patience = 5
# A few of every().
some="i:SENT.answer:1:lose i:BIND.answer:1:late i:ADD.COMMITTED:2:cut
    r:BIND:1:late r:ADD.answer:2:cut r:ADD.COMMITTED:1:twice"

every() {
    local side step action
    for side in i r; do
        for step in GETKEY:1 GETKEY.answer:1 SENT:1 SENT.answer:1 BIND:1 BIND.answer:1 \
            ADD:1 ADD.answer:1 ADD.ACK:1 ADD.COMMITTED:1 ADD:2 ADD.answer:2 ADD.ACK:2 ADD.COMMITTED:2; do
            case $side:$step in r:GETKEY* | r:SENT*) continue ;; esac # only the initiator has them
            for action in cut lose late; do echo "$side:$step:$action"; done
        done
    done
}

# rule N RULE: in one step, as the proxy may look at any time.
rule() { echo "$2" >"$GW/$1/run/rule.new" && mv "$GW/$1/run/rule.new" "$GW/$1/run/rule"; }
rule_gone() { [ ! -e "$1" ]; }
# settled: one CHILD_SA on either side, with equal keys.
settled() { [ "$(sa_count a)" = 2 ] && [ "$(sa_count b)" = 2 ] && states_equal; }
fresh() { settled && [ "$(sa_keys a)" != "$1" ]; }

cell() {
    local side step nth action times n=a before ping lost sent began=$SECONDS name=${1//:/-}
    IFS=: read -r side step nth action times <<<"$1"
    [ "$side" = i ] || n=b
    [ "$action" != late ] || action="late $late"
    before=$(sa_keys a)
    node ha ping -q -i 0.005 -W 2 10.2.0.2 >"$GW/a/log/$name.log" &
    ping=$!
    rule "$n" "$step $nth $action"
    qipsec a tunnels rekey a-b >>"$GW/a/log/rekey.log" 2>&1
    check "$1: the frame came by" await 15 rule_gone "$GW/$n/run/rule"
    for ((; ${times:-1} > 1; times--)); do # charon tries again after 6 to 15 s
        rule "$n" "$step $nth $action"
        check "$1: and again" await 25 rule_gone "$GW/$n/run/rule"
    done
    check "$1: a fresh CHILD_SA with equal keys, alone" await 60 fresh "$before"
    pkill -INT -P "$ping" ping || kill -INT "$ping"
    wait "$ping"
    sent=$(awk '/packets transmitted/ { print $1 }' "$GW/a/log/$name.log")
    lost=$(awk '/packets transmitted/ { print $1 - $4 }' "$GW/a/log/$name.log")
    check "$1: $lost of $sent packets lost, $((SECONDS - began)) s" [ "${lost:-1}" -eq 0 ]
    check "$1: journal and SAD agree" agree_both
}
# stalls: stops either qipsecd for longer than an ADD may take, at odd times.
stalls() {
    local n pid
    until [ -e "$GW/calm" ]; do
        for n in a b; do
            sleep "0.$((RANDOM % 10))"
            pid=$(pgrep -P "${task_pid[$n/qipsecd]}" qipsecd || echo "${task_pid[$n/qipsecd]}")
            kill -STOP "$pid" && sleep "$((1 + RANDOM % 3)).2"
            kill -CONT "$pid"
        done
    done
}

storm() {
    local ping lost sent stalls
    rm -f "$GW/calm"
    stalls &
    stalls=$!
    node ha ping -q -i 0.005 -W 2 10.2.0.2 >"$GW/a/log/storm.log" &
    ping=$!
    check "storm: rekeys by either side in turn, with either qipsecd stopped for 1 to 4 s at odd times" \
        "$BIN/rekeyer" -a "$GW/a/run/q-ipsec/operator.sock" -b "$GW/b/run/q-ipsec/operator.sock" -count "${COUNT:-20}" -patience 120s
    : >"$GW/calm"
    wait "$stalls"
    pkill -INT -P "$ping" ping || kill -INT "$ping"
    wait "$ping"
    sent=$(awk '/packets transmitted/ { print $1 }' "$GW/a/log/storm.log")
    lost=$(awk '/packets transmitted/ { print $1 - $4 }' "$GW/a/log/storm.log")
    refused=$(cat "$GW"/[ab]/run/charon.log | grep -c 'rekeying failed')
    check "storm: $lost of $sent packets lost, $refused rekeys had to be repeated" [ "${lost:-1}" -eq 0 ]
    check "storm: one CHILD_SA is left, with equal keys" await 60 settled
    check "storm: journal and SAD agree" agree_both
}

main() {
    local c n
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    for n in a b; do
        printf 'charon {\n delete_rekeyed_delay = 1\n plugins {\n  qipsec {\n   socket = /run/q-ipsec/proxy.sock\n   patience = %s\n  }\n }\n}\n' "${PATIENCE:-5}" >"$GW/$n/run/strongswan.d/10-proxy.conf"
        node_start "$n" proxy "$BIN/plugproxy" -listen /run/q-ipsec/proxy.sock -to /run/q-ipsec/plugin.sock -rule /run/rule
    done
    for n in b a; do gateway_up "$n" || fail "gateway $n does not start"; done
    qkdsim_start "" "first_keys = 5000"
    await 90 settled || fail "no tunnel"
    note "tunnel is up"
    # shellcheck disable=SC2046,SC2086
    [ $# -gt 0 ] || if [ "${ALL:-}" = 1 ]; then set -- $(every) i:BIND:1:twice i:BIND.answer:1:twice i:ADD.answer:1:twice r:ADD.COMMITTED:1:twice i:ADD:2:cut:3 storm; else set -- $some; fi
    for c; do if [ "$c" = storm ]; then storm; else cell "$c"; fi; done
}

main "$@"
