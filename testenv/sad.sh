#!/bin/bash
# sad.sh: sad and sad/xfrm against a kernel with ESP.
#
# usage: testenv/sad.sh [TEST-REGEXP]     builds, then runs itself by testenv/run
#
# Passes when every TestKernel... of the two packages passes, none skipped.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
repo=$(dirname "$here")
bin=$repo/out/sad-test
packages=(sad sad/xfrm)

# outside: build; the machine's files are read-only inside.
if [ -z "${TESTENV_KIND:-}" ]; then
    mkdir -p "$bin"
    for package in "${packages[@]}"; do
        (cd "$repo" && go test -c -o "$bin/${package//\//-}.test" "./$package")
    done
    exec "$here/run" "$here/sad.sh" "$@"
fi

# inside: charon would have the IPv6 modules loaded on demand; UML has them as files
if [ "$TESTENV_KIND" = uml ]; then modprobe -a ipv6 esp6; fi
rc=0
for package in "${packages[@]}"; do
    log=$TESTENV_OUT/${package//\//-}.log
    cd "$repo/$package"
    good=1
    QIPSEC_ESP=1 "$bin/${package//\//-}.test" -test.v -test.timeout 200s -test.run "${1:-^TestKernel}" >"$log" 2>&1 || good=0
    if ! grep -q '^--- PASS: TestKernel' "$log" || grep -q -- '--- SKIP' "$log"; then
        echo "$package: no test ran, or one was skipped"
        good=0
    fi
    # result lines for testrun; the log below shows more of a failure
    sed -nE "s|^--- PASS: ([^ ]+).*|ok - $package: \1|p; s|^--- FAIL: ([^ ]+).*|not ok - $package: \1|p" "$log"
    if [ "$good" = 0 ]; then
        rc=1
        cat "$log"
    fi
done
exit "$rc"
