#!/bin/bash
# host.sh save | up | clean | guests | restore: what the cloud changes on the host itself.
#   save     note, before the first start, what restore brings back
#   up       bridges (and Open vSwitch) for NET
#   clean    remove the bridges, name spaces, filter chains and sets that Neutron's agents leave behind
#   guests   end what an agent left running below its cgroup: instances and their keepers outlive it by design
#   restore  kernel settings and empty filter tables as they were at save
set -u
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"
B=$STATE/host

# tables: each filter table of the kernel as "FAMILY NAME" (iptables and ebtables live in them).
tables() { nft list tables 2>/dev/null | awk '$1 == "table" {print $2, $3}' | grep -E '^(ip|ip6|bridge) (filter|nat|mangle|raw|security|broute)$' | sort; }

settings() {
    local f
    for f in /proc/sys/net/ipv4/ip_forward /proc/sys/net/bridge/bridge-nf-call-{arp,ip,ip6}tables /proc/sys/net/ipv4/neigh/default/gc_thresh{1,2,3}; do
        [ -r "$f" ] && printf '%s %s\n' "$f" "$(<"$f")"
    done
    return 0
}

# mount_of DIRECTORY: the number of the mount it is on. mountpoint(1) also knows those that another one covers.
mount_of() { awk '$1 == "mnt_id:" {print $2}' /proc/self/fdinfo/0 <"$1"; }

save() {
    [ -e "$B/settings" ] && return 0
    tables >"$B/tables"
    : >"$B/absent"
    local d
    for d in $OVSRUN $OVNRUN /run/netns; do [ -e "$d" ] || echo "$d" >>"$B/absent"; done
    # ip-netns mounts its folder over itself.
    if ! [ -e /run/netns ] || [ "$(mount_of /run/netns)" = "$(mount_of /run)" ]; then touch "$B/netns-plain"; fi
    settings >"$B/settings.new" && mv "$B/settings.new" "$B/settings"
}

up() {
    echo 1 >/proc/sys/net/ipv4/ip_forward
    # Not every kernel has dummy devices: an empty bridge carries the tunnels' address.
    ip link show cloud-tep >/dev/null 2>&1 || ip link add cloud-tep type bridge || exit 1
    ip addr replace $VXLAN_IP/24 dev cloud-tep; ip link set cloud-tep up
    if [ "$MECHANISM" = linuxbridge ] || [ "$MECHANISM" = macvtap ]; then
        ip link show br-ex >/dev/null 2>&1 || ip link add br-ex type bridge || exit 1
        running neutron-linuxbridge-agent || flush_among
        [ "$MECHANISM" != macvtap ] || lans
        [ "$WITH_SRIOV" != 1 ] || card
    else
        "$HERE/ovs.sh" start || exit 1
    fi
    ip addr replace $EXT_IP/24 dev br-ex; ip link set br-ex up
}

# lans: two physical interfaces of the compute host, each with a cable to a bridge of the network node.
lans() {
    local i
    for i in 1 2; do
        ip link show cloud-lan$i >/dev/null 2>&1 || ip link add cloud-lan$i type bridge || exit 1
        ip link show cloud-nic$i >/dev/null 2>&1 || ip link add cloud-nic$i type veth peer name cloud-nic$i-far || exit 1
        ip link set cloud-nic$i-far master cloud-lan$i up; ip link set cloud-nic$i up; ip link set cloud-lan$i up
    done
}

# card: cloud-nic1 has two virtual functions, pairs of virtual Ethernet devices with one end on its bridge, and a part of
# sysfs that tells of them. A program built with the tag "standin" takes them for such (network/card_standin.go).
card() {
    local s=$STATE/sysfs/bus/pci/devices i f
    mkdir -p "$s/0000:03:00.0/net/cloud-nic1" "$STATE/sysfs/class/net/cloud-nic1"
    cat /sys/class/net/cloud-nic1/address >"$s/0000:03:00.0/net/cloud-nic1/address"
    ln -sfn ../../../bus/pci/devices/0000:03:00.0 "$STATE/sysfs/class/net/cloud-nic1/device"
    echo 2 >"$s/0000:03:00.0/sriov_numvfs"
    for i in 0 1; do
        f=$s/0000:03:10.$i
        mkdir -p "$f/net/cloud-vf$i"
        echo 0x8086 >"$f/vendor"; echo 0x1520 >"$f/device"; echo -1 >"$f/numa_node"; echo cloud-vf$i-far >"$f/far"
        ln -sfn "../0000:03:10.$i" "$s/0000:03:00.0/virtfn$i"
        ip link show cloud-vf$i-far >/dev/null 2>&1 || ip link add cloud-vf$i-far type veth peer name cloud-vf$i || exit 1
        ip link set cloud-vf$i-far master cloud-lan1 up
    done
}

