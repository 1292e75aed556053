#!/usr/bin/env bash
# soak.sh: the tests with full counts, behind `make soak`.
#
# usage: [PART="NAME ..."] [COUNT=N] [SEED=N] [FRESH=1] scripts/soak.sh
#
#   kill9       two nodes under load, one or both killed 1,000 times (testenv/twonodes)
#   site        a node of two machines on one PostgreSQL, under load: the leader killed 150
#               times, stopped 10 times for longer than the server waits, PostgreSQL
#               crashed 20 times, both machines started at once 60 times
#   full-speed  two nodes issue keys at full speed at once for 5 minutes
#   rekeys      10,000 CHILD_SA rekeys, as fast as both ends allow, under numbered UDP
#               packets, beside a stock tunnel (testenv/udp-rekeys.sh)
#   matrix      every cell of testenv/matrix.sh, under each policy; writes docs/fail-closed.md
#   suites      every type of SA beside charon's own (testenv/suites.sh)
#   restarts    every restart of testenv/restarts.sh
#   ike         every part of testenv/ike.sh, with 100 connections in one gateway
#   forged      what an attacker on the wire can do to keys (testenv/forged.sh)
#   collision   rekeyings that end by halves (testenv/collision.sh)
#   supply      rekeyings that follow the supply of keys (testenv/supply.sh)
#   late        every step of the plugin's socket cut, late, lost and repeated, within
#               2 s for a CHILD_SA, and 40 rekeys while either qipsecd is stopped again
#               and again (testenv/late.sh)
#   model       every model of what two nodes agree on (testenv/model/run.sh)
#   fuzz        every fuzz target for 30 s
#
# kill9, site and full-speed come first, alone; of the rest two run at a time.
# COUNT overrides the counts of kill9, site (kills; the others in proportion) and
# rekeys and the seconds of full-speed.
# Of kill9 and rekeys a few are measured first: where the full count would take
# longer than the part's share of 90 minutes, the largest that does not is run,
# and the table says so.
#
# A part that has passed at this commit, with no change since, is not run again
# unless PART names it or FRESH=1 is set: after an interruption the next call
# goes on. Results: out/soak.json and the same as a table, out/soak.txt; logs in
# out/soak/. Exit status 0 only if every part has passed with its full count or
# the largest that fits.
set -euo pipefail
cd "$(dirname "$0")/.."

alone="kill9 site full-speed"
all="$alone rekeys matrix late ike restarts suites supply forged collision fuzz model"
out=out/soak
end=$((SECONDS + 90 * 60))
seed=${SEED:-$((RANDOM * 32768 + RANDOM + 1))}
commit=$(git rev-parse --short=12 HEAD)
# but the pages that the soak itself writes, or that are written from it
[ -z "$(git status --porcelain -- . ':!docs/fail-closed.md' ':!docs/soak.md')" ] || commit+=+changes
machine="$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), Linux $(uname -r)"

say() { printf 'soak: %s\n' "$*"; }

# share SECONDS: those, or what is left of the 90 minutes.
share() {
    local left=$((end - SECONDS))
    echo $(($1 < left ? $1 : left))
}

# fit WANTED SECONDS N TOOK_MS: how many of WANTED fit, if N took so long.
fit() {
    local most=$(($2 * 1000 * $3 / ($4 > 0 ? $4 : 1)))
    echo $(($1 < most ? $1 : most))
}

ms() { date +%s%3N; }

# twonodes SECONDS LOG TEST FLAGS...: passes progress on. -test.v streams.
twonodes() {
    local limit=$1 log=$2 test=$3
    shift 3
    timeout -k 10 "$limit" go test -count=1 -v -timeout "${limit}s" -run "^$test\$" ./testenv/twonodes "$@" 2>&1 |
        tee "$log" | { grep --line-buffered -E '^ +[a-z_0-9]+\.go:[0-9]+: |^(---|FAIL|panic)' || true; }
}

part_kill9() {
    local limit n=${COUNT:-1000} t
    limit=$(share 2400)
    wanted=1000
    say "kill9: measuring 20 kills"
    t=$(ms)
    twonodes 300 "$out/kill9-measure.log" TestKill9 -kills 20 -seed "$seed" || return
    t=$(($(ms) - t))
    count=$(fit "$n" $((limit * 9 / 10)) 20 "$t") # the measured time has the build in it
    [ "$count" -gt 0 ] || return
    say "kill9: $count kills of $n asked for, $((t / 20)) ms for one at first"
    twonodes "$limit" "$out/kill9.log" TestKill9 -kills "$count" -seed "$seed" || return
    note=$(sed -nE 's/.*: ([0-9]+ kills in .* while both nodes supplied)$/\1/p' "$out/kill9.log" | tail -1)
    note+="; $(grep -oE '[0-9]+ pairs equal, [0-9]+ keys stranded' "$out/kill9.log" | tail -1)"
}

