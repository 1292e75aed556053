#!/bin/bash
# forged.sh: what an attacker on the wire can do to keys: forged errors, COOKIE and
# INVALID_KE_PAYLOAD, a support notify that is taken out, silence and replays burn
# none. Who completes IKE_SA_INIT in the peer's name burns one for each attempt, and
# the attempts come at longer and longer intervals. Then the tunnel comes up, or goes
# on. Keys are counted by the logs of both qipsecds and by the pool, which gets none
# meanwhile.
#
# usage: testenv/run testenv/forged.sh [MODE...]      modes of testenv/mitm; default: all
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

modes="forge cookie-alone forge-cookie forge-ke strip silence replay forge-complete"

logs() { grep -cE -- "$2" "$GW/$1/log/qipsecd.log"; }
asked() { logs "$1" 'msg="GetKey sent"'; }
spent() { logs "$1" 'msg="Key-ID in nonce"'; }
fetched() { logs "$1" 'msg="GetKeyWithID sent"'; }
hits() { cat "$GW"/wire/log/mitm-*.log 2>/dev/null | grep -cE -- "$1"; }
more_hits() { [ "$(hits "$1")" -ge "$2" ]; }

# count / cost: keys since count, "ASKED SPENT FETCHED LEVEL" of a, then of b. LEVEL is
# what the pool has lost.
count() {
    local n
    for n in a b; do had[$n]="$(asked "$n") $(spent "$n") $(fetched "$n") $(level "$n")"; done
    seen=$(hits .)
}
declare -A had=()
cost() {
    local n now was
    cost=
    for n in a b; do
        read -ra was <<<"${had[$n]}"
        now=("$(asked "$n")" "$(spent "$n")" "$(fetched "$n")" "$(level "$n")")
        cost+="$((now[0] - was[0])) $((now[1] - was[1])) $((now[2] - was[2])) $((was[3] - now[3])) "
    done
    cost=${cost% }
}
# costs TEXT ASKED SPENT FETCHED: of a, a and b; b asks for none, and no more is gone
# from the pools than was asked for.
is_cost() { [[ $cost =~ $1 ]]; }
costs() {
    local text=$1 want
    cost
    want="^$2 $3 0 $2 0 0 $4 [0-$4]\$"
    check "$text: GetKey $2, sent $3, fetched by b $4" is_cost "$want"
}

attacks=
attack() { # MODE, if it is not there already
    local before
    [ "$attacks" != "$1" ] || return 0
    attacks=$1
    before=$(hits "^mode $1")
    ip -n wire link set port-a nomaster && ip -n wire link set port-b nomaster &&
        node_start wire "mitm-$1" "$BIN/mitm" -a port-a -b port-b -mode "$1" &&
        await 20 more_hits "^mode $1" $((before + 1)) || fail "no attacker"
}
attack_end() {
    attacks=
    node_stop wire "mitm-$1"
    ip -n wire link set port-a master hub && ip -n wire link set port-b master hub
}

down() { qipsec a tunnels terminate a-b >/dev/null 2>&1; await 20 no_sa || fail "the tunnel does not go down"; }
begin() { qipsec a tunnels initiate a-b >>"$GW/a/log/initiate.log" 2>&1 & }
renewed() { tunnel_up && [ "$(sa_count a)" = 2 ] && [ "$(sa_keys a)" != "$1" ]; }

# Under these the tunnel comes up all the same.
starts_under() { # MODE HIT
    down
    count
    attack "$1"
    begin
    check "$1, tunnel begins: it comes up" await 60 tunnel_up
    check "$1, tunnel begins: the attack took place ($(hits "$2") times)" more_hits "$2" 1
    costs "$1, tunnel begins" 1 1 1
}

# Under these it does not, however often a tries: each attempt takes the same key.
held_off_by() { # MODE HIT ATTEMPTS
    down
    count
    attack "$1"
    begin
    check "$1, tunnel begins: $3 attacks" await 90 more_hits "$2" $(($(hits "$2") + $3))
    check "$1, tunnel begins: there is no tunnel" no_sa
    costs "$1, while it lasts" 1 0 0
    attack_end "$1"
    check "$1, tunnel begins: it comes up afterwards" await 90 tunnel_up
    costs "$1, tunnel begins, in all" 1 1 1
}

