#!/bin/bash
# suites.sh: every type of SA. All variants of the table below are up at once, each
# with addresses of its own on the wire, first as tunnels of Q-IPsec, then as stock
# connections of the same charon (charon.plugins.qipsec.off). A variant passes when
# the SAs and policies of both are the same in every attribute, at both gateways, and
# when its pings, where the table says so, were ESP on the wire and nothing else.
#
# usage: testenv/run testenv/suites.sh [VARIANT...]      (default: all)
# To see it fail, with status 1: TESTENV_BREAK=stock (b's stock connections have
# another replay window), clear (a's policies are flushed before the pings).
#
# Not compared, because no two SAs share them: SPI, reqid, keys (their lengths are),
# sequence numbers, counters, times of use. A soft limit, which charon lowers by chance,
# must be within a tenth, and the one more that charon's rounding takes, below what is
# configured.
#
# What Q-IPsec does on purpose in another way than charon by default is configured
# for charon here (stock_child), so that nothing is left to except:
#   life_time     max_key_age (1 h), not a tenth above rekey_time
#   rekey_time    four fifths of that, as qipsecd itself asks for rekeyings
#   life_bytes    max_key_bytes or none, not a tenth above rekey_bytes; likewise packets
#   rekey_bytes   four fifths of max_key_bytes if only that is set; likewise packets
#   rand_*        a tenth of the limit, not life minus rekey
#   replay_window 128, not 32
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

