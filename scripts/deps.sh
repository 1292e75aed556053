#!/bin/bash
# deps.sh: install the Debian packages that a part of Q-IPsec needs.
#
# usage: scripts/deps.sh GROUP...
#
#   build        what compiles the charon plugin
#   plugincheck  what scripts/plugin-check.sh needs besides
#   tunnel       what the tunnel scenarios run: strongSwan's charon, tcpdump, sshd,
#                ... and, where the running kernel has no ESP, user-mode-linux
#   test         what the tests need besides
#
# Installs missing packages only; when all are there it prints nothing and
# changes nothing. Otherwise it lists what it installs and why. On a terminal it
# asks first, unless ASSUME_YES=1 or CI is set; where nobody could answer it goes on: whoever
# calls a target that needs packages wants them.
#
# Nothing but packages is changed: no installed service is started (a
# policy-rc.d denies it during this call only; the one that was there comes
# back), services that this call brought in are not left enabled for the next
# boot, an empty PostgreSQL cluster that came along is removed, and no file of /etc
# is edited. The output of apt goes to out/deps.log.
#
# environment: ASSUME_YES, CI, FORCE_UML (see testenv/README.md), DEPS_LOG
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
log=${DEPS_LOG:-$root/out/deps.log}
policy=/usr/sbin/policy-rc.d

say() { printf 'deps: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# group_packages GROUP: lines "package|why".
group_packages() {
    case $1 in
    build)
        cat <<-'END'
		gcc|compiles the charon plugin
		libc6-dev|C headers for the charon plugin
		make|runs the targets of the Makefile
		bzip2|unpacks the strongSwan source, whose headers the plugin needs
		END
        ;;
    plugincheck)
        cat <<-'END'
		clang|its analyser reads the C of the charon plugin
		END
        ;;
    tunnel)
        cat <<-'END'
		charon-systemd|the IKEv2 daemon, run in network namespaces
		libstrongswan-standard-plugins|its AES-GCM and OpenSSL plugins
		strongswan-swanctl|loads and shows its connections
		iproute2|makes the network namespaces, shows the SAD
		iptables|NAT and packet loss in scenarios
		iputils-ping|traffic through the tunnel
		tcpdump|judges what is on the wire
		openssh-server|SFTP intake of QKD-Key files, run on its own configuration
		openssl|certificates of the environment's self-test
		END
        if ! "$root/testenv/esp-probe"; then
            cat <<-'END'
		user-mode-linux|a kernel with ESP: the running one has none
		kmod|loads the modules of that kernel
		END
        fi
        ;;
    test)
        cat <<-'END'
		curl|runs the lines that the lab prints
		procps|finds processes that a test left behind
		postgresql|the inventory's other database; tests run servers of their own
		spin|checks the model of what two nodes agree on
		python3|the second implementation behind the test vectors
		END
        ;;
    *) die "unknown group '$1' (build, plugincheck, tunnel, test)" ;;
    esac
}

installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# missing_packages GROUP...: the lines of group_packages not installed, once each.
missing_packages() {
    local group line
    for group in "$@"; do
        group_packages "$group" | while IFS= read -r line; do
            installed "${line%%|*}" || printf '%s\n' "$line"
        done
    done | awk -F'|' '!seen[$1]++'
}

apt() {
    DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 LC_ALL=C apt-get \
        -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -qq "$@" >>"$log" 2>&1
}

# deny_services, allow_services: no maintainer script starts a daemon in between.
# The file that was there is moved aside and moved back, mode and owner intact.
saved_policy=
deny_services() {
    if [ -e "$policy" ] || [ -L "$policy" ]; then
        saved_policy=$policy.qipsec.$$
        mv -- "$policy" "$saved_policy"
    fi
    printf '#!/bin/sh\n# Q-IPsec deps.sh, process %s: no service starts while it installs.\nexit 101\n' "$$" >"$policy"
    chmod 755 "$policy"
}
allow_services() {
    grep -qs "Q-IPsec deps.sh, process $$:" "$policy" && rm -f -- "$policy"
    if [ -n "$saved_policy" ]; then
        mv -- "$saved_policy" "$policy"
        saved_policy=
    fi
    return 0
}

# boot_units: the units enabled for the next boot, as wants links.
boot_units() {
    find /etc/systemd/system -mindepth 2 -type l \
        \( -path '*.wants/*' -o -path '*.requires/*' \) 2>/dev/null | sort
}

# clusters: PostgreSQL's, "VERSION NAME". Debian's package makes one as it is installed.
clusters() {
    command -v pg_lsclusters >/dev/null || return 0
    pg_lsclusters -h | awk '{ print $1, $2 }' | sort
}

# drop_new CLUSTERS: those that were not there before; nothing has used them.
drop_new() {
    local version name
    comm -13 <(sed '/^$/d' <<<"$1") <(clusters) | while read -r version name; do
        pg_dropcluster "$version" "$name" >>"$log" 2>&1 && say "removed the empty PostgreSQL cluster $version/$name that came along"
    done
}

ask() {
    [ "${ASSUME_YES:-}" != 1 ] && [ -z "${CI:-}" ] && [ -t 0 ] || return 0
    local answer
    printf 'deps: %s [y/N] ' "$1" >&2
    read -r answer
    case $answer in y | Y | yes) return 0 ;; *) die "not installed" ;; esac
}

main() {
    [ $# -gt 0 ] || die "usage: scripts/deps.sh build|plugincheck|tunnel|test ..."
    local lines
    lines=$(missing_packages "$@")
    [ -n "$lines" ] || exit 0

    say "these Debian packages are missing:"
    awk -F'|' '{ printf "  %-32s %s\n", $1, $2 }' <<<"$lines" >&2
    [ "$(id -u)" = 0 ] || die "installing needs root. Run as root:  scripts/deps.sh $*"
    command -v apt-get >/dev/null || die "this is no Debian system (no apt-get): install the equivalents by hand"

    mkdir -p "$(dirname "$log")"
    : >"$log"
    local -a names
    mapfile -t names < <(cut -d'|' -f1 <<<"$lines")

    say "refreshing the package lists"
    apt update || say "warning: the package lists could not be refreshed (see $log); going on with the old ones"
    local plan extra
    plan=$(LC_ALL=C apt-get -s -qq --no-install-recommends --no-remove install "${names[@]}" 2>>"$log" | awk '/^Inst/ { print $2 }') ||
        die "apt-get cannot install them: see $log"
    extra=$(grep -vxF -f <(printf '%s\n' "${names[@]}") <<<"$plan" | paste -sd' ' || true)
    [ -z "$extra" ] || say "they bring along: $extra"
    say "no service is started or enabled, no configuration is edited"
    ask "install $(wc -w <<<"$plan") packages?"

    local before after had
    before=$(boot_units)
    had=$(clusters)
    trap allow_services EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    deny_services
    say "installing (log: $log)"
    apt install --no-install-recommends --no-remove -y "${names[@]}" || {
        tail -n 15 "$log" >&2
        die "apt-get install failed: see $log"
    }
    after=$(boot_units)
    local unit
    comm -13 <(printf '%s\n' "$before") <(printf '%s\n' "$after") | sed '/^$/d' | while IFS= read -r unit; do
        rm -f -- "$unit"
        say "left disabled at boot: ${unit##*/}"
    done
    drop_new "$had"
    allow_services
    lines=$(missing_packages "$@")
    [ -z "$lines" ] || die "still missing after the installation: $(cut -d'|' -f1 <<<"$lines" | paste -sd' ')"
    say "done"
}

main "$@"
