#!/bin/bash
# down.sh [--wipe]: stop the cloud by its pid files; what it holds is kept for the next up.sh.
# --wipe: also its instances, its data and everything it left on the host. Kept: packages, and the schemas
# in /var/cache/novalet.
set -u
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"
# shellcheck source=devstack/apis.sh
. "$HERE/apis.sh"
case ${1-} in ''|--wipe) ;; *) echo "usage: down.sh [--wipe]" >&2; exit 2 ;; esac
need_root; lock
if [ ! -e "$STATE/.novalet-cloud" ]; then
    say "no cloud in $STATE"; exit 0
fi
cd / || exit 1

if [ "${1-}" = --wipe ] && running novalet && running nova-api && running neutron-server; then
    phase "delete servers"
    timeout 120 "$PYTHON" "$HERE/bootstrap.py" empty "$PASSWORD_FILE" || say "   servers are left; the host is cleaned without Nova's help"
fi

phase "stop services"
names() { local f; for f in "$RUN"/$1.pid; do [ -e "$f" ] && basename "$f" .pid; done; }
# shellcheck disable=SC2046
stop_all 40 novalet $(names 'nova-compute-*') $(names 'fake-l2-*') horizon heat-api heat-engine barbican-api
stop_all 15 neutron-metadata-agent neutron-l3-agent neutron-dhcp-agent neutron-linuxbridge-agent neutron-macvtap-agent neutron-openvswitch-agent neutron-ovn-metadata-agent
stop_all 15 "${more_services[@]}" neutron-server nova-serialproxy nova-api nova-scheduler nova-conductor glance-api placement keystone
# Helpers of Neutron's agents outlive them, some by design: known by their name and by our configuration.
for p in /proc/[0-9]*; do
    case $(cat "$p/comm" 2>/dev/null) in privsep-helper|neutron-rootwra*|dnsmasq|haproxy|keepalived|radvd) ;; *) continue ;; esac
    tr '\0' '\n' 2>/dev/null <"$p/cmdline" | grep -qF "$STATE/" && kill "${p#/proc/}"
done
"$HERE/ovs.sh" stop
stop_all 30 rabbitmq memcached mariadb
stop epmd

if [ "${1-}" = --wipe ]; then
    phase "clean the host"
    "$HERE/host.sh" guests
    "$HERE/host.sh" clean
    "$HERE/host.sh" restore
    rm -rf --one-file-system "$STATE" || exit 1
    rm -f /run/lock/novalet-cloud.lock
else
    "$HERE/host.sh" restore
fi
phase ''