# NAME OUTER INNER SHOWN KEY=VALUE...: the families of the outer header and of the
# selectors (h: transport mode); pings that show traffic, - for none, or their mark;
# keys of qipsecd.toml.
table='
aes128gcm16       4 4 ping esp_proposals=aes128gcm16-x25519
aes192gcm16       4 4 ping esp_proposals=aes192gcm16-x25519
aes256gcm16       4 4 ping
chacha20poly1305  4 4 ping esp_proposals=chacha20poly1305-x25519
aes128-sha256     4 4 ping esp_proposals=aes128-sha256-x25519
aes128-sha384     4 4 ping esp_proposals=aes128-sha384-x25519
aes128-sha512     4 4 ping esp_proposals=aes128-sha512-x25519
aes192-sha256     4 4 ping esp_proposals=aes192-sha256-x25519
aes192-sha384     4 4 ping esp_proposals=aes192-sha384-x25519
aes192-sha512     4 4 ping esp_proposals=aes192-sha512-x25519
aes256-sha256     4 4 ping esp_proposals=aes256-sha256-x25519
aes256-sha384     4 4 ping esp_proposals=aes256-sha384-x25519
aes256-sha512     4 4 ping esp_proposals=aes256-sha512-x25519
esn               4 4 ping esp_proposals=aes256gcm16-x25519-esn
esn-cbc           4 4 ping esp_proposals=aes256-sha256-x25519-esn
esn-noesn         4 4 ping esp_proposals=aes256gcm16-x25519-esn-noesn
window-1          4 4 ping replay_window=1
window-32         4 4 ping replay_window=32
window-33         4 4 ping replay_window=33
window-64         4 4 ping replay_window=64
window-1024       4 4 ping replay_window=1024
window-4096       4 4 ping replay_window=4096
esn-window-1      4 4 ping replay_window=1 esp_proposals=aes256gcm16-x25519-esn
esn-window-32     4 4 ping replay_window=32 esp_proposals=aes256gcm16-x25519-esn
esn-window-64     4 4 ping replay_window=64 esp_proposals=aes256gcm16-x25519-esn
esn-window-1024   4 4 ping replay_window=1024 esp_proposals=aes256gcm16-x25519-esn
esn-window-4096   4 4 ping replay_window=4096 esp_proposals=aes256gcm16-x25519-esn
v6                6 6 ping
v6-chacha20       6 6 ping esp_proposals=chacha20poly1305-x25519
v6-cbc            6 6 ping esp_proposals=aes256-sha256-x25519
v6-esn            6 6 ping esp_proposals=aes256gcm16-x25519-esn
v4-in-v6          6 4 ping
v6-in-v4          4 6 ping
both-in-v4        4 b ping
both-in-v6        6 b ping
transport         4 h ping
transport-cbc     4 h ping esp_proposals=aes256-sha256-x25519
transport-esn     4 h ping esp_proposals=aes256gcm16-x25519-esn
transport-v6      6 h ping
transport-v6-cbc  6 h ping esp_proposals=aes256-sha256-x25519
encap             4 4 ping encap=true
encap-cbc         4 4 ping encap=true esp_proposals=aes256-sha256-x25519
encap-esn         4 4 ping encap=true esp_proposals=aes256gcm16-x25519-esn
encap-v6          6 6 ping encap=true
encap-v4-in-v6    6 4 ping encap=true
encap-transport   4 h ping encap=true
rekey-bytes       4 4 -    rekey_bytes=50000000
max-bytes         4 4 -    max_key_bytes=100000000
both-bytes        4 4 -    rekey_bytes=50000000 max_key_bytes=100000000
rekey-packets     4 4 -    rekey_packets=500000
max-packets       4 4 -    max_key_packets=1000000
both-packets      4 4 -    rekey_packets=500000 max_key_packets=1000000
max-age           4 4 -    rekey_time=900 max_key_age=1200
age-bytes-packets 6 6 -    rekey_time=900 max_key_age=1200 max_key_bytes=100000000 max_key_packets=1000000
marks             4 4 0x10 mark_in=0x10/0xff mark_out=0x10/0xff set_mark_in=0x10/0xff
mark-in           4 4 -    mark_in=0x11/0xff
mark-out          4 4 -    mark_out=0x12/0xffffffff
set-mark-in       4 4 ping set_mark_in=0x20/0xf0
set-mark-out      4 4 ping set_mark_out=0x30/0xf0
v6-marks          6 6 0x13 mark_in=0x13/0xff mark_out=0x13/0xff set_mark_in=0x13/0xff set_mark_out=0x40/0xf0
transport-mark    4 h -    mark_out=0x14/0xff set_mark_in=0x14/0xff set_mark_out=0x50/0xf0
if-id             4 4 -    if_id_in=7 if_id_out=7
if-id-in          4 4 -    if_id_in=8
if-id-out         6 6 -    if_id_out=0x10000
if-id-mark        4 4 -    if_id_in=9 if_id_out=10 mark_in=0x15/0xff mark_out=0x15/0xff set_mark_out=0x60/0xf0
copy-df-no        4 4 ping copy_df=false
copy-ecn-no       4 4 ping copy_ecn=false
copy-dscp-no      4 4 ping copy_dscp=no
copy-dscp-in      4 4 ping copy_dscp=in
copy-dscp-yes     4 4 ping copy_dscp=yes
v6-copy-nothing   6 6 ping copy_df=false copy_ecn=false copy_dscp=no
encap-esn-marks   4 4 0x16 encap=true replay_window=256 esp_proposals=aes128-sha512-x25519-esn mark_in=0x16/0xff mark_out=0x16/0xff set_mark_in=0x16/0xff copy_dscp=in copy_ecn=false'

# --- the variants ----------------------------------------------------------------

names=() # in the order of the table; the number of a variant is its place there
declare -A number=() outer=() inner=() shown=() keys=()
# By NODE/NAME: the end on the wire, the selectors, one of the gateway's own addresses
# in each of these.
declare -A end=() networks=() hosts=()
other() { if [ "$1" = a ]; then echo b; else echo a; fi; }

# ends NAME: fills them in.
ends() {
    local n side=0 k=${number[$1]} four six
    for n in a b; do
        side=$((side + 1))
        four=10.$side.$k
        printf -v six 'fd00:%x:%x::' "$side" "$k"
        if [ "${outer[$1]}" = 4 ]; then end[$n/$1]=198.18.$side.$k; else printf -v "end[$n/$1]" '2001:db8::%x:%x' "$side" "$k"; fi
        case ${inner[$1]} in
        4) networks[$n/$1]=$four.0/24 hosts[$n/$1]=$four.1 ;;
        6) networks[$n/$1]=$six/64 hosts[$n/$1]=${six}1 ;;
        b) networks[$n/$1]="$four.0/24 $six/64" hosts[$n/$1]="$four.1 ${six}1" ;;
        h) hosts[$n/$1]=${end[$n/$1]} networks[$n/$1]=${end[$n/$1]}/$([ "${outer[$1]}" = 4 ] && echo 32 || echo 128) ;;
        esac
    done
}

