#!/usr/bin/env bash
# run.sh: the model of what two nodes agree on (pool.pml), checked by spin.
#
# usage: testenv/model/run.sh [quick|full|trail MUTATION|NAME]
#
#   quick   the small models, and every mutation (default; under a minute)
#   full    every model and every mutation
#   trail   prints, in words, how spin breaks the mutation, or the model NAME
#
# Each model is searched exhaustively: every order of every step. A mutation is
# the model with one rule left out; spin has to find the claim that it breaks,
# or that claim would prove nothing. docs/model.md says more.
#
# environment: MODEL_LIMIT, seconds for one search (default 540); MODEL_MEM, MB for
# one search (default 1950; two run at once).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
limit=${MODEL_LIMIT:-540}
mem=${MODEL_MEM:-1950}

# models: name|when|defines|what it shows
models() {
    cat <<'END'
lease|quick|-DK=2 -DCRASHES=2 -DSTALES=0|leases, notices, burn: two crashes
late|quick|-DK=2 -DCRASHES=1 -DSTALES=1|leases, notices, burn: a crash, a message that comes late and again
restore|quick|-DK=2 -DCRASHES=0 -DSTALES=0 -DRESTORES=1|the disk of one node restored
validate|quick|-DK=2 -DCRASHES=1 -DSTALES=1 -DM102|intake and M102: a crash, a late message, bytes that differ
floor|quick|-DK=2 -DCRASHES=1 -DSTALES=0 -DFLOOR|put back, notices that expire unsent, the sweep: a crash
transfer|quick|-DK=2 -DCRASHES=1 -DSTALES=0 -DTRANSFER|transfer: a crash
expiry|quick|-DK=2 -DCRASHES=2 -DSTALES=0 -DEXPIRY|expiry: two crashes
expiry-late|full|-DK=2 -DCRASHES=1 -DSTALES=1 -DEXPIRY|expiry: a crash, a late message
expiry-restore|full|-DK=2 -DCRASHES=0 -DSTALES=0 -DRESTORES=1 -DEXPIRY|expiry: a restored disk
expiry-transfer|full|-DK=2 -DCRASHES=1 -DSTALES=0 -DEXPIRY -DTRANSFER|expiry and transfer: a crash
transfer-floor|full|-DK=2 -DCRASHES=1 -DSTALES=0 -DTRANSFER -DFLOOR|transfer, put back, the sweep: a crash
transfer-floor-late|full|-DK=2 -DCRASHES=0 -DSTALES=1 -DTRANSFER -DFLOOR|transfer, put back, the sweep: a late message
restore-crash|full|-DK=2 -DCRASHES=1 -DSTALES=0 -DRESTORES=1|a restored disk and a crash
restore-late|full|-DK=2 -DCRASHES=0 -DSTALES=1 -DRESTORES=1|a restored disk and a late message
transfer-crashes|full|-DK=2 -DCRASHES=2 -DSTALES=0 -DTRANSFER|transfer: two crashes
transfer-late|full|-DK=2 -DCRASHES=1 -DSTALES=1 -DTRANSFER|transfer: a crash and a late message
transfer-restore|full|-DK=2 -DCRASHES=0 -DSTALES=0 -DRESTORES=1 -DTRANSFER|transfer: a restored disk
supply-only|full|-DSUPPLY_ONLY -DK=2 -DCRASHES=0 -DSTALES=1 -DRESTORES=1 -DTRANSFER|transfer: a restored disk and a late message; only the claims on what is supplied
END
}