part_site() {
    count=${COUNT:-150}
    wanted=150
    twonodes "$(share $((count * 10 + 300)))" "$out/site.log" 'TestSite.*' -site-kills "$count" -site-freezes "$((count / 15 + 1))" \
        -site-outages "$((count / 8 + 1))" -site-starts "$((count * 2 / 5 + 1))" -seed "$seed" || return
    note="kills of the leader and the rest in proportion; supply came back within $(sed -nE 's/.*supply came back within (.*)$/\1/p' "$out/site.log" | sort -V | tail -1)"
}

part_full-speed() {
    count=${COUNT:-300}
    wanted=300
    twonodes $((count + 180)) "$out/full-speed.log" TestFullSpeed -load "${count}s" -seed "$seed" || return
    note=$(sed -nE 's/.*: ([0-9.]+ keys\/s .*)$/\1/p' "$out/full-speed.log" | tail -1)
}

# part_rekeys: 50 under ping are measured first.
part_rekeys() {
    local limit n=${COUNT:-10000} took
    limit=$(share 3600)
    COUNT=50 scenario 500 rekeys-measure testenv/run testenv/rekeys.sh || return
    took=$(sed -nE 's/.*, a rekey took ([0-9.]+)(m?)s .*/\1 \2/p' "$out/rekeys-measure.log" |
        awk 'END { printf "%d", $2 == "m" ? $1 : $1 * 1000 }')
    [ "$took" -gt 0 ] || return
    # a quarter for a rekey's way to both ends, 300 s for set-up and the stock tunnel
    n=$(fit "$n" $((limit - 300)) 4 $((took * 5)))
    [ "$n" -ge 5 ] || return
    say "rekeys: $n of ${COUNT:-10000} asked for, $took ms for one at first"
    COUNT=$((n / 5)) ROUNDS=5 INTERVAL=0s STOCK=50 TESTENV_MEM=1G TESTENV_PASS="ROUNDS INTERVAL STOCK" \
        scenario "$limit" rekeys testenv/run testenv/udp-rekeys.sh || return
    count=$((n / 5 * 5))
    wanted=10000
    note=$(sed -nE 's/^ok - (lost under .*)$/\1/p' "$out/rekeys.log")
}

# scenario SECONDS NAME COMMAND...: one scenario; its checks are the count.
scenario() {
    local limit=$1 name=$2
    shift 2
    seed_used=null
    TESTENV_TIMEOUT=$(share "$limit") TESTENV_OUT=$out/$name "$@" >"$out/$name.log" 2>&1 || {
        grep -E '^(not ok|FAIL)' "$out/$name.log" || true
        return 1
    }
    count=$(grep -c '^ok - ' "$out/$name.log")
    wanted=$count
    note="checks"
}

# part_matrix: all policies at once, each on a machine of its own.
part_matrix() {
    local policy rows=("$out"/matrix-{required,optional,off}/matrix.tsv) good=1
    for policy in required optional off; do
        (POLICY=$policy ALL=1 TESTENV_PASS="ALL POLICY" scenario 3600 "matrix-$policy" testenv/run testenv/matrix.sh) &
    done
    for _ in 1 2 3; do wait -n || good=0; done
    [ "$good" = 1 ] || return
    count=$(cat "$out"/matrix-{required,optional,off}.log | grep -c '^ok - ')
    wanted=$count
    seed_used=null
    note="checks in $(cat "${rows[@]}" | wc -l) cells"
    scripts/matrix.sh "${rows[@]}" >docs/fail-closed.md
}

part_suites() { TESTENV_MEM=1G scenario 600 suites testenv/run testenv/suites.sh; }
part_restarts() { ALL=1 TESTENV_PASS=ALL scenario 1500 restarts testenv/run testenv/restarts.sh; }
part_ike() { COUNT=100 TESTENV_MEM=1G scenario 1800 ike testenv/run testenv/ike.sh; }
part_forged() { scenario 1500 forged testenv/run testenv/forged.sh; }
part_collision() { scenario 600 collision testenv/run testenv/collision.sh; }
part_supply() { scenario 300 supply testenv/run testenv/supply.sh; }

part_late() {
    ALL=1 COUNT=40 TESTENV_PASS=ALL scenario 2400 late testenv/run testenv/late.sh || return
    note="checks; $(grep -oE '[0-9]+ of [0-9]+ packets lost, .* repeated' "$out/late.log")"
}

