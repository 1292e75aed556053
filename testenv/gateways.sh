# shellcheck shell=bash
# gateways.sh: two IPsec gateways in network namespaces, to be sourced by a
# scenario that testenv/run runs.
#
#     ha 10.1.0.2 -- 10.1.0.1 a 192.0.2.1 -- wire -- 192.0.2.2 b 10.2.0.1 -- 10.2.0.2 hb
#                             a 198.51.100.1 -- km -- 198.51.100.2 b
#
# `wire` is a namespace of its own with a bridge, and tcpdump listens there: on
# a gateway it would see what ESP carried a second time, in clear. `km` is the
# channel for Type-1. The gateways have ordinary routes to each other's hosts, so
# that a packet no tunnel takes does show on the wire.
#
# What a node (a, b) is and has stands in node.sh, which this file brings along.
# $GW is in memory and ends with the scenario; logs, captures and states are
# copied to $TESTENV_OUT at the end.
#
#   gw_up                          makes all of the above; IPv4 only, as its neighbour
#                                  discovery would clutter captures, unless GW_IPV6=1
#   node, node_start, node_stop, charon_start, charon_stop: see node.sh; N is a, b, ha,
#                                  hb or wire
#   sshd_start N [PORT]            SFTP only, port 2022; key and user: see there
#   capture_start NAME [FILTER...] tcpdump on the wire to $TESTENV_OUT/NAME.pcap
#   capture_stop NAME
#   xfrm_redacted N                state and policy of N, keys as fingerprints
#   collect N                      logs and states to $TESTENV_OUT/N
#   gw_stay                        waits for $TESTENV_OUT/stop to appear, or SIGTERM
#   await, note, fail              see node.sh

set -u
: "${TESTENV_OUT:?is set by testenv/run}"
GW=/tmp/gateways
# shellcheck source=testenv/node.sh
. "${BASH_SOURCE[0]%/*}/node.sh"

# gw_link NS1 IF1 NS2 IF2: a veth pair, up.
gw_link() {
    ip link add name "$2" netns "$1" type veth peer name "$4" netns "$3" || return
    ip -n "$1" link set "$2" up && ip -n "$3" link set "$4" up
}

gw_up() {
    local ns
    trap gw_down EXIT
    trap 'exit 143' TERM
    trap 'exit 130' INT
    mkdir -p "$GW"
    for ns in a b ha hb wire; do
        ip netns add "$ns" && ip -n "$ns" link set lo up || return
        [ "${GW_IPV6:-}" = 1 ] || [ ! -d /proc/sys/net/ipv6 ] || node "$ns" bash -c '
            for c in default all; do echo 1 >/proc/sys/net/ipv6/conf/$c/disable_ipv6; done' || return
    done
    gw_link a wire wire port-a && gw_link b wire wire port-b &&
        gw_link a km b km && gw_link a lan ha lan && gw_link b lan hb lan || return
    ip -n wire link add name hub type bridge && ip -n wire link set hub up &&
        ip -n wire link set port-a master hub && ip -n wire link set port-b master hub || return
    gw_node a 1 2 && gw_node b 2 1
}

# gw_node N OWN OTHER: gateway N, with addresses and routes, and those of the host behind.
gw_node() {
    local n=$1 own=$2 other=$3
    ip -n "$n" addr add "192.0.2.$own/24" dev wire &&
        ip -n "$n" addr add "198.51.100.$own/24" dev km &&
        ip -n "$n" addr add "10.$own.0.1/24" dev lan &&
        ip -n "$n" route add "10.$other.0.0/24" via "192.0.2.$other" &&
        ip -n "h$n" addr add "10.$own.0.2/24" dev lan &&
        ip -n "h$n" route add default via "10.$own.0.1" || return
    # sshd wants an account that is not locked, for a user who delivers files
    mkdir -p "$GW/$n" && cp -a /etc/passwd /etc/group /etc/shadow "$GW/$n/" || return
    echo 'qkde:x:970:970:QKD device:/run:/bin/sh' >>"$GW/$n/passwd"
    echo 'qkde:x:970:' >>"$GW/$n/group"
    echo 'qkde:*:19000:0:99999:7:::' >>"$GW/$n/shadow"
    node_make "$n" && node "$n" bash -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
}

# sshd_start N [PORT]: SFTP into N for its QKD device, by key only, on every
# address of N. The user is `qkde`; for the scenario and both nodes:
#   $GW/N/run/sftp/client_key      the device's private key
#   $GW/N/run/sftp/known_hosts     N's host key, for any name
# The session starts in N's /run/sftp/intake (mode 0700, owner qkde).
sshd_start() {
    local n=$1 port=${2:-2022} dir=$GW/$1/run/sftp
    mkdir -p "$dir" "$GW/$n/run/sshd" && install -d -m 0700 -o 970 -g 970 "$dir/intake" || return
    ssh-keygen -q -t ed25519 -N '' -C '' -f "$dir/host_key" </dev/null &&
        ssh-keygen -q -t ed25519 -N '' -C '' -f "$dir/client_key" </dev/null || return
    install -m 0644 "$dir/client_key.pub" "$dir/authorized_keys"
    printf '* %s\n' "$(cat "$dir/host_key.pub")" >"$dir/known_hosts"
    cat >"$dir/sshd_config" <<-END
	Port $port
	HostKey /run/sftp/host_key
	PidFile none
	UsePAM no
	AllowUsers qkde
	PasswordAuthentication no
	KbdInteractiveAuthentication no
	AuthorizedKeysFile /run/sftp/authorized_keys
	DisableForwarding yes
	ForceCommand internal-sftp -d /run/sftp/intake
	Subsystem sftp internal-sftp
	END
    node_start "$n" sshd /usr/sbin/sshd -D -e -f /run/sftp/sshd_config
    await 20 grep -qs 'Server listening' "$GW/$n/log/sshd.log" || {
        cat "$GW/$n/log/sshd.log" >&2
        return 1
    }
}

