#!/bin/bash
# restarts.sh: restarts of charon, of qipsecd and of both, in every order, in order
# and by kill -9, under traffic; and the guard while nothing else is there. What must
# become of the SAs is the table "Restarts" of docs/architecture.md.
#
# usage: testenv/run testenv/restarts.sh [PART|CELL...]      (default: all parts)
#   PART  boot         the guard alone, then the daemons (only as the first one)
#         cells        each CELL of node b, and three of node a; ALL=1: all of a too
#         crash        everything killed, SAs and charon's policies flushed, as by a reset
#         upgrade      everything stopped, the plugin taken out and put back
#         kept         the SPD is flushed under qipsecd's eyes; the operator removes the guard
#         peer_in_r    a's remote_ts contains the address of b, for IKE and Type-1
#         peer_in_both likewise at both ends, and each local_ts its own address
#   CELL  NODE:HOW:WHAT     HOW: stop, kill; WHAT: charon, qipsecd, both (at once), or
#         charon,qipsecd or qipsecd,charon (in that order, down and up)
#
# After each cell the numbered pings of both directions say what was lost, the wire
# shows nothing but IKE and ESP with quantum keys, journal, SAD and charon name the
# same SAs at both ends, and over the whole scenario no Key-ID made two CHILD_SAs and
# no key was installed twice.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

daemons='charon qipsecd'
other() { if [ "$1" = a ]; then echo b; else echo a; fi; }

# --- what three parties say of the SAs --------------------------------------------
in_sad() { node "$1" ip xfrm state | awk '/proto esp spi/ { print substr($4, 3) }' | sort; }
in_charon() { node "$1" swanctl --list-sas 2>>"$GW/$1/log/swanctl.log" | sed -nE 's/^ +(in|out) +([0-9a-f]{8}).*/\2/p' | sort; }
# Not committed ones bear a mark, which no other list has.
in_journal() {
    local op spi
    sed -nE 's/.*"op":"([a-z]+)".*"SPI":([0-9]+),.*/\1 \2/p' "$GW/$1/run/q-ipsec/sad.journal" |
        awk '$1 == "gone" { delete op[$2]; next } { op[$2] = $1 } END { for (spi in op) print op[spi], spi }' |
        while read -r op spi; do
            printf '%08x%s\n' "$spi" "$([ "$op" = commit ] || echo " $op")"
        done | sort
}
# agreed: all three name the same SAs, some, and both nodes the same.
agreed() {
    local n sad all=''
    for n in a b; do
        sad=$(in_sad "$n")
        [ -n "$sad" ] && [ "$sad" = "$(in_journal "$n")" ] && [ "$sad" = "$(in_charon "$n")" ] || return
        [ -z "$all" ] || [ "$sad" = "$all" ] || return
        all=$sad
    done
}
agree() {
    local n list
    await 45 agreed && return
    for n in a b; do
        for list in in_sad in_journal in_charon; do echo "$list $n:" "$($list "$n")"; done
    done
    return 1
}
# ended NODE SPIS: none of them is in its SAD.
ended() { ! in_sad "$1" | grep -qxF -- "$2"; }
ended_both() { ended a "$1" && ended b "$1"; }
holds() { [ "$(in_sad "$1" | grep -cxF -- "$2")" = "$(wc -l <<<"$2")" ]; }
renewed() { tunnel_up && ended_both "$1"; }

# reused: what was used twice since the scenario began, by the logs of both ends.
reused() {
    local n
    for n in a b; do
        sed -nE "s/.*msg=\"SA installed\".* key_id=([0-9a-f-]+) spi=([0-9a-f]{8}) .* fingerprint=([0-9a-f]+).*/$n \1 \2 \3/p" "$GW/$n/log/qipsecd.log"
    done | awk '
        !seen[$2, $3]++ && ++spis[$2] > 2 { print "Key-ID " $2 " keyed a third SPI, " $3 }
        installed[$1, $4]++ { print $1 " installed a key twice, SPI " $3 }
        ($4 in spi) && spi[$4] != $3 { print "one key for SPIs " spi[$4] " and " $3 }
        { spi[$4] = $3; lines++ }
        END { if (!lines) print "no SA was installed" }'
}
nothing_reused() {
    local what
    what=$(reused)
    [ -z "$what" ] || { echo "$what"; return 1; }
}

