#!/bin/bash
# stock.sh: does the environment itself work? Debian's charon on both gateways,
# certificates, no Q-IPsec.
#
# usage: testenv/run testenv/stock.sh
#
# Passes when the tunnel comes up, pings cross it, the wire shows IKE and ESP and
# nothing else, a CHILD_SA rekey loses no packet, and terminating leaves no SA.
# To see it fail, with status 1: TESTENV_BREAK=esp (a gateway drops ESP), clear (no
# tunnel, the ping goes in clear), rekey (packets are lost during the rekey),
# stale (a state that nobody deletes).
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"

# certificates: one CA, one certificate for each gateway, ECDSA P-256.
certificates() {
    local pki=$GW/pki n
    mkdir -p "$pki"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
        -subj "/CN=testenv CA" -keyout "$pki/ca.key" -out "$pki/ca.pem" 2>"$pki/log" || return
    for n in a b; do
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=gw-$n" \
            -keyout "$GW/$n/swanctl/private/gw.pem" -out "$pki/$n.csr" 2>>"$pki/log" &&
            openssl x509 -req -in "$pki/$n.csr" -CA "$pki/ca.pem" -CAkey "$pki/ca.key" -CAcreateserial \
                -days 2 -extfile <(printf 'subjectAltName=DNS:gw-%s\n' "$n") \
                -out "$GW/$n/swanctl/x509/gw.pem" 2>>"$pki/log" &&
            cp "$pki/ca.pem" "$GW/$n/swanctl/x509ca/" || return
    done
}

# connection N OTHER OWN-NUMBER OTHER-NUMBER
connection() {
    cat >"$GW/$1/swanctl/swanctl.conf" <<-END
	connections {
	    link {
	        version = 2
	        local_addrs = 192.0.2.$3
	        remote_addrs = 192.0.2.$4
	        proposals = aes256gcm16-prfsha512-x25519
	        dpd_delay = 30s
	        local {
	            auth = pubkey
	            certs = gw.pem
	            id = gw-$1
	        }
	        remote {
	            auth = pubkey
	            id = gw-$2
	        }
	        children {
	            net {
	                local_ts = 10.$3.0.0/24
	                remote_ts = 10.$4.0.0/24
	                esp_proposals = aes256gcm16
	            }
	        }
	    }
	}
	END
}

ok() { printf 'ok - %s\n' "$*"; }

# wire_has FILTER...: packets of the capture that match.
wire_has() { tcpdump -n -r "$GW/wire/wire.pcap" "$@" 2>/dev/null | wc -l; }

# rekeyed: both ends send with the new SA.
rekeyed() { grep -q 'outbound CHILD_SA net{2} established' "$GW/a/run/charon.log" "$GW/b/run/charon.log"; }

# break_if NAME N CMD...: sabotage, asked for by TESTENV_BREAK.
break_if() {
    [ "${TESTENV_BREAK:-}" = "$1" ] || return 0
    shift
    node "$@" || fail "cannot break: $*"
}

tunnel() {
    local lost ping
    break_if esp b iptables -I INPUT -p esp -j DROP
    node a swanctl --initiate --child net --timeout 20 >"$GW/a/log/initiate.log" || fail "no tunnel"
    ok "CHILD_SA is up: $(sa_count a) states on a, $(sa_count b) on b"
    node ha ping -q -c 10 -i 0.2 -W 2 10.2.0.2 >"$GW/a/log/ping.log" ||
        fail "ha does not reach hb: $(grep loss "$GW/a/log/ping.log")"
    ok "ping through the tunnel: $(grep loss "$GW/a/log/ping.log")"

    node ha ping -q -i 0.05 -c 200 -W 2 10.2.0.2 >"$GW/a/log/ping-rekey.log" &
    ping=$!
    await 10 test -s "$GW/a/log/ping-rekey.log"
    break_if rekey b iptables -I INPUT -p esp -m limit --limit 1/second -j DROP
    node a swanctl --rekey --child net >"$GW/a/log/rekey.log" || fail "swanctl --rekey"
    await 20 rekeyed || fail "no rekey"
    wait "$ping"
    lost=$(awk '/packets transmitted/ { print $1 - $4 }' "$GW/a/log/ping-rekey.log")
    [ "$lost" = 0 ] || fail "packets lost in the rekey: '$lost'"
    ok "CHILD_SA rekey under ping: $(grep loss "$GW/a/log/ping-rekey.log")"

    break_if stale a ip xfrm state add src 192.0.2.7 dst 192.0.2.8 proto esp spi 0x1000 mode tunnel enc cipher_null ''
    node a swanctl --terminate --ike link --timeout 20 >"$GW/a/log/terminate.log" || fail "swanctl --terminate"
    await 10 no_sa || fail "states left: $(sa_count a) on a, $(sa_count b) on b"
    ok "terminated: no state left"
}

main() {
    local n
    gw_up || fail "cannot make the gateways"
    certificates || fail "cannot make certificates: $(cat "$GW/pki/log")"
    connection a b 1 2
    connection b a 2 1
    capture_start wire || fail "tcpdump does not capture"
    for n in a b; do
        charon_start "$n" || fail "charon of $n does not start"
        node "$n" swanctl --load-all --noprompt >"$GW/$n/log/swanctl.log" || fail "swanctl --load-all on $n"
    done
    note "gateways and charon are up"

    if [ "${TESTENV_BREAK:-}" = clear ]; then
        node ha ping -q -c 440 -i 0.01 10.2.0.2 >/dev/null || fail "ha does not reach hb"
    else
        tunnel
    fi

    capture_stop wire || fail "the capture did not end cleanly"
    local ike esp other
    ike=$(wire_has udp port 500 or udp port 4500)
    esp=$(wire_has esp)
    other=$(wire_has 'not (udp port 500 or udp port 4500 or esp or arp)')
    note "on the wire: $ike IKE, $esp ESP, $other other"
    [ "$ike" -gt 0 ] && [ "$esp" -ge 420 ] || fail "the wire shows less than was sent"
    [ "$other" = 0 ] || fail "the wire shows more than IKE and ESP"
    ok "nothing but IKE and ESP on the wire"
}

main
