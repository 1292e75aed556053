#!/usr/bin/env bash
# bench.sh: the table of measurements, behind `make bench`; numbers in
# out/bench.json. Arguments go to testenv/bench (-rounds, -slice, ...; -h lists
# them). A quiet machine gives narrow quartiles; on a busy one look at the ratios.
set -euo pipefail
cd "$(dirname "$0")/.."
CGO_ENABLED=0 go build -trimpath -o bin/bench ./testenv/bench
commit=$(git rev-parse --short HEAD 2>/dev/null) || commit=unknown
[ -z "$(git status --porcelain -uno 2>/dev/null)" ] || commit+=" and changes"
printf '%s, commit %s\n' "$(date -u +%Y-%m-%d)" "$commit"
exec bin/bench "$@"
