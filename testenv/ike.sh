#!/bin/bash
# ike.sh: what IKE does with more than one CHILD_SA and more than one IKE_SA: every
# CHILD_SA has a Key-ID of its own, no Key-ID serves twice, and both ends agree.
#
# usage: testenv/run testenv/ike.sh [PART...]      (default: all)
#   children    three CHILD_SAs in one IKE_SA, one of them by trap; rekeyed by a, by b,
#               and by both at once, on a slow wire so that the requests cross
#   ike_rekey   the IKE_SA is rekeyed by a, by b, by both at once; the children after it
#   reauth      a reauthenticates; then again with charon.make_before_break
#   cookie      b demands a COOKIE; b takes no group but another than a's first, in
#               IKE_SA_INIT and in CREATE_CHILD_SA
#   many        COUNT (20) connections between the two gateways; last, as it ends all others
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

toml() { echo "$GW/$1/run/etc/qipsecd.toml"; }
own() { if [ "$1" = a ]; then echo 1; else echo 2; fi; }
other() { if [ "$1" = a ]; then echo 2; else echo 1; fi; }

# --- hosts and configurations ----------------------------------------------------
# nets FROM TO: 10.x.FROM.0/24 to 10.x.TO.0/24 behind either gateway.
nets() {
    local n k o
    for n in a b; do
        o=$(own "$n")
        for ((k = $1; k <= $2; k++)); do echo "addr add 10.$o.$k.1/24 dev lan"; done | ip -n "$n" -batch - || return
        for ((k = $1; k <= $2; k++)); do echo "addr add 10.$o.$k.2/24 dev lan"; done | ip -n "h$n" -batch - || return
    done
}

# child N NAME K START [KEY...]: a child with the subnets 10.x.K.0/24.
child() {
    printf '[[ipsec.connection.child]]\nname = "%s"\nlocal_ts = ["10.%s.%s.0/24"]\nremote_ts = ["10.%s.%s.0/24"]\nstart = "%s"\nrekey_time = "20m"\n' \
        "$2" "$(own "$1")" "$3" "$(other "$1")" "$3" "$4"
    printf '%s\n' "${@:5}"
}

# three_children [KEY...]: net, two and trap; the keys are added to each.
three_children() {
    local n
    for n in a b; do
        sed -i '/^\[\[ipsec.connection.child\]\]/,$d' "$(toml "$n")"
        if [ "$n" = a ]; then child a net 0 now "$@"; child a two 1 now "$@"; child a trap 2 trap "$@"
        else child b net 0 none "$@"; child b two 1 none "$@"; child b trap 2 none "$@"; fi >>"$(toml "$n")"
    done
}

# set_key N KEY VALUE: in the connection's own table.
set_key() { sed -i -e "/^$2 = /d" -e "s#^policy = .*#&\n$2 = $3#" "$(toml "$1")"; }

guards() {
    local n
    for n in a b; do qipsec "$n" guard install >"$GW/$n/log/guard.log" 2>&1 || fail "no guard: $(cat "$GW/$n/log/guard.log")"; done
}

qipsecds() { # stop|start
    local n
    for n in b a; do "qipsecd_$1" "$n" || fail "cannot $1 qipsecd of $n"; done
}

# setting N NAME LINES: of charon, read at its next start.
setting() { printf 'charon {\n%s\n}\n' "$3" >"$GW/$1/run/strongswan.d/10-$2.conf"; }

# --- what is there ---------------------------------------------------------------
# child_keys N: "CHILD KEY-ID" of each CHILD_SA that qipsecd of N shows as installed.
child_keys() { qipsec "$1" tunnels | awk '$1 == "-" && $3 == "INSTALLED" && $6 ~ /^[0-9a-f]+-[0-9a-f-]+$/ { print $2, $6 }' | sort; }
keys_of() { awk '{ print $2 }' <<<"$1" | sort; }
# settled COUNT: so many CHILD_SAs at both ends, equal keys, nothing beside them; each has
# a Key-ID of its own, the same at both ends. Sets `now` to child_keys.
settled() {
    [ "$(sa_count a)" = $((2 * $1)) ] && [ "$(sa_count b)" = $((2 * $1)) ] && states_equal || return
    now=$(child_keys a)
    [ "$now" = "$(child_keys b)" ] && [ "$(wc -l <<<"$now")" = "$1" ] && [ "$(keys_of "$now" | uniq | wc -l)" = "$1" ]
}
# renewed COUNT BEFORE: settled, and none of the Key-IDs is one of those before.
renewed() { settled "$1" && [ -z "$(comm -12 <(keys_of "$2") <(keys_of "$now"))" ]; }