# mutations: name|claim it breaks|defines
mutations() {
    cat <<'END'
BUG_HAND_OUT_BEFORE_ACK|once_per_side|-DSUPPLY_ONLY -DK=2 -DCRASHES=0 -DSTALES=0 -DRESTORES=1
BUG_NO_ADOPT|leased_on_both_or_neither|-DK=2 -DCRASHES=0 -DSTALES=0 -DRESTORES=1
BUG_NO_SYNC|once_per_side|-DSUPPLY_ONLY -DK=2 -DCRASHES=0 -DSTALES=0 -DRESTORES=1
BUG_MARK_IN_MEMORY|once_per_side|-DSUPPLY_ONLY -DK=2 -DCRASHES=2 -DSTALES=0
BUG_ACK_BEFORE_WRITE|once_per_side|-DSUPPLY_ONLY -DK=2 -DCRASHES=1 -DSTALES=0 -DRESTORES=1
BUG_NO_BURN|active_on_both_or_neither|-DK=2 -DCRASHES=1 -DSTALES=0
BUG_BURN_ALL|noticed_stays|-DK=2 -DCRASHES=1 -DSTALES=0
BUG_RESET_KEEPS_OWN|leased_on_both_or_neither|-DK=2 -DCRASHES=1 -DSTALES=0
BUG_NO_NOTICE|notice_first|-DK=2 -DCRASHES=0 -DSTALES=0
BUG_ANY_PROOF|same_bytes|-DK=2 -DCRASHES=0 -DSTALES=0 -DM102
BUG_PUT_BACK_BELOW_FLOOR|leased_on_both_or_neither|-DK=4 -DCRASHES=0 -DSTALES=0 -DFLOOR
BUG_EXPIRE_IN_MEMORY|expired_stays_gone|-DSUPPLY_ONLY -DK=2 -DCRASHES=0 -DSTALES=0 -DEXPIRY
BUG_PUT_BACK_GIVEN|leased_on_both_or_neither|-DK=2 -DCRASHES=1 -DSTALES=0 -DFLOOR -DTRANSFER
BUG_RECLAIM|one_owner|-DSUPPLY_ONLY -DK=2 -DCRASHES=0 -DSTALES=0 -DTRANSFER
BUG_USE_WHILE_GIVING|not_in_transfer|-DSUPPLY_ONLY -DTRANSIT_ONLY -DK=2 -DCRASHES=0 -DSTALES=0 -DTRANSFER
BUG_BURN_SPARES|burned_stays_gone|-DSUPPLY_ONLY -DK=2 -DCRASHES=1 -DSTALES=0
BUG_EXPIRE_KEEPS_KEY|stranded_on_both|-DK=2 -DCRASHES=0 -DSTALES=0
BUG_BURN_NOT_GIVEN|leased_on_both_or_neither|-DK=2 -DCRASHES=1 -DSTALES=0 -DTRANSFER
BUG_BURN_ANY_OWNER|leased_on_both_or_neither|-DK=2 -DCRASHES=1 -DSTALES=1 -DTRANSFER
BUG_BURN_MEMORY_ONLY|active_on_both_or_neither|-DK=2 -DCRASHES=2 -DSTALES=1
BUG_SYNC_FOR_ANYONE|active_on_both_or_neither|-DK=2 -DCRASHES=1 -DSTALES=0 -DM102
BUG_FORGET_LAST_LEASE|leased_on_both_or_neither|-DK=2 -DCRASHES=1 -DSTALES=0 -DRESTORES=1
BUG_REFUSED_FOR_EVER|sync_gets_on|-DK=2 -DCRASHES=2 -DSTALES=0 -DRESTORES=1
END
}

# search DIR LEVEL DEFINES...: the search's report into DIR/pan.log. LEVEL is the
# compiler's: a search that ends soon is not worth a slow compilation.
search() {
    local dir=$1 level=$2
    shift 2
    mkdir -p "$dir"
    cp "$here/pool.pml" "$dir/"
    (
        cd "$dir"
        spin "$@" -a pool.pml >spin.log 2>&1
        gcc "$level" -w -DSAFETY -DCOLLAPSE -DNOFAIR "-DMEMLIM=$mem" -o pan pan.c
        timeout -k 5 "$limit" ./pan -m100000 >pan.log 2>&1
    ) || true
}

