# shellcheck shell=bash
# qipsec.sh: the two gateways of gateways.sh with Q-IPsec on them, to be sourced
# after it. Binaries and the plugin come from bin/ (make build plugin).
#
#   site_up [POLICY]               configs and certificates by `qipsec init`; what
#                                  a node sees as /run/etc is $GW/<node>/run/etc
#   gateway_up N                   charon with the plugin, then qipsecd, both ready
#   qipsecd_start N / qipsecd_stop N / qipsecd_kill N
#   qkdsim_start [TOML LINES]      one pair for both: into a's directory, to b over
#                                  SFTP; the lines are added to its config
#   qipsec N ARGS...               the command, on node N
#   tunnel_up                      both CHILD_SAs installed on both nodes
#   logged N REGEXP                qipsecd of N has logged a line like that
#   ok TEXT / check TEXT CMD...    a result line for testrun; check fails the scenario

BIN=$TESTENV_REPO/bin
PLUGIN=$BIN/libstrongswan-qipsec.so

ok() { printf 'ok - %s\n' "$*"; }
# check TEXT CMD...
check() {
    local text=$1
    shift
    if "$@"; then ok "$text"; else
        printf 'not ok - %s: %s\n' "$text" "$*"
        exit 1
    fi
}

qipsec() {
    local n=$1 words=1
    shift
    case "$1 ${2:-}" in tunnels\ [!-]* | guard\ *) words=2 ;; esac
    node "$n" "$BIN/qipsec" "${@:1:words}" --config /run/etc/qipsecd.toml "${@:words + 1}"
}

field() { sed -n "s/^$2 = \"\(.*\)\"$/\1/p" "$1" | head -1; }

site_up() { site_make "${1:-required}" a b --km-address 198.51.100.1,198.51.100.2; }

# site_make POLICY NAME_A NAME_B ARGS...: the same for nodes a and b that call
# themselves so, with ARGS for `qipsec init`.
site_make() {
    local n policy=$1
    local -A name=([a]=$2 [b]=$3)
    shift 3
    "$BIN/qipsec" init --pair "${name[a]}" "${name[b]}" --out "$GW/site" "$@" >"$GW/init.log" 2>&1 || { cat "$GW/init.log" >&2; return 1; }
    for n in a b; do
        cp -a "$GW/site/${name[$n]}" "$GW/$n/run/etc" || return
        # All state below /run, as that alone is the node's own; the rest is as init wrote it.
        sed -i "s#^\[node\]#[node]\nstate_dir = \"/run/state\"#; s#^policy = .*#policy = \"$policy\"#" "$GW/$n/run/etc/qipsecd.toml"
        mkdir -m 0700 -p "$GW/$n/run/state" "$GW/$n/run/q-ipsec"
    done
}

qipsecd_start() {
    node_start "$1" qipsecd "$BIN/qipsecd" -config /run/etc/qipsecd.toml
}
qipsecd_stop() { node_stop "$1" qipsecd; }
qipsecd_kill() {
    kill -KILL "${task_pid[$1/qipsecd]}"
    wait "${task_pid[$1/qipsecd]}" 2>/dev/null
    unset "task_pid[$1/qipsecd]"
}

logged() { grep -qE -- "$2" "$GW/$1/log/qipsecd.log"; }
# line N REGEXP: the newest such line, without its time.
line() { grep -E -- "$2" "$GW/$1/log/qipsecd.log" | tail -n 1 | sed -E 's/^time=[^ ]+ level=([A-Z]+) /\1 /'; }

gateway_up() {
    charon_start "$1" "$PLUGIN" && qipsecd_start "$1"
}

# qkdsim_start [LINES]: node a is on the KM channel and reaches b's SFTP server; the
# link has QKD_KM km (50: some 280 keys/s).
qkdsim_start() {
    local dir=$GW/a/run/qkdsim
    mkdir -p "$dir"
    cp "$GW/b/run/sftp/client_key" "$dir/sftp.key" && chmod 600 "$dir/sftp.key"
    cp "$GW/b/run/sftp/host_key.pub" "$dir/"
    cat >"$dir/qkdsim.toml" <<-END
	${1:-}
	[link]
	device = "ingaas-100mhz"
	km = ${QKD_KM:-50.0}
	block_bits = 100000
	[master]
	node = "a"
	qkd_id = "$(field "$GW/a/run/etc/qipsecd.toml" qkd_id)"
	dir = "/run/etc/intake"
	[slave]
	node = "b"
	qkd_id = "$(field "$GW/b/run/etc/qipsecd.toml" qkd_id)"
	[slave.sftp]
	address = "198.51.100.2:2022"
	user = "qkde"
	key = "sftp.key"
	host_key = "host_key.pub"
	dir = "/run/sftp/intake"
	[pair]
	id = "$(field "$GW/a/run/etc/qipsecd.toml" id)"
	state_file = "seq"
	${2:-}
	END
    node_start a qkdsim "$BIN/qkdsim" -config /run/qkdsim/qkdsim.toml
}

# sftp_intake: node b takes its files from its SFTP server's directory.
sftp_intake() {
    sshd_start b || return
    sed -i 's#^intake = .*#intake = "/run/sftp/intake"\nfeeder = "qkde"#' "$GW/b/run/etc/qipsecd.toml"
}

# sa_keys N: the ESP keys in N's SAD, "SPI KEY" in the order of SPIs; for
# comparing and searching only, never printed.
sa_keys() {
    node "$1" ip xfrm state | awk '/proto esp spi/ { spi = $4 } /^\t(aead|enc|auth-trunc)/ { print spi, $3 }' | sort
}

