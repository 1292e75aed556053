#!/usr/bin/env bash
# test.sh: every test, behind `make test`. The Go tests run first, under the race
# detector; then the scenarios, three at once and the longest first, most of them in
# testenv/run, because they need a kernel with ESP. Logs: out/test/. The last line
# is "total: N passed, N failed, N skipped".
set -euo pipefail
cd "$(dirname "$0")/.."
export TESTENV_TIMEOUT=1800
exec bin/testrun -out out/test -parallel 3 \
    "testenv/run testenv/matrix.sh" \
    "testenv/run testenv/restarts.sh b:kill:qipsecd b:kill:both crash kept" \
    "testenv/run testenv/late.sh" \
    "testenv/run testenv/lifetimes.sh" \
    "testenv/run testenv/ike.sh children reauth" \
    "env ROUNDS=1 TESTENV_PASS=ROUNDS testenv/run testenv/udp-rekeys.sh" \
    "testenv/run testenv/nat.sh" \
    "testenv/run testenv/supply.sh" \
    "testenv/run testenv/suites.sh aes256gcm16 chacha20poly1305 aes256-sha256 esn-window-4096 v6 both-in-v6 transport transport-v6 encap marks if-id copy-dscp-in age-bytes-packets" \
    "testenv/run testenv/demo.sh" \
    "testenv/run testenv/netns.sh" \
    "testenv/run testenv/collision.sh" \
    "testenv/run testenv/forged.sh forge-cookie replay" \
    "testenv/run testenv/rekeys.sh" \
    "testenv/run testenv/secrets.sh" \
    "testenv/model/run.sh quick" \
    "testenv/sad.sh" \
    "scripts/plugin-check.sh" \
    "testenv/run testenv/stock.sh" \
    "scripts/testbed-test.sh" \
    "testenv/unprivileged.sh scripts/demo-stage1.sh" \
    "testenv/unprivileged.sh testenv/labtest.sh"
