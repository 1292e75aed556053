#!/usr/bin/env bash
# test.sh: every test, behind `make test`. The Go tests run first, under the race
# detector; then the scenarios that need a kernel with ESP, each in testenv/run.
# Logs: out/test/. The last line is "total: N passed, N failed, N skipped".
set -euo pipefail
cd "$(dirname "$0")/.."
exec bin/testrun -out out/test \
    "testenv/run testenv/stock.sh" \
    "testenv/sad.sh" \
    "scripts/demo-stage1.sh" \
    "testenv/labtest.sh" \
    "testenv/run testenv/demo.sh" \
    "scripts/testbed-test.sh" \
    "testenv/run testenv/faults.sh" \
    "testenv/run testenv/rekeys.sh" \
    "testenv/run testenv/lifetimes.sh" \
    "testenv/run testenv/secrets.sh"
