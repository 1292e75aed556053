#!/usr/bin/env bash
# fuzz.sh: each fuzz target of the tree for FUZZTIME (default 10s). Inputs are made
# smaller by a few tries only: by default that takes all the time there is.
set -euo pipefail
cd "$(dirname "$0")/.."
n=0
while IFS=: read -r file _ line; do
    target=$(sed -E 's/^func (Fuzz[A-Za-z0-9_]+).*/\1/' <<<"$line")
    printf '%-60s ' "$(dirname "$file") $target"
    if ! out=$(go test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-10s}" -fuzzminimizetime 20x "./$(dirname "$file")" 2>&1); then
        printf 'FAIL\n%s\n' "$out"
        exit 1
    fi
    grep -oE 'execs: [0-9]+' <<<"$out" | tail -1
    n=$((n + 1))
done < <(git grep -nE '^func Fuzz[A-Za-z0-9_]+\(' -- '*_test.go')
[ "$n" -gt 0 ]
echo "$n targets, no crash"
