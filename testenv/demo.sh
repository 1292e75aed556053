#!/bin/bash
# demo.sh: the main job from end to end, each step by what was observed: QKD-Key
# files to both QKMS (one over SFTP), M102, GetKey, Key-ID in Ni, GetKeyWithID,
# SAs in both kernels, traffic, rekeys by either side.
#
# usage: testenv/run testenv/demo.sh     (make demo)
#
# Exit status 0 only if every step was observed. $TESTENV_OUT keeps the captures,
# the redacted kernel states, both sides' logs and the configs.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

conn=a-b

# told N REGEXP: shows the log line on which a step rests.
told() { printf '         %s | %s\n' "$1" "$(line "$1" "$2")"; }

# key_ids N: the Key-IDs of the SAs that N's log names, oldest first.
key_ids() { grep -E 'msg="SA installed"' "$GW/$1/log/qipsecd.log" | sed -nE 's/.* key_id=([0-9a-f-]{36}).*/\1/p' | uniq; }

# ni_key_id FILE: the Key-ID in the nonce of the first IKE_SA_INIT of a capture,
# read from the bytes that tcpdump shows: magic "Q-IPsec" 0x01, then 16 bytes.
ni_key_id() {
    tcpdump -n -x -r "$1" 'udp port 500' 2>/dev/null | awk '
        /^[0-9]/ { if (hex ~ /512d495073656301/) exit; hex = "" }
        /0x[0-9a-f]+:/ { for (i = 2; i <= NF; i++) hex = hex $i }
        END { if (p = index(hex, "512d495073656301")) { k = substr(hex, p + 16, 32)
            print substr(k,1,8) "-" substr(k,9,4) "-" substr(k,13,4) "-" substr(k,17,4) "-" substr(k,21) } }'
}

rekeyed() { # COUNT: so many Key-IDs were used on both sides, and the old SAs are gone or going
    [ "$(key_ids a | wc -l)" -ge "$1" ] && [ "$(key_ids b | wc -l)" -ge "$1" ] && tunnel_up
}

prepare() {
    gw_up || fail "cannot make the gateways"
    site_up || fail "cannot make the configs"
    sftp_intake || fail "cannot start sshd"
    capture_start wire || fail "tcpdump does not capture"
    note "two gateways, a sshd on b for its QKD device, tcpdump on the wire between"
    for n in a b; do
        qipsecd_start "$n"
    done
    qkdsim_start "" "first_keys = 2000"
}

keys_arrive() {
    local n
    for n in a b; do
        await 60 logged "$n" 'msg="QKD-Key file taken in"' || fail "no QKD-Key file at $n"
        told "$n" 'msg="QKD-Key file taken in"'
    done
    ok "QKD-Key files taken in: from a directory on a, over SFTP on b"
    for n in a b; do
        await 60 logged "$n" 'msg="M102 agreed"' || fail "no agreement at $n"
        told "$n" 'msg="M102 agreed"'
    done
    ok "M102: both QKMS agree on the keys"
}

tunnel_starts() {
    local n id
    # b first: its answers to a peer that it does not know yet would cost a round
    for n in b a; do
        charon_start "$n" "$PLUGIN" || fail "charon of $n does not start"
        await 30 logged "$n" 'msg="connection loaded"' || fail "qipsecd of $n loads no connection into charon"
    done
    await 90 tunnel_up || fail "no tunnel"
    for step in 'GetKey sent' 'key received' 'Key-ID in nonce' 'SA installed' 'session established'; do
        logged a "msg=\"$step\"" || fail "a does not log: $step"
        told a "msg=\"$step\""
    done
    for step in 'nonce received with Key-ID' 'GetKeyWithID sent' 'key received' 'SA installed' 'result sent to the initiator'; do
        logged b "msg=\"$step\"" || fail "b does not log: $step"
        told b "msg=\"$step\""
    done
    ok "GetKey at a, GetKeyWithID at b, the same Key-ID: the CHILD_SA is up"
    id=$(key_ids a | head -n 1)
    cp "$GW/wire/wire.pcap" "$GW/first.pcap"
    [ "$(ni_key_id "$GW/first.pcap")" = "$id" ] || fail "tcpdump shows Key-ID '$(ni_key_id "$GW/first.pcap")' in Ni, a used $id"
    printf '         wire | IKE_SA_INIT, Ni = random(32) | 512d495073656301 | %s\n' "$id"
    ok "tcpdump sees the Key-ID in Ni: random(32) | \"Q-IPsec\" 01 | Key-ID(16)"
}

