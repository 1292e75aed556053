#!/bin/bash
# supply.sh: how often two tunnels are rekeyed when keys are few. Over a poor link,
# with a stock that does not afford the policy's pace: the interval stretches, alike
# for both. Other consumers take most of the stock: the rest is the reserve, and
# rekeyings wait; `qipsec tunnels` tells when the last key goes. The link is good
# again: the policy's interval is back. No packet is lost meanwhile.
#
# usage: testenv/run testenv/supply.sh
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

policy=3 reserve=20 stock=300 # seconds, keys of either node, keys of both

# second N OWN OTHER: connection two, between addresses and networks of its own.
second() {
    local n=$1 own=$2 other=$3 f=$GW/$1/run/etc/qipsecd.toml start=none
    [ "$n" != a ] || start=now
    ip -n "$n" addr add "192.0.2.1$own/24" dev wire && ip -n "$n" addr add "10.$own.1.1/24" dev lan &&
        ip -n "h$n" addr add "10.$own.1.2/24" dev lan && ip -n "$n" route add "10.$other.1.0/24" via "192.0.2.1$other" || return
    sed -i "s/^\[ipsec\]/&\nrekey_reserve = $reserve/" "$f"
    cat >>"$f" <<-END
	rekey_time = "${policy}s"

	[[ipsec.connection]]
	name = "two"
	$(grep -E '^(local|remote)_id = |^(local|peer)_sae = ' "$f")
	local_addr = "192.0.2.1$own"
	remote_addr = "192.0.2.1$other"
	[[ipsec.connection.child]]
	name = "two-net"
	local_ts = ["10.$own.1.0/24"]
	remote_ts = ["10.$other.1.0/24"]
	start = "$start"
	rekey_time = "${policy}s"
	END
}

# link KM KEYS: the QKD link is so long from now on; keys per file.
link() {
    node_stop a qkdsim
    QKD_KM=$1 qkdsim_start "" "first_keys = $stock"$'\n'"keys_per_file = $2"
}

both_up() { [ "$(sa_count a)" -ge 4 ] && [ "$(sa_count b)" -ge 4 ]; }

# supply N KEY: what `qipsec tunnels` of N says of the keys; both tunnels share them.
supply() { qipsec "$1" tunnels --json | sed -nE "s/^ *\"$2\": *([^,]*),?$/\1/p" | head -n 1; }
stretched() { interval=$(supply a interval_s); [ "${interval:-0}" -gt $((2 * policy)) ]; }
waits() { [ "$(supply "$1" waits)" = true ]; }
as_policy() { [ "$(supply a level)" -gt "$reserve" ] && [ -z "$(supply a interval_s)$(supply a waits)" ]; }
# dry N: sets dry to the words of the table.
dry() {
    dry=$(qipsec "$1" tunnels | awk '$1 == "a-b" { print $8 }')
    [[ $dry =~ ^([0-9]+h)?([0-9]+m)?[0-9]+s$ ]]
}

# rekeys CONN: how many rekeyings by time either end has begun.
rekeys() { cat "$GW"/[ab]/log/qipsecd.log | grep -cE "msg=\"tunnel command\" .*connection=$1 .*why=\"its key is due\""; }
# more COUNT: each connection has been rekeyed so often since `count`.
more() { [ $(($(rekeys a-b) - one)) -ge "$1" ] && [ $(($(rekeys two) - two)) -ge "$1" ]; }
count() { one=$(rekeys a-b) two=$(rekeys two); }
# shortest: the shortest time between two rekeyings of one connection at a, in seconds.
shortest() {
    sed -nE 's/^time=[0-9-]+T([0-9]+):([0-9]+):([0-9]+).* msg="tunnel command" .*connection=([^ ]+) .*why="its key is due".*/\1 \2 \3 \4/p' "$GW/a/log/qipsecd.log" |
        awk '{ now = ($1 * 60 + $2) * 60 + $3; if ($4 in last) { gap = (now - last[$4] + 86400) % 86400; if (!n++ || gap < least) least = gap }; last[$4] = now } END { print n ? least : 0 }'
}

# take N OTHER: transmission devices take N's keys, and what the other node gives it
# meanwhile, but for half of the reserve.
take() {
    local pki=$GW/$1/run/etc/pki address=198.51.100.1 left number
    [ "$1" = a ] || address=198.51.100.2
    while left=$(qipsec "$1" keys --json | awk -F'[:,]' '/"(own_active|leased)":/ { n += $2 } END { print n }') && left=$((left - reserve / 2)) && [ "$left" -gt 0 ]; do
        number=$((left < 128 ? left : 128))
        node "$1" "$BIN/qipsec" sae get-key --url "https://$address:8442" --peer "$2-te" --number "$number" \
            --ca "$pki/sae-ca.crt" --cert "$pki/saes/$1-te.crt" --key "$pki/saes/$1-te.key" >/dev/null 2>>"$GW/$1/log/te.log" || return
    done
}

main() {
    local n one two before interval dry
    gw_up && site_up && sftp_intake && second a 1 2 && second b 2 1 || fail "cannot prepare"
    link 118 "$stock"
    for n in b a; do gateway_up "$n" || fail "gateway $n does not start"; done
    await 60 both_up || fail "no two tunnels"
    link 118 4
    note "tunnels are up"
    ping_start one -i 0.02
    ping_to=10.2.1.2 ping_start two -i 0.02 -I 10.1.1.2

    check "a stock of few keys stretches the interval" await 30 stretched
    note "$(supply a level) keys at a: $interval s for each CHILD_SA, where the policy is $policy s"
    count
    check "both tunnels are rekeyed at that pace" await 60 more 2
    note "rekeyings: $(($(rekeys a-b) - one)) of a-b, $(($(rekeys two) - two)) of two"
    check "neither more often than the other" [ "$(rekeys a-b)" -le $(($(rekeys two) + 1)) ] && [ "$(rekeys two)" -le $(($(rekeys a-b) + 1)) ]
    check "none came at the policy's pace: there were $(shortest) s between two at least" [ "$(shortest)" -gt $((policy + 2)) ]

    for n in a b; do take "$n" "$([ "$n" = a ] && echo b || echo a)" || fail "no keys for the transmission devices of $n"; done
    for n in a b; do check "others take the keys of $n but the reserve: rekeyings wait" await 25 waits "$n"; done
    count
    before=$(supply a level)
    check "qipsec tunnels says when the last key goes" await 60 dry a
    note "dry in $dry, with $(supply a level) keys left"
    check "the reserve is kept: no rekeying since, and $(supply a level) keys after $before" [ "$(rekeys a-b) $(rekeys two)" = "$one $two" ] && [ "$(supply a level)" -ge "$before" ]

    link 50 200
    check "a good link: nothing is said of an interval any more" await 40 as_policy
    count
    check "and both tunnels are rekeyed at the policy's pace" await $((2 * interval)) more 2
    for n in one two; do
        ping_end "$n"
        check "tunnel $n: $lost of $sent packets lost" [ "$lost" = 0 ]
    done
}

main "$@"
