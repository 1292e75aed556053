#!/usr/bin/env bash
# lab.sh up|down: two QKMS nodes on loopback with a simulated QKD link, no root.
#
# Everything is in out/lab. `up` writes lab.env in the working directory, prints
# curl lines that work as they stand, and runs until interrupted or `down`.
# The nodes listen on 127.0.81.1 and .2; LAB_NET=82 takes 127.0.82.1 and .2.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 022 # the daemons take no config that others can change
lab=out/lab
a=127.0.${LAB_NET:-81}.1
b=127.0.${LAB_NET:-81}.2

field() { sed -n "s/^$2 = \"\(.*\)\"$/\1/p" "$1" | head -1; }

pids=()
start() { # NAME CMD...: ends with this script, however that ends
    local name=$1
    shift
    setpriv --pdeathsig TERM "$@" >"$lab/$name.log" 2>&1 &
    pids+=($!)
}

finish() {
    rm -f lab.env "$lab/lab.pid"
    [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || true
    wait
}

# running: the pid of the lab's own script, if it runs.
running() {
    local pid
    pid=$(cat "$lab/lab.pid" 2>/dev/null) && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q 'lab.sh up' && echo "$pid"
}

down() {
    local pid _
    pid=$(running) || { echo "no lab runs"; return; }
    kill "$pid"
    for _ in $(seq 100); do
        running >/dev/null || return 0
        sleep 0.1
    done
    echo "the lab (pid $pid) does not end" >&2
    return 1
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
    if running >/dev/null; then
        echo "the lab runs already; make lab-down ends it" >&2
        exit 1
    fi
    rm -rf "$lab"
    mkdir -p "$lab"
    echo $$ >"$lab/lab.pid"
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
    trap finish EXIT
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
	  keys=$(curl -s --cacert $CA_CERT --cert $SAE_A_CERT --key $SAE_A_KEY "$KME_A_URL/api/v1/keys/$SAE_B_ID/enc_keys?number=1&size=256"); echo "$keys"
	  # SAE B asks node B for the key with that Key-ID (GetKeyWithID):
	  id=$(sed -E 's/.*"key_ID":"([^"]*)".*/\1/' <<<"$keys")
	  curl -s --cacert $CA_CERT --cert $SAE_B_CERT --key $SAE_B_KEY "$KME_B_URL/api/v1/keys/$SAE_A_ID/dec_keys?key_ID=$id"
	  # what is left:
	  curl -s --cacert $CA_CERT --cert $SAE_A_CERT --key $SAE_A_KEY "$KME_A_URL/api/v1/keys/$SAE_B_ID/status"

	Interrupt, or make lab-down, ends it.
	END
    # Until interrupted, or until one of the three ends.
    wait -n || true
    echo "a daemon of the lab has ended; see $lab/*.log" >&2
    exit 1
}

case ${1:-} in
up) up ;;
down) down ;;
*) echo "usage: lab.sh up|down" >&2; exit 2 ;;
esac
