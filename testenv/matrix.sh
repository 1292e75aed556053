#!/bin/bash
# matrix.sh: who dies or lies, when, under which policy: what goes over the wire,
# what the log says, and that everything comes back without a person. tcpdump
# judges. Each cell is one row of $TESTENV_OUT/matrix.tsv; scripts/matrix.sh makes
# docs/fail-closed.md of them.
#
# usage: testenv/run testenv/matrix.sh [CAUSE[:WHEN[:POLICY]]...]
#   default: each cause once, under `required`; ALL=1: every cell of POLICY (required)
#
# Under `required` a cell passes only if every ESP packet has the SPI of an SA that a
# qipsecd installed with a quantum key, and nothing is in clear, from before the
# fault until after its end; under `optional` IKE's own keys may carry traffic, with
# an alarm; under `off`, which charon's setting names too, all ESP must be charon's own.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

# CAUSE~WHENs~REGEXP of the line that names connection and cause (a connection that
# charon knows), empty if the fault stops nothing~what it is
causes='
charon~first rekey traffic boot~a-b.*no charon~charon of b is killed
qipsecd~first rekey traffic boot~a-b.*(no quantum key|refused)~qipsecd of b is killed
both~first rekey traffic boot~a-b.*(refused|establishing CHILD_SA)|type-1 with the peer does not get on~charon and qipsecd of b are killed
kms-a~first rekey traffic boot~a-b.*GetKey at KME~the KMS of a (another maker'"'"'s, over ETSI 014) is down
kms-b~first rekey traffic boot~a-b.*GetKeyWithID at KME~the KMS of b is down
keys-differ~first rekey traffic boot~a-b.*(C_i|confirm)~both KMSs give different keys for one Key-ID
key-id-foreign~first rekey traffic boot~a-b.*GetKeyWithID~the KMS of b does not know the Key-ID
key-id-replayed~first rekey traffic~a-b.*a second time~the KMS of a gives a Key-ID a second time
plugin-missing~first rekey traffic boot~a-b.*has not loaded the qipsec plugin~b has no plugin
plugin-version~first rekey traffic boot~a-b.*plugin was built for strongSwan~the plugin of b was built for another strongSwan
vici~first rekey traffic boot~a-b.*no charon~charon of a takes no VICI
type1~first rekey traffic boot~a-b.*(GetKeyWithID|GetKey at KME)~Type-1 is cut: no supply notice
qkde~first rekey traffic boot~~both QKDEs are silent, with keys in the pool
pool-dry~first rekey traffic boot~a-b.*(no key|empty)~the pool has run dry
damaged~first rekey traffic boot~~a damaged QKD-Key file at b
stock-peer~first rekey traffic~a-b.*does not speak Q-IPsec~b is a stock charon
strip~first boot~a-b.*does not speak Q-IPsec~an attacker takes the support notify out
forge~first boot~~an attacker forges IKE_SA_INIT answers
'

ip_of() { if [ "$1" = a ]; then echo 198.51.100.1; else echo 198.51.100.2; fi; }
of() { awk -F'~' -v c="$1" -v f="$2" '$1 == c { print $f }' <<<"$causes"; }

# Cells that are not there, for scripts/matrix.sh to say: CAUSE WHEN~why
absent_cells='
key-id-replayed boot~Key-IDs that were used are remembered in memory: a gateway that has just booted cannot find out a KME that gives one again
stock-peer boot~without the peer'"'"'s KMS there is no key, as when qipsecd is killed
strip rekey, traffic~there is no IKE_SA_INIT in which to strip anything
forge rekey, traffic~there is no IKE_SA_INIT to answer
'

# --- daemons: what a cause has taken away is not started -------------------------
declare -A absent=() plugin=()
start() { # N
    [ -n "${absent[$1/charon]:-}" ] || [ -n "${task_pid[$1/charon]:-}" ] || charon_start "$1" "${plugin[$1]-$PLUGIN}" || fail "charon of $1 does not start"
    [ -n "${absent[$1/qipsecd]:-}" ] || [ -n "${task_pid[$1/qipsecd]:-}" ] || qipsecd_start "$1"
}
end() { # N DAEMON: as kill -9 does
    local pid=${task_pid[$1/$2]:-}
    [ -n "$pid" ] || return 0
    kill -KILL "$pid"
    wait "$pid" 2>/dev/null
    unset "task_pid[$1/$2]"
}
take() { absent[$1/$2]=1; end "$1" "$2"; }
give() { unset "absent[$1/$2]"; start "$1"; }
restart() { charon_stop "$1"; start "$1"; }

# --- the causes ------------------------------------------------------------------
break_charon() { take b charon; }
mend_charon() { give b charon; }
break_qipsecd() { take b qipsecd; }
mend_qipsecd() { give b qipsecd; }
break_both() { take b charon; take b qipsecd; }
mend_both() { unset 'absent[b/charon]'; give b qipsecd; }

break_kms-a() { node_stop a kme; }
mend_kms-a() { kme a one; }
break_kms-b() { node_stop b kme; }
mend_kms-b() { kme b one; }
break_keys-differ() { node_stop b kme; kme b two; }
mend_keys-differ() { node_stop b kme; kme b one; }
break_key-id-foreign() { : >"$GW/b/run/deny"; }
mend_key-id-foreign() { rm -f "$GW/b/run/deny"; }
break_key-id-replayed() { : >"$GW/a/run/again"; }
mend_key-id-replayed() { rm -f "$GW/a/run/again"; }

break_plugin-missing() { plugin[b]=; rm -f "$GW/b/plugins/libstrongswan-qipsec.so"; [ -z "${task_pid[b/charon]:-}" ] || restart b; }
mend_plugin-missing() { unset 'plugin[b]'; restart b; }
break_plugin-version() {
    mkdir -p "$GW/other" # its version is a string in it
    sed "s/\\b$version\\x00/${version%?}0\\x00/g" "$PLUGIN" >"$GW/other/libstrongswan-qipsec.so"
    plugin[b]=$GW/other/libstrongswan-qipsec.so
    [ -z "${task_pid[b/charon]:-}" ] || restart b
}
mend_plugin-version() { unset 'plugin[b]'; restart b; }
break_vici() { set_vici /run/nobody.vici; }
mend_vici() { set_vici /run/charon.vici; }
set_vici() {
    sed -i -e '/^vici = /d' -e "s#^\[ipsec\]#&\nvici = \"$1\"#" "$GW/a/run/etc/qipsecd.toml"
    end a qipsecd
    [ "$booting" = 1 ] || start a
}
break_type1() {
    node b iptables -I INPUT -i km -p tcp -j DROP
    node b iptables -I OUTPUT -o km -p tcp -j DROP
}
mend_type1() { node b iptables -F; }
break_qkde() { node_stop a qkdsim; }
mend_qkde() { node_start a qkdsim "$BIN/qkdsim" -config /run/qkdsim/qkdsim.toml; }
break_pool-dry() {
    local i
    node_stop a qkdsim
    start a; start b # a pool is drained by those who hold it
    [ "$booting" != 1 ] || await 60 up
    # a node that runs dry gets keys of the other: dry is what both are, and stay
    for ((i = 0; i < 20; i++)); do
        drain_all
        dry && sleep 2 && dry && break
    done
    if [ "$booting" = 1 ]; then
        for i in a b; do end "$i" qipsecd; end "$i" charon; done
    elif [ -z "$(sa_keys a)" ]; then # a key that was reserved is still good for one tunnel
        qipsec a tunnels initiate a-b >/dev/null 2>&1
        qipsec a tunnels terminate a-b >/dev/null 2>&1
        await 20 no_sa
    fi
}
drain_all() {
    local number i
    for number in 128 16 1; do
        for ((i = 0; i < 200; i++)); do drain a b "$number" || drain b a "$number" || break; done
    done
}
# dry: neither node has keys that it could supply.
dry() { [ "$(level a)" = 0 ] && [ "$(level b)" = 0 ]; }
drain() { # N OTHER NUMBER: so many keys for the transmission devices
    local pki=$GW/$1/run/etc/pki
    node "$1" "$BIN/qipsec" sae get-key --url "https://$(ip_of "$1"):8442" --peer "$2-te" --number "$3" \
        --ca "$pki/sae-ca.crt" --cert "$pki/saes/$1-te.crt" --key "$pki/saes/$1-te.key" >/dev/null 2>&1
}
mend_pool-dry() { mend_qkde; }
break_damaged() {
    head -c 4000 /dev/urandom >"$GW/b/run/sftp/intake/damaged.tmp"
    chown 970:970 "$GW/b/run/sftp/intake/damaged.tmp" && chmod 600 "$GW/b/run/sftp/intake/damaged.tmp" &&
        mv "$GW/b/run/sftp/intake/damaged.tmp" "$GW/b/run/sftp/intake/damaged.json"
}
mend_damaged() { :; }

break_stock-peer() {
    local pki=$GW/b/run/etc/pki
    take b qipsecd
    plugin[b]=
    rm -f "$GW/b/plugins/libstrongswan-qipsec.so"
    cp "$pki/ike.crt" "$GW/b/swanctl/x509/" && cp "$pki/ike.key" "$GW/b/swanctl/private/" && cp "$pki/ike-ca.crt" "$GW/b/swanctl/x509ca/"
    stock_conf b 2 1 a-b >"$GW/b/swanctl/swanctl.conf"
    charon_stop b
    start b
    node b swanctl --load-all --noprompt >>"$GW/b/log/swanctl.log" 2>&1
}
mend_stock-peer() {
    rm -f "$GW/b/swanctl"/{x509/ike.crt,private/ike.key,x509ca/ike-ca.crt,swanctl.conf}
    unset 'plugin[b]' 'absent[b/qipsecd]'
    restart b
}
look_stock-peer() {
    check "$1: qipsec explain says why" explained 'Why: .*the peer at 192.0.2.2 does not speak Q-IPsec'
    check "$1: qipsec explain says what to do" explained 'Next: .*at 192.0.2.2, see whether'
    node b swanctl --initiate --child net --timeout 8 >"$GW/b/log/stock-initiate.log" 2>&1
    check "$1: nor does a take it as initiator" await 25 said 'a-b.*(does not announce|carries no Key-ID)'
}
# explained REGEXP: `qipsec explain` of a, which fails for a tunnel that is not up, has such a line.
explained() { grep -qE -- "$1" <<<"$(qipsec a explain a-b 2>&1)"; }
break_strip() { mitm strip; }
mend_strip() { mitm_end; }
break_forge() { mitm forge; }
mend_forge() { mitm_end; }
mitm() {
    ip -n wire link set port-a nomaster && ip -n wire link set port-b nomaster
    node_start wire mitm "$BIN/mitm" -a port-a -b port-b -mode "$1"
}
mitm_end() {
    node_stop wire mitm
    ip -n wire link set port-a master hub && ip -n wire link set port-b master hub
}

# stock_conf N OWN OTHER NAME: what an administrator would write without Q-IPsec.
stock_conf() {
    local peer=a
    [ "$1" = b ] || peer=b
    cat <<-END
	connections {
	    $4 {
	        version = 2
	        local_addrs = 192.0.2.$2
	        remote_addrs = 192.0.2.$3
	        local {
	            auth = pubkey
	            certs = ike.crt
	            id = $1.gw.q-ipsec
	        }
	        remote {
	            auth = pubkey
	            id = $peer.gw.q-ipsec
	        }
	        children {
	            net {
	                local_ts = 10.$2.0.0/24
	                remote_ts = 10.$3.0.0/24
	            }
	        }
	    }
	}
	END
}

# --- worlds: our own KMS, or one of another maker at both ends ------------------
world=own
kme() { # N SEED
    node_start "$1" kme "$BIN/fakekme" -listen "$(ip_of "$1"):8450" -pki /run/etc/pki -seed "$2" -deny /run/deny -again /run/again
}
enter() {
    local n before
    [ "$world" != "$1" ] || return 0
    world=$1
    for n in a b; do end "$n" qipsecd; done
    for n in a b; do
        if [ "$1" = own ]; then
            node_stop "$n" kme
            cp "$GW/$n/run/etc/own.toml" "$GW/$n/run/etc/qipsecd.toml"
        else
            cp "$GW/$n/run/etc/qipsecd.toml" "$GW/$n/run/etc/own.toml"
            other_kme "$n" || fail "cannot configure the other KME: $(tail -n 3 "$GW/init.log")"
            kme "$n" one
        fi
    done
    for n in a b; do start "$n"; done
    await 60 up || fail "no tunnel in the world '$1'"
    before=$(sa_keys a) # from now on with its keys
    await 60 rekeyed "$before" || fail "no rekey in the world '$1'"
}
rekeyed() { qipsec a tunnels rekey a-b >>"$GW/a/log/rekey.log" 2>&1; await 10 renewed "$1"; } # an old inbound SA stays 5 s
other_kme() {
    [ -e "$GW/$1/run/etc/pki/$1-ipsec.crt" ] ||
        "$BIN/qipsec" pki issue --ca "$GW/site/ca" --out "$GW/$1/run/etc/pki" sae "$1-ipsec" >>"$GW/init.log" 2>&1 || return
    sed -i -e "s#^local_sae = #kme = \"other\"\nlocal_sae = #" -e "s#^\[\[ipsec.connection\]\]#[[ipsec.kme]]\nname = \"other\"\nurl = \"https://$(ip_of "$1"):8450\"\nca = \"pki/sae-ca.crt\"\ncert = \"pki/$1-ipsec.crt\"\nkey = \"pki/$1-ipsec.key\"\n\n[[ipsec.connection]]#" \
        "$GW/$1/run/etc/qipsecd.toml"
}

# --- one cell ---------------------------------------------------------------------
declare -A mark=()
# said REGEXP: either qipsecd has logged such a line since the cell began.
said() { for n in a b; do since "$n" | grep -qE -- "$1" && return; done; return 1; }
since() { tail -n +$((${mark[$1]:-0} + 1)) "$GW/$1/log/qipsecd.log"; }
# why REGEXP: the newest such line, an event if there is one.
why() {
    { for n in a b; do since "$n" | grep -E -- "$1"; done; for n in a b; do since "$n" | grep -E -- "$1" | grep -E ' event='; done; } | tail -n 1
}

# up: the tunnel is. Under `off` the SAs of a charon that was killed may lie beside
# it: nobody takes them away but their lifetime, as ever with stock strongSwan.
up() {
    if [ "$policy" = off ]; then
        [ "$(comm -12 <(sa_keys a) <(sa_keys b) | wc -l)" -ge 2 ]
    else
        tunnel_up
    fi
}
pings() { grep -c 'bytes from' "$GW/ha/log/tempt.log"; }
more_pings() { [ "$(pings)" -gt "$1" ]; }
renewed() { up && [ "$(sa_keys a)" != "$1" ]; }
rekey() { for n in a b; do qipsec "$n" tunnels rekey a-b >>"$GW/$n/log/rekey.log" 2>&1; done; }

# classes: sets clear, quantum, classical, unknown: packets of the cell's capture.
classes() {
    local spi count
    clear=$(in_clear "$1") quantum=0 classical=0 unknown=0
    spis_logged '(direct|relayed|derived)' >"$GW/spi.quantum"
    spis_logged 'none' >"$GW/spi.classical"
    while read -r count spi; do
        if grep -qx "$spi" "$GW/spi.quantum"; then quantum=$((quantum + count))
        elif grep -qx "$spi" "$GW/spi.classical"; then classical=$((classical + count))
        else unknown=$((unknown + count)); fi
    done < <(tcpdump -n -r "$GW/wire/$1.pcap" esp 2>/dev/null | grep -oE 'spi=0x[0-9a-f]+' | sed -E 's/spi=0x/00000000/; s/.*(.{8})$/\1/' | sort | uniq -c)
}
spis_logged() { sed -nE "s/.*msg=\"SA installed\".* spi=([0-9a-f]{8}) .* class=$1 .*/\1/p" "$GW"/[ab]/log/qipsecd.log; }

# keyed: the tunnel has a quantum key, if need be by a rekey: a cell before may have
# ended on fallback.
keyed() {
    local before
    before=$(sa_keys a)
    spis_logged '(direct|relayed|derived)' | sort >"$GW/spi.quantum"
    [ -z "$(cut -d' ' -f1 <<<"$before" | sed 's/^0x//' | sort | comm -23 - "$GW/spi.quantum")" ] && return
    rekeyed "$before"
    return 1
}

wire_ok() {
    case $policy in
    required) [ "$clear" = 0 ] && [ "$classical" = 0 ] && [ "$unknown" = 0 ] ;;
    optional) [ "$unknown" = 0 ] && { [ "$classical" = 0 ] || said 'ipsec-fallback'; } ;;
    off) [ "$unknown" -gt 0 ] && [ "$quantum" = 0 ] && [ "$classical" = 0 ] ;;
    esac
}

