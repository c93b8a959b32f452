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
CACHE=${CACHE:-/var/cache/novalet/devstack}
RELEASE=${RELEASE:-${SAVED_RELEASE:-zed}}
case $RELEASE in
    zed)    VENV='' SHARE=/etc PYTHON=/usr/bin/python3 NETS='linuxbridge ovs ovs-hybrid ovn macvtap' ;;
    # Neutron has no Linux bridge there.
    2025.1|2026.2) VENV=$CACHE/python-$RELEASE SHARE=$VENV/etc PYTHON=$VENV/bin/python3 NETS='ovn ovs ovs-hybrid' ;;
    *) echo "RELEASE=$RELEASE: supported are zed (the packages of Debian 12), 2025.1 and 2026.2 (those of PyPI)" >&2; exit 2 ;;
esac
[ -z "$VENV" ] || PATH=$VENV/bin:$PATH
NET=${NET:-${SAVED_NET:-${NETS%% *}}}
COMPUTE_HOST=${COMPUTE_HOST:-${SAVED_COMPUTE_HOST:-novalet1}}
# The dashboard comes with Debian's packages only.
WITH_HORIZON=${WITH_HORIZON:-$([ -n "$VENV" ] && echo 0 || echo 1)}
# The key manager, for signed images; Debian's only.
WITH_BARBICAN=${WITH_BARBICAN:-${SAVED_WITH_BARBICAN:-0}}
if [ "$WITH_BARBICAN" = 1 ] && [ -n "$VENV" ]; then
    echo "WITH_BARBICAN=1: only with RELEASE=zed" >&2; exit 2
fi
CTL_HOST=${CTL_HOST:-controller}
NOVALET_BIN=${NOVALET_BIN:-$HERE/../bin/novalet}
# Python's programs look through every installed package for their plug-ins, or here: half a second of each start.
export XDG_CACHE_HOME=$CACHE

REQUIREMENTS=$HERE/requirements-$RELEASE.txt         # of the virtual environment
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
    macvtap)     MECHANISM=macvtap ;;
    *) MECHANISM= ;;
esac
[[ -n $MECHANISM && " $NETS " == *" $NET "* ]] || { echo "NET=$NET: supported with RELEASE=$RELEASE are $NETS" >&2; exit 2; }
# What of SR-IOV goes into the configuration: nothing without it.
if [ "${WITH_SRIOV:-${SAVED_WITH_SRIOV:-0}}" = 1 ]; then
    [ "$MECHANISM" = macvtap ] || { echo "WITH_SRIOV=1: supported with NET=macvtap" >&2; exit 2; }
    WITH_SRIOV=1 MORE_MECHANISMS=,sriovnicswitch
    SCHEDULER_FILTERS=$'[filter_scheduler]\nenabled_filters = ComputeFilter,ComputeCapabilitiesFilter,ImagePropertiesFilter,ServerGroupAntiAffinityFilter,ServerGroupAffinityFilter,PciPassthroughFilter'
    DEVICES=$'[pci]\ndevice_spec = {"devname": "cloud-nic1", "physical_network": "lan1"}'
else
    WITH_SRIOV=0
fi
# Neutron's agents run as root: rootwrap would filter nothing and costs a Python process per agent.
ROOT_HELPER=sudo
# sudo takes a path of its own, without the virtual environment.
[ -z "$VENV" ] || ROOT_HELPER="sudo env PATH=$PATH"
# Each mechanism has a database and a state folder of its own: networks keep the type they were made with.
NEUTRON=neutron_$MECHANISM