# verdict DIR: "ok", or the claim that is broken, or why the search is not whole.
verdict() {
    local log=$1/pan.log broken
    [ -s "$log" ] || { echo "no search: $(tail -1 "$1/spin.log" 2>/dev/null)"; return; }
    broken=$(sed -nE 's/^pan:1: assertion violated ([a-z_]+).*/\1/p; s/^pan:1: (invalid end state).*/\1/p' "$log" | head -1)
    if [ -n "$broken" ]; then
        echo "$broken"
    elif grep -q 'errors: 0$' "$log" && ! grep -qE 'max search depth too small|out of memory|Search not completed' "$log"; then
        echo ok
    else
        echo "not searched to the end: $(grep -oE 'out of memory|max search depth too small' "$log" | head -1 || true)"
    fi
}

# size DIR: states, seconds, memory.
size() {
    local n s m
    n=$(sed -nE 's/^ +([0-9.e+]+) states, stored.*/\1/p' "$1/pan.log")
    s=$(sed -nE 's/^pan: elapsed time ([0-9.]+).*/\1/p' "$1/pan.log")
    m=$(sed -nE 's/^ *([0-9]+)\.[0-9]+\ttotal actual memory usage.*/\1/p' "$1/pan.log")
    echo "$n states, ${s} s, $m MB"
}

check_model() {
    local name=$1 defines=$3 what=$4 got
    # shellcheck disable=SC2086 # defines are words
    search "$work/$name" -O1 $defines
    got=$(verdict "$work/$name")
    if [ "$got" = ok ]; then
        echo "ok - model $name: $what ($(size "$work/$name"))"
    else
        echo "not ok - model $name: $what: $got"
    fi
}

check_mutation() {
    local name=$1 claim=$2 defines=$3 got
    # shellcheck disable=SC2086
    search "$work/$name" -O0 $defines "-D$name"
    got=$(verdict "$work/$name")
    if [ "$got" = "$claim" ]; then
        echo "ok - $name breaks $claim"
    else
        echo "not ok - $name shall break $claim: $got"
    fi
}

# trail NAME: the steps to the broken claim, in words; the search goes by
# breadth, so that they are few.
trail() {
    local name=$1 defines
    defines=$({ models | awk -F'|' -v n="$name" '$1 == n { print $3 }'; mutations | awk -F'|' -v n="$name" '$1 == n { print $3, "-D" n }'; })
    [ -n "$defines" ] || { echo "no model or mutation is named '$name'" >&2; exit 2; }
    mkdir -p "$work/trail"
    cp "$here/pool.pml" "$work/trail/"
    cd "$work/trail"
    # shellcheck disable=SC2086
    {
        spin $defines -DTELL -DBREADTH -a pool.pml >spin.log 2>&1
        gcc -O2 -w -DSAFETY -DCOLLAPSE -DBFS "-DMEMLIM=$((2 * mem))" -o pan pan.c
        timeout -k 5 "$limit" ./pan >pan.log 2>&1 || true
        [ -e pool.pml.trail ] || { echo "no claim is broken"; return; }
        spin $defines -DTELL -DBREADTH -T -t pool.pml | awk '/^spin: trail ends/ { exit } NF && !/^spin: text/'
        sed -nE 's/^pan:1: //p' pan.log
    }
}

main() {
    local mode=${1:-quick} list line f
    command -v spin >/dev/null || { echo "not ok - spin is not installed: scripts/deps.sh test"; exit 1; }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    case $mode in
    quick) list=$(models | grep '|quick|') ;;
    full) list=$(models) ;;
    trail) trail "${2:?usage: run.sh trail NAME}"; return ;;
    *) sed -n '4p' "$0" >&2; exit 2 ;;
    esac
    {
        printf '%s\n' "$list" | sed 's/^/model|/'
        mutations | sed 's/^/mutation|/'
    } >"$work/list"
    while IFS= read -r line; do
        IFS='|' read -r -a f <<<"$line"
        "check_${f[0]}" "${f[@]:1}" | tee -a "$work/result" &
        while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n || true; done
    done <"$work/list"
    wait
    [ "$(grep -c '^ok - ' "$work/result")" = "$(wc -l <"$work/list")" ]
}

main "$@"