# capture_start NAME [FILTER...]: what crosses the wire, both directions once.
capture_start() {
    local name=$1
    shift
    node_start wire "$name" tcpdump -i port-a -n -p -U --immediate-mode -Z root \
        -w "$GW/wire/$name.pcap" "$@"
    await 20 grep -qs 'listening on' "$GW/wire/log/$name.log" || {
        cat "$GW/wire/log/$name.log" >&2
        return 1
    }
}

# capture_stop NAME: the pcap is complete when this returns 0.
capture_stop() {
    node_stop wire "$1"
    cp -- "$GW/wire/$1.pcap" "$TESTENV_OUT/$1.pcap"
}

# fingerprint HEX: 16 digits that stand for a key; the first 8 bytes of
# HMAC-SHA-256(key, "Q-IPsec v1 fingerprint"), as in the logs of the daemons.
# The key is in no command line. HEX has at most 64 bytes.
fingerprint() {
    local hex=$1 i byte inner='' outer=''
    for ((i = 0; i < 64; i++)); do
        byte=0x${hex:$((2 * i)):2}
        [ "$byte" = 0x ] && byte=0
        printf -v inner '%s\\x%02x' "$inner" $((byte ^ 0x36))
        printf -v outer '%s\\x%02x' "$outer" $((byte ^ 0x5c))
    done
    # shellcheck disable=SC2059
    hex=$({ printf "$inner"; printf 'Q-IPsec v1 fingerprint'; } | sha256sum)
    # shellcheck disable=SC2001,SC2059
    hex=$({ printf "$outer"; printf "$(sed 's/../\\x&/g' <<<"${hex%% *}")"; } | sha256sum)
    printf '%s\n' "${hex:0:16}"
}

# redact: from `ip xfrm state` to the same with `key:<fingerprint>` for keys.
# A line that may hold a key and does not look as expected is dropped.
redact() {
    local line
    local keyed='^([[:space:]]*(auth|auth-trunc|enc|aead|comp)[[:space:]]+[^[:space:]]+)[[:space:]]+0x([0-9a-f]+)(.*)$'
    while IFS= read -r line; do
        if [[ $line =~ $keyed ]]; then
            printf '%s key:%s%s\n' "${BASH_REMATCH[1]}" "$(fingerprint "${BASH_REMATCH[3]}")" "${BASH_REMATCH[4]}"
        elif [[ $line =~ 0x[0-9a-f]{17,} ]]; then
            printf '\t(a line with a long number, not shown)\n'
        else
            printf '%s\n' "$line"
        fi
    done
}

# xfrm_redacted N: states, then policies.
xfrm_redacted() {
    node "$1" ip -s xfrm state | redact
    node "$1" ip xfrm policy | redact
}

# sa_count N: how many ESP states N has, larval ones included. no_sa: neither has any.
sa_count() { node "$1" ip xfrm state | grep -c 'proto esp'; }
no_sa() { [ "$(sa_count a)" = 0 ] && [ "$(sa_count b)" = 0 ]; }

collect() {
    local n=$1 to=$TESTENV_OUT/$1
    mkdir -p "$to"
    cp -- "$GW/$n"/log/*.log "$to/" 2>/dev/null
    cp -- "$GW/$n/run/charon.log" "$to/charon.log" 2>/dev/null
    xfrm_redacted "$n" >"$to/xfrm.txt" 2>&1
    node "$n" cat /proc/net/xfrm_stat >"$to/xfrm_stat.txt" 2>/dev/null
    return 0
}

# gw_stay: for those who attach. $TESTENV_OUT/ready says that they may.
gw_stay() {
    rm -f "$TESTENV_OUT/stop"
    : >"$TESTENV_OUT/ready"
    until [ -e "$TESTENV_OUT/stop" ]; do sleep 0.5; done
    rm -f "$TESTENV_OUT/stop" "$TESTENV_OUT/ready"
}

# gw_shell: for TESTENV_SHELL=1, the terminal of testenv/run.
gw_shell() {
    : >/dev/shm/testenv.shell
    if [ "$TESTENV_KIND" = uml ]; then
        stty -F /dev/tty1 sane
        setsid -c -w "$TESTENV_REPO/testenv/shell" <>/dev/tty1 >&0 2>&0
        stty -F /dev/tty1 raw -echo
    else
        "$TESTENV_REPO/testenv/shell"
    fi
}

# gw_down: runs at every exit and keeps its status.
gw_down() {
    local rc=$? key n
    trap '' TERM INT
    trap - EXIT
    if [ "${TESTENV_SHELL:-}" = 1 ]; then
        note "status so far: $rc. The nodes are up. testenv/shell a enters one; exit ends all."
        gw_shell
    fi
    for n in a b; do [ -z "${node_pid[$n]:-}" ] || collect "$n"; done
    for key in "${!task_pid[@]}"; do node_stop "${key%%/*}" "${key#*/}" || true; done
    [ ! -d "$GW/wire" ] || cp -- "$GW"/wire/*.pcap "$TESTENV_OUT/" 2>/dev/null
    for n in "${!node_pid[@]}"; do kill -KILL "${node_pid[$n]}" && wait "${node_pid[$n]}"; done 2>/dev/null
    for n in a b ha hb wire; do ip netns del "$n" 2>/dev/null; done
    exit "$rc"
}