# --- traffic -----------------------------------------------------------------------
pings_start() {
    node_start ha "ping-$1" ping -i 0.05 -W 2 10.2.0.2
    node_start hb "ping-$1" ping -i 0.05 -W 2 10.1.0.2
}
replies() { cat "$GW/$1/log/ping-$2.log" 2>/dev/null | grep -c 'bytes from'; }
more_than() { [ "$(replies ha "$1")" -gt "$2" ] && [ "$(replies hb "$1")" -gt "$3" ]; }
flows() { await "${2:-30}" more_than "$1" "$(replies ha "$1")" "$(replies hb "$1")"; }
# pings_end NAME: lost, of both directions, and in words which. What was still on its
# way at the end is not counted.
pings_end() {
    local n count which
    lost=0 losses=''
    for n in ha hb; do
        node_stop "$n" "ping-$1"
        read -r count which < <(sed -nE 's/.*bytes from .*icmp_seq=([0-9]+) .*/\1/p' "$GW/$n/log/ping-$1.log" | awk '
            $1 > next_seq + 1 { lost += $1 - next_seq - 1; gaps = gaps " " next_seq + 1 "-" $1 - 1 }
            $1 <= next_seq { gaps = gaps " late:" $1 }
            $1 > next_seq { next_seq = $1 }
            END { print lost + 0, "of " next_seq + 0 (gaps ? " (numbers" gaps ")" : "") }')
        lost=$((lost + count))
        losses+="${losses:+, }$n $count $which"
    done
}
clean() { capture_stop "$1" && quantum_only "$1"; }
# one_ping N ADDRESS [OPTIONS]
one_ping() { nsenter --net="/run/netns/$1" ping -q -c 1 -W 1 "${@:3}" "$2" >>"$GW/pings.log" 2>&1; }
# shut: no ping passes, either way.
shut() { ! one_ping ha 10.2.0.2 && ! one_ping hb 10.1.0.2; }

# --- daemons -----------------------------------------------------------------------
declare -A mark=()
since() { tail -n +$((${mark[$1]:-0} + 1)) "$GW/$1/log/qipsecd.log" | grep -qE -- "$2"; }
marks() { local n; for n in a b; do mark[$n]=$(wc -l <"$GW/$n/log/qipsecd.log"); done; }

# down NODE HOW DAEMON...: at once; fails if an orderly stop is not orderly.
down() {
    local n=$1 how=$2 d pid rc bad=0
    shift 2
    for d; do
        if [ "$how" = stop ]; then kill -TERM "${task_pid[$n/$d]}"; else kill -KILL "${task_pid[$n/$d]}"; fi
    done
    for d; do
        pid=${task_pid[$n/$d]} rc=0
        [ "$how" = kill ] || await 20 node_gone "$n" "$d" || return
        wait "$pid" 2>/dev/null || rc=$?
        unset "task_pid[$n/$d]"
        [ "$how" = kill ] || [ "$rc" = 0 ] || { note "$d of $n ended with status $rc"; bad=1; }
    done
    return "$bad"
}
up() { # NODE DAEMON
    if [ "$2" = charon ]; then charon_start "$1" "$PLUGIN" || fail "charon of $1 does not start"; else qipsecd_start "$1"; fi
}
all_down() {
    local n
    # shellcheck disable=SC2086 # words
    for n in a b; do down "$n" "$1" $daemons || fail "the daemons of $n do not end"; done
}
all_up() {
    local n d
    for n in a b; do for d in $daemons; do up "$n" "$d"; done; done
}

cell() { # NODE:HOW:WHAT
    local how what peer old n name=${1//[:,]/-} began=$SECONDS
    IFS=: read -r n how what <<<"$1"
    peer=$(other "$n")
    note "cell $1"
    await 60 agreed || fail "$1: no tunnel to begin with"
    old=$(in_sad "$n")
    marks
    capture_start "$name" || fail "tcpdump does not capture"
    pings_start "$name"
    flows "$name" || fail "$1: no traffic to begin with"

    case $what in
    *,*) # one after the other, the second one while the first is away
        check "$1: ${what%,*} ends ($how)" down "$n" "$how" "${what%,*}"
        sleep 1
        check "$1: ${what#*,} ends ($how)" down "$n" "$how" "${what#*,}"
        ;;
    # shellcheck disable=SC2086 # words
    both) check "$1: both end ($how)" down "$n" "$how" $daemons ;;
    *) check "$1: it ends ($how)" down "$n" "$how" "$what" ;;
    esac
    if [ "$how" = stop ]; then
        check "$1: at an orderly end the SAs go, at both ends" await 20 ended_both "$old"
    else
        check "$1: after a kill the SAs are still there" holds "$n" "$old"
    fi
    case $what in
    qipsecd,charon)
        up "$n" qipsecd
        await 20 since "$n" 'no charon' || fail "$1: qipsecd does not miss charon"
        up "$n" charon
        ;;
    charon,qipsecd)
        up "$n" charon
        sleep 2
        up "$n" qipsecd
        ;;
    both)
        up "$n" qipsecd
        up "$n" charon
        ;;
    *) up "$n" "$what" ;;
    esac

    if [ "$how:$what" = kill:qipsecd ]; then
        await 30 since "$n" 'connection loaded' || fail "$1: qipsecd does not load the connection"
        check "$1: charon and the new qipsecd keep the SAs, and all agree" agree
        check "$1: they are those of before, at both ends" eval "holds $n '$old' && holds $peer '$old'"
        qipsec "$n" tunnels rekey a-b >>"$GW/$n/log/rekey.log" 2>&1
        check "$1: the next rekey takes a fresh key, and the old SAs go" await 60 renewed "$old"
    else
        check "$1: what charon does not know is gone within one comparison (30 s)" await 35 ended "$n" "$old"
        check "$1: and at the peer, which has found out by itself" await 60 ended "$peer" "$old"
        check "$1: the tunnel comes back by itself" await 120 tunnel_up
    fi
    check "$1: traffic passes both ways" flows "$name"
    check "$1: journal, SAD and charon name the same SAs, at both ends" agree
    pings_end "$name"
    if [ "$how:$what" = kill:qipsecd ]; then
        check "$1: no packet is lost, over crash and rekey: $losses" [ "$lost" = 0 ]
    else
        note "$1: lost $losses"
    fi
    check "$1: no clear and no classical packet on the wire" clean "$name"
    check "$1: nothing was used twice" nothing_reused
    rm -f "$GW/wire/$name.pcap"
    note "$1 took $((SECONDS - began)) s"
}

