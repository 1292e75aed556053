#!/bin/bash
# collision.sh: rekeyings that end by halves must not end the tunnel's traffic.
#
# usage: testenv/run testenv/collision.sh [PART...]      (default: all)
#   refused  both ends rekey at once on a slow wire, and b refuses a's request while a
#            takes b's: without the plugin's care a's charon takes b's DELETE of the
#            old CHILD_SA for the end of it, and sends nothing any more
#   policy   a's outbound policy is lost: qipsecd finds that nothing leads into the
#            CHILD_SA any more, says so, and has it rekeyed
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

# slow SECONDS: the wire takes so long each way; 0: no time.
slow() {
    local p
    for p in port-a port-b; do
        ip netns exec wire tc qdisc del dev "$p" root 2>/dev/null
        [ "$1" = 0 ] || ip netns exec wire tc qdisc add dev "$p" root netem delay "${1}s" limit 10000 || return
    done
}

# rule N RULE: in one step, as the proxy may look at any time.
rule() { echo "$2" >"$GW/$1/run/rule.new" && mv "$GW/$1/run/rule.new" "$GW/$1/run/rule"; }
rule_gone() { [ ! -e "$1" ]; }
settled() { [ "$(sa_count a)" = 2 ] && [ "$(sa_count b)" = 2 ] && states_equal; }
fresh() { settled && [ "$(sa_keys a)" != "$1" ]; }
# charons N TEXT: how many lines of N's charon have TEXT.
charons() { grep -cF -- "$2" "$GW/$1/run/charon.log"; }
said() { [ "$(charons "$1" "$2")" -gt "$3" ]; }
passes() { node ha ping -q -c 3 -i 0.2 -W 3 10.2.0.2 >/dev/null 2>&1 && node hb ping -q -c 3 -i 0.2 -W 3 10.1.0.2 >/dev/null 2>&1; }

both_rekey() {
    local n pids=() pid
    for n in a b; do
        qipsec "$n" tunnels rekey a-b >>"$GW/$n/log/rekey.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || return; done
}

# collide: one collision of which b refuses a's half. Fails if the requests did not
# cross: the machine may stand still between the two commands.
collide() {
    local had failed deleted
    had=$(charons a 'detected CHILD_REKEY collision with CHILD_REKEY') failed=$(charons a 'CHILD_SA rekeying failed')
    deleted=$(charons a 'received DELETE for ESP CHILD_SA')
    rule b 'BIND 1 cut'
    both_rekey || return
    await 20 rule_gone "$GW/b/run/rule" && await 20 said a 'CHILD_SA rekeying failed' "$failed" || return
    said a 'detected CHILD_REKEY collision with CHILD_REKEY' "$had" && await 20 said a 'received DELETE for ESP CHILD_SA' "$deleted"
}

part_refused() {
    local try before
    await 20 settled || fail "no single CHILD_SA to begin with"
    slow 0.7 || fail "no netem"
    before=$(sa_keys a)
    ping_start refused -i 0.05 -W 8
    for try in 1 2 3 4; do
        collide && break
        [ "$try" != 4 ] || fail "the requests of both did not cross"
        rm -f "$GW/b/run/rule"
        await 30 fresh "$before"
        before=$(sa_keys a)
    done
    ok "refused: the requests crossed, b refused a's, and deleted the CHILD_SA that a had let it replace (try $try)"
    check "refused: one CHILD_SA is left, with fresh and equal keys" await 30 fresh "$before"
    sleep 2
    ping_way=4 ping_end refused
    check "refused: $lost of $sent packets lost" [ "$lost" = 0 ]
    check "refused: packets pass both ways" await 5 passes
    check "refused: and no qipsecd had to mend anything" [ "$(cat "$GW"/[ab]/log/qipsecd.log | grep -c ipsec-stalled)" = 0 ]
    slow 0
}

stalled() { qipsec a explain a-b 2>&1 | grep -q 'Why: .*nothing leads into'; }
part_policy() {
    local before
    await 20 settled || fail "no single CHILD_SA to begin with"
    check "policy: packets pass" passes
    before=$(sa_keys a)
    node a ip xfrm policy delete dir out src 10.1.0.0/24 dst 10.2.0.0/24 || fail "no policy to delete"
    check "policy: without a's outbound policy nothing passes" sh -c '! ip netns exec ha ping -q -c 2 -W 1 10.2.0.2 >/dev/null'
    check "policy: qipsecd raises an alarm" await 45 logged a 'event=ipsec-stalled severity=alarm'
    check "policy: a fresh CHILD_SA takes its place" await 30 fresh "$before"
    check "policy: packets pass again" await 10 passes
    check "policy: and that is told" await 30 logged a 'event=ipsec-stalled severity=run'
}

main() {
    local n part
    [ $# -gt 0 ] || set -- refused policy
    modprobe sch_netem 2>/dev/null
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    for n in a b; do
        printf 'charon {\n delete_rekeyed_delay = 1\n plugins {\n  qipsec {\n   socket = /run/q-ipsec/proxy.sock\n  }\n }\n}\n' >"$GW/$n/run/strongswan.d/10-proxy.conf"
        node_start "$n" proxy "$BIN/plugproxy" -listen /run/q-ipsec/proxy.sock -to /run/q-ipsec/plugin.sock -rule /run/rule
        qipsec "$n" guard install >"$GW/$n/log/guard.log" 2>&1 || fail "no guard: $(cat "$GW/$n/log/guard.log")"
    done
    capture_start clear 'not (udp port 500 or udp port 4500 or esp or arp)' || fail "tcpdump does not capture"
    for n in b a; do gateway_up "$n" || fail "gateway $n does not start"; done
    qkdsim_start "" "first_keys = 2000"
    await 90 settled || fail "no tunnel"
    note "tunnel is up"
    for part; do "part_$part"; done
    check "journal and SAD agree" agree_both
    capture_stop clear
    check "no packet in clear on the wire" only_ipsec clear
}

main "$@"
