#!/usr/bin/env bash
# demo-stage1.sh: the paper's stage 1 test (section 5, table 10): two domains,
# direct mode, seven steps, each shown by what the programs themselves report.
# No IPsec, no root. Exit status 0 only if every step was seen.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 022 # the daemons take no config that others can change
d=$(mktemp -d)
# Addresses by the process number, so that two demos can run at once.
net=127.$((64 + $$ / 256 % 64)).$(($$ % 256))
a=$net.1
b=$net.2
pids=()

finish() {
    local status=$?
    for p in "${pids[@]}"; do kill "$p" 2>/dev/null || true; done
    for p in "${pids[@]}"; do wait "$p" 2>/dev/null || true; done
    mkdir -p out/demo-stage1
    cp "$d"/*.log out/demo-stage1/ 2>/dev/null || true
    rm -rf "$d"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

step=0
say() { step=$((step + 1)); printf 'ok - step %d: %s\n' "$step" "$*"; }
die() { printf 'not ok - step %d: %s (logs: out/demo-stage1)\n' "$((step + 1))" "$*"; exit 1; }
field() { sed -n "s/^$2 = \"\(.*\)\"$/\1/p" "$1" | head -1; }
# seen FILE REGEXP: waits up to 20 s for a line.
seen() {
    local _
    for _ in $(seq 200); do
        grep -qE "$2" "$1" 2>/dev/null && return
        sleep 0.1
    done
    return 1
}
# shown FILE REGEXP: that line, without time and level.
shown() { grep -E "$2" "$1" | head -1 | sed -E 's/^time=[^ ]+ level=[A-Z]+ /       /'; }

bin/qipsec init --pair a b --out "$d/site" --no-ipsec --here --address "$a,$b" >/dev/null
pair=$(field "$d/site/a/qipsecd.toml" id)
mkdir "$d/made-a" "$d/made-b"
cat >"$d/qkdsim.toml" <<END
[pair]
id = "$pair"
seed = $((RANDOM * 32768 + RANDOM + 1))
first_keys = 100
keys_per_file = 100
on_demand = true
[link]
device = "ingaas-1ghz"
[master]
node = "a"
qkd_id = "$(field "$d/site/a/qipsecd.toml" qkd_id)"
dir = "made-a"
[slave]
node = "b"
qkd_id = "$(field "$d/site/b/qipsecd.toml" qkd_id)"
dir = "made-b"
END
for n in a b; do
    bin/qipsecd -config "$d/site/$n/qipsecd.toml" >"$d/$n.log" 2>&1 &
    pids+=($!)
done
bin/qkdsim -config "$d/qkdsim.toml" >"$d/qkdsim.log" 2>&1 &
pids+=($!)

name=$pair-00000000000000000001.qkd
for _ in $(seq 200); do [ -e "$d/made-b/$name" ] && [ -e "$d/made-a/$name" ] && break; sleep 0.1; done
bin/qipsec keyfile inspect "$d/made-a/$name" >"$d/inspect-a.log" || die "no Key-file of the master"
bin/qipsec keyfile inspect "$d/made-b/$name" >"$d/inspect-b.log" || die "no Key-file of the slave"
grep -q master "$d/inspect-a.log" && grep -q slave "$d/inspect-b.log" || die "the two Key-files are not of the two types"
say "the QKD simulator made two types of Key-files, master and slave: $name"

for n in a b; do mv "$d/made-$n/$name" "$d/site/$n/intake/$name"; done
say "it sent them to the QKMS on both sides"

for n in a b; do
    seen "$d/$n.log" 'QKD-Key file taken in' || die "QKMS $n took no Key-file in"
done
say "each QKMS extracted the key data and reformatted it"
for n in a b; do printf '     %s:%s\n' "$n" "$(shown "$d/$n.log" 'QKD-Key file taken in')"; done

for n in a b; do
    seen "$d/$n.log" 'M102 agreed' || die "QKMS $n reports no agreement (M102)"
done
say "the QKMS pair validated the keys with M102"
for n in a b; do printf '     %s:%s\n' "$n" "$(shown "$d/$n.log" 'M102 agreed')"; done

sae() { # NODE ADDRESS PEER COMMAND ARGS...
    local n=$1 addr=$2 peer=$3
    shift 3
    local cmd=$1
    shift
    bin/qipsec sae "$cmd" --url "https://$addr:8442" --peer "$peer" --ca "$d/site/$n/pki/sae-ca.crt" \
        --cert "$d/site/$n/pki/saes/$n-te.crt" --key "$d/site/$n/pki/saes/$n-te.key" "$@"
}
for i in $(seq 100); do
    got=$(sae a "$a" b-te get-key --number 3 2>"$d/get-key.log") && break
    [ "$i" -lt 100 ] || die "GetKey: $(cat "$d/get-key.log")"
    sleep 0.1
done
say "transmission device 1 called GetKey at QKMS a"
sed 's/^/       /' <<<"$got"

# shellcheck disable=SC2046 # one word per Key-ID
with=$(sae b "$b" a-te get-key-with-id $(awk '{print $2}' <<<"$got") 2>"$d/with.log") || die "GetKeyWithID: $(cat "$d/with.log")"
say "transmission device 2 called GetKeyWithID at QKMS b with these Key-IDs"
sed 's/^/       /' <<<"$with"

[ -n "$got" ] && [ "$got" = "$with" ] || die "Key-IDs or keys differ"
say "Key-IDs and keys of both devices are equal"
