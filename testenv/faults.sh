#!/bin/bash
# faults.sh: under policy `required`, no cause makes a clear or a classical
# packet: each cell brings a fault, looks at the wire and at the log, mends the
# fault, and sees the tunnel come back by itself.
#
# usage: testenv/run testenv/faults.sh [CELL...]      (default: all)
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

# tempt: traffic that would leave in clear if anything let it; both ways, until
# the scenario's end.
tempt() {
    node_start ha tempt ping -i 0.2 -W 1 10.2.0.2
    node_start hb tempt ping -i 0.2 -W 1 10.1.0.2
}

# begin CELL: a capture of its own, and the place in the logs where it starts.
begin() {
    cell=$1
    note "cell: $cell"
    for n in a b; do mark[$n]=$(cat "$GW/$n/log/qipsecd.log" 2>/dev/null | wc -l); done
    capture_start "$cell" || fail "tcpdump does not capture"
}
declare -A mark=()
# since N REGEXP: the log of N has such a line since the cell began.
since() { tail -n +$((${mark[$1]:-0} + 1)) "$GW/$1/log/qipsecd.log" | grep -qE -- "$2"; }
cause() { tail -n +$((${mark[$1]:-0} + 1)) "$GW/$1/log/qipsecd.log" | grep -E -- "$2" | tail -n 1 | cut -c1-240; }

# closed: the wire shows IKE, and ESP of SAs with quantum keys (those of before
# the fault), and nothing else.
closed() {
    capture_stop "$cell"
    quantum_only "$cell"
}
# blamed N REGEXP: a log line at N that names the connection and the cause.
blamed() {
    await 25 since "$1" "$2" || {
        printf 'not ok - %s: %s does not log %s\n' "$cell" "$1" "$2"
        tail -n +$((${mark[$1]:-0} + 1)) "$GW/$1/log/qipsecd.log" | tail -n 15
        exit 1
    }
    ok "$cell: one line says why: $(cause "$1" "$2")"
}
# explained N REGEXP: `qipsec explain`, which fails for a tunnel that is not up, has such a line.
explained() { grep -qE -- "$2" <<<"$(qipsec "$1" explain a-b 2>&1)"; }
# forwarded: a ping of the tempting ones was answered after this moment.
pings() { grep -c 'bytes from' "$GW/ha/log/tempt.log"; }
more_pings() { [ "$(pings)" -gt "$1" ]; }
recovers() {
    local before
    before=$(pings)
    check "$cell: the tunnel comes back by itself" await "${1:-60}" tunnel_up
    check "$cell: and carries traffic" await 20 more_pings "$before"
}
still_down() { sleep 6; ! complete a && ! complete b; }

anew() { # the tunnel is taken down at both ends and set up anew
    qipsec a tunnels terminate a-b >/dev/null 2>&1
    await 20 no_sa
    qipsec a tunnels initiate a-b >/dev/null 2>&1
}
no_sa() { [ "$(sa_count a)" = 0 ] && [ "$(sa_count b)" = 0 ]; }

cell_pool_empty() { # runs first: no key has ever arrived
    begin pool-empty
    for n in a b; do gateway_up "$n" || fail "gateway $n does not start"; done
    blamed a 'a-b.*(no key|empty|not synchronised|no keys)'
    check "$cell: no tunnel" still_down
    check "$cell: no clear and no classical packet on the wire" closed
    qkdsim_start "" "first_keys = 3000"
    recovers 90
}

cell_plugin_missing() {
    begin plugin-missing
    charon_stop a
    qipsecd_stop a
    rm -f "$GW/a/plugins/libstrongswan-qipsec.so"
    charon_start a
    qipsecd_start a
    blamed a 'a-b.*has not loaded the qipsec plugin'
    check "$cell: no tunnel" still_down
    check "$cell: no clear and no classical packet on the wire" closed
    charon_stop a
    charon_start a "$PLUGIN"
    recovers 90
}

cell_daemon_killed() {
    begin daemon-killed
    qipsecd_kill b
    sleep 1
    qipsec a tunnels rekey a-b >/dev/null 2>&1
    # b's charon asks nobody: the plugin refuses, the old SA goes on.
    check "$cell: charon refuses without qipsecd" await 20 grep -qE 'qipsec.*(refus|qipsecd)' "$GW/b/run/charon.log"
    check "$cell: no clear and no classical packet on the wire" closed
    qipsecd_start b
    recovers 90
    begin daemon-killed-2
    before=$(sa_keys a)
    renewed() { [ "$(sa_keys a)" != "$before" ] && states_equal; }
    qipsec a tunnels rekey a-b >/dev/null 2>&1
    check "$cell: the next rekey takes a fresh key" await 60 renewed
    check "$cell: no clear and no classical packet on the wire" closed
}

cell_type1_cut() { # the responder cannot learn of the supply: an unknown Key-ID to it
    begin unknown-key-id
    node b iptables -I INPUT -i km -p tcp -j DROP
    node b iptables -I OUTPUT -o km -p tcp -j DROP
    anew
    blamed b 'a-b.*GetKeyWithID'
    check "$cell: no clear and no classical packet on the wire" closed
    check "$cell: no tunnel" still_down
    node b iptables -F
    recovers 120
}

