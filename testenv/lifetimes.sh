#!/bin/bash
# lifetimes.sh: how SAs end. By age and by bytes, soft (rekeys come by themselves,
# nothing is lost) and hard (the SA goes, with rekeys refused, and nothing passes
# in clear); by terminate; by an orderly stop of qipsecd and of charon. Each
# leaves no SA behind, on either side, and journal and SAD agree.
#
# usage: testenv/run testenv/lifetimes.sh [by_time] [by_bytes] [ends]      (default: all)
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

# limits MAX_AGE MAX_BYTES REKEY_TIME REKEY_BYTES: into both configs.
limits() {
    local n f
    for n in a b; do
        f=$GW/$n/run/etc/qipsecd.toml
        sed -i -e '/^max_key_age = /d; /^max_key_bytes = /d; /^rekey_time = /d; /^rekey_bytes = /d' \
            -e "s/^policy = .*/&\nmax_key_age = \"$1\"\nmax_key_bytes = $2/" "$f"
        printf 'rekey_time = "%s"\nrekey_bytes = %s\n' "$3" "$4" >>"$f" # the child is the last table
    done
}

# carries: SAs at both ends, and a ping passes. With a rekey every few seconds the
# two SADs are seldom equal: an old inbound SA stays 5 s for late packets.
carries() { complete a && complete b && node ha ping -q -c 1 -W 1 10.2.0.2 >>"$GW/a/log/carries.log"; }
# ended SPIS: neither node has any of them.
ended() { ! { spis a; spis b; } | grep -qxF -- "$1"; }
key_ids() { grep -E 'msg="SA installed"' "$GW/$1/log/qipsecd.log" | sed -nE 's/.* key_id=([0-9a-f-]{36}).*/\1/p' | sort -u; }
# fresh COUNT: at both nodes so many Key-IDs keyed SAs, all told.
fresh() { [ "$(key_ids a | wc -l)" -ge "$1" ] && [ "$(key_ids b | wc -l)" -ge "$1" ]; }
# soft_within SECONDS BYTES: each node has an SA that is due for a rekey by then
# (one direction: without jitter charon gives the other no limit of its own).
soft_within() {
    local n
    for n in a b; do
        node "$n" ip -s xfrm state | awk -v age="$1" -v bytes="$2" '
            /expire add: soft/ { split($4, v, "("); if (v[1] + 0 >= 1 && v[1] + 0 <= age) in_age = 1 }
            /limit: soft .*\(bytes\)/ { split($3, v, "("); if (v[1] + 0 >= 1 && v[1] + 0 <= bytes) in_bytes = 1 }
            END { exit !(in_age && (in_bytes || !bytes)) }' || return
    done
}
none_lost() { [ "${sent:-0}" -ge "$1" ] && [ "${lost:-1}" -eq 0 ]; }

soft() { # NAME SECONDS BYTES PING...: two rekeys that nobody asked for
    local name=$1 age=$2 bytes=$3 first had
    shift 3
    first=$(spis a)
    had=$(key_ids a | wc -l)
    check "soft expiry by $name: the kernel's soft limits are the config's bytes and 80 % of max_key_age" soft_within "$age" "$bytes"
    ping_start "soft-$name" "$@"
    check "soft expiry by $name: rekeys come by themselves, twice, each with a fresh Key-ID at both ends" await 60 fresh $((had + 2))
    check "soft expiry by $name: the old SAs are gone at both ends" await 30 ended "$first"
    ping_end "soft-$name"
    check "soft expiry by $name: $lost of $sent packets lost meanwhile" none_lost 50
}

hard() { # NAME PING...: b's qipsecd is dead, so that no rekey comes
    local name=$1
    shift
    await 20 carries || fail "no tunnel before hard expiry by $name"
    qipsecd_kill b
    capture_start "hard-$name" || fail "tcpdump does not capture"
    ping_start "hard-$name" "$@"
    check "hard expiry by $name: without rekeys, the SAs end at both ends" await 60 no_sa
    sleep 4
    check "hard expiry by $name: and no new one comes" no_sa
    ping_end "hard-$name"
    capture_stop "hard-$name"
    check "hard expiry by $name: $lost of $sent packets did not pass" [ "${lost:-0}" -gt 0 ]
    check "hard expiry by $name: no clear and no classical packet on the wire" quantum_only "hard-$name"
    qipsecd_start b
    check "hard expiry by $name: the tunnel comes back by itself" await 60 carries
}

ends() {
    check "terminate: the command succeeds" qipsec a tunnels terminate a-b
    check "terminate: no SA is left on either side" await 20 no_sa
    sleep 3
    check "terminate: and none comes back" no_sa
    check "terminate: qipsecd holds none either" agree a
    qipsec a tunnels initiate a-b # a try that fails on a slow machine is repeated by qipsecd
    check "terminate: initiate brings the tunnel back" await 60 tunnel_up

    charon_stop b
    check "orderly stop of charon: no SA is left on either side" await 20 no_sa
    # Until its qipsecd is back, b's charon knows no connection and says so. That
    # is no authenticated word: a's attempt must go on to the real answer.
    qipsecd_stop b
    charon_start b "$PLUGIN" || fail "charon of b does not start again"
    check "a does not believe an unauthenticated refusal" await 40 grep -q 'IKE_SA_INIT answer of 192.0.2.2 ignored' "$GW/a/run/charon.log"
    qipsecd_start b
    check "and the same attempt makes the tunnel when b has its connection" await 60 tunnel_up
    for n in a b; do check "journal and SAD of $n agree" await 20 agree "$n"; done

    check "orderly stop of qipsecd: it ends well" qipsecd_stop a
    check "orderly stop of qipsecd: no SA is left on either side" await 20 no_sa
}

by_time() {
    soft time 16 0 -i 0.05
    hard time -i 0.2
}

by_bytes() {
    local n
    for n in a b; do qipsecd_stop "$n"; done
    limits 10m 1000000 5m 200000
    for n in b a; do qipsecd_start "$n"; done
    await 60 carries || fail "no tunnel with limits by bytes"
    soft bytes 480 200000 -i 0.05 -s 1200
    hard bytes -i 0.02 -s 8000
}

main() {
    local n part
    [ $# -gt 0 ] || set -- by_time by_bytes ends
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    for n in a b; do qipsec "$n" guard install >"$GW/$n/log/guard.log" 2>&1 || fail "no guard: $(cat "$GW/$n/log/guard.log")"; done
    # so patient that within the scenario an attempt never ends by itself
    printf 'charon {\n retransmit_tries = 60\n retransmit_base = 1.0\n}\n' >"$GW/a/run/strongswan.d/10-patient.conf"
    [ "$1" != by_time ] || limits 20s 0 6s 0
    for n in b a; do gateway_up "$n" || fail "gateway $n does not start"; done
    qkdsim_start "" "first_keys = 3000"
    await 90 carries || fail "no tunnel"
    for part; do
        note "$part"
        "$part"
    done
}

main "$@"
