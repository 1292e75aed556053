#!/bin/bash
# unprivileged.sh: runs a script of this repository as a user without any privilege,
# with the limit of locked memory that Debian gives such a user, on a copy of what
# it needs: what the README says needs no root must work without.
#
# usage: testenv/unprivileged.sh SCRIPT [ARGS...]     (needs root, to give it up)
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "unprivileged.sh: needs root, to give it up" >&2; exit 1; }
nobody=65534

out=$PWD/out
tmp=$(mktemp -d)
trap 'mkdir -p "$out" && cp -r "$tmp/out/." "$out/"; rm -rf -- "$tmp"' EXIT
cp -a bin conf scripts testenv "$tmp/"
chmod 755 "$tmp"
mkdir "$tmp/out"
chown -R "$nobody:$nobody" "$tmp"
cd "$tmp"
env -i PATH="$PATH" HOME="$tmp" \
    prlimit --memlock=8388608:8388608 \
    setpriv --reuid="$nobody" --regid="$nobody" --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs \
    --pdeathsig TERM -- "$@" &
trap 'kill -TERM $! && wait $!; exit 143' TERM INT
wait $!
