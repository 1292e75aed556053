# shellcheck shell=bash
# node.sh: a node: a network namespace with a charon and other daemons in it, to be
# sourced by what has made, or found, the namespace and set $GW.
#
# A node has, besides its network namespace, a mount namespace with its own /run,
# /etc/swanctl and strongSwan plugins. What node N sees as /run/x is $GW/N/run/x for
# everybody else.
#
#   node_make N [NETNS]            makes node N in the network namespace NETNS (N), of
#                                  which it changes nothing
#   node N CMD...                  runs CMD in node N, or in a network namespace N
#   node_start N NAME CMD...       the same in the background, output to N/log/NAME.log
#   node_stop N NAME               ends it: TERM, 5 s later KILL
#   charon_start N [PLUGIN.so]     the installed charon, with the plugin if named;
#                                  settings: $GW/N/run/strongswan.d/*.conf
#   charon_stop N
#   await SECONDS CMD...           until CMD succeeds, polled; fails when time is up
#   note TEXT...                   a line of the story
#   fail TEXT...                   ends the script, status 1
#   started PID                    when PID started; fails if it has ended
#
# What sources it may define node_starts N NAME, called before a process of node N
# begins, and node_started N NAME PID, called when its PID is known.

declare -A node_pid=() task_pid=()

# note TEXT...: a line of the scenario's story, with the seconds since its start.
note() { printf '%4ds  %s\n' "$SECONDS" "$*"; }
fail() { printf 'FAIL: %s\n' "$*" >&2; exit 1; }

await() {
    local seconds=$1 end
    shift
    end=$((SECONDS + seconds))
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

# started PID: when that process started, in ticks since boot; tells it from a
# later one with its number. What is in the second field may hold blanks.
started() {
    local stat=''
    { read -r -d '' stat <"/proc/$1/stat"; } 2>/dev/null || true
    [ -n "$stat" ] || return
    # shellcheck disable=SC2086 # words
    set -- ${stat##*) }
    [ "$1" != Z ] && echo "${20}"
}

# hook NAME ARGS...: NAME, if it is defined.
hook() { ! declare -F "$1" >/dev/null || "$@"; }

# node_make N [NETNS]. If $GW/N has a passwd, group or shadow, it is the node's.
# Propagation slave: what others unmount, a deleted namespace above all, goes here too.
node_make() {
    local n=$1
    mkdir -p "$GW/$n"/{log,run/lock,run/strongswan.d} "$GW/$n/plugins" \
        "$GW/$n"/swanctl/{conf.d,x509,x509ca,x509ocsp,x509aa,x509ac,x509crl,pubkey,private,rsa,ecdsa,bliss,pkcs8,pkcs12} || return
    cp -a /usr/lib/ipsec/plugins/. "$GW/$n/plugins/" || return
    hook node_starts "$n" node
    setsid nsenter --net="/run/netns/${2:-$n}" unshare --mount --propagation slave \
        bash -c '
            mount --bind "$1/swanctl" /etc/swanctl || exit
            mount --bind "$1/plugins" /usr/lib/ipsec/plugins || exit
            for f in passwd group shadow; do
                [ ! -e "$1/$f" ] || mount --bind "$1/$f" "/etc/$f" || exit
            done
            mount --rbind "$1/run" /run || exit
            : >/run/ready
            exec sleep infinity' node "$GW/$n" >"$GW/$n/log/node.log" 2>&1 &
    node_pid[$n]=$!
    hook node_started "$n" node "$!"
    echo "${node_pid[$n]}" >"$GW/$n/pid" # for testenv/shell
    await 20 test -e "$GW/$n/run/ready" || { cat "$GW/$n/log/node.log" >&2; return 1; }
}

# node_enter N: sets the array `enter` to the words that put a command into N.
node_enter() {
    if [ -n "${node_pid[$1]:-}" ]; then
        enter=(nsenter --target "${node_pid[$1]}" --mount --net --wdns="$PWD" --
            env STRONGSWAN_CONF=/run/strongswan.conf)
    else
        enter=(nsenter --net="/run/netns/$1" --)
    fi
}

# node N CMD...
node() {
    local -a enter
    node_enter "$1"
    shift
    "${enter[@]}" "$@"
}

# node_start N NAME CMD... In a session of its own, so that what ends the scenario
# early does not end this before logs and states are collected.
node_start() {
    local n=$1 name=$2
    local -a enter
    shift 2
    node_enter "$n"
    mkdir -p "$GW/$n/log"
    hook node_starts "$n" "$name"
    setsid "${enter[@]}" "$@" </dev/null >>"$GW/$n/log/$name.log" 2>&1 &
    task_pid[$n/$name]=$!
    hook node_started "$n" "$name" "$!"
}

node_alive() { kill -0 "${task_pid[$1/$2]}" 2>/dev/null; }
node_gone() { ! node_alive "$@"; }

# node_stop N NAME: the process's exit status, 137 if it had to be killed.
node_stop() {
    local pid=${task_pid[$1/$2]:-} rc=0
    [ -n "$pid" ] || return 0
    kill -TERM "$pid" 2>/dev/null
    await 5 node_gone "$1" "$2" || kill -KILL "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null || rc=$?
    unset "task_pid[$1/$2]"
    return "$rc"
}

# charon_start N [PLUGIN.so]: PLUGIN is found by charon as Debian's own are, by
# its file name libstrongswan-<name>.so, in this node only. Short retransmission,
# half-open and delete times fit a machine with one slow CPU and a scenario of
# seconds. The configuration is $GW/N/swanctl, loaded with `node N swanctl`.
charon_start() {
    local n=$1 plugin=${2:-} name='' templates=/usr/share/strongswan/templates/config/plugins
    : >"$GW/$n/run/strongswan.d/00-plugin.conf"
    if [ -n "$plugin" ]; then
        cp -- "$plugin" "$GW/$n/plugins/" || return
        name=${plugin##*/libstrongswan-}
        name=${name%.so}
        # patience: a user-mode-linux machine stands still for longer than a call may take
        printf 'charon {\n plugins {\n  %s {\n   load = yes\n   patience = 5\n  }\n }\n}\n' "$name" \
            >"$GW/$n/run/strongswan.d/00-plugin.conf"
    fi
    cat >"$GW/$n/run/strongswan.conf" <<-END
	charon {
	    load_modular = yes
	    plugins {
	        include $templates/*.conf
	    }
	    retransmit_tries = 4
	    retransmit_timeout = 2.0
	    retransmit_base = 1.3
	    half_open_timeout = 15
	    filelog {
	        file {
	            path = /run/charon.log
	            time_format = %T
	            time_add_ms = yes
	            ike_name = yes
	            flush_line = yes
	            default = 1
	        }
	    }
	}
	swanctl {
	    load = random pem pkcs1 x509 pubkey openssl
	}
	include /run/strongswan.d/*.conf
	END
    rm -f "$GW/$n/run/charon.vici"
    node_start "$n" charon /usr/sbin/charon-systemd
    await 20 charon_settled "$n" && node_alive "$n" charon || {
        tail -n 15 "$GW/$n/run/charon.log" "$GW/$n/log/charon.log" >&2
        return 1
    }
}

charon_settled() { [ -S "$GW/$1/run/charon.vici" ] || node_gone "$1" charon; }
charon_stop() { node_stop "$1" charon; }
