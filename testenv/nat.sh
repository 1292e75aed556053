#!/bin/bash
# nat.sh: the gateways' addresses and ports change under traffic. charon's
# update_sa goes to qipsecd, which changes ports in place and re-adds what has new
# addresses. The tunnel goes on with the same keys, and no IV comes twice: that is
# read from the captures.
#
# usage: testenv/run testenv/nat.sh [mobike] [nat]      (default: both)
#   mobike  a loses the first of its two addresses, and gets it back
#   nat     a is behind a NAT, which changes the ports
# To see it fail, with status 1: TESTENV_BREAK=update (an UPDATE never reaches
# qipsecd), clear (a's policies are taken away), repeat (two packets with one IV).
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

first=192.0.2.1 second=192.0.2.3 peer=192.0.2.2 private=203.0.113.2

# --- what is seen ----------------------------------------------------------------

# sas N: a line for each SA: SPI, source, destination, ports (- without UDP), packets.
sas() {
    node "$1" ip -s xfrm state | awk '
        /^src / { src = $2; dst = $4; ports = "- -"; current = 0 }
        /proto esp spi/ { spi = $4; sub(/\(.*/, "", spi) }
        /^\tencap type espinudp/ { ports = $5 " " $7 }
        /lifetime current/ { current = 1 }
        current && /\(packets\)/ { print spi, src, dst, ports, $2 + 0; current = 0 }' | sort
}
# all_sas N REGEXP: N has SAs, and each is like that.
all_sas() {
    local all
    all=$(sas "$1")
    [ -n "$all" ] && ! grep -qvE -- "$2" <<<"$all"
}
# between N ADDRESS: all SAs are between ADDRESS and the peer, without UDP.
between() { all_sas "$1" " ($2 $peer|$peer $2) - - "; }
# ports N A LIKE: all SAs are in UDP between port LIKE of address A and 4500 of the peer.
ports() { all_sas "$1" " ($2 $peer $3 4500|$peer $2 4500 $3) "; }
between_both() { between a "$1" && between b "$1"; }

key_ids() { sed -nE 's/.*msg="SA installed".* key_id=([0-9a-f-]{36}).*/\1/p' "$GW/$1/log/qipsecd.log" | sort -u; }
# fresh COUNT: at both nodes so many Key-IDs keyed SAs, and they are the same.
fresh() { [ "$(key_ids a | wc -l)" -ge "$1" ] && [ "$(key_ids a)" = "$(key_ids b)" ]; }
# settled: one CHILD_SA at either node, with equal keys.
settled() { [ "$(sa_count a)" = 2 ] && [ "$(sa_count b)" = 2 ] && states_equal; }
passes() { node ha ping -q -c 3 -i 0.05 -W 1 10.2.0.2 >>"$GW/a/log/passes.log"; }
few_lost() { [ "${sent:-0}" -ge "$1" ] && [ "${lost:-$sent}" -le "$2" ]; }

# busy: each SA of b has carried 100 packets.
busy() { sas b | awk '$6 < 100 { few = 1 } END { exit few || !NR }'; }

# watch NS INTERFACE NAME: a capture of all that passes there; unwatch NS NAME ends it.
watch() {
    mkdir -p "$GW/wire"
    node_start "$1" "$3" tcpdump -i "$2" -n -p -U --immediate-mode -B 8192 -Z root -w "$GW/wire/$3.pcap"
    await 20 grep -qs 'listening on' "$GW/$1/log/$3.log" || fail "no capture $3: $(cat "$GW/$1/log/$3.log")"
}
unwatch() {
    node_stop "$1" "$2"
    check "capture $2: nothing was dropped" grep -q '^0 packets dropped by kernel' "$GW/$1/log/$2.log"
}

esp='esp or (udp port 4500 and udp[8:4] != 0)'
# no_iv_twice NAME...: in the captures; keeps ivcheck's lines in $GW/ivcheck.
no_iv_twice() { "$BIN/ivcheck" "${@/#/$GW/wire/}" >"$GW/ivcheck" 2>&1; }
# planted NAME: a capture that also has an ESP packet of NAME with its last byte changed.
planted() {
    local one=$GW/wire/planted.pcap last
    tcpdump -r "$GW/wire/$1" -c 1 -w "$GW/one.pcap" "$esp" 2>/dev/null || return
    last=$((($(tail -c 1 "$GW/one.pcap" | od -An -tu1) + 1) % 256))
    { cat "$GW/one.pcap"; tail -c +25 "$GW/one.pcap" | head -c -1; printf "\\x$(printf %02x $last)"; } >"$one"
}
sees_planted() { planted "$1" && ! no_iv_twice planted.pcap && grep -q '^ivcheck: 2 packets, 1 SPIs, 1 repeats' "$GW/ivcheck"; }
# quantum: each SPI that ivcheck saw is that of an SA that a qipsecd keyed.
quantum() {
    local spi
    for spi in $(sed -nE 's/^([0-9a-f]{8}): .*/\1/p' "$GW/ivcheck"); do
        grep -qE "msg=\"SA installed\".* spi=$spi .* class=direct " "$GW"/[ab]/log/qipsecd.log || { note "SPI $spi is nobody's"; return 1; }
    done
}
# went SPI FLOW: sets low and high to the sequence numbers that SPI had on FLOW.
went() {
    local seq
    seq=$(grep "^${1#0x}: " "$GW/ivcheck" | grep -oE -- "$2 [0-9]+ packets seq [0-9]+-[0-9]+" | sed 's/.* //')
    low=${seq%-*} high=${seq#*-}
    [ -n "$seq" ]
}
# advanced SPI FLOW1 FLOW2 / went_on SPI FLOW1 FLOW2: SPI was on both flows, and
# between them its sequence numbers jumped by 2^20, or did not.
advanced() {
    local low high end
    went "$1" "$2" && end=$high && went "$1" "$3" && [ "$low" -gt $((end + (1 << 20))) ] && [ "$low" -lt $((end + (1 << 20) + 5000)) ]
}
went_on() {
    local low high end
    went "$1" "$2" && end=$high && went "$1" "$3" && [ "$low" -gt "$end" ] && [ "$low" -lt $((end + 5000)) ]
}

# judge PART CAPTURE...: after the last packet.
judge() {
    local part=$1 c
    shift
    for c; do check "$part: nothing but IKE and ESP at $c" only_ipsec "$c"; done
    check "$part: ivcheck finds a planted repeat" sees_planted "$1.pcap"
    [ "${TESTENV_BREAK:-}" != repeat ] || set -- "$@" planted
    no_iv_twice "${@/%/.pcap}" || { cat "$GW/ivcheck"; check "$part: no IV twice" false; }
    cp "$GW/ivcheck" "$TESTENV_OUT/ivcheck-$part.txt"
    check "$part: $(tail -n 1 "$GW/ivcheck")" grep -q ' 0 repeats$' "$GW/ivcheck"
    check "$part: every SPI is that of an SA with a quantum key" quantum
}

# --- what is done ----------------------------------------------------------------

# watch_updates N...: the next two UPDATE frames at N are noted; updated N: they came.
watch_updates() {
    local n action='late 0s'
    [ "${TESTENV_BREAK:-}" != update ] || action=cut
    for n; do echo "UPDATE 2 $action" >"$GW/$n/run/rule.new" && mv "$GW/$n/run/rule.new" "$GW/$n/run/rule"; done
}
updated() { [ ! -e "$GW/$1/run/rule" ]; }
in_place() { ! grep -hE 'not moved|unable to update' "$GW"/[ab]/run/charon.log; }

# rekey PART: by command, under a ping every 10 ms.
rekey() {
    local had
    had=$(key_ids a | wc -l)
    ping_start "rekey-$1" -i 0.01
    check "$1: rekey" qipsec a tunnels rekey a-b
    check "$1: with a fresh Key-ID at both ends" await 30 fresh $((had + 1))
    check "$1: the old SAs go" await 30 settled
    ping_end "rekey-$1"
    check "$1: $lost of $sent packets lost in the rekey" few_lost 50 0
}

# moves FROM TO: a loses FROM, has TO. The SPIs that moved are left in $moved.
moves() {
    local what="from $1 to $2" had before
    had=$(key_ids a | wc -l)
    before=$(sas a | cut -d' ' -f1)
    ping_start "move-$2" -i 0.01
    sleep 1
    watch_updates a b
    node a ip addr del "$1/24" dev wire
    check "$what: charon asks qipsecd of a for both SAs" await 30 updated a
    check "$what: and qipsecd of b" await 30 updated b
    check "$what: no CHILD_SA had to be made anew for it" in_place
    check "$what: the queued rekey comes by itself, with a fresh Key-ID at both ends" await 60 fresh $((had + 1))
    check "$what: one CHILD_SA is left, with equal keys" await 60 settled
    check "$what: all SAs of both ends have the new address" between_both "$2"
    check "$what: traffic goes on" await 20 passes
    ping_end "move-$2"
    check "$what: $lost of $sent packets lost, one every 10 ms" few_lost 50 1500
    note "$what: $(($(key_ids a | wc -l) - had)) Key-IDs were used"
    for n in a b; do check "$what: journal and SAD of $n agree" await 10 agree "$n"; done
    moved+=("$before")
}

mobike() {
    local -a moved=()
    local spi n
    for n in a b; do sed -i 's/^policy = .*/&\nmobike = true/' "$GW/$n/run/etc/qipsecd.toml"; done
    node a sh -c 'echo 1 >/proc/sys/net/ipv4/conf/wire/promote_secondaries' && ip -n a addr add "$second/24" dev wire || fail "no second address"
    watch wire port-a mobike
    tunnel mobike
    check "mobike: SAs between the first addresses" between_both "$first"
    moves "$first" "$second"
    ip -n a addr add "$first/24" dev wire
    moves "$second" "$first"
    rekey mobike
    sabotage
    unwatch wire mobike
    judge mobike mobike
    for spi in ${moved[0]}; do
        check "mobike: SPI $spi moved with its sequence advanced by 2^20" advanced_either "$spi" "$first" "$second"
    done
    for spi in ${moved[1]}; do
        check "mobike: SPI $spi moved back with its sequence advanced by 2^20" advanced_either "$spi" "$second" "$first"
    done
}
# advanced_either SPI FROM TO: whichever direction SPI is of.
advanced_either() { advanced "$1" "$2 > $peer" "$3 > $peer" || advanced "$1" "$peer > $2" "$peer > $3"; }

# nat_up: a namespace between a and the wire, which has a's first address outside. It
# routes what it does not masquerade, so that a packet in clear does show.
nat_up() {
    ip netns add nat && node nat sh -c '
        [ ! -d /proc/sys/net/ipv6 ] || for c in default all; do echo 1 >/proc/sys/net/ipv6/conf/$c/disable_ipv6; done
        echo 1 >/proc/sys/net/ipv4/ip_forward' || return
    ip -n nat link set lo up && ip -n wire link set port-a netns nat && ip -n nat link set port-a name inner up || return
    gw_link nat outer wire port-a && ip -n wire link set port-a master hub || return
    ip -n a addr flush dev wire && ip -n a addr add "$private/24" dev wire &&
        ip -n a route add 192.0.2.0/24 via 203.0.113.1 && ip -n a route replace 10.2.0.0/24 via 203.0.113.1 || return
    ip -n nat addr add 203.0.113.1/24 dev inner && ip -n nat addr add "$first/24" dev outer &&
        ip -n nat route add 10.1.0.0/24 via "$private" && ip -n nat route add 10.2.0.0/24 via "$peer" || return
    # it forwards, and says nothing itself
    node nat iptables -P INPUT DROP && node nat iptables -P OUTPUT DROP && nat_ports -A 20000-20999 || return
    ip -n b neigh flush dev wire
}
# nat_ports -A LOW-HIGH / nat_ports -R LOW-HIGH: in one step, as without any rule the
# kernel tracks no connections and lets packets of old ones pass as they are.
nat_ports() {
    local at=()
    [ "$1" = -A ] || at=(1)
    node nat iptables -t nat "$1" POSTROUTING "${at[@]}" -o outer -p udp -j MASQUERADE --to-ports "$2"
}
nat_down() { # runs at every exit and keeps its status
    local rc=$?
    ip netns del nat 2>/dev/null
    return "$rc"
}
# nat_changes: other ports from now on; an interface that goes down takes its mappings along.
nat_changes() {
    nat_ports -R 30000-30999 && ip -n nat link set outer down && sleep 0.5 &&
        ip -n nat link set outer up && ip -n nat route add 10.2.0.0/24 via "$peer"
}

nat() {
    local n before old new spi counted
    for n in a b; do sed -i '/^mobike = /d' "$GW/$n/run/etc/qipsecd.toml"; done
    sed -i "s/^local_addr = .*/local_addr = \"$private\"/" "$GW/a/run/etc/qipsecd.toml"
    trap 'nat_down; gw_down' EXIT
    nat_up || fail "no NAT"
    watch nat inner nat-inside
    watch wire port-b nat-outside
    tunnel nat
    check "nat: a's SAs are in UDP, from its private address" ports a "$private" 4500
    check "nat: b's SAs are in UDP, to the port that the NAT gave" ports b "$first" '20[0-9]{3}'
    check "nat: traffic passes" passes
    rekey nat
    check "nat: b's new SAs have that port" ports b "$first" '20[0-9]{3}'

    ping_start port -i 0.01
    await 60 busy || fail "no traffic"
    before=$(sas b)
    watch_updates b
    nat_changes || fail "the NAT does not change"
    check "port change: charon asks qipsecd of b for both SAs" await 60 updated b
    check "port change: b's SAs have the new port" await 20 ports b "$first" '30[0-9]{3}'
    counted=$(sas b)
    check "port change: traffic goes on" await 20 passes
    ping_end port
    check "port change: $lost of $sent packets lost, one every 10 ms" few_lost 100 1500
    check "port change: the same SAs, their counters went on" same_sas "$before" "$counted"
    check "port change: no CHILD_SA had to be made anew for it" in_place
    for n in a b; do check "port change: journal and SAD of $n agree" await 10 agree "$n"; done
    rekey "after the port change"
    check "after the port change: b's new SAs have the new port" ports b "$first" '30[0-9]{3}'
    for n in a b; do check "after the port change: journal and SAD of $n agree" await 10 agree "$n"; done

    sabotage
    unwatch nat nat-inside
    unwatch wire nat-outside
    judge nat nat-outside nat-inside
    for spi in $(cut -d' ' -f1 <<<"$before"); do
        check "nat: SPI $spi was on both ports, its sequence just went on" went_on_either "$spi"
    done
}
went_on_either() {
    went_on "$1" "$first:20[0-9]{3} > $peer:4500" "$first:30[0-9]{3} > $peer:4500" ||
        went_on "$1" "$peer:4500 > $first:20[0-9]{3}" "$peer:4500 > $first:30[0-9]{3}"
}
# same_sas BEFORE AFTER: two answers of sas, with the same SPIs and no fewer packets.
same_sas() {
    [ "$(cut -d' ' -f1 <<<"$1")" = "$(cut -d' ' -f1 <<<"$2")" ] &&
        paste -d' ' <(echo "$1") <(echo "$2") | awk '{ if ($12 < $6) exit 1 }'
}

# tunnel PART: with the configuration as it is now.
tunnel() {
    local n
    for n in b a; do qipsecd_start "$n"; done
    await 90 settled || fail "$1: no tunnel"
    note "$1: tunnel is up"
}
# sabotage: the last packets of a part, if TESTENV_BREAK asks for them.
sabotage() { [ "${TESTENV_BREAK:-}" != clear ] || { node a ip xfrm policy flush && node ha ping -q -c 3 -W 1 10.2.0.2; }; }

main() {
    local n part
    [ $# -gt 0 ] || set -- mobike nat
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    for n in a b; do
        # MOBIKE tries every path there is, and would take the tunnel to the KM channel
        printf 'charon {\n interfaces_ignore = km, lan\n plugins {\n  qipsec {\n   socket = /run/q-ipsec/proxy.sock\n  }\n }\n}\n' >"$GW/$n/run/strongswan.d/10-nat.conf"
        node_start "$n" proxy "$BIN/plugproxy" -listen /run/q-ipsec/proxy.sock -to /run/q-ipsec/plugin.sock -rule /run/rule
        charon_start "$n" "$PLUGIN" || fail "charon of $n does not start"
    done
    qkdsim_start "" "first_keys = 3000"
    for part; do
        "$part"
        for n in a b; do qipsecd_stop "$n"; done
        check "$part: an orderly stop leaves no SA" await 20 no_sa
    done
}

main "$@"
