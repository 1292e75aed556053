#!/bin/bash
# netns.sh: scripts/testbed-netns on two namespaces that a user has: what it refuses,
# the tunnel with its traffic and a rekey, and that nothing of it stays, whether it is
# ended by --down, by Ctrl-C, or by --down after it was killed together with a charon.
#
# usage: testenv/run testenv/netns.sh
#
#     east-host 10.1.0.2 -- east 192.0.2.1 -- 192.0.2.2 west -- 10.2.0.2 west-host
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

testbed=$TESTENV_REPO/scripts/testbed-netns
run= # the process of the testbed-netns in the background

# side NAME OWN OTHER: a gateway and a host behind it, by a user's own commands.
side() {
    local ns
    for ns in "$1" "$1-host"; do
        ip netns add "$ns" && ip -n "$ns" link set lo up || return
        [ ! -d /proc/sys/net/ipv6 ] || node "$ns" bash -c '
            for c in default all; do echo 1 >/proc/sys/net/ipv6/conf/$c/disable_ipv6; done' || return
    done
    gw_link "$1" lan "$1-host" lan &&
        ip -n "$1" addr add "10.$2.0.1/24" dev lan &&
        ip -n "$1-host" addr add "10.$2.0.2/24" dev lan &&
        ip -n "$1-host" route add default via "10.$2.0.1" &&
        node "$1" bash -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
}

namespaces() {
    mkdir -p "$GW/wire"
    side east 1 && side west 2 && gw_link east wire west wire &&
        ip -n east addr add 192.0.2.1/24 dev wire && ip -n west addr add 192.0.2.2/24 dev wire &&
        ip -n east route add 10.2.0.0/24 via 192.0.2.2 && ip -n west route add 10.1.0.0/24 via 192.0.2.1 || return
    # what the user has in the kernel already, to other addresses
    ip -n east xfrm state add src 203.0.113.1 dst 203.0.113.2 proto esp spi 0x1001 reqid 1 mode tunnel \
        aead 'rfc4106(gcm(aes))' "0x$(printf '%072d' 0)" 128 &&
        ip -n east xfrm policy add src 10.8.0.0/24 dst 10.9.0.0/24 dir out action block &&
        touch '/run/netns/West 2' && mount --bind /run/netns/west '/run/netns/West 2'
}

# settings: what of a user's namespaces must be as it was, even while the tunnel is up.
settings() {
    local ns
    for ns in east west; do
        echo "== $ns"
        ip -n "$ns" addr && ip -n "$ns" rule && ip -n "$ns" route show table all &&
            node "$ns" bash -c 'cat /proc/sys/net/core/xfrm_* /proc/sys/net/ipv4/ip_forward'
    done
}
# everything: besides, what must be as it was when all is over.
everything() {
    local ns pid
    settings
    for ns in east west; do ip -n "$ns" xfrm state && ip -n "$ns" xfrm policy; done
    cat /proc/mounts
    # but the repository's, where other scenarios write at the same time
    find /run /tmp /dev/shm \( -path "$GW" -o -path "$TESTENV_REPO" -o -path "$TESTENV_OUT" \) -prune -o -print | sort
    for pid in /proc/[0-9]*; do
        if [ "$pid/ns/net" -ef /run/netns/east ] || [ "$pid/ns/net" -ef /run/netns/west ]; then cat "$pid/comm"; fi
    done
    pgrep -l 'charon|qipsecd|qkdsim|testbed-netns'
}
unchanged() { # WHAT: says what is not
    "$1" >"$GW/$1.now" 2>/dev/null
    diff "$GW/$1.before" "$GW/$1.now" >&2
}

# refused WHAT REGEXP CMD...: CMD fails with a message like that.
refused() {
    local what=$1 like=$2 rc=0
    shift 2
    "$@" >"$GW/refused" 2>&1 || rc=$?
    [ "$rc" != 0 ] && grep -qE -- "$like" "$GW/refused" || { cat "$GW/refused" >&2; check "refused: $what (status $rc)" false; }
    ok "refused: $what: $(grep -E -m 1 -- "$like" "$GW/refused")"
}