none_twice() { ! grep -q DUP "$GW/a/log/ping-$1.log"; }
# The tunnel is up: traffic and a rekeying go on, for one key.
stands_under() { # MODE
    local before
    await 30 renewed '' || fail "no single CHILD_SA"
    before=$(sa_keys a)
    count
    attack "$1"
    ping_start "$1" -i 0.05
    qipsec a tunnels rekey a-b >>"$GW/a/log/rekey.log" 2>&1
    check "$1, tunnel is up: it is rekeyed" await 60 renewed "$before"
    ping_end "$1"
    check "$1, tunnel is up: $lost of $sent packets lost" [ "${lost:-1}" = 0 ]
    check "$1, tunnel is up: no packet came twice" none_twice "$1"
    attack_end "$1"
    costs "$1, tunnel is up" 1 1 1
}

mode_forge() { starts_under forge 'NO_PROPOSAL_CHOSEN'; }
mode_cookie-alone() { starts_under cookie-alone 'COOKIE 3'; }
# b answers each of a's requests, with and without COOKIE, and a takes the first answer,
# which may be that to another request than its last: then the two do not authenticate
# each other, and the key of that attempt is gone. Not more.
mode_forge-cookie() {
    local failed
    down
    failed=$(logs a 'msg="set-up failed after its key was spent"')
    count
    attack forge-cookie
    begin
    check "forge-cookie, tunnel begins: it comes up" await 120 tunnel_up
    failed=$(($(logs a 'msg="set-up failed after its key was spent"') - failed))
    costs "forge-cookie, tunnel begins, and $failed attempts failed" $((1 + failed)) $((1 + failed)) 1
}
mode_forge-ke() { starts_under forge-ke 'INVALID_KE_PAYLOAD'; }
mode_strip() { held_off_by strip '^stripped from a: .* request' 4; }
mode_silence() { held_off_by silence '^lost from a: the request' 5; }
mode_replay() {
    starts_under replay '^replayed from a: the IKE_AUTH request'
    check "replay, tunnel begins: the answers came twice, too" more_hits '^replayed from b: the IKE_AUTH answer' 1
}

# failures N: so many set-ups of a have failed after their key was spent. No more begin
# once the attacker is gone.
failures() { [ "$(logs a 'msg="set-up failed after its key was spent"')" -ge "$1" ]; }
waits() { qipsec a explain a-b 2>/dev/null | grep -q 'the next key is asked for in'; }
mode_forge-complete() {
    local had_failures before
    down
    had_failures=$(logs a 'msg="set-up failed after its key was spent"')
    before=$(hits '^forged to a: a complete answer')
    count
    attack forge-complete
    begin
    check "forge-complete, tunnel begins: three attempts fail" await 120 failures $((had_failures + 3))
    check "forge-complete, tunnel begins: a waits before it asks for another key" await 20 waits
    cost
    note "forge-complete: $(($(hits '^forged to a: a complete answer') - before)) complete answers; of a and b: $cost"
    check "forge-complete: each attempt burned one key of a's, and none of b's ($cost)" \
        is_cost '^(3 3 0 3|4 3 0 4|4 4 0 4) 0 0 0 0$'
    attack_end forge-complete
    check "forge-complete, tunnel begins: it comes up afterwards" await 120 tunnel_up
}

main() {
    local n m
    # shellcheck disable=SC2086
    [ $# -gt 0 ] || set -- $modes
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    for n in a b; do
        printf 'charon {\n retransmit_tries = 2\n retransmit_timeout = 1.5\n delete_rekeyed_delay = 1\n}\n' >"$GW/$n/run/strongswan.d/10-own.conf"
        # the second group for forge-ke
        sed -i 's#^policy = .*#&\nproposals = ["aes256gcm16-prfsha384-x25519", "aes256gcm16-prfsha384-ecp384"]#' "$GW/$n/run/etc/qipsecd.toml"
        qipsec "$n" guard install >"$GW/$n/log/guard.log" 2>&1 || fail "no guard: $(cat "$GW/$n/log/guard.log")"
    done
    capture_start clear 'not (udp port 500 or udp port 4500 or esp or arp)' || fail "tcpdump does not capture"
    for n in b a; do gateway_up "$n" || fail "gateway $n does not start"; done
    qkdsim_start "" "first_keys = 1000"
    await 90 tunnel_up || fail "no tunnel"
    note "tunnel is up"
    node_stop a qkdsim
    sleep 3 # what is on its way comes in
    for m; do
        note "$m"
        "mode_$m"
        stands_under "$m"
    done
    check "journal and SAD agree" agree_both
    capture_stop clear
    check "no packet in clear on the wire" only_ipsec clear
}

main "$@"
