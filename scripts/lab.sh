#!/usr/bin/env bash
# lab.sh up|down: two QKMS nodes on loopback with a simulated QKD link, no root.
#
# Everything is in out/lab. `up` writes lab.env in the working directory, prints
# curl lines that work as they stand, and runs until interrupted or `down`.
# LAB_PORT=1 starts at another pair of loopback addresses (127.0.PORT.1 and .2).
set -euo pipefail
cd "$(dirname "$0")/.."
lab=out/lab
a=127.0.${LAB_NET:-81}.1
b=127.0.${LAB_NET:-81}.2

field() { sed -n "s/^$2 = \"\(.*\)\"$/\1/p" "$1" | head -1; }

stop() {
    local pid
    for name in qkdsim a b; do
        pid=$(cat "$lab/$name.pid" 2>/dev/null) || continue
        # Only what we started: the pid must still run our program from our directory.
        if grep -qs "$PWD/$lab" "/proc/$pid/cmdline" || tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q "$lab/"; then
            kill "$pid" 2>/dev/null || true
            for _ in $(seq 100); do
                kill -0 "$pid" 2>/dev/null || break
                sleep 0.1
            done
        fi
        rm -f "$lab/$name.pid"
    done
    rm -f lab.env
}

start() { # NAME CMD...
    local name=$1
    shift
    "$@" >"$lab/$name.log" 2>&1 &
    echo $! >"$lab/$name.pid"
}

# pool_ready NODE: the node has keys to give.
pool_ready() {
    local n
    n=$(bin/qipsec sae status --url "https://$2:8442" --peer "$3" --json --ca "$lab/$1/pki/sae-ca.crt" \
        --cert "$lab/$1/pki/saes/$1-te.crt" --key "$lab/$1/pki/saes/$1-te.key" 2>/dev/null |
        sed -nE 's/.*"stored_key_count": *([0-9]+).*/\1/p')
    [ "${n:-0}" -gt 0 ]
}

up() {
    if [ -e "$lab/a.pid" ] && kill -0 "$(cat "$lab/a.pid")" 2>/dev/null; then
        echo "the lab runs already; make lab-down ends it" >&2
        exit 1
    fi
    rm -rf "$lab"
    mkdir -p "$lab"
    bin/qipsec init --pair a b --out "$lab" --force --no-ipsec --here --address "$a,$b" >/dev/null
    cat >"$lab/qkdsim.toml" <<-END
	[pair]
	id = "$(field "$lab/a/qipsecd.toml" id)"
	state_file = "qkdsim.seq"
	first_keys = 5000
	[link]
	device = "ingaas-100mhz"
	km = 25.0
	block_bits = 100000
	[master]
	node = "a"
	qkd_id = "$(field "$lab/a/qipsecd.toml" qkd_id)"
	dir = "a/intake"
	[slave]
	node = "b"
	qkd_id = "$(field "$lab/b/qipsecd.toml" qkd_id)"
	dir = "b/intake"
	END
	trap stop EXIT
    trap 'exit 0' INT TERM
    start a bin/qipsecd -config "$lab/a/qipsecd.toml"
    start b bin/qipsecd -config "$lab/b/qipsecd.toml"
    start qkdsim bin/qkdsim -config "$lab/qkdsim.toml"
    for n in "a $a b-te" "b $b a-te"; do
        for i in $(seq 300); do
            # shellcheck disable=SC2086 # three words
            pool_ready $n && break
            [ "$i" -lt 300 ] || { echo "no keys after 30 s; see $lab/*.log" >&2; exit 1; }
            sleep 0.1
        done
    done
    cat >lab.env <<-END
	KME_A_URL=https://$a:8442
	KME_B_URL=https://$b:8442
	SAE_A_ID=a-te
	SAE_A_CERT=$PWD/$lab/a/pki/saes/a-te.crt
	SAE_A_KEY=$PWD/$lab/a/pki/saes/a-te.key
	SAE_B_ID=b-te
	SAE_B_CERT=$PWD/$lab/b/pki/saes/b-te.crt
	SAE_B_KEY=$PWD/$lab/b/pki/saes/b-te.key
	CA_CERT=$PWD/$lab/a/pki/sae-ca.crt
	RETRY_WINDOW_S=0
	END
    cat <<-'END'
	The lab runs: two QKMS nodes and a QKD link of 25 km, simulated. In another terminal:

	  . ./lab.env
	  # SAE A asks node A for a key to share with SAE B (GetKey):
	  curl -s --cacert $CA_CERT --cert $SAE_A_CERT --key $SAE_A_KEY "$KME_A_URL/api/v1/keys/$SAE_B_ID/enc_keys?number=1&size=256"
	  # SAE B asks node B for the key with that key_ID (GetKeyWithID):
	  curl -s --cacert $CA_CERT --cert $SAE_B_CERT --key $SAE_B_KEY "$KME_B_URL/api/v1/keys/$SAE_A_ID/dec_keys?key_ID=KEY_ID"
	  # what is left:
	  curl -s --cacert $CA_CERT --cert $SAE_A_CERT --key $SAE_A_KEY "$KME_A_URL/api/v1/keys/$SAE_B_ID/status"

	Interrupt, or make lab-down, ends it.
	END
    # Until interrupted, or until one of the three ends.
    wait -n || true
    if [ -e lab.env ]; then
        echo "a daemon of the lab has ended; see $lab/*.log" >&2
        exit 1
    fi
}

case ${1:-} in
up) up ;;
down) stop ;;
*) echo "usage: lab.sh up|down" >&2; exit 2 ;;
esac