errors() {
    refused "no root" 'needs root' setpriv --reuid 65534 --clear-groups "$testbed" east west
    refused "no such namespace" "no network namespace 'north'" "$testbed" east north
    refused "a path for a name" 'no name' "$testbed" east ../netns/west
    refused "twice the same" 'the same network namespace' "$testbed" west 'West 2'
    refused "a kernel without ESP" 'no ESP.*make demo' env FORCE_UML=1 "$testbed" east west
    refused "no charon" 'charon-systemd is not there: run scripts/deps.sh build tunnel' unshare --mount \
        bash -c 'mount --bind /dev/null /usr/sbin/charon-systemd && exec "$@"' bash "$testbed" east west
    refused "a policy without a tunnel" '--policy' "$testbed" --policy off east west
    refused "a foreign address" 'west has no address 192.0.2.9' "$testbed" --address 192.0.2.1,192.0.2.9 east west
    refused "no common subnet" 'no common.*--address' "$testbed" east-host west
    refused "the same network behind both" '10.3.0.0/24.*--subnet' "$testbed" --subnet 10.3.0.0/24,10.3.0.0/24 east west
    ip -n east addr add 198.51.100.1/24 dev wire
    refused "two networks behind one" 'east is on several more.*10.1.0.0/24 198.51.100.0/24.*--subnet' "$testbed" east west
    ip -n west addr add 198.51.100.2/24 dev wire
    refused "two common subnets" '--address 192.0.2.1,192.0.2.2 or --address 198.51.100.1,198.51.100.2' "$testbed" east west
    ip -n east addr del 198.51.100.1/24 dev wire
    ip -n west addr del 198.51.100.2/24 dev wire
    ip -n west addr del 10.2.0.1/24 dev lan
    refused "no network behind one" 'west is on no IPv4 subnet but.*--subnet' "$testbed" east west
    ip -n west addr add 10.2.0.1/24 dev lan
    refused "--down of nothing" 'nothing of testbed-netns' "$testbed" --down east west
}

# begin LOG ARGS...: testbed-netns as on a terminal: SIGINT is not ignored.
begin() {
    log=$TESTENV_OUT/$1
    shift
    env --default-signal=INT "$testbed" "$@" >"$log" 2>&1 &
    run=$!
}
# says REGEXP: the run has said so, or has ended.
says() { grep -qE -- "$1" "$log" || ! kill -0 "$run" 2>/dev/null; }
# reached REGEXP TEXT
reached() {
    await 150 says "$1"
    grep -qE -- "$1" "$log" || cat "$log" >&2
    check "$2" grep -qE -- "$1" "$log"
}
is_up() { reached '^Ctrl-C, or' "$1"; dir=$(echo /run/qipsec-netns.*); }
# our N ARGS...: qipsec of node a or b of the run.
our() { QIPSEC_SOCKET=$dir/$1/run/q-ipsec/operator.sock "$BIN/qipsec" "${@:2}"; }
# ends TEXT: the run has ended and nothing of it is left.
ends() {
    wait "$run"
    check "$1: nothing is left, and the user's own is as it was" unchanged everything
}

# charon_shows CONNECTION: by the command that the run has printed.
charon_shows() { bash -c "$(sed -nE 's/^ +(swanctl .*charon.vici).*/\1/p' "$log")" 2>/dev/null | grep -q "^$1: .* ESTABLISHED"; }

esp_spis() { ip -n "$1" xfrm state | awk '/^src 192/ { ours = 1 } /^src [^1]/ { ours = 0 } ours && /proto esp spi/ { print $4 }' | sort; }
same_sas() { [ "$(esp_spis east | wc -l)" = 2 ] && [ "$(esp_spis east)" = "$(esp_spis west)" ]; }
fresh_sas() { same_sas && [ -z "$(comm -12 <(esp_spis east) - <<<"$1")" ]; }
journal() { our "$1" sa --json | grep -oE '"spi": *"[^"]*"' | sed -E 's/.*"(0x)?([0-9a-f]+)"$/0x\2/' | sort; }
by_qipsecd() { [ "$(journal a)" = "$(esp_spis east)" ] && [ "$(journal b)" = "$(esp_spis west)" ]; }

