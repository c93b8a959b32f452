#!/bin/bash
# try.sh: boot one instance as a user would, and show it. The instance stays; a second run shows it again.
set -u
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"
[ -r "$STATE/openrc-demo" ] || die "no cloud in $STATE: run $HERE/up.sh"
running novalet || die "the compute service does not run: $HERE/compute.sh start novalet"
# shellcheck source=/dev/null
. "$STATE/openrc-demo"
# step CMD...: show a command of the user, then run it.
step() { say "\$ $*"; "$@"; }

phase "first instance"
case $(openstack server show hello -f value -c status 2>/dev/null) in
    ACTIVE) ;;
    '') step openstack server create --image busybox --flavor m1.tiny --network private --wait hello -f value -c id ||
            { openstack server show hello -f value -c fault; die "no instance; see $LOG/novalet.log"; } ;;
    *) step openstack server delete --wait hello; exec "$0" ;;
esac
step openstack server list || exit 1
# The console has its first line a moment after ACTIVE.
for ((i = 0; i < 30; i++)); do
    out=$(openstack console log show hello 2>&1) && [ -n "$out" ] && break
    sleep 1
done
say "\$ openstack console log show hello"; say "$out"
[[ $out == *"up: hello"* ]] || die "the instance's console log has not what its command prints"
phase ''
cat <<S

Go on with:  . $STATE/openrc-demo
  openstack server stop hello; openstack server start hello; openstack server event list hello
  openstack server delete hello
S
