# shellcheck shell=bash
# two-tunnels.sh: a Q-IPsec tunnel and a stock one, of the same two charons and with
# the same algorithms, to be sourced after qipsec.sh.
#
#   tunnels_up                     both, on the gateways of gateways.sh; from the host at
#                                  a, 10.2.0.2 is behind the Q-IPsec tunnel, 10.12.0.2
#                                  behind the stock one. What uses port 7000 and crosses
#                                  the wire in clear is in the capture `clear`.
#   traffic KIND NAME RATE REKEYS [INTERVAL]
#                                  numbered UDP packets through the qipsec or the stock
#                                  tunnel while it is rekeyed each second, or INTERVAL
#   value, sum, lossless           what came of it
#   find_rate                      the packets per second that both are to carry

# The stock tunnel: 10.11.0.0/24 and 10.12.0.0/24, between 192.0.2.11 and .12.
# stock_site N OWN OTHER
stock_site() {
    local n=$1 own=$2 other=$3
    ip -n "$n" addr add "192.0.2.$own/24" dev wire &&
        ip -n "$n" addr add "10.$own.0.1/24" dev lan &&
        ip -n "$n" route add "10.$other.0.0/24" via "192.0.2.$other" &&
        ip -n "h$n" addr add "10.$own.0.2/24" dev lan &&
        ip -n "h$n" route add "10.$other.0.0/24" via "10.$own.0.1" src "10.$own.0.2" || return
    printf 'charon {\n plugins {\n  qipsec {\n   off = stock\n  }\n }\n}\n' >"$GW/$n/run/strongswan.d/10-off.conf"
    cat >"$GW/$n/swanctl/swanctl.conf" <<-END
	connections {
	    stock {
	        version = 2
	        local_addrs = 192.0.2.$own
	        remote_addrs = 192.0.2.$other
	        proposals = aes256gcm16-prfsha384-x25519
	        local {
	            auth = psk
	            id = stock-$own
	        }
	        remote {
	            auth = psk
	            id = stock-$other
	        }
	        children {
	            stock {
	                local_ts = 10.$own.0.0/24
	                remote_ts = 10.$other.0.0/24
	                esp_proposals = aes256gcm16-x25519
	            }
	        }
	    }
	}
	secrets {
	    ike-stock {
	        secret = "stock of the test environment"
	    }
	}
	END
}

# value NAME HOST KEY: of a host's udpnum line.
value() { sed -nE "s/^(.* )?$3=([^ ]+).*/\2/p" "$GW/a/log/$1-$2.log"; }

# sum NAME KEY: of both hosts, or "unknown".
sum() {
    local a b
    a=$(value "$1" ha "$2")
    b=$(value "$1" hb "$2")
    [[ $a$b =~ ^[0-9]+$ ]] && [ -n "$a" ] && [ -n "$b" ] && echo $((a + b)) || echo unknown
}

# traffic KIND NAME RATE REKEYS [INTERVAL]: packets both ways through the qipsec or the
# stock tunnel while it is rekeyed so often; longer than as many intervals if a rekey
# takes more than one. The story is in $told.
traffic() {
    local kind=$1 name=$2 rate=$3 rekeys=$4 interval=${5:-1s} log=$GW/a/log/$2 a=10.1.0.2 b=10.2.0.2 rc=0 h
    local -a udpnum=() with=(-a "$GW/a/run/q-ipsec/operator.sock" -b "$GW/b/run/q-ipsec/operator.sock")
    if [ "$kind" = stock ]; then
        a=10.11.0.2 b=10.12.0.2
        with=(-vici -connection stock -a "$GW/a/run/charon.vici" -b "$GW/b/run/charon.vici")
    fi
    for h in "ha $a $b" "hb $b $a"; do
        # shellcheck disable=SC2086
        set -- $h
        # its own process, not a function's subshell: SIGTERM must reach udpnum itself
        nsenter --net="/run/netns/$1" "$BIN/udpnum" -listen "$2:7000" -peer "$3:7000" -rate "$rate" -for "$((rekeys * 10))s" \
            >"$log-$1.log" 2>&1 &
        udpnum+=($!)
    done
    "$BIN/rekeyer" "${with[@]}" -count "$rekeys" -interval "$interval" >"$log-rekeys.log" 2>&1 || rc=$?
    kill -TERM "${udpnum[@]}"
    wait "${udpnum[0]}" && wait "${udpnum[1]}" || fail "udpnum: $(cat "$log-ha.log" "$log-hb.log")"
    sed "s/^/         $kind | /" "$log-ha.log" "$log-hb.log"
    [ "$rc" = 0 ] || fail "$name: $(tail -n 1 "$log-rekeys.log")"
    told="$(sum "$name" lost) of $(sum "$name" sent) packets lost, $(sum "$name" duplicates) came twice"
    told+=", $rekeys rekeys in $((($(value "$name" ha took_ms) + 500) / 1000)) s, $(sed -n 's/.*, \(a rekey took .*\)/\1/p' "$log-rekeys.log")"
}

# lossless NAME: each host has got all that the other sent.
lossless() { [ "$(sum "$1" lost)" = 0 ]; }
# on_time NAME RATE: either host has sent 95 % of that at least.
on_time() {
    local h
    for h in ha hb; do
        [ "$(value "$1" "$h" sent)" -ge $(($(value "$1" "$h" took_ms) * $2 * 95 / 100000)) ] || return
    done
}

# find_rate: the highest of a few that the stock tunnel carries without loss, under
# rekeys, while the senders keep their schedule. Sets `rate`, and why it is not 1000.
find_rate() {
    for rate in 1000 700 500 350 250; do
        traffic stock "rate-$rate" "$rate" 10
        note "trying the stock tunnel at $rate/s each way: $told"
        if lossless "rate-$rate" && on_time "rate-$rate" "$rate"; then return; fi
        why=" (at more the stock tunnel lost packets here, or the senders fell behind)"
    done
    fail "the stock tunnel does not carry $rate/s each way: this machine cannot tell"
}

# tunnels_up: fails the scenario if one is not.
tunnels_up() {
    local n
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    stock_site a 11 12 && stock_site b 12 11 || fail "cannot prepare the stock tunnel"
    capture_start clear port 7000 || fail "tcpdump does not capture"
    for n in b a; do
        charon_start "$n" "$PLUGIN" || fail "charon of $n does not start"
        # before qipsecd: it unloads what is in no file
        node "$n" swanctl --load-all --noprompt >"$GW/$n/log/swanctl.log" 2>&1 ||
            fail "swanctl --load-all on $n: $(tail -n 3 "$GW/$n/log/swanctl.log")"
        qipsecd_start "$n"
    done
    qkdsim_start "" "first_keys = 5000"
    await 90 tunnel_up || fail "no tunnel"
    node a swanctl --initiate --child stock --timeout 20 >"$GW/a/log/initiate.log" 2>&1 ||
        fail "no stock tunnel: $(tail -n 3 "$GW/a/log/initiate.log")"
    note "both tunnels are up"
}