# limits NAME: sets life (seconds), hard and soft (bytes, packets; 0: none).
limits() {
    local word i
    life=3600 soft=(0 0) hard=(0 0)
    for word in ${keys[$1]}; do
        case $word in
        max_key_age=*) life=${word#*=} ;;
        rekey_bytes=*) soft[0]=${word#*=} ;;
        rekey_packets=*) soft[1]=${word#*=} ;;
        max_key_bytes=*) hard[0]=${word#*=} ;;
        max_key_packets=*) hard[1]=${word#*=} ;;
        esac
    done
    for i in 0 1; do
        [ "${hard[i]}" = 0 ] || [ "${soft[i]}" != 0 ] || soft[i]=$((hard[i] - hard[i] / 5))
    done
}

# read_table [NAME...]: the variants, or those.
read_table() {
    local name out in show rest k=0
    while read -r name out in show rest; do
        [ -n "$name" ] || continue
        k=$((k + 1))
        number[$name]=$k outer[$name]=$out inner[$name]=$in shown[$name]=$show keys[$name]=$rest
        [ $# -gt 0 ] || names+=("$name")
    done <<<"$table"
    for name; do
        [ -n "${number[$name]:-}" ] || fail "no variant $name"
        names+=("$name")
    done
    for name in "${names[@]}"; do
        ends "$name"
        limits "$name"
        echo "${end[a/$name]} ${end[b/$name]} $name $((life * 4 / 5)) ${soft[*]}"
    done >"$pairs"
}
pairs=$TESTENV_OUT/pairs # both ends of each variant, its name, its soft limits in seconds, bytes, packets

addresses() { # N
    local n=$1 name host batch=$GW/$1/log/addresses.log o side=2
    [ "$n" = a ] || side=1
    o=$(other "$n")
    {
        echo "addr add 198.18.$((3 - side)).255/16 dev wire"
        echo "addr add 2001:db8::$n/64 dev wire nodad"
        echo "route add 10.$side.0.0/16 via 198.18.$side.255"
        echo "route add fd00:$side::/32 via 2001:db8::$o"
        for name in "${names[@]}"; do
            case ${outer[$name]} in 4) echo "addr add ${end[$n/$name]}/16 dev wire" ;; 6) echo "addr add ${end[$n/$name]}/64 dev wire nodad" ;; esac
            [ "${inner[$name]}" != h ] || continue
            for host in ${hosts[$n/$name]}; do
                case $host in *:*) echo "addr add $host/64 dev lan nodad" ;; *) echo "addr add $host/24 dev lan" ;; esac
            done
        done
    } >"$batch"
    ip -n "$n" -batch "$batch" && node "$n" sh -c '
        echo 1 >/proc/sys/net/ipv4/fwmark_reflect # an answer has the mark of its question
        echo 1 >/proc/sys/net/ipv6/fwmark_reflect'
}

# quoted WORDS: a list of TOML.
quoted() { printf '["%s"]' "${*// /\", \"}"; }

# tunnels N: qipsecd.toml with a connection q-NAME for each variant.
tunnels() {
    local n=$1 o f=$GW/$1/run/etc/qipsecd.toml head name word value conn child start=none ids
    o=$(other "$n")
    [ "$n" != a ] || start=now
    ids=$(grep -E '^(local|remote)_id = |^(local|peer)_sae = |^policy = ' "$f")
    head=$(sed '/^\[\[ipsec.connection\]\]/,$d' "$f")
    {
        echo "$head"
        for name in "${names[@]}"; do
            conn="" child=""
            [ "${inner[$name]}" != h ] || child='mode = "transport"'$'\n'
            for word in ${keys[$name]}; do
                value=${word#*=}
                case ${word%%=*} in
                max_key_age) conn+="max_key_age = \"${value}s\""$'\n' ;;
                encap | max_key_*) conn+="${word%%=*} = $value"$'\n' ;;
                rekey_time) child+="rekey_time = \"${value}s\""$'\n' ;;
                esp_proposals) child+="esp_proposals = [\"$value\"]"$'\n' ;;
                mark_* | set_mark_* | copy_dscp) child+="${word%%=*} = \"$value\""$'\n' ;;
                *) child+="${word%%=*} = $value"$'\n' ;;
                esac
            done
            cat <<-END
			[[ipsec.connection]]
			name = "q-$name"
			$ids
			local_addr = "${end[$n/$name]}"
			remote_addr = "${end[$o/$name]}"
			$conn
			[[ipsec.connection.child]]
			name = "$name"
			local_ts = $(quoted "${networks[$n/$name]}")
			remote_ts = $(quoted "${networks[$o/$name]}")
			start = "$start"
			$child
			END
        done
    } >"$f.new" && chmod 600 "$f.new" && mv "$f.new" "$f"
}

