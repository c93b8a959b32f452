#!/bin/bash
# install.sh [--check]: the packages of an OpenStack control plane. RELEASE=zed is that of Debian 12 (530 packages,
# 190 MB, about five minutes from nothing); a later one comes from PyPI, in a virtual environment, on Debian's data
# base, broker and switch. Nothing is started or enabled. With everything installed it takes a moment. --check only
# tells what is missing.
set -eu
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"

packages=(
    mariadb-server mariadb-client rabbitmq-server memcached uwsgi-core uwsgi-plugin-python3
    iptables nftables ebtables ipset iproute2 bridge-utils ethtool dnsmasq-base dnsmasq-utils conntrack haproxy keepalived radvd
    iputils-arping iputils-ping sudo curl jq procps tcpdump busybox-static
    openvswitch-switch ovn-central ovn-host
)
if [ -n "$VENV" ]; then
    packages+=(python3-venv)
else
    # nova-consoleproxy carries nova-serialproxy. nova-compute is there to compare with; nova-compute-ironic is
    # the one provider of nova-compute-hypervisor that does not bring libvirt and QEMU (it is not used).
    packages+=(
        keystone glance-api placement-api
        nova-api nova-conductor nova-scheduler nova-consoleproxy nova-compute nova-compute-ironic
        neutron-server neutron-api neutron-rpc-server neutron-linuxbridge-agent neutron-dhcp-agent neutron-l3-agent neutron-metadata-agent
        neutron-openvswitch-agent neutron-ovn-metadata-agent
        heat-api heat-engine openstack-dashboard python3-heat-dashboard
        python3-openstackclient python3-osc-placement python3-heatclient tempest python3-stestr
    )
    [ "$WITH_BARBICAN" != 1 ] || packages+=(barbican-api)
    [ "$NET" != macvtap ] || packages+=(neutron-macvtap-agent)
fi
missing() {
    dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${packages[@]}" 2>/dev/null |
        awk '$2 == "installed" {print $1}' | sort -u | comm -13 - <(printf '%s\n' "${packages[@]}" | sort -u)
}
venv_ok() { [ -z "$VENV" ] || cmp -s "$REQUIREMENTS" "$VENV/requirements.txt"; }
mapfile -t need < <(missing)
if [ ${#need[@]} = 0 ] && venv_ok; then
    [ "${1-}" = --check ] || say "all ${#packages[@]} packages${VENV:+ and $VENV} are installed"
    exit 0
fi
if [ "${1-}" = --check ]; then
    say "missing: ${need[*]} $(venv_ok || echo "$VENV")"; exit 1
fi
need_root
. /etc/os-release
[ "${VERSION_CODENAME-}" = bookworm ] || die "these are packages of Debian 12 (bookworm); this is ${PRETTY_NAME-unknown}"

log=$(mktemp /var/log/novalet-install.XXXXXX)
# run TITLE CMD...: its output goes to the log, one line of progress a quarter minute goes out.
run() {
    local t=$1 p n=0; shift
    say "   $t"
    "$@" >>"$log" 2>&1 9>&- & p=$!
    while kill -0 $p 2>/dev/null; do
        sleep 1; n=$((n + 1))
        [ $((n % 15)) != 0 ] || say "     $n s: $(grep -aE '^(Get:|Unpacking|Setting up|Processing|Collecting|Installing)' "$log" | tail -n 1 | cut -c1-90)"
    done
    wait $p || { tail -n 25 "$log" >&2; die "$t: see $log"; }
}

install_packages() {
    phase "install ${#need[@]} packages and what they need"
    export DEBIAN_FRONTEND=noninteractive
    # No service may start: there may be no init to keep it, and the ports belong to the cloud.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt=(apt-get -y --no-install-recommends -o DPkg::Lock::Timeout=900 -o Dpkg::Use-Pty=0
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold -o Acquire::Retries=3)
    run "finish what an interrupted installation left" dpkg --configure -a --force-confdef --force-confold
    run "package lists" apt-get -o Acquire::Retries=3 update
    run "debconf" "${apt[@]}" install debconf-utils dbconfig-no-thanks
    debconf-set-selections <<D
keystone keystone/configure_db boolean false
keystone keystone/create-admin-tenant boolean false
glance-common glance/configure_db boolean false
nova-common nova/configure_db boolean false
nova-api nova/register-endpoint boolean false
placement-common placement/configure_db boolean false
neutron-common neutron/configure_db boolean false
neutron-common neutron/configure_rabbit boolean false
heat-common heat/configure_db boolean false
barbican-common barbican/configure_db boolean false
D
    run "packages" "${apt[@]}" install "${need[@]}"
    mapfile -t need < <(missing)
    [ ${#need[@]} = 0 ] || die "still missing: ${need[*]}"
}

# It is whole once it carries the list that it was made from, which is copied last.
make_venv() {
    phase "virtual environment $VENV: $(grep -c == "$REQUIREMENTS") packages"
    rm -rf "$VENV"; mkdir -p "${VENV%/*}"
    /usr/bin/python3 -m venv "$VENV"
    # The list is complete: nothing has to be resolved.
    run "packages of Python" "$VENV/bin/pip" --disable-pip-version-check --no-cache-dir install --no-deps -r "$REQUIREMENTS"
    run "do they fit" "$VENV/bin/pip" --disable-pip-version-check check
    cp "$REQUIREMENTS" "$VENV/requirements.txt"
}

[ ${#need[@]} = 0 ] || install_packages
venv_ok || make_venv
rm -f "$log"
phase ''
