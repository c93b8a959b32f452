#!/bin/bash
# ovs.sh start | restart | stop: Open vSwitch with its datapath in user space (no kernel module), and OVN for NET=ovn.
# Not by ovs-ctl, which insists on the module. The switch's own data base is made anew at each start, as
# neutron-ovs-cleanup does at boot; restart keeps it, as an upgrade of the package does. OVS_SET: more settings, such
# as other_config:userspace-tso-enable=true.
set -u
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"
N=$STATE/ovn
switch() { ovs-vsctl --timeout=30 --no-wait "$@"; }

# switch_up: the two programs of the switch, on the data base that is there.
switch_up() {
    start ovsdb-server ovsdb-server "$STATE/ovs/conf.db" --remote=punix:$OVSRUN/db.sock \
        --remote=db:Open_vSwitch,Open_vSwitch,manager_options --pidfile=$OVSRUN/ovsdb-server.pid
    wait_for ovsdb-server 30 test -S $OVSRUN/db.sock
    start ovs-vswitchd ovs-vswitchd unix:$OVSRUN/db.sock --pidfile=$OVSRUN/ovs-vswitchd.pid
}
# switch_down: the datapath's taps outlive a plain TERM (br-int, br-ex, ovs-netdev); exit --cleanup deletes them, but not
# what Neutron's agents have moved into namespaces. Found there again, dead, it would not be made anew.
switch_down() {
    local p n d
    if p=$(pid_of ovs-vswitchd); then timeout 10 ovs-appctl -t "$OVSRUN/ovs-vswitchd.$p.ctl" exit --cleanup; fi
    stop_all 15 "$@" ovs-vswitchd ovsdb-server
    [ "$MECHANISM" = ovs ] || return 0
    for n in $(ip netns list | awk '/^(qdhcp|qrouter)-/ {print $1}'); do
        for d in $(ip -n "$n" -o link | awk -F'[ :@]+' '$2 ~ /^(tap|qr-|qg-)/ {print $2}'); do ip -n "$n" link del "$d"; done
    done
}

case ${1-} in
start)
    mkdir -p $OVSRUN $OVNRUN "$STATE/ovs" "$N"
    if ! running ovsdb-server; then
        rm -f "$STATE/ovs/conf.db"; ovsdb-tool create "$STATE/ovs/conf.db" /usr/share/openvswitch/vswitch.ovsschema || exit 1
        fresh=1
    fi
    switch_up
    if [ -n "${fresh-}" ]; then
        # shellcheck disable=SC2086
        switch init && switch set Open_vSwitch . external_ids:system-id="$COMPUTE_HOST" external_ids:hostname="$COMPUTE_HOST" ${OVS_SET-} || exit 1
    fi
    ovs-vsctl --timeout=30 --may-exist add-br br-ex -- set Bridge br-ex datapath_type=netdev || dead ovs-vswitchd "made no br-ex"
    [ "$MECHANISM" = ovn ] || exit 0
    for d in nb sb; do
        [ -e "$N/$d.db" ] || ovsdb-tool create "$N/$d.db" /usr/share/ovn/ovn-$d.ovsschema || exit 1
        start ovn-$d ovsdb-server "$N/$d.db" --remote=punix:$OVNRUN/ovn${d}_db.sock --unixctl=$OVNRUN/ovn${d}_db.ctl --pidfile=$OVNRUN/ovn${d}_db.pid
        wait_for ovn-$d 30 test -S $OVNRUN/ovn${d}_db.sock
    done
    ovn-nbctl --timeout=30 --no-wait init || exit 1
    start ovn-northd ovn-northd --ovnnb-db=unix:$OVNRUN/ovnnb_db.sock --ovnsb-db=unix:$OVNRUN/ovnsb_db.sock --unixctl=$OVNRUN/ovn-northd.ctl
    switch set Open_vSwitch . external_ids:ovn-remote=unix:$OVNRUN/ovnsb_db.sock external_ids:ovn-encap-type=geneve \
        external_ids:ovn-encap-ip=$VXLAN_IP external_ids:ovn-bridge=br-int external_ids:ovn-bridge-datapath-type=netdev \
        external_ids:ovn-bridge-mappings=public:br-ex external_ids:ovn-cms-options=enable-chassis-as-gw || exit 1
    start ovn-controller ovn-controller unix:$OVSRUN/db.sock --pidfile=$OVNRUN/ovn-controller.pid
    # A router that gets its gateway before there is a chassis never gets a gateway chassis.
    chassis() { [ -n "$(ovn-sbctl --timeout=5 --bare --columns=name find Chassis hostname="$COMPUTE_HOST")" ]; }
    wait_for ovn-controller 60 chassis
    alive ovsdb-server ovs-vswitchd ovn-nb ovn-sb ovn-northd ;;
restart)
    # Neutron's own ports are taps of the datapath that goes: its agents make them anew as they start.
    [ "$MECHANISM" != ovs ] || stop_all 30 neutron-dhcp-agent neutron-l3-agent
    switch_down; switch_up ;;
stop)
    stop ovn-controller
    switch_down ovn-northd ovn-nb ovn-sb ;;
*) echo "usage: ovs.sh start | restart | stop" >&2; exit 2 ;;
esac
