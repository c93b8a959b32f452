#!/bin/bash
# trace.sh: what a cloud or an agent could leave on a host, one fact a line, sorted, without counters, pids
# and times. Two of its outputs can be compared with diff. Processes and ports are those of this moment.
set -u
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
section() { sed "s|^|$1: |" | LC_ALL=C sort -u; }
ip -o link | awk -F'[ :@]+' '{print $2}' | section link
ip -o -4 addr | awk '{print $2, $4}' | section address
ip netns list 2>/dev/null | awk '{print $1}' | section netns
awk '{split($0, a, " - "); split(a[2], b, " "); print b[1], $5}' /proc/self/mountinfo | section mount
for c in iptables ip6tables; do
    $c-save 2>/dev/null | sed -E '/^#/d; s/ \[[0-9]+:[0-9]+\]//' | awk '/^\*/ {t = substr($0, 2); print t; next} /^COMMIT/ {next} {print t, $0}' | section $c
done
ebtables-save 2>/dev/null | sed '/^#/d' | awk '/^\*/ {t = substr($0, 2)} {print t, $0}' | section ebtables
nft list tables 2>/dev/null | section nft
ipset list -n 2>/dev/null | section ipset
find /sys/fs/cgroup -mindepth 1 -maxdepth 3 -type d 2>/dev/null | section cgroup
for f in /proc/sys/net/ipv4/ip_forward /proc/sys/net/bridge/*; do [ -r "$f" ] && echo "$f $(<"$f")"; done | section setting
# Threads of the kernel are children of pid 2; this pipeline is nobody's business.
# One that has ended and that its heir, process 1, has not heard of yet is nothing that was left.
ps -eo ppid=,pid=,stat=,comm= | awk '$1 != 2 && $2 != 2 && !($1 == 1 && $3 ~ /^Z/) {print $4}' | grep -vE '^(ps|awk|sort|sed|grep|bash|sh|sleep|trace.sh|make)$' | section process
ss -Hltn | awk '{print $4}' | section port
for d in "$STATE" $OVSRUN $OVNRUN /run/netns /run/lock/novalet-cloud.lock /etc/openstack-dashboard/local_settings.d/*; do
    [ -e "$d" ] && echo "$d"
done | section path