cells() {
    local what how
    for how in stop kill; do
        for what in charon qipsecd charon,qipsecd qipsecd,charon both; do
            cell "b:$how:$what"
            [ "${ALL:-}" != 1 ] || cell "a:$how:$what"
        done
    done
    [ "${ALL:-}" = 1 ] || for what in stop:both kill:charon kill:qipsecd; do cell "a:$what"; done
}

# --- the guard ----------------------------------------------------------------------
guarded() { qipsec "$1" guard status >>"$GW/$1/log/guard.log" 2>&1; }
guarded_both() { guarded a && guarded b; }
guard() { qipsec "$1" guard install >>"$GW/$1/log/guard.log" 2>&1 || fail "no guard: $(tail -n 3 "$GW/$1/log/guard.log")"; }
# What was blocked stays so over a change of the config, until it is removed.
guard_anew() {
    node "$1" "$BIN/qipsec" guard remove >>"$GW/$1/log/guard.log" 2>&1 || fail "the guard is not removed: $(tail -n 3 "$GW/$1/log/guard.log")"
    guard "$1"
}
from_a() { wire boot-a 'src net 10.1.0.0/24'; }

# charon_flushed N: no SA, and no policy but the guard's: those have no template.
charon_flushed() {
    local p
    node "$1" ip xfrm state flush
    for p in $(node "$1" ip xfrm policy | awk '/priority/ { p = $4 } /^\ttmpl/ { print p }' | sort -u); do
        node "$1" ip xfrm policy deleteall priority "$p" || return
    done
    ! node "$1" ip xfrm policy | grep -q tmpl && [ "$(sa_count "$1")" = 0 ]
}