cell() { # CAUSE WHEN POLICY
    local cause=$1 when=$2 before name="$1-$2-$3" n line want
    policy=$3 booting=0
    set_policy "$policy"
    case $cause in kms-* | key*) enter other ;; *) enter own ;; esac
    await 90 up || fail "$name: no tunnel to begin with"
    [ "$policy" = off ] || await 90 keyed || fail "$name: no quantum key to begin with"
    for n in a b; do mark[$n]=$(wc -l <"$GW/$n/log/qipsecd.log"); done
    capture_start "$name" || fail "tcpdump does not capture"
    before=$(pings)
    case $when in
    first)
        qipsec a tunnels terminate a-b >/dev/null 2>&1
        await 20 no_sa
        "break_$cause"
        qipsec a tunnels initiate a-b >/dev/null 2>&1 &
        ;;
    rekey)
        await 20 more_pings "$before" || fail "$name: no traffic to begin with"
        "break_$cause"
        rekey
        ;;
    traffic)
        await 20 more_pings "$before" || fail "$name: no traffic to begin with"
        "break_$cause"
        ;;
    boot)
        booting=1
        for n in a b; do end "$n" qipsecd; end "$n" charon; node "$n" ip xfrm state flush; done
        "break_$cause"
        for n in a b; do start "$n"; done
        ;;
    esac
    want=$(of "$cause" 3)
    # With traffic alone most faults stop nothing until the next rekey.
    if [ -n "$want" ] && [ "$policy" = required ] && [ "$when" != traffic ]; then
        check "$name: the log says why" await 40 said "$want"
        if declare -F "look_$cause" >/dev/null; then "look_$cause" "$name"; fi
    fi
    sleep 3
    line=${want:+$(why "$want")}
    booting=0
    "mend_$cause"
    check "$name: the tunnel comes back by itself" await 120 up
    before=$(pings)
    check "$name: and carries traffic" await 30 more_pings "$before"
    capture_stop "$name"
    classes "$name"
    check "$name: on the wire: $quantum ESP with a quantum key, $classical without, $unknown of unknown origin, $clear in clear" wire_ok
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$cause" "$when" "$policy" "$quantum" "$classical" "$unknown" "$clear" "${line#* msg=}" >>"$TESTENV_OUT/matrix.tsv"
    rm -f "$GW/wire/$name.pcap"
}