# ebtables-nft 1.8.9 cannot delete a rule with --among-src ("RULE_DELETE failed: Invalid argument"), and a
# linuxbridge agent that starts beside a wired tap tries that for ever and wires nothing. It makes its
# neutronMAC chains anew, so they may be emptied before.
flush_among() {
    local c
    for c in $(nft list table bridge nat 2>/dev/null | awk '$1 == "chain" && $2 ~ /^neutronMAC-/ {print $2}'); do
        nft flush chain bridge nat "$c"
    done
    return 0
}

# Rules that jump to Neutron's chains, then the chains. In the kernel's own terms: by handle, so that
# nothing has to be parsed back into the words of iptables or ebtables.
unfilter() {
    local f t
    tables | while read -r f t; do
        nft -a list table "$f" "$t" 2>/dev/null | awk -v T="$f $t" '
            $1 == "chain" { c = $2; if (c ~ /^neutron/) mine[++n] = c; next }
            c !~ /^neutron/ && /(jump|goto) neutron/ { print "delete rule", T, c, "handle", $NF }
            END { for (i = 1; i <= n; i++) print "flush chain", T, mine[i]
                  for (i = 1; i <= n; i++) print "delete chain", T, mine[i] }' | nft -f - ||
            say "   table $f $t: chains of Neutron are left"
    done
    for t in $(ipset list -n 2>/dev/null | grep -E '^N?IPv[46]'); do ipset destroy "$t"; done
    return 0
}

clean() {
    local x
    for x in $(ip netns list | awk '/^(qdhcp|qrouter|ovnmeta|snat|fip)-/ {print $1}'); do ip netns del "$x"; done
    for x in $(ip -o link | awk -F'[ :@]+' '$2 ~ /^(brq|qbr|qvo|qvb|vxlan-)/ || $2 ~ /^(br-ex|cloud-tep|cloud-lan.|cloud-nic.|cloud-vf.|br-int|br-tun|ovs-netdev|genev_sys_.*|vxlan_sys_.*)$/ {print $2}'); do
        ip link del "$x" 2>/dev/null
    done
    unfilter
}

guests() {
    local groups=() g p m d n end=$((SECONDS + 20))
    # Each agent has groups of its own, named after its state folder; that of the usual folder is plain novalet.
    for d in "$STATE" "$STATE/novalet"; do
        n=novalet
        [ "$d" = /var/lib/novalet ] || n=novalet-$(printf %s "$d" | sha256sum | cut -c1-8)
        for g in "/sys/fs/cgroup/$n" /sys/fs/cgroup/*/"$n"; do [ -d "$g" ] && groups+=("$g"); done
    done
    while [ ${#groups[@]} -gt 0 ] && [ $SECONDS -lt $end ]; do
        # Frozen processes of cgroup v1 die when they thaw.
        find "${groups[@]}" -name freezer.state -exec sh -c 'for f; do echo THAWED >"$f"; done' thaw {} + 2>/dev/null
        find "${groups[@]}" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u | while read -r p; do kill -KILL "$p" 2>/dev/null; done
        find "${groups[@]}" -depth -type d -exec rmdir {} + 2>/dev/null
        local left=()
        for g in "${groups[@]}"; do [ -d "$g" ] && left+=("$g"); done
        groups=("${left[@]}")
        [ ${#groups[@]} = 0 ] || sleep 0.2
    done
    [ ${#groups[@]} = 0 ] || say "   left: ${groups[*]}"
    # What is still mounted below the state folder must never be deleted through.
    awk -v s="$STATE/" 'index($5, s) == 1 {print $5}' /proc/self/mountinfo | sort -r | while read -r m; do umount "$(printf '%b' "$m")"; done
    losetup -l -n -O NAME,BACK-FILE 2>/dev/null | while read -r p m; do
        case $m in "$STATE"/*) losetup -d "$p" ;; esac
    done
    return 0
}

restore() {
    local f v
    [ -e "$B/settings" ] || return 0
    while read -r f v; do echo "$v" 2>/dev/null >"$f"; done <"$B/settings"
    # A table that was not there and holds no rule and no chain but the built-in ones.
    comm -13 "$B/tables" <(tables) | while read -r f v; do
        nft list table "$f" "$v" | awk '$1 == "chain" {n++} /type .* hook .* policy accept;/ {h++} /^\t\t/ && !/hook/ {r++} END {exit !(n == h && !r)}' && nft delete table "$f" "$v"
    done
    # It stays as long as anybody's name space is there.
    if [ -e "$B/netns-plain" ] && [ -z "$(ls -A /run/netns 2>/dev/null)" ]; then umount /run/netns 2>/dev/null; fi
    while read -r f; do
        case $f in
            /run/netns) rmdir /run/netns 2>/dev/null ;;
            *) rm -rf "$f" ;;
        esac
    done <"$B/absent"
    return 0
}

case ${1-} in
    save|up|clean|guests|restore) "$1" ;;
    *) echo "usage: host.sh save | up | clean | guests | restore" >&2; exit 2 ;;
esac