# stock_child NAME: the same in the words of swanctl.conf.
stock_child() {
    local word key value window=128 proposal=aes256gcm16-x25519
    for word in ${keys[$1]}; do
        key=${word%%=*} value=${word#*=}
        case $key in
        encap | rekey_* | max_key_*) ;; # of the connection; limits
        replay_window) window=$value ;;
        esp_proposals) proposal=$value ;;
        copy_df | copy_ecn) echo "$key = no" ;;
        *) echo "$key = $value" ;;
        esac
    done
    limits "$1"
    printf 'rekey_bytes = %d\nrand_bytes = %d\nlife_bytes = %d\n' "${soft[0]}" $((soft[0] / 10)) "${hard[0]}"
    printf 'rekey_packets = %d\nrand_packets = %d\nlife_packets = %d\n' "${soft[1]}" $((soft[1] / 10)) "${hard[1]}"
    [ "${inner[$1]}" != h ] || echo "mode = transport"
    printf 'rekey_time = %d\nrand_time = %d\nlife_time = %d\n' $((life * 4 / 5)) $((life * 4 / 50)) "$life"
    printf 'replay_window = %d\nesp_proposals = %s\n' "$window" "$proposal"
}

# stock N: swanctl.conf with a connection s-NAME for each variant; one CA and
# certificate for all of them, those of Q-IPsec.
stock() {
    local n=$1 o dir=$GW/$1/swanctl etc=$GW/$1/run/etc name own peer encap action=none
    o=$(other "$n")
    own=$(field "$etc/qipsecd.toml" local_id)
    peer=$(field "$etc/qipsecd.toml" remote_id)
    cp "$etc/pki/ike.crt" "$dir/x509/gw.pem" && cp "$etc/pki/ike.key" "$dir/private/gw.pem" && cp "$etc/pki/ike-ca.crt" "$dir/x509ca/ca.pem" || return
    [ "$n" != a ] || action=start
    {
        echo 'connections {'
        for name in "${names[@]}"; do
            encap=no
            [[ " ${keys[$name]} " != *' encap=true '* ]] || encap=yes
            cat <<-END
			s-$name {
			version = 2
			local_addrs = ${end[$n/$name]}
			remote_addrs = ${end[$o/$name]}
			proposals = aes256gcm16-prfsha384-x25519
			unique = never
			encap = $encap
			mobike = no
			local {
			auth = pubkey
			certs = gw.pem
			id = $own
			}
			remote {
			auth = pubkey
			id = $peer
			}
			children {
			$name {
			local_ts = ${networks[$n/$name]// /,}
			remote_ts = ${networks[$o/$name]// /,}
			start_action = $action
			$(stock_child "$name")
			}
			}
			}
			END
        done
        echo '}'
    } >"$dir/swanctl.conf"
    [ "${TESTENV_BREAK:-}" != stock ] || [ "$n" != b ] || sed -i 's/^replay_window = .*/replay_window = 96/' "$dir/swanctl.conf"
}

# --- what is in the kernel --------------------------------------------------------

# record PHASE N: the SAs and policies of each variant, normalised, in $GW/PHASE/N/NAME.
record() {
    local dir=$GW/$1/$2
    mkdir -p "$dir"
    {
        node "$2" ip -s -d xfrm state
        echo
        node "$2" ip -d xfrm policy
    } | awk -v dir="$dir" '
        # the records of a variant in the order of their text: that of the kernel is chance
        function flush(    name, i) {
            name = of[ends]
            if (name != "") {
                for (i = ++count[name]; i > 1 && all[name, i - 1] > rec; i--) all[name, i] = all[name, i - 1]
                all[name, i] = rec
            }
            rec = ends = ""
            skip = 0
        }
        FNR == NR {
            of[$1 " " $2] = of[$2 " " $1] = $3
            due[$3, "sec"] = $4; due[$3, "bytes"] = $5; due[$3, "packets"] = $6
            next
        }
        /^$/ { flush(); next }
        /^src / { # of a policy in transport mode the selectors are the ends
            flush()
            ends = $2 " " $4
            gsub(/\/(32|128)/, "", ends)
        }
        /^\ttmpl / && $3 != "0.0.0.0" && $3 != "::" { ends = $3 " " $5 }
        /^\t(lifetime current|stats):/ { skip = 1 }
        skip { next }
        /^\t [0-9a-f]+( [0-9a-f]+)* $/ { next } # bitmap of the replay window
        {
            sub(/spi 0x[0-9a-f]+(\([0-9]+\))?/, "spi")
            sub(/reqid [0-9]+(\(0x[0-9a-f]+\))?/, "reqid")
            sub(/ index [0-9]+/, " index")
            gsub(/seq(-hi)? 0x[0-9a-f]+/, "seq")
            sub(/bitmap 0x[0-9a-f]+/, "bitmap")
            if ($1 ~ /^(aead|enc|auth-trunc|auth)$/) sub(/ 0x[0-9a-f]* /, " key ")
            if (match($0, /soft [1-9][0-9]*\(/)) {
                n = substr($0, RSTART + 5, RLENGTH - 6)
                latest = due[of[ends], /bytes/ ? "bytes" : /packets/ ? "packets" : "sec"]
                if (n >= int(0.9 * latest) - 1 && n <= latest) sub(/soft [0-9]+/, "soft up to " latest)
            }
            rec = rec $0 "\n"
        }
        END {
            flush()
            for (name in count) {
                for (i = 1; i <= count[name]; i++) printf "%s", all[name, i] >(dir "/" name)
                close(dir "/" name)
            }
        }' "$pairs" - || return
    cp -r "$GW/$1" "$TESTENV_OUT/" # no keys in there
}

# lacking: the variants without two keyed SAs at both gateways.
lacking() {
    local n
    for n in a b; do node "$n" ip xfrm state; done | awk '
        FNR == NR { of[$1 " " $2] = of[$2 " " $1] = $3; next }
        /^src / { name = of[$2 " " $4] }
        /^\t(aead|enc) / { have[name]++ }
        END { for (ends in of) if (have[of[ends]] < 4) print of[ends] }' "$pairs" - | sort -u
}
all_up() { [ -z "$(lacking)" ]; }

none_replaced() { ! grep -h 'received INITIAL_CONTACT' "$GW"/[ab]/run/charon.log; }

# stock_up: charon tries a stock connection only once by itself.
stock_up() {
    local name
    await 60 all_up && return
    for name in $(lacking); do node a swanctl --initiate --child "$name" --timeout 20 >>"$GW/a/log/initiate.log" 2>&1; done
    await 30 all_up
}

# --- what passes -------------------------------------------------------------------

# pings: NAME GOOD|BAD for each variant that shows traffic, three pings per family.
pings() {
    local name mark from
    local -a to
    for name in "${names[@]}"; do
        case ${shown[$name]} in - | '') continue ;; ping) mark='' ;; *) mark="-m $((shown[$name]))" ;; esac
        read -ra to <<<"${hosts[b/$name]}"
        for from in ${hosts[a/$name]}; do
            echo "ping -q -c 3 -i 0.01 -W 5 $mark -I $from ${to[0]} >/dev/null && echo $name GOOD || echo $name BAD"
            to=("${to[@]:1}")
        done
    done >"$GW/a/run/pings.sh"
    node a sh /run/pings.sh >"$GW/pings" 2>>"$GW/a/log/pings.log"
}