# set_policy POLICY: charon reads its setting `off` when it starts.
policy_now=required
set_policy() {
    local n off
    [ "$policy_now" != "$1" ] || return 0
    for n in a b; do
        end "$n" qipsecd
        sed -i "s/^policy = .*/policy = \"$1\"/" "$GW/$n/run/etc/"{qipsecd,own}.toml 2>/dev/null
        off=$GW/$n/run/strongswan.d/20-off.conf
        rm -f "$off"
        [ "$1" != off ] || printf 'charon {\n plugins {\n  qipsec {\n   off = a-b\n  }\n }\n}\n' >"$off"
        [ "$1" != off ] && [ "$policy_now" != off ] || charon_stop "$n"
        start "$n"
    done
    policy_now=$1
}

main() {
    local n c w p cell
    version=$(dpkg-query -W -f='${Version}' charon-systemd | sed 's/-.*//')
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    for n in a b; do
        # as qipsec-guard.service does, before the network is up
        qipsec "$n" guard install >"$GW/$n/log/guard.log" 2>&1 || fail "no guard: $(cat "$GW/$n/log/guard.log")"
        sed -i -e 's/^policy = .*/&\ndpd_delay = "2s"/' -e 's/^\[kms\]/&\nlease = 64/' "$GW/$n/run/etc/qipsecd.toml"
        start "$n"
    done
    : >"$TESTENV_OUT/matrix.tsv"
    node_start ha tempt ping -i 0.2 -W 1 10.2.0.2
    node_start hb tempt ping -i 0.2 -W 1 10.1.0.2
    QKD_KM=75.0 # not many keys: one cell takes all of them
    qkdsim_start "" "first_keys = 3000"
    if [ $# = 0 ]; then
        for c in $(cut -d'~' -f1 <<<"$causes"); do
            if [ "${ALL:-}" = 1 ]; then
                for w in $(of "$c" 2); do set -- "$@" "$c:$w:${POLICY:-required}"; done
            else
                set -- "$@" "$c"
            fi
        done
    fi
    for cell; do
        IFS=: read -r c w p <<<"$cell"
        [ -n "$(of "$c" 1)" ] || fail "no cause is named '$c'"
        cell "$c" "${w:-$(of "$c" 2 | cut -d' ' -f1)}" "${p:-required}"
    done
}

main "$@"