boot() {
    local n
    check "boot: without the guard the wire carries it in clear (so what follows means something)" \
        eval 'await 10 one_ping ha 10.2.0.2 && await 10 one_ping hb 10.1.0.2'
    guard a
    capture_start boot-a || fail "tcpdump does not capture"
    check "boot: with a's guard alone, before every daemon, nothing passes either way" shut
    capture_stop boot-a
    check "boot: and nothing of a's network is on the wire" [ "$(from_a)" = 0 ]
    guard b
    capture_start boot || fail "tcpdump does not capture"
    pings_start boot
    check "boot: nothing passes before the daemons run" shut
    for n in a b; do up "$n" charon; done
    check "boot: nothing passes with charon alone" shut
    for n in b a; do up "$n" qipsecd; done
    check "boot: nothing passes while there are no keys" shut
    qkdsim_start "" "first_keys = 4000"
    check "boot: the tunnel comes up" await 120 tunnel_up
    check "boot: traffic passes both ways" flows boot
    pings_end boot
    check "boot: no clear and no classical packet on the wire" clean boot
}

crash() {
    local n old
    old=$(in_sad a)
    capture_start crash || fail "tcpdump does not capture"
    pings_start crash
    flows crash || fail "crash: no traffic to begin with"
    all_down kill
    for n in a b; do check "crash: $n has neither SAs nor charon's policies left" charon_flushed "$n"; done
    rm "$GW/a/run/q-ipsec/sad.journal" # as a boot does; b's names SAs that are gone
    check "crash: the guard is in place" guarded_both
    check "crash: nothing passes" shut
    for n in a b; do up "$n" charon; done
    check "crash: nothing passes with charon alone" shut
    for n in a b; do up "$n" qipsecd; done
    check "crash: the tunnel comes back by itself" await 120 renewed "$old"
    check "crash: traffic passes both ways" flows crash
    check "crash: journal, SAD and charon name the same SAs, at both ends" agree
    pings_end crash
    check "crash: no clear and no classical packet on the wire" clean crash
    check "crash: nothing was used twice" nothing_reused
}

# told N SEVERITY TEXT: qipsecd of N has reported of the guard since mark_guard N.
mark_guard() { guard_mark=$(wc -l <"$GW/$1/log/qipsecd.log"); }
told() { tail -n +$((guard_mark + 1)) "$GW/$1/log/qipsecd.log" | grep -qE "$3.*event=ipsec-guard severity=$2"; }
# explained N REGEXP: `qipsec explain` of N has such a line.
explained() { grep -qE -- "$2" <<<"$(qipsec "$1" explain a-b 2>&1)"; }

kept() {
    guarded_both || fail "kept: no guard to begin with"
    pings_start kept
    flows kept || fail "kept: no traffic to begin with"
    mark_guard a
    node a ip xfrm policy flush || fail "kept: nothing is flushed"
    check "kept: without policies at a the guard is missing" eval '! guarded a'
    check "kept: qipsecd puts it back" await 45 guarded a
    check "kept: with an alarm" await 10 told a alarm 'was not in place any more'
    check "kept: explain tells of it" explained a 'guard: in place at .*it was lost and put back'
    check "kept: charon's policies come back as well, and traffic flows" await 60 one_ping ha 10.2.0.2
    flows kept || fail "kept: no traffic"
    pings_end kept

    mark_guard a
    node a "$BIN/qipsec" guard remove >>"$GW/a/log/guard.log" 2>&1 || fail "kept: the guard is not removed"
    check "kept: what the operator removes stays away, with an alarm" await 45 told a alarm 'the operator has removed'
    check "kept: explain tells of it" explained a 'guard: removed by the operator'
    sleep 35 # the comparison after that
    check "kept: nor does the next comparison put it back" eval '! guarded a'
    guard a
    check "kept: installed again it is in place" guarded a
    check "kept: which is told" await 45 told a run 'the guard is in place'
}