sad_holds() {
    local n
    check "both kernels hold the same SAs with equal keys, installed by qipsecd" states_equal
    for n in a b; do
        node "$n" ip xfrm state | redact | grep -E 'proto esp|aead|enc|auth-trunc' | paste - - |
            sed -E "s/^/         $n | /; s/[[:space:]]+/ /g"
    done
    printf '         the key prints are those of the log lines "SA installed" above\n'
    for n in a b; do
        node "$n" ip xfrm state | redact | grep -oE 'key:[0-9a-f]{16}' | cut -d: -f2 | sort -u >"$GW/$n.prints"
        grep -oE 'fingerprint=[0-9a-f]{16}' <(grep 'msg="SA installed"' "$GW/$n/log/qipsecd.log") | cut -d= -f2 | sort -u >"$GW/$n.logged"
        [ -z "$(comm -23 "$GW/$n.prints" "$GW/$n.logged")" ] || fail "the SAD of $n has a key that qipsecd did not install"
    done
    ok "every key in the SADs is one that qipsecd installed; charon holds tokens in their place"
}

traffic() {
    node ha ping -q -c 20 -i 0.1 -W 2 10.2.0.2 >"$GW/a/log/ping.log" || fail "ping: $(grep loss "$GW/a/log/ping.log")"
    ok "ping through the tunnel: $(grep -o '[0-9]* packets.*loss' "$GW/a/log/ping.log")"
}

rekeys() {
    local ping n before lost count=1
    node ha ping -q -i 0.02 -c 1500 -W 2 10.2.0.2 >"$GW/a/log/ping-rekey.log" &
    ping=$!
    for n in a b a b; do
        before=$(key_ids "$n" | wc -l)
        qipsec "$n" tunnels rekey "$conn" >>"$GW/$n/log/rekey.log" 2>&1 || fail "rekey by $n: $(cat "$GW/$n/log/rekey.log")"
        count=$((count + 1))
        await 30 rekeyed "$count" || fail "no rekey by $n"
        printf '         %s | rekeyed by %s: Key-ID %s\n' "$n" "$n" "$(key_ids "$n" | tail -n 1)"
    done
    [ "$(key_ids a | sort | uniq -d | wc -l)" = 0 ] || fail "a Key-ID was used twice"
    wait "$ping"
    lost=$(awk '/packets transmitted/ { print $1 - $4 }' "$GW/a/log/ping-rekey.log")
    [ "$lost" = 0 ] || fail "packets lost in the rekeys: '$lost'"
    ok "4 CHILD_SA rekeys, two from either side, each with a fresh Key-ID, no packet lost of 1500"
}

finish() {
    local n
    for n in a b; do
        printf '         %s | %s\n' "$n" "$(qipsec "$n" explain "$conn" | head -n 1)"
        cp "$GW/$n/run/etc/qipsecd.toml" "$TESTENV_OUT/qipsecd-$n.toml"
        xfrm_redacted "$n" >"$TESTENV_OUT/xfrm-$n.txt"
    done
    cp "$GW/a/run/qkdsim/qkdsim.toml" "$TESTENV_OUT/"
    for n in a b; do
        qipsecd_stop "$n" || fail "qipsecd of $n ends with status $?"
    done
    [ "$(sa_count a)" = 0 ] && [ "$(sa_count b)" = 0 ] || fail "SAs left after an orderly stop: $(sa_count a), $(sa_count b)"
    ok "an orderly stop leaves no SA behind"
    capture_stop wire || fail "the capture did not end cleanly"
    check "only IKE and ESP on the wire: $(wire wire 'udp port 500 or udp port 4500') IKE, $(wire wire esp) ESP, nothing else" only_ipsec wire
    [ "$(wire wire esp)" -ge 3000 ] || fail "the wire shows fewer ESP packets than were sent"
    note "all seen; captures, states, logs and configs are in out/demo"
}

prepare
keys_arrive
tunnel_starts
sad_holds
traffic
rekeys
finish