# stock_conf N OWN OTHER: what an administrator would write without Q-IPsec.
stock_peer() {
    local pki=$GW/b/run/etc/pki
    cp "$pki/ike.crt" "$GW/b/swanctl/x509/" && cp "$pki/ike.key" "$GW/b/swanctl/private/" && cp "$pki/ike-ca.crt" "$GW/b/swanctl/x509ca/"
    cat >"$GW/b/swanctl/swanctl.conf" <<-END
	connections {
	    stock {
	        version = 2
	        local_addrs = 192.0.2.2
	        remote_addrs = 192.0.2.1
	        local {
	            auth = pubkey
	            certs = ike.crt
	            id = b.gw.q-ipsec
	        }
	        remote {
	            auth = pubkey
	            id = a.gw.q-ipsec
	        }
	        children {
	            net {
	                local_ts = 10.2.0.0/24
	                remote_ts = 10.1.0.0/24
	            }
	        }
	    }
	}
	END
    charon_start b && node b swanctl --load-all --noprompt >"$GW/b/log/swanctl.log"
}

cell_stock_peer() {
    begin stock-peer
    qipsecd_stop b
    charon_stop b
    rm -f "$GW/b/plugins/libstrongswan-qipsec.so"
    stock_peer || fail "stock charon of b does not start"
    await 20 no_sa
    check "$cell: charon's log says why" await 40 grep -q "connection 'a-b': IKE_SA_INIT answer of 192.0.2.2 ignored: the peer does not speak Q-IPsec" "$GW/a/run/charon.log"
    blamed a 'a-b.*IKE_SA_INIT answer ignored: the peer at 192.0.2.2 does not speak Q-IPsec'
    check "$cell: qipsec explain says why" explained a 'Why: .*the peer at 192.0.2.2 does not speak Q-IPsec'
    check "$cell: qipsec explain says what to do" explained a 'Next: .*at 192.0.2.2, see whether'
    node b swanctl --initiate --child net --timeout 8 >"$GW/b/log/stock-initiate.log" 2>&1
    blamed a 'a-b.*(does not announce|carries no Key-ID)'
    check "$cell: no tunnel from either side" still_down
    capture_stop "$cell"
    check "$cell: no clear and no classical packet on the wire" quantum_only "$cell"
    charon_stop b
    rm -f "$GW/b/swanctl"/{x509/ike.crt,private/ike.key,x509ca/ike-ca.crt,swanctl.conf}
    gateway_up b || fail "gateway b does not start again"
    recovers 120
}

# kme N SEED: a KME of another maker on node N.
kme() {
    node_start "$1" kme "$BIN/fakekme" -listen "198.51.100.$([ "$1" = a ] && echo 1 || echo 2):8450" \
        -pki /run/etc/pki -seed "$2" -deny "/run/deny"
}

# other_kme N: [ipsec] of N takes its keys from that KME.
other_kme() {
    local ip=198.51.100.1
    [ "$1" = a ] || ip=198.51.100.2
    "$BIN/qipsec" pki issue --ca "$GW/site/ca" --out "$GW/$1/run/etc/pki" sae "$1-ipsec" >>"$GW/init.log" 2>&1 || return
    sed -i -e "s#^local_sae = #kme = \"other\"\nlocal_sae = #" -e "s#^\[\[ipsec.connection\]\]#[[ipsec.kme]]\nname = \"other\"\nurl = \"https://$ip:8450\"\nca = \"pki/sae-ca.crt\"\ncert = \"pki/$1-ipsec.crt\"\nkey = \"pki/$1-ipsec.key\"\n\n[[ipsec.connection]]#" \
        "$GW/$1/run/etc/qipsecd.toml"
}

cell_differing_keys() {
    local n
    begin differing-keys
    for n in a b; do
        qipsecd_stop "$n"
        other_kme "$n" || fail "cannot configure the other KME: $(tail -n 3 "$GW/init.log")"
    done
    kme a one
    kme b two
    for n in a b; do qipsecd_start "$n"; done
    blamed b 'a-b.*(C_i|confirm)'
    check "$cell: no tunnel" still_down
    check "$cell: no clear and no classical packet on the wire" closed
    node_stop b kme
    kme b one
    recovers 120
    begin kms-down
    node_stop a kme
    anew
    blamed a 'a-b.*GetKey'
    check "$cell: no tunnel" still_down
    check "$cell: no clear and no classical packet on the wire" closed
    kme a one
    recovers 120
    begin refused-key-id
    : >"$GW/b/run/deny"
    anew
    blamed b 'a-b.*GetKeyWithID'
    check "$cell: no tunnel" still_down
    check "$cell: no clear and no classical packet on the wire" closed
    rm "$GW/b/run/deny"
    recovers 120
}

cell_memory() { # no final key and no KEYMAT of ESP in charon's memory, nor in its level-4 log
    local n pid
    cell=memory
    await 60 tunnel_up || fail "no tunnel"
    for n in a b; do
        pid=$(pgrep -P "${node_pid[$n]}" -f charon-systemd || pgrep -f charon-systemd --ns "${node_pid[$n]}" --nslist net | head -n 1)
        node "$n" swanctl --list-sas >/dev/null
        sa_keys "$n" | cut -d' ' -f2 >"$GW/needles"
        check "$cell: no ESP key of the SAD is in the memory of charon on $n: $("$BIN/memscan" "$pid" <"$GW/needles")" \
            sh -c "'$BIN/memscan' '$pid' <'$GW/needles' >/dev/null"
    done
    rm -f "$GW/needles"
}

main() {
    local c n
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    # as qipsec-guard.service does, before the network is up
    for n in a b; do qipsec "$n" guard install >"$GW/$n/log/guard.log" 2>&1 || fail "no guard: $(cat "$GW/$n/log/guard.log")"; done
    tempt
    if [ $# = 0 ]; then
        set -- pool_empty plugin_missing daemon_killed type1_cut stock_peer memory differing_keys
    elif [ "$1" != pool_empty ]; then
        for n in a b; do gateway_up "$n" || fail "gateway $n does not start"; done
        qkdsim_start "" "first_keys = 3000"
        await 90 tunnel_up || fail "no tunnel"
    fi
    for c; do "cell_$c"; done
}

main "$@"
