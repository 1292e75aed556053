#!/bin/bash
# secrets.sh: charon never has a key that protects traffic. With the plugin's
# add_sa hook left out the tunnel is a black hole; with it, no key of the SAD, no
# QKD key and no session key is in charon's memory, nor in its log at level 4,
# nor in anything that the daemons print. qkdsim runs from a seed, so that
# memscan knows all its keys.
#
# usage: testenv/run testenv/secrets.sh
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

seed=20261122
sa_needles=$GW/sa_keys # every key that was in a SAD

believes() { grep -q 'CHILD_SA net{[0-9]*} established' "$GW/$1/run/charon.log"; }
believe() { believes a && believes b; }
proto_errors() { node "$1" awk '$1 == "XfrmInStateProtoError" { print $2 }' /proc/net/xfrm_stat; }
rejected() { [ "$(proto_errors a)" -gt 0 ] || [ "$(proto_errors b)" -gt 0 ]; }
answered() { cat "$GW"/h[ab]/log/tempt.log | grep -c 'bytes from'; }
no_answer() { [ "$(answered)" = 0 ]; }
some_answer() { [ "$(answered)" -gt 0 ]; }

black_hole() {
    local n
    node_start ha tempt ping -i 0.1 -W 1 10.2.0.2
    node_start hb tempt ping -i 0.1 -W 1 10.1.0.2
    for n in b a; do
        charon_start "$n" "$BIN/no-add-sa/libstrongswan-qipsec.so" && qipsecd_start "$n" || fail "gateway $n does not start"
    done
    qkdsim_start "" "first_keys = 3000
	seed = $seed"
    check "without the add_sa hook: both charons believe in their CHILD_SA" await 90 believe
    check "without the add_sa hook: the kernel meets ESP that it cannot open" await 30 rejected
    check "without the add_sa hook: no ping was answered" no_answer
    for n in a b; do charon_stop "$n"; done
    check "without the add_sa hook: qipsecd installed no SA" not logged a 'msg="SA installed"'
}
not() { ! "$@"; }

note_keys() { { sa_keys a; sa_keys b; } | cut -d' ' -f2 >>"$sa_needles"; }
renewed() { [ "$(sa_keys a)" != "$1" ] && states_equal; }
rekey() { # N
    local before
    before=$(sa_keys a)
    qipsec "$1" tunnels rekey a-b >/dev/null && await 30 renewed "$before" && note_keys
}

# scan TARGET...: for the SAD's keys, and all that the seed made until now.
scan() {
    "$BIN/memscan" -seed "$seed" -pair "$pair" -files "$(grep -c 'msg="file made"' "$GW/a/log/qkdsim.log")" \
        -sae a-ipsec,b-ipsec -sae b-ipsec,a-ipsec -sae a-te,b-te "$@" <"$sa_needles" >"$GW/scan"
}
clean() { scan "$@"; }
dirty() { # found some; 2 is memscan's own failure
    scan "$@"
    [ $? = 1 ]
}
known() { # HEX TARGET...: that one is there
    local hex=$1
    shift
    "$BIN/memscan" "$@" <<<"$hex" >"$GW/scan"
    [ $? = 1 ]
}
# judge TEXT CMD...: check, with what memscan counted.
judge() {
    local text=$1 rc=0
    shift
    "$@" || rc=$?
    check "$text: $(cat "$GW/scan")" [ "$rc" = 0 ]
}

use() {
    local n
    for n in a b; do
        # a file of its own, which is not kept: it has charon's IKE secrets
        cat >"$GW/$n/run/strongswan.d/10-deep.conf" <<-END
		charon {
		    filelog {
		        deep {
		            path = /run/charon-deep.log
		            flush_line = yes
		            default = 4
		        }
		    }
		}
		END
    done
    for n in b a; do charon_start "$n" "$PLUGIN" || fail "charon of $n does not start"; done
    await 90 tunnel_up || fail "no tunnel"
    check "with it, pings are answered" await 20 some_answer
    note_keys
    check "rekeys from either side" eval 'rekey a && rekey b'
    for n in a b; do node "$n" swanctl --list-sas >"$GW/$n/log/list-sas.log"; done
}

controls() { # the same search finds what is there
    local id n
    id=$(line a 'msg="SA installed"' | sed -nE 's/.* key_id=([0-9a-f-]{36}).*/\1/p' | tr -d -)
    node a "$BIN/qipsec" sae get-key --url "$(sed -n 's#^type2_listen = "\(.*\)"#https://\1#p' "$GW/a/run/etc/qipsecd.toml")" --peer b-te --show-key \
        --ca /run/etc/pki/sae-ca.crt --cert /run/etc/pki/saes/a-te.crt --key /run/etc/pki/saes/a-te.key >"$GW/control-session" || fail "no session key"
    judge "control: a session key is found where an SAE printed it" dirty "$GW/control-session"
    sa_keys b | head -n 1 | cut -d' ' -f2 >"$GW/control-sa"
    judge "control: a key of the SAD is found in a file" dirty "$GW/control-sa"
    judge "control: QKD keys are found in the memory of qipsecd" dirty "${task_pid[a/qipsecd]}"
    judge "control: the Key-ID is found in charon's log, whose hex dumps are read" known "$id" "$GW/a/run/charon-deep.log"
    for n in a b; do check "control: charon's log on $n has secrets, as level 4 does" grep -q 'Sk_d secret => ' "$GW/$n/run/charon-deep.log"; done
    rm -f "$GW"/control-*
}

main() {
    local n
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    pair=$(field "$GW/a/run/etc/qipsecd.toml" id)
    : >"$sa_needles"
    # as qipsec-guard.service does, before the network is up
    for n in a b; do qipsec "$n" guard install >"$GW/$n/log/guard.log" 2>&1 || fail "no guard: $(cat "$GW/$n/log/guard.log")"; done
    black_hole
    use
    note "tunnel, rekeys and list-sas done: now the search"
    controls
    for n in a b; do
        judge "charon of $n: no key in its memory" clean "${task_pid[$n/charon]}"
        judge "charon of $n: no key in its log at level 4" clean "$GW/$n/run/charon-deep.log"
    done
    for n in a b; do collect "$n"; done
    judge "no key in any output of qipsecd, qkdsim, charon and ip" clean "$GW/a/log" "$GW/b/log" "$TESTENV_OUT"
}

main