upgrade() {
    local n d
    capture_start upgrade || fail "tcpdump does not capture"
    pings_start upgrade
    flows upgrade || fail "upgrade: no traffic to begin with"
    for n in a b; do
        for d in qipsecd charon; do check "upgrade: $d of $n ends in order" down "$n" stop "$d"; done
        rm "$GW/$n/plugins/libstrongswan-qipsec.so"
    done
    check "upgrade: the guard is in place when all have stopped" guarded_both
    check "upgrade: nothing passes" shut
    # What a package does: charon starts anew before the plugin that fits it is there.
    for n in a b; do
        charon_start "$n" || fail "charon of $n does not start without the plugin"
        marks
        up "$n" qipsecd
        check "upgrade: qipsecd of $n says that the plugin is missing" await 40 since "$n" 'a-b.*has not loaded the qipsec plugin'
    done
    check "upgrade: nothing passes" shut
    all_down stop
    all_up
    check "upgrade: the tunnel comes back by itself" await 120 tunnel_up
    check "upgrade: traffic passes both ways" flows upgrade
    pings_end upgrade
    check "upgrade: no clear and no classical packet on the wire" clean upgrade
    check "upgrade: nothing was used twice" nothing_reused
}

# --- the peer's own address in remote_ts --------------------------------------------
# selectors N LOCAL REMOTE: into its config; Type-1 runs between the wire's addresses.
selectors() {
    sed -i -e "s#^local_ts = .*#local_ts = [$2]#; s#^remote_ts = .*#remote_ts = [$3]#" \
        -e 's#^\(type1_listen\|address\) = "198.51.100#\1 = "192.0.2#' "$GW/$1/run/etc/qipsecd.toml"
}
type1='tcp port 8441 and host 192.0.2.1 and host 192.0.2.2'
# stray NAME: what a sent in clear, but for IKE, Type-1 and ARP.
stray() { wire "$1" "not (udp port 500 or esp or arp) and not ($type1) and (src host 192.0.2.1 or src net 10.1.0.0/24)"; }
# quantum_esp NAME: besides, all ESP has quantum keys.
quantum_esp() {
    tcpdump -n -r "$GW/wire/$1.pcap" -w "$GW/wire/$1-rest.pcap" "not ($type1)" 2>/dev/null && quantum_only "$1-rest"
}
bound_to_b() { ! one_ping ha 10.2.0.2 && ! one_ping ha 192.0.2.2 && ! one_ping a 192.0.2.2 && ! one_ping a 192.0.2.77; }
hears_nothing() { ! one_ping b 192.0.2.1 && ! one_ping hb 10.1.0.2; }

peer_in_r() {
    local n
    [ -z "${task_pid[a/charon]:-}" ] || all_down stop
    selectors a '"10.1.0.0/24"' '"10.2.0.0/24", "192.0.2.0/24"'
    selectors b '"10.2.0.0/24", "192.0.2.0/24"' '"10.1.0.0/24"'
    for n in a b; do guard_anew "$n"; done
    capture_start peer-in-r || fail "tcpdump does not capture"
    check "peer_in_r: a reaches neither b's network nor b nor its neighbours in R" bound_to_b
    check "peer_in_r: and hears neither" hears_nothing
    all_up
    check "peer_in_r: the tunnel comes up: IKE, ESP and Type-1 pass the guard" await 120 tunnel_up
    check "peer_in_r: it carries traffic to b's network" await 20 one_ping ha 10.2.0.2
    check "peer_in_r: and to b's own address" await 20 one_ping ha 192.0.2.2
    # without -I, a's packets have the source of charon's route: 10.1.0.1, of local_ts
    check "peer_in_r: what is not of local_ts still does not reach b" eval '! one_ping a 192.0.2.2 -I 192.0.2.1'
    rekeys_and_crashes peer_in_r
    capture_stop peer-in-r
    check "peer_in_r: Type-1 went in clear, $(wire peer-in-r "$type1") packets" [ "$(wire peer-in-r "$type1")" -gt 0 ]
    check "peer_in_r: nothing else left a in clear" [ "$(stray peer-in-r)" = 0 ]
    check "peer_in_r: and all ESP had quantum keys" quantum_esp peer-in-r
}