part_model() {
    scripts/deps.sh test || return
    scenario 600 model testenv/model/run.sh full || return
    note="checks; $(sed -nE 's/^ok - model .*\(([0-9]+) states, .*/\1/p' "$out/model.log" | awk '{ n += $1 } END { print n }') states"
}

part_fuzz() {
    seed_used=null
    FUZZTIME=30s timeout -k 10 "$(share 1800)" scripts/fuzz.sh 2>&1 | tee "$out/fuzz.log" || return
    count=$(sed -nE 's/^([0-9]+) targets.*/\1/p' "$out/fuzz.log")
    wanted=$count
    note="targets, 30 s each"
}

# json STRING: as a JSON string.
json() {
    local s=${1//\\/\\\\}
    s=${s//\"/\\\"}
    printf '"%s"' "$(tr -d '\000-\037' <<<"$s")"
}

# run PART: one part and its line in out/soak/PART.json. The part runs in the
# condition of an if, where -e does not hold: every step of it says || return.
run() {
    local part=$1 began=$SECONDS result=passed count=0 wanted=0 note="" seed_used=$seed
    say "$part begins"
    if ! "part_$part"; then result=failed; fi
    local less=""
    if [ "$count" -lt "$wanted" ]; then
        less=time
        [ "$count" -ne "${COUNT:--1}" ] || less=COUNT
    fi
    printf '{"part": %s, "count": %d, "wanted": %d, "less": "'"$less"'", "seconds": %d, "result": %s, "seed": %s, "date": %s, "commit": %s, "cores": %d, "machine": %s, "note": %s}\n' \
        "$(json "$part")" "$count" "$wanted" $((SECONDS - began)) "$(json "$result")" "$seed_used" "$(json "$(date -u +%FT%TZ)")" \
        "$(json "$commit")" "$(nproc)" "$(json "$machine")" "$(json "$note")" >"$out/$part.json"
    say "$part has $result (log: $out/$part.log)"
}

# passed PART: it has passed at this commit before.
passed() {
    [ "${FRESH:-}" != 1 ] && [[ $commit != *+changes ]] &&
        grep -qs "\"result\": \"passed\".*\"commit\": \"$commit\"" "$out/$1.json" && [ "$(value "$1" less)" != COUNT ]
}

value() { sed -nE "s/.*\"$2\": \"?([^\",}]*)\"?[,}].*/\1/p" "$out/$1.json"; }

# sum_up: out/soak.json and the table, of all parts that have ever run here.
sum_up() {
    local part sep=""
    {
        printf '['
        for part in $all; do
            [ -e "$out/$part.json" ] || continue
            printf '%s\n  %s' "$sep" "$(cat "$out/$part.json")"
            sep=,
        done
        printf '\n]\n'
    } >out/soak.json
    {
        printf '%-11s %-7s %7s %7s %8s  %-20s  %-12s  %s\n' part result count wanted seconds date commit note
        for part in $all; do
            if [ ! -e "$out/$part.json" ]; then
                printf '%-11s %-7s\n' "$part" "not run"
                continue
            fi
            printf '%-11s %-7s %7s %7s %8s  %-20s  %-12s  %s\n' "$part" "$(value "$part" result)" "$(value "$part" count)" "$(value "$part" wanted)" \
                "$(value "$part" seconds)" "$(value "$part" date)" "$(value "$part" commit)" "$(sed -nE 's/.*"note": "(.*)"\}$/\1/p' "$out/$part.json")"
            case $(value "$part" less) in
            COUNT) printf '%-11s   not the full count of %s: COUNT was set\n' "" "$(value "$part" wanted)" ;;
            time) printf '%-11s   the full count of %s does not fit into the time on this machine, or was not reached\n' "" "$(value "$part" wanted)" ;;
            esac
        done
        printf 'machine: %s cores, %s\n' "$(nproc)" "$machine"
    } | tee out/soak.txt
}

# one PART: if it has not passed before.
one() {
    if [ -z "${PART:-}" ] && passed "$1"; then
        say "$1 has passed at this commit before"
        return
    fi
    rm -f "$out/$1.json"
    run "$1"
    sum_up >/dev/null # an interruption later loses nothing
}

main() {
    local part running=0 failed=0
    mkdir -p "$out"
    for part in ${PART:-$all}; do
        [[ " $all " == *" $part "* ]] || { say "no part is named '$part': $all"; exit 2; }
    done
    for part in ${PART:-$all}; do
        if [[ " $alone " == *" $part "* ]]; then
            one "$part"
            continue
        fi
        if [ "$running" = 2 ]; then
            wait -n
            running=1
        fi
        one "$part" &
        running=$((running + 1))
    done
    wait
    for part in ${PART:-$all}; do
        [ "$(value "$part" result)" = passed ] || failed=1
    done
    sum_up
    exit "$failed"
}

main
