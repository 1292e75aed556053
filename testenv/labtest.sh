#!/usr/bin/env bash
# labtest.sh: make lab as a user finds it: it comes up, the lines that it prints
# work as they stand, it goes down and leaves nothing. Result lines for testrun.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'scripts/lab.sh down >/dev/null 2>&1; rm -rf "$out"' EXIT
die() { echo "not ok - lab: $*"; cat "$out"/*; exit 1; }

LAB_NET=83 scripts/lab.sh up >"$out/up" 2>&1 &
for i in $(seq 450); do
    grep -q 'make lab-down' "$out/up" && break
    [ "$i" -lt 450 ] || die "not up after 45 s"
    sleep 0.1
done
echo "ok - lab: two nodes are up with keys"
sed -n 's/^  //p' "$out/up" | bash >"$out/curl" 2>&1 || die "the printed lines fail"
key=$(grep -oE '\{"keys":\[\{"key_ID":"[^"]+","key":"[^"]{44}"\}\]\}' "$out/curl" | sort | uniq -c | awk '{print $1}')
[ "$key" = 2 ] || { sed -i 's/"key":"[^"]*"/"key":"-"/g' "$out/curl"; die "GetKey and GetKeyWithID by curl do not give one and the same key"; }
grep -q '"stored_key_count":[1-9]' "$out/curl" || { sed -i 's/"key":"[^"]*"/"key":"-"/g' "$out/curl"; die "no status"; }
echo "ok - lab: the printed curl lines work as they stand, both SAEs get the same key"
scripts/lab.sh down || die "lab-down fails"
wait
[ ! -e lab.env ] && ! pgrep -f 'out/lab/' >/dev/null || die "something is left after lab-down"
echo "ok - lab: lab-down leaves nothing"