# watch, unwatch: what leaves either end of the veth. (What comes in is there a second
# time, decrypted.)
watch() {
    local ns
    for ns in east west; do
        node_start "$ns" wire tcpdump -i wire -Q out -n -p -U --immediate-mode -Z root -w "$GW/wire/$ns.pcap"
        await 20 grep -qs 'listening on' "$GW/$ns/log/wire.log" || fail "no capture: $(cat "$GW/$ns/log/wire.log")"
    done
}
unwatch() {
    for ns in east west; do
        node_stop "$ns" wire
        cp "$GW/wire/$ns.pcap" "$TESTENV_OUT/"
    done
}
# protected NS COUNT: at least so many ESP packets, else IKE, ARP and the QKMS's own TLS.
protected() {
    [ "$(wire "$1" esp)" -ge "$2" ] &&
        [ "$(wire "$1" 'not (esp or arp or udp port 500 or udp port 4500 or tcp port 8441)')" = 0 ]
}

tunnel() {
    local before ping
    begin first.log east west
    is_up "the tunnel comes up"
    check "it says what it found" grep -q "^west: the tunnel's end is 192.0.2.2; it protects 10.2.0.0/24" "$log"
    check "it shows the tunnel" grep -qE '^- +net +INSTALLED +direct ' "$log"
    check "charon's view is there as it says" charon_shows east-west
    ! grep -q '^note: ' "$log" || check "no note about a namespace that has all" false
    check "both SADs hold the same SAs, those of qipsecd's journals" by_qipsecd
    check "addresses, routes, rules and settings are as they were, while it runs" unchanged settings
    check "its directory is root's alone" [ "$(stat -c %a%U "$dir")" = 700root ]
    refused "a second run" 'east is keyed already; scripts/testbed-netns --down east west' "$testbed" east west
    refused "another partner" 'west is keyed already' "$testbed" east-host west
    watch
    node east-host ping -q -i 0.05 -c 200 -W 5 10.2.0.2 >"$GW/ping.log" &
    ping=$!
    before=$(esp_spis east)
    check "a rekey is begun" our b tunnels rekey east-west
    check "both ends have fresh SAs" await 60 fresh_sas "$before"
    wait "$ping"
    check "no packet of 200 is lost" grep -q '200 received, 0% packet loss' "$GW/ping.log"
    unwatch
    check "on the wire all of east's is ESP" protected east 200
    check "on the wire all of west's is ESP" protected west 200
    check "--down ends it" "$testbed" --down east west
    ends "--down"
}

# interrupted: Ctrl-C comes where it hurts most: a charon has begun, and the script has
# not noted down yet that it is there.
interrupted() {
    cat >"$GW/interrupt.bash" <<-'END'
	set -o functrace
	trap '[[ ${FUNCNAME[0]:-} != record || $1 != charon ]] || kill -INT $$' DEBUG
	END
    BASH_ENV=$GW/interrupt.bash begin second.log --policy optional west east
    reached '^All is ended' "it starts again, the other way round, and is interrupted"
    check "that came while it started" grep -q '^Both QKMS' "$log"
    check "no tunnel came up before" bash -c '! grep -q "^The tunnel is up" "$0"' "$log"
    ends "Ctrl-C while it starts"
}

killed() {
    local kind pid
    begin third.log --address 192.0.2.1,192.0.2.2 --subnet 10.1.0.0/24,10.2.0.0/24 east 'West 2'
    is_up "the tunnel comes up with options and a name that no QKMS can have"
    while read -r kind _ pid _; do
        case $kind in charon | script) kill -KILL "$pid" ;; esac
    done <"$dir/pids"
    wait "$run" 2>/dev/null
    check "after a kill its SAs are still there" same_sas
    refused "a new run on what a killed one left" 'keyed already' "$testbed" east west
    check "--down ends what is left" "$testbed" --down east 'West 2'
    ends "--down of a killed one"
}

namespaces || fail "cannot make the namespaces"
mkdir -p "$GW"/{east,west}/log
for what in settings everything; do "$what" >"$GW/$what.before" 2>/dev/null; done
errors
check "a refusal leaves nothing" unchanged everything
tunnel
interrupted
killed