# wire_kinds: NAME KIND COUNT of what the capture has between the ends of each variant;
# KIND is ESP, UDP (ESP in that) or IKE.
wire_kinds() {
    tcpdump -n -r "$GW/wire/suites.pcap" 'esp or udp port 4500' 2>/dev/null | awk '
        FNR == NR { of[$1 " " $2] = of[$2 " " $1] = $3; next }
        {
            src = $3; dst = $5; sub(/:$/, "", dst)
            udp = sub(/\.4500$/, "", src) + sub(/\.4500$/, "", dst)
            kind = /ESP\(spi=/ ? udp ? "UDP" : "ESP" : "IKE"
            count[of[src " " dst] " " kind]++
        }
        END { for (k in count) print k, count[k] }' "$pairs" - >"$GW/kinds"
}
# carried NAME: all answered, by at least six packets of the right form, none of the other.
carried() {
    local want=ESP not=UDP
    [[ " ${keys[$1]} " != *' encap=true '* ]] || want=UDP not=ESP
    awk -v name="$1" -v want="$want" -v not="$not" '
        $1 != name { next }
        $2 == "GOOD" { good++ }
        $2 == want { n = $3 }
        $2 == "BAD" || $2 == not { bad = 1 }
        END { exit !(good && n >= 6 && !bad) }' "$GW/pings" "$GW/kinds"
}
# Neighbour discovery and the reports of multicast listeners are no traffic of ours.
nothing_else() {
    [ -z "$(tcpdump -n -r "$GW/wire/suites.pcap" 'not (udp port 500 or udp port 4500 or esp or arp)
        and not (icmp6 and ip6[40] >= 133 and ip6[40] <= 137) and not (ip6 and ip6[6] == 0)' 2>/dev/null | tee "$GW/wire/log/clear.log")" ]
}

# --- judged ------------------------------------------------------------------------

bad=0
judge() { (check "$@") || bad=1; } # all variants are judged, whatever comes of one
same() {
    local n rc=0
    for n in a b; do
        [ -s "$GW/quantum/$n/$1" ] && diff "$GW/stock/$n/$1" "$GW/quantum/$n/$1" || rc=1
    done
    return "$rc"
}

main() {
    local n name off
    read_table "$@"
    [ "$TESTENV_KIND" != uml ] || modprobe -a esp6 || fail "no ESP for IPv6"
    GW_IPV6=1
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    off=$(printf ', s-%s' "${names[@]}")
    for n in a b; do
        addresses "$n" || fail "no addresses on $n"
        stock "$n" && tunnels "$n" || fail "no configuration for $n"
        printf 'charon {\n plugins {\n  qipsec {\n   off = %s\n  }\n }\n}\n' "${off#, }" >"$GW/$n/run/strongswan.d/10-off.conf"
    done
    for n in b a; do gateway_up "$n" || fail "gateway $n does not start"; done
    qkdsim_start "" "first_keys = 2000"
    await 240 all_up || note "not up: $(lacking | tr '\n' ' ')"
    check "${#names[@]} tunnels of Q-IPsec at once" all_up
    check "none ended another one's IKE_SA" none_replaced
    for n in a b; do record quantum "$n" || fail "cannot read the SAs of $n"; done
    check "both gateways have the same keys" states_equal
    for n in a b; do check "qipsecd of $n installed each of the SAs" await 20 agree "$n"; done

    [ "${TESTENV_BREAK:-}" != clear ] || node a ip xfrm policy flush
    capture_start suites || fail "tcpdump does not capture"
    pings
    capture_stop suites
    wire_kinds
    for name in "${names[@]}"; do
        [ "${shown[$name]}" != - ] || continue
        judge "variant $name: pings are answered, all as ESP" carried "$name"
    done
    judge "nothing in clear on the wire" nothing_else

    note "stopping"
    for n in a b; do qipsecd_stop "$n"; done
    check "with qipsecd stopped in order no SA is left" await 60 no_sa
    for n in b a; do node "$n" swanctl --load-all --noprompt >"$GW/$n/log/swanctl.log" 2>&1 || fail "swanctl --load-all on $n"; done
    check "${#names[@]} stock connections at once" stock_up
    for n in a b; do record stock "$n" || fail "cannot read the SAs of $n"; done
    for name in "${names[@]}"; do
        judge "variant $name: the SAs are those that charon itself installs" same "$name"
    done
    exit "$bad"
}

main "$@"