peer_in_both() {
    local n
    [ -z "${task_pid[a/charon]:-}" ] || all_down stop
    selectors a '"10.1.0.0/24", "192.0.2.1/32"' '"10.2.0.0/24", "192.0.2.2/32"'
    selectors b '"10.2.0.0/24", "192.0.2.2/32"' '"10.1.0.0/24", "192.0.2.1/32"'
    for n in a b; do guard_anew "$n"; done
    capture_start peer-in-both || fail "tcpdump does not capture"
    check "peer_in_both: a reaches neither b nor its network" bound_to_b
    check "peer_in_both: and hears neither" hears_nothing
    all_up
    check "peer_in_both: the tunnel comes up: IKE, ESP and Type-1 pass the guard" await 120 tunnel_up
    check "peer_in_both: it carries traffic between the networks" await 20 one_ping ha 10.2.0.2
    check "peer_in_both: and between the gateways' own addresses" await 20 one_ping a 192.0.2.2
    rekeys_and_crashes peer_in_both
    all_down stop
    sed -i 's/^start = "now"/start = "trap"/' "$GW/a/run/etc/qipsecd.toml"
    all_up
    node_start ha tempt ping -i 0.5 -W 1 10.2.0.2
    check "peer_in_both: with a trap instead, traffic brings the tunnel up: Type-1 does not fall into it" await 120 tunnel_up
    node_stop ha tempt
    sed -i 's/^start = "trap"/start = "now"/' "$GW/a/run/etc/qipsecd.toml"
    capture_stop peer-in-both
    check "peer_in_both: nothing but Type-1 left a in clear" [ "$(stray peer-in-both)" = 0 ]
    check "peer_in_both: and all ESP had quantum keys" quantum_esp peer-in-both
}

# rekeys_and_crashes NAME: Type-1 must pass in every state of the tunnel.
rekeys_and_crashes() {
    local old n
    old=$(in_sad a)
    qipsec a tunnels rekey a-b >>"$GW/a/log/rekey.log" 2>&1
    check "$1: a rekey takes a fresh key" await 60 renewed "$old"
    for n in b a; do
        old=$(in_sad a)
        down "$n" kill charon
        sleep 1
        up "$n" charon
        check "$1: after a kill of $n's charon the tunnel comes back by itself" await 120 renewed "$old"
        await 30 agreed
    done
    old=$(in_sad a)
    all_down kill
    all_up
    check "$1: after a kill of everything the tunnel comes back by itself" await 120 renewed "$old"
    check "$1: and carries traffic" await 20 one_ping ha 10.2.0.2
    check "$1: journal, SAD and charon name the same SAs, at both ends" agree
    check "$1: nothing was used twice" nothing_reused
}

main() {
    local n part
    [ $# -gt 0 ] || set -- boot cells crash kept upgrade peer_in_r peer_in_both
    gw_up && site_up && sftp_intake || fail "cannot prepare"
    for n in a b; do
        sed -i 's/^policy = .*/&\ndpd_delay = "2s"/' "$GW/$n/run/etc/qipsecd.toml"
        printf 'charon {\n retransmit_tries = 2\n retransmit_timeout = 1.5\n}\n' >"$GW/$n/run/strongswan.d/10-haste.conf"
    done
    if [ "$1" != boot ]; then
        for n in a b; do guard "$n"; done
        all_up
        qkdsim_start "" "first_keys = 4000"
        await 90 tunnel_up || fail "no tunnel"
    fi
    for part; do
        note "$part"
        case $part in *:*) cell "$part" ;; *) "$part" ;; esac
    done
}

main "$@"