# states_equal: both ends hold the same SAs with the same keys.
states_equal() {
    local a b
    a=$(sa_keys a)
    b=$(sa_keys b)
    [ -n "$a" ] && [ "$a" = "$b" ]
}

complete() { # N: two ESP states with keys
    [ "$(node "$1" ip xfrm state | grep -cE '^	(aead|enc) ')" -ge 2 ]
}
tunnel_up() { complete a && complete b && states_equal; }

# wire NAME FILTER...: how many packets of a stopped capture match.
wire() {
    local name=$1
    shift
    tcpdump -n -r "$GW/wire/$name.pcap" "$@" 2>/dev/null | wc -l
}

# in_clear NAME: packets of a stopped capture that are neither IKE, ESP nor ARP, nor
# the gateways' own ICMP about it.
in_clear() {
    wire "$1" 'not (udp port 500 or udp port 4500 or esp or arp) and not (icmp and host 192.0.2.1 and host 192.0.2.2) and not (src net 192.0.2.0/24 and dst net 192.0.2.0/24 and (icmp[icmptype] == icmp-unreach or icmp[icmptype] == icmp-redirect))'
}
only_ipsec() { [ "$(in_clear "$1")" = 0 ]; }

# quantum_only NAME: besides, every ESP packet has the SPI of an SA that a
# qipsecd installed with a quantum key.
quantum_only() {
    only_ipsec "$1" || return
    tcpdump -n -r "$GW/wire/$1.pcap" esp 2>/dev/null | grep -oE 'spi=0x[0-9a-f]+' | sort -u | sed 's/spi=0x//' >"$GW/esp.seen"
    sed -nE 's/.*msg="SA installed".* spi=([0-9a-f]{8}) .* class=(direct|relayed|derived) .*/\1/p' "$GW"/[ab]/log/qipsecd.log | sort -u >"$GW/esp.logged"
    [ -z "$(sed -E 's/^/00000000/; s/.*(.{8})$/\1/' "$GW/esp.seen" | sort -u | comm -23 - "$GW/esp.logged")" ]
}

# spis N: those of N's SAD. agree N: qipsecd's journal has the same, each committed.
spis() { node "$1" ip xfrm state | awk '/proto esp spi/ { print $4 }' | sort; }
agree() {
    local json
    json=$(qipsec "$1" sa --json) || return
    ! grep -q '"committed": *false' <<<"$json" &&
        [ "$(grep -oE '"spi": *"[^"]*"' <<<"$json" | sed -E 's/.*"(0x)?([0-9a-f]+)"$/0x\2/' | sort)" = "$(spis "$1")" ]
}
agree_both() { await 10 agree a && await 10 agree b; }

# ping_start NAME ARGS... / ping_end NAME: from ha to hb, or $ping_to; sets sent and lost.
# What is behind the last answer is on its way, and lost only if that came ${ping_way:-2} s
# before the end, or earlier.
declare -A ping_of=()
ping_start() {
    local name=$1
    shift
    # its own process, not a function's subshell: SIGINT must reach ping itself
    nsenter --net=/run/netns/ha ping -D -W 2 "$@" "${ping_to:-10.2.0.2}" >"$GW/a/log/ping-$name.log" &
    ping_of[$name]=$!
}
ping_end() {
    kill -INT "${ping_of[$1]}"
    wait "${ping_of[$1]}"
    read -r sent lost < <(awk -v end="$EPOCHREALTIME" -v way="${ping_way:-2}" '
        /bytes from/ && !/DUP/ {
            got++
            at = substr($1, 2) + 0
            split($0, seq, "icmp_seq=")
            if (seq[2] + 0 > last) last = seq[2] + 0
        }
        /packets transmitted/ { sent = $1 }
        END { print sent + 0, last - got + (end - at > way ? sent - last : 0) }' "$GW/a/log/ping-$1.log")
}

# held: NODE/DAEMON RSS FDS of each, kB and a count.
held() {
    local n d pid
    for n in a b; do
        for d in qipsecd charon; do
            pid=${task_pid[$n/$d]}
            echo "$n/$d $(awk '/^VmRSS/ { print $2 }' "/proc/$pid/status") $(ls "/proc/$pid/fd" | wc -l)"
        done
    done
}

# flat: by $GW/held.first and held.last no daemon grew by more than a quarter and
# 8 MiB, nor by more than 8 descriptors.
flat() {
    paste -d' ' "$GW/held.first" "$GW/held.last" |
        awk '{ if (!($2 && $3 && $5 <= $2 * 1.25 + 8192 && $6 <= $3 + 8)) { print "grew:", $0; bad = 1 } } END { exit bad || NR != 4 }'
}

# check_flat: flat, with the figures.
check_flat() {
    [ "${TESTENV_BREAK:-}" != leak ] || sed -i 's/ [0-9]* / 1 /' "$GW/held.first"
    paste -d' ' "$GW/held.first" "$GW/held.last" | awk '{ printf "      %s: %d kB and %d descriptors, at the end %d and %d\n", $1, $2, $3, $5, $6 }'
    check "no daemon's memory or descriptors grew" flat
}

# level N: keys of N's that are not supplied yet.
level() { qipsec "$1" keys --json | awk -F'[:,]' '/"(own_active|leased)":/ { n += $2 } END { print n }'; }
