#!/bin/bash
# testbed.sh: the demo's two gateways, which stay: a QKD link simulated, QKMS on
# both, one end fed over SFTP, the tunnel up. Shells come by testenv/attach.
#
# usage: TESTENV_ATTACH=1 testenv/run testenv/testbed.sh     (make testbed)
#
# $TESTENV_OUT/ready appears when the tunnel is up; it ends when
# $TESTENV_OUT/stop does. What a user's shell needs is in testbed.rc.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=testenv/gateways.sh
. "$here/gateways.sh"
# shellcheck source=testenv/qipsec.sh
. "$here/qipsec.sh"

gw_up || fail "cannot make the gateways"
site_up || fail "cannot make the configs"
sftp_intake || fail "cannot start sshd"
note "two gateways"
for n in a b; do qipsecd_start "$n"; done
qkdsim_start "" "first_keys = 2000"
for n in a b; do
    await 90 logged "$n" 'msg="M102 agreed"' || fail "the two QKMS do not agree on keys"
done
note "both QKMS have keys"
for n in b a; do
    charon_start "$n" "$PLUGIN" || fail "charon of $n does not start"
    await 60 logged "$n" 'msg="connection loaded"' || fail "qipsecd of $n loads no connection into charon"
done
await 120 tunnel_up || fail "no tunnel"
note "the tunnel is up"
gw_stay
note "ended as asked"
