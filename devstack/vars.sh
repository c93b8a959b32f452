# shellcheck shell=bash disable=SC2034
# Options and paths, sourced by every script here. What is given in the environment wins over what
# the running cloud was brought up with ($STATE/settings), which wins over the defaults below.
exec </dev/null         # nothing here asks, and CI may hand over a closed descriptor

# A known environment: not a foreign PATH (pyenv's python has none of Debian's modules), not the caller's
# own cloud in OS_* variables.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LANG=C.UTF-8 LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 OS_CLIENT_CONFIG_FILE=/nonexistent
export no_proxy=127.0.0.1,localhost NO_PROXY=127.0.0.1,localhost
for v in "${!OS_@}" "${!PYENV_@}" PYTHONPATH PYTHONHOME; do
    [ "$v" = OS_CLIENT_CONFIG_FILE ] || unset "$v"
done
unset v
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

STATE=${STATE:-/srv/novalet-cloud}
if [ -r "$STATE/settings" ]; then
    # shellcheck source=/dev/null
    . "$STATE/settings"
fi
RELEASE=${RELEASE:-${SAVED_RELEASE:-zed}}
NET=${NET:-${SAVED_NET:-linuxbridge}}               # linuxbridge | ovs | ovs-hybrid | ovn
COMPUTE_HOST=${COMPUTE_HOST:-${SAVED_COMPUTE_HOST:-novalet1}}
CTL_HOST=${CTL_HOST:-controller}
NOVALET_BIN=${NOVALET_BIN:-$HERE/../bin/novalet}
CACHE=${CACHE:-/var/cache/novalet/devstack}
# Python's programs look through every installed package for their plug-ins, or here: half a second of each start.
export XDG_CACHE_HOME=$CACHE

RUN=$STATE/run LOG=$STATE/log ETC=$STATE/etc
PASSWORD_FILE=$ETC/password
MYSQL_SOCK=$STATE/mysql/mysqld.sock
VXLAN_IP=10.200.0.1                                 # on the bridge cloud-tep, the tunnels' own end
EXT_IP=172.24.4.1                                   # the host on the external network
EPMD_PORT=4370                                      # not 4369: another node's epmd is none of ours
OVSRUN=/run/openvswitch OVNRUN=/run/ovn             # the defaults of every ovs and ovn tool

L3_PLUGIN=router
case $NET in
    linuxbridge) MECHANISM=linuxbridge ;;
    ovs)         MECHANISM=ovs OVS_FIREWALL=openvswitch ;;
    ovs-hybrid)  MECHANISM=ovs OVS_FIREWALL=iptables_hybrid ;;
    ovn)         MECHANISM=ovn L3_PLUGIN=ovn-router ;;
    *) echo "NET=$NET: supported are linuxbridge, ovs, ovs-hybrid and ovn" >&2; exit 2 ;;
esac
if [ "$RELEASE" != zed ]; then
    echo "RELEASE=$RELEASE: supported is zed (the packages of Debian 12)" >&2; exit 2
fi
# Each mechanism has a database and a state folder of its own: networks keep the type they were made with.
NEUTRON=neutron_$MECHANISM
