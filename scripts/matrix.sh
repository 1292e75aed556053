#!/usr/bin/env bash
# matrix.sh: docs/fail-closed.md from the rows of testenv/matrix.sh.
#
# usage: scripts/matrix.sh ROWS.tsv... >docs/fail-closed.md
set -euo pipefail
cd "$(dirname "$0")/.."

cause() { # its description, from the scenario's own table
    awk -F'~' -v c="$1" '$1 == c && NF == 4 { print $4 }' testenv/matrix.sh | sed "s/'\"'\"'/'/g"
}
log() { # one cell of the table: the message alone, no Key-ID, no pipe
    sed -E 's/" (part|event)=.*//; s/[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}/.../g; s/\\"/"/g; s/^"//; s/\|/\\|/g; s/^$/-/' <<<"$1" | cut -c1-200
}

absent_cells() {
    sed -n "/^absent_cells='/,/^'/{//!p}" testenv/matrix.sh | sed "s/'\"'\"'/'/g" | while IFS='~' read -r cell why; do
        printf '%s (%s: %s)\n' "$(cause "${cell%% *}")" "\`${cell#* }\`" "$why"
    done | paste -sd';' | sed 's/;/; /g'
}

cat <<END
# Who dies or lies, and what goes over the wire

Written by the test run itself (\`make soak\`, part matrix; testenv/matrix.sh), $(date -u +%F), commit $(git rev-parse --short HEAD). Two gateways under traffic both ways, tcpdump between them. Each row is one run: the fault comes, is looked at, is mended, and the tunnel must come back by itself. A row stands here only if it passed.

When: \`first\`, before the first SA; \`rekey\`, with traffic and rekeys asked for at both ends; \`traffic\`, with traffic alone; \`boot\`, everything starts with the fault there. Packets: ESP of SAs with a quantum key, ESP of SAs with IKE's own keys alone, ESP of unknown origin, anything in clear. Under \`required\` the last three must be 0; under \`optional\` IKE's own keys may carry traffic, with an alarm, and nothing keeps the network's own routes from being used while there is no SA; under \`off\`, which charon's setting \`plugins.qipsec.off\` names too, charon keys the tunnel without qipsecd, so all ESP must be of origin unknown to it.

Not there: $(absent_cells).

| fault | when | policy | quantum | classical | unknown | clear | what the log said |
|---|---|---|---|---|---|---|---|
END
while IFS=$'\t' read -r c when policy quantum classical unknown clear line; do
    printf '| %s | %s | %s | %s | %s | %s | %s | %s |\n' "$(cause "$c")" "$when" "$policy" "$quantum" "$classical" "$unknown" "$clear" "$(log "$line")"
done < <(cat "$@")