# ikes N: the SPIs of each IKE_SA of N.
ikes() { node "$1" swanctl --list-sas | sed -nE 's/^[^ ]+: #[0-9]+, ESTABLISHED, IKEv2, ([0-9a-f]+)_i\*? ([0-9a-f]+)_r\*?$/\1 \2/p; s/^[^ ]+: #[0-9]+, (CONN|CREA|REK|DEL).*/other/p' | sort; }
# one_ike BEFORE: the same one at both ends, another than before.
one_ike() {
    ike=$(ikes a)
    [ -n "$ike" ] && [ "$(wc -l <<<"$ike")" = 1 ] && [ "$ike" != other ] && [ "$ike" != "$1" ] && [ "$(ikes b)" = "$ike" ]
}

# counts REGEXP: how many lines of both qipsecds, resp. of both charons, are like that.
counts() { cat "$GW"/[ab]/log/qipsecd.log | grep -cE -- "$1"; }
charons() { cat "$GW"/[ab]/run/charon.log | grep -cE -- "$1"; }
asked() { counts 'msg="GetKey sent"'; }
spent() { counts 'msg="Key-ID in nonce"'; }
installed_ids() { sed -nE 's/.*msg="SA installed".* key_id=([0-9a-f-]{36}).*/\1/p' "$GW/$1/log/qipsecd.log" | sort -u; }
used() { cat <(installed_ids a) <(installed_ids b) | sort -u | wc -l; }

# --- traffic ----------------------------------------------------------------------
declare -A pings=()
# ping_start NAME K...: every 50 ms through the subnets K, until ping_end.
ping_start() {
    local name=${1//[^a-z]/-} k
    shift
    for k; do
        nsenter --net=/run/netns/ha ping -i 0.05 -W 2 -I "10.1.$k.2" "10.2.$k.2" >"$GW/a/log/ping-$name-$k.log" &
        pings[$k]=$!
    done
}
# ping_end NAME: sets `lost` and `sent`, of each subnet. Those of the last 2 s, whose
# answers may be on their way still, count as lost only if all of them are missing.
ping_end() {
    local name=${1//[^a-z]/-} k counts
    lost='' sent=''
    for k in "${!pings[@]}"; do kill -INT "${pings[$k]}"; done
    for k in $(printf '%s\n' "${!pings[@]}" | sort -n); do
        wait "${pings[$k]}"
        counts=$(awk -F'icmp_seq=' '
            /bytes from/ && !/DUP/ { got++; if ($2 + 0 > last) last = $2 + 0 }
            /packets transmitted/ { split($0, v, " "); sent = v[1] }
            END { tail = sent - last; print sent + 0, last - got + (tail > 40 ? tail : 0) }' "$GW/a/log/ping-$name-$k.log")
        sent+="${counts% *} " lost+="${counts#* } "
    done
    pings=()
}
none_lost() { [[ $sent =~ ^([1-9][0-9]+\ )+$ && $lost =~ ^(0\ )+$ ]]; }
passes() { nsenter --net=/run/netns/ha ping -q -c 1 -W 2 -I "10.1.$1.2" "10.2.$1.2" >>"$GW/a/log/passes.log"; }

# slow SECONDS: the wire's delay in each direction; 0: none.
slow() {
    local port
    for port in port-a port-b; do
        if [ "$1" = 0 ]; then tc -n wire qdisc del dev "$port" root; else tc -n wire qdisc add dev "$port" root netem delay "$1"s; fi || return
    done
}

# --- children ---------------------------------------------------------------------
trap_up() { # by a ping: the first ones are lost while the key is fetched
    [ "$(wc -l <<<"$(child_keys a)")" = 2 ] || return
    await 30 passes 2
}

# rekey BY...: every child, by a, by b, or by both at once.
rekey() {
    local n pid pids=()
    for n; do
        qipsec "$n" tunnels rekey a-b >>"$GW/$n/log/rekey.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || return; done
}

# rekeyed PART BY...: three CHILD_SAs, rekeyed under pings.
rekeyed() {
    local part=$1 before had took=$SECONDS
    shift
    await 10 settled 3 || fail "no three CHILD_SAs before the rekeying"
    before=$now
    had=$(asked)
    ping_start "$part-$*" 0 1 2
    check "$part: rekeying by $*: the commands succeed" rekey "$@"
    check "$part: rekeying by $*: three CHILD_SAs with fresh Key-IDs, equal keys, and nothing beside them" await 90 renewed 3 "$before"
    ping_end "$part-$*"
    check "$part: rekeying by $*: $lost of $sent packets lost" none_lost
    check "$part: rekeying by $*: journal and SAD agree" agree_both
    note "$(($(asked) - had)) keys, $((SECONDS - took)) s"
}

# crossed PART REGEXP CMD...: CMD, again on a slower wire until charon says that the
# requests of both ends crossed, four times at most: a busy machine begins them too far
# apart.
crossed() {
    local part=$1 regexp=$2 had hits=0 delay
    shift 2
    had=$(charons "$regexp")
    for delay in 0.4 0.6 0.9 0.9; do
        slow "$delay" || fail "no netem"
        "$@"
        slow 0
        hits=$(($(charons "$regexp") - had))
        [ "$hits" = 0 ] || break
    done
    check "$part: the requests of both did cross ($hits collisions seen)" [ "$hits" -gt 0 ]
}

part_children() {
    check "children: those that start at once are up, the trapped one waits" await 60 settled 2
    check "children: traffic brings the trapped one up" trap_up
    check "children: each has a Key-ID of its own, in one IKE_SA" await 30 settled 3
    check "children: there is one IKE_SA" one_ike none
    rekeyed children a
    rekeyed children b
    crossed children 'detected CHILD_REKEY collision with CHILD_REKEY' rekeyed children a b
    rekeyed children a b
}

# --- the IKE_SA --------------------------------------------------------------------
up_three() {
    await 60 settled_but_trap || fail "no two CHILD_SAs"
    await 30 passes 2
    await 30 settled 3 || fail "no three CHILD_SAs"
}

settled_but_trap() { settled 2 || settled 3; }

# unchanged: the SAD is as `kept` has it; check prints its words, which must be no keys.
unchanged() { [ "$(sa_keys a)" = "$kept" ]; }

# ike_rekeyed BY...: the CHILD_SAs move to a new IKE_SA, with their keys.
ike_rekeyed() {
    local n pid pids=() old had kept
    one_ike none || fail "no single IKE_SA before its rekeying"
    old=$ike
    kept=$(sa_keys a)
    had=$(asked)
    ping_start "ike-$*" 0 1 2
    for n; do
        node "$n" swanctl --rekey --ike a-b >>"$GW/$n/log/swanctl.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do check "ike_rekey by $*: the command succeeds" wait "$pid"; done
    check "ike_rekey by $*: one new IKE_SA, the same at both ends" await 60 one_ike "$old"
    check "ike_rekey by $*: the CHILD_SAs and their keys are as they were" unchanged
    check "ike_rekey by $*: it took no quantum key" [ "$(asked)" = "$had" ]
    ping_end "ike-$*"
    check "ike_rekey by $*: $lost of $sent packets lost" none_lost
    rekeyed "ike_rekey by $*, then" a
    rekeyed "ike_rekey by $*, then" b
}

part_ike_rekey() {
    up_three
    ike_rekeyed a
    ike_rekeyed b
    crossed ike_rekey 'IKE_SA rekey collision|IKE_REKEY collision' ike_rekeyed a b
}

# reauth_once NAME: with what it cost.
reauth_once() {
    local name=$1 before old had ids got no
    up_three
    before=$now
    one_ike none || fail "no single IKE_SA before $name"
    old=$ike
    had=$(spent) ids=$(used) got=$(asked) no=$(counts ' refused: ')
    capture_start "$name" || fail "tcpdump does not capture"
    ping_start "$name" 0 1 2
    check "$name: the command succeeds" node a swanctl --rekey --ike a-b --reauth
    check "$name: one new IKE_SA, the same at both ends" await 60 one_ike "$old"
    check "$name: three CHILD_SAs with fresh Key-IDs, equal keys, and nothing beside them" await 60 renewed 3 "$before"
    await 10 passes 2
    ping_end "$name"
    capture_stop "$name"
    note "$name: $lost of $sent packets lost, one every 50 ms"
    check "$name: no clear and no classical packet on the wire" quantum_only "$name"
    check "$name: no CHILD_SA was refused meanwhile" [ "$(counts ' refused: ')" = "$no" ]
    check "$name: three keys were spent, none of them in vain" [ "$(spent) $(used)" = "$((had + 3)) $((ids + 3))" ]
    note "$name: $(($(asked) - got)) keys were fetched; one that was not spent serves the next time"
    check "$name: journal and SAD agree" agree_both
}

part_reauth() {
    local n
    reauth_once reauth
    qipsec a tunnels terminate a-b >/dev/null
    for n in a b; do
        setting "$n" mbb ' make_before_break = yes'
        node "$n" swanctl --reload-settings >>"$GW/$n/log/swanctl.log" 2>&1
    done
    qipsec a tunnels initiate a-b >>"$GW/a/log/initiate.log" 2>&1
    reauth_once make-before-break
    for n in a b; do
        rm "$GW/$n/run/strongswan.d/10-mbb.conf"
        node "$n" swanctl --reload-settings >>"$GW/$n/log/swanctl.log" 2>&1
    done
}

# --- COOKIE, INVALID_KE_PAYLOAD ------------------------------------------------------
# half_open: an IKE_SA at b that nobody will finish: a's first request of all, with
# another SPI, from another port.
half_open() {
    local hex
    hex=$(tcpdump -n -r "$GW/wire/init.pcap" -c 1 -x 'src host 192.0.2.1 and udp dst port 500' 2>/dev/null |
        sed -nE 's/^[[:space:]]+0x[0-9a-f]+:[[:space:]]+//p' | tr -d ' \n')
    hex=${hex:56} # behind the headers of IP and UDP
    [ "${#hex}" -gt 400 ] || return
    # shellcheck disable=SC2059,SC2001
    printf "$(sed 's/../\\x&/g' <<<"c00c1ec00c1ec00c${hex:16}")" >"$GW/half-open"
    # shellcheck disable=SC2016
    node a bash -c 'cat "$1" >/dev/udp/192.0.2.2/500' half-open "$GW/half-open"
    await 10 waits_half_open
}
waits_half_open() { node b swanctl --list-sas | grep -q CONNECTING; }
loaded() { [ "$(grep -c 'msg="connection loaded"' "$GW/b/log/qipsecd.log")" -gt "$1" ]; }
# answers TEXT: how many answers a's charon got that carry nothing else.
answers() { grep -cE "parsed $1 response [0-9]+ \[ N\($2\) \]" "$GW/a/run/charon.log"; }

part_cookie() {
    local had ids seen
    up_three
    check "cookie: terminate" qipsec a tunnels terminate a-b
    await 20 no_sa
    charon_stop b
    setting b cookie $' cookie_threshold = 1\n cookie_threshold_ip = 1\n half_open_timeout = 120'
    had=$(grep -c 'msg="connection loaded"' "$GW/b/log/qipsecd.log")
    charon_start b "$PLUGIN" || fail "charon of b does not start again"
    await 30 loaded "$had" || fail "b does not load its connection again"
    half_open || fail "no half-open IKE_SA at b"
    had=$(spent) ids=$(used) seen=$(answers IKE_SA_INIT COOKIE)
    qipsec a tunnels initiate a-b >>"$GW/a/log/initiate.log" 2>&1
    check "cookie: the tunnel comes up" await 60 settled 3
    check "cookie: b had demanded a COOKIE" [ "$(answers IKE_SA_INIT COOKIE)" -gt "$seen" ]
    check "cookie: one key for each CHILD_SA, whatever the rounds" [ "$(spent) $(used)" = "$((had + 3)) $((ids + 3))" ]

    qipsecds stop
    set_key a proposals '["aes256gcm16-prfsha384-x25519", "aes256gcm16-prfsha384-ecp384"]'
    set_key b proposals '["aes256gcm16-prfsha384-ecp384"]'
    had=$(spent) ids=$(used) seen=$(answers IKE_SA_INIT INVAL_KE)
    qipsecds start
    check "invalid_ke: the tunnel comes up" await 60 settled 2
    check "invalid_ke: b had demanded another group in IKE_SA_INIT" [ "$(answers IKE_SA_INIT INVAL_KE)" -gt "$seen" ]
    check "invalid_ke: one key for each CHILD_SA" [ "$(spent) $(used)" = "$((had + 2)) $((ids + 2))" ]

    qipsecds stop
    three_children 'esp_proposals = ["aes256gcm16-x25519", "aes256gcm16-ecp384"]'
    sed -i 's/^esp_proposals = .*/esp_proposals = ["aes256gcm16-ecp384"]/' "$(toml b)"
    had=$(spent) ids=$(used) seen=$(answers CREATE_CHILD_SA INVAL_KE)
    qipsecds start
    up_three
    rekeyed "invalid_ke in CREATE_CHILD_SA" a
    rekeyed "invalid_ke in CREATE_CHILD_SA" b
    seen=$(($(answers CREATE_CHILD_SA INVAL_KE) - seen))
    check "invalid_ke: b had demanded another group in $seen CREATE_CHILD_SA" [ "$seen" -ge 2 ]
    check "invalid_ke: each of them cost a key, and no other was in vain" [ "$(($(spent) - had))" = "$(($(used) - ids + seen))" ]
    rm "$GW/b/run/strongswan.d/10-cookie.conf"
    charon_stop b
    charon_start b "$PLUGIN" || fail "charon of b does not start again"
}

# --- many connections ----------------------------------------------------------------
# connections COUNT: spokes of a: the same gateway under COUNT identities, as charon
# chooses among connections of equal addresses by identity.
connections() {
    local n k names=()
    for ((k = 1; k <= $1; k++)); do names+=("m$k.gw.q-ipsec"); done
    "$BIN/qipsec" pki issue --ca "$GW/site/ca" --out "$GW/b/run/etc/pki" --as ike --force \
        --dns "$(IFS=,; echo "${names[*]}")" gateway b.gw.q-ipsec >>"$GW/init.log" 2>&1 || return
    for n in a b; do
        sed -i '/^\[\[ipsec.connection\]\]/,$d' "$(toml "$n")"
        for ((k = 1; k <= $1; k++)); do
            printf '[[ipsec.connection]]\nname = "m%s"\nlocal_addr = "192.0.2.%s"\nremote_addr = "192.0.2.%s"\n' "$k" "$(own "$n")" "$(other "$n")"
            if [ "$n" = a ]; then printf 'local_sae = "a-ipsec"\npeer_sae = "b-ipsec"\nlocal_id = "a.gw.q-ipsec"\nremote_id = "m%s.gw.q-ipsec"\n' "$k"
            else printf 'local_sae = "b-ipsec"\npeer_sae = "a-ipsec"\nlocal_id = "m%s.gw.q-ipsec"\nremote_id = "a.gw.q-ipsec"\n' "$k"; fi
            child "$n" "net$k" "$k" "$(if [ "$n" = a ]; then echo now; else echo none; fi)"
        done >>"$(toml "$n")"
    done
}

# stop_all: an orderly stop of both qipsecds, with the time that many connections take.
stop_all() {
    local n
    for n in a b; do
        kill -TERM "${task_pid[$n/qipsecd]}"
        await 60 node_gone "$n" qipsecd || return
        node_stop "$n" qipsecd || return
    done
}
same_ikes() { [ "$(ikes a)" = "$(ikes b)" ] && [ "$(ikes a | uniq | wc -l)" = "$1" ]; }
none_left() {
    local n
    for n in a b; do
        [ "$(sa_count "$n")" = 0 ] && ! node "$n" ip xfrm policy | grep -q 'proto esp' && [ -z "$(node "$n" swanctl --list-conns)" ] || return
    done
}

part_many() {
    local k before took pid pids=() count=${COUNT:-20}
    stop_all || fail "cannot stop"
    nets 3 "$count"
    connections "$count" || fail "no connections: $(tail -n 3 "$GW/init.log")"
    guards
    took=$SECONDS
    qipsecds start
    check "many: $count connections are up, each with a Key-ID of its own" await $((60 + 4 * count)) settled "$count"
    note "$count connections came up in $((SECONDS - took)) s"
    check "many: one IKE_SA for each, the same at both ends" same_ikes "$count"
    for ((k = 1; k <= count; k++)); do
        await 20 passes "$k" & pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || fail "no packet passes through one of the connections"; done
    ok "many: each carries packets"
    before=$now
    took=$SECONDS
    # shellcheck disable=SC2016
    check "many: one loop of commands rekeys all" node a bash -c '
        for ((k = 1; k <= $2; k++)); do "$1" tunnels rekey --config /run/etc/qipsecd.toml "m$k" >/dev/null || exit; done' rekey "$BIN/qipsec" "$count"
    check "many: all have fresh Key-IDs and equal keys, and nothing is beside them" await $((60 + 4 * count)) renewed "$count" "$before"
    note "$count connections were rekeyed in $((SECONDS - took)) s"
    check "many: journal and SAD agree" agree_both
    took=$SECONDS
    check "many: orderly stop" stop_all
    check "many: nothing is left of it, on either side" await 20 none_left
    note "$count connections were taken down in $((SECONDS - took)) s"
}

# --- over the whole scenario -----------------------------------------------------------
# once: no line of standard input comes twice.
once() { [ -z "$(sort | uniq -d | tee "$GW/twice")" ]; }
id_lines() { sed -nE "s/.*msg=\"$1\".* key_id=([0-9a-f-]{36}).*/\1/p" "$GW"/[ab]/log/qipsecd.log; }

sound() {
    local n alone failed
    for n in a b; do
        sed -nE 's/.*msg="SA installed".* key_id=([0-9a-f-]{36}).* (inbound=[a-z]+) .*/\1 \2/p' "$GW/$n/log/qipsecd.log" >"$GW/$n/keyed"
        check "a Key-ID keyed at most one CHILD_SA on $n ($(installed_ids "$n" | wc -l) of them)" once <"$GW/$n/keyed"
    done
    check "no Key-ID was sent twice" once < <(id_lines "Key-ID in nonce")
    check "no Key-ID was fetched twice" once < <(id_lines "GetKeyWithID sent")
    alone=$(comm -3 <(installed_ids a) <(installed_ids b) | wc -l)
    failed=$(counts 'set-up failed after its key was spent')
    check "both ends used the same Key-IDs, but for $alone of $failed set-ups that failed" [ "$alone" -le "$failed" ]
    capture_stop clear
    check "no clear packet on the wire" only_ipsec clear
}

main() {
    local n part
    [ $# -gt 0 ] || set -- children ike_rekey reauth cookie many
    modprobe sch_netem 2>/dev/null
    gw_up && site_up && sftp_intake && nets 1 2 || fail "cannot prepare"
    for n in a b; do
        ip -n "$n" route add "10.$(other "$n").0.0/16" via "192.0.2.$(other "$n")"
        setting "$n" own ' delete_rekeyed_delay = 1'
    done
    three_children
    guards
    capture_start init 'udp port 500' && capture_start clear 'not (udp port 500 or udp port 4500 or esp or arp)' || fail "tcpdump does not capture"
    for n in b a; do gateway_up "$n" || fail "gateway $n does not start"; done
    qkdsim_start "" "first_keys = 5000"
    await 90 settled 2 || fail "no tunnel"
    note "tunnel is up"
    for part; do
        note "$part"
        "part_$part"
    done
    sound
}

main "$@"
