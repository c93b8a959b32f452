#!/bin/bash
# up.sh: bring the cloud up. May be run again at any time: steps done once are skipped, running services
# are left alone, dead ones are started. Options: README.md.
set -u
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"
# shellcheck source=devstack/apis.sh
. "$HERE/apis.sh"
need_root; lock
BEGAN=$SECONDS

phase "configuration in $STATE"
"$HERE/install.sh" --check || die "packages are missing: run $HERE/install.sh"
if [ -d "$STATE" ] && [ ! -e "$STATE/.novalet-cloud" ] && [ -n "$(ls -A "$STATE")" ]; then
    die "$STATE is not empty and not a cloud's folder"
fi
if running neutron-server && [ "${SAVED_NET-$NET} ${SAVED_COMPUTE_HOST-$COMPUTE_HOST}" != "$NET $COMPUTE_HOST" ]; then
    die "the cloud runs with NET=$SAVED_NET COMPUTE_HOST=$SAVED_COMPUTE_HOST: run $HERE/down.sh first"
fi
# The data bases are those of one release.
[ "${SAVED_RELEASE-$RELEASE}" = "$RELEASE" ] || die "$STATE holds a cloud of RELEASE=$SAVED_RELEASE: run $HERE/down.sh --wipe first, or name another STATE"
mkdir -p "$STATE" && touch "$STATE/.novalet-cloud" || exit 1
mkdir -p "$RUN" "$LOG" "$ETC" "$STATE"/{done,host,rabbitmq,horizon,keystone,nova/{instances,lock}} \
    "$STATE"/glance/{images,staging,tasks,cache,lock} "$STATE/$NEUTRON/lock" || exit 1
# Services that give up root (dnsmasq, the databases) must pass through $STATE; the rest is root's.
chmod 755 "$STATE"; chmod 700 "$ETC" "$LOG" "$RUN" "$STATE"/{keystone,glance,nova,horizon}
cat >"$STATE/settings" <<S
SAVED_RELEASE=$RELEASE SAVED_NET=$NET SAVED_COMPUTE_HOST=$COMPUTE_HOST SAVED_WITH_BARBICAN=$WITH_BARBICAN SAVED_WITH_SRIOV=$WITH_SRIOV
S
[ -s "$PASSWORD_FILE" ] || (umask 077; head -c 18 /dev/urandom | base64 | tr '+/' 'Aa' >"$PASSWORD_FILE")
PASSWORD=$(<"$PASSWORD_FILE")
"$HERE/host.sh" save
for f in "$HERE"/etc/* "$HERE/etc-$MECHANISM"/* ${VENV:+"$HERE"/etc-venv/*}; do
    [ -f "$f" ] && render "$f" >"$ETC/${f##*/}"
done
install -D -m 755 "$HERE/tools/ebtables" "$STATE/bin/ebtables"
for u in admin demo demo2; do
    (umask 077; cat >"$STATE/openrc-$u") <<R
export OS_AUTH_URL=http://127.0.0.1:5000/v3 OS_IDENTITY_API_VERSION=3 OS_REGION_NAME=RegionOne OS_INTERFACE=public
export OS_USERNAME=$u OS_PASSWORD=$PASSWORD OS_PROJECT_NAME=$u OS_USER_DOMAIN_NAME=Default OS_PROJECT_DOMAIN_NAME=Default
export OS_COMPUTE_API_VERSION=2.92 OS_PLACEMENT_API_VERSION=1.39 PATH=${VENV:+$VENV/bin:}/usr/bin:/usr/sbin:/bin:/sbin:\$PATH PYTHONDONTWRITEBYTECODE=1
R
done

phase "MariaDB, RabbitMQ, memcached"
mv "$ETC/rabbitmq.conf" "$STATE/rabbitmq/"
"$PYTHON" "$HERE/bootstrap.py" broker "$PASSWORD_FILE" >"$STATE/rabbitmq/definitions.json" || exit 1
chown -R rabbitmq: "$STATE/rabbitmq"; chmod 700 "$STATE/rabbitmq"
start epmd setpriv --reuid rabbitmq --regid rabbitmq --init-groups epmd -address 127.0.0.1 -port $EPMD_PORT
start rabbitmq "$HERE/rabbit.sh" server
start memcached /usr/bin/memcached -u memcache -l 127.0.0.1 -p 11211 -m 128
once keystone-keys "$PYTHON" "$HERE/bootstrap.py" keys "$PASSWORD_FILE" "$STATE/keystone/fernet-keys" "$STATE/keystone/credential-keys" || exit 1
"$HERE/schema.sh" restore || exit 1
start mariadb /usr/sbin/mariadbd --defaults-file="$ETC/my.cnf"
wait_tcp mariadb 3306
# Every service of this cloud is one account of the data base, on the loopback only.
users() {
    local d
    for d in keystone glance placement nova_api nova nova_cell0 neutron_{linuxbridge,ovs,ovn} "$NEUTRON" heat; do
        echo "CREATE DATABASE IF NOT EXISTS $d CHARACTER SET utf8mb3; GRANT ALL ON $d.* TO 'openstack'@'127.0.0.1' IDENTIFIED BY '$PASSWORD';"
    done | sql mysql
}
once databases users || exit 1

if [ ! -e "$STATE/done/schemas" ]; then
    phase "data base schemas (kept for the next time in $CACHE)"
    "$HERE/schema.sh" create && once databases users || exit 1
    touch "$STATE/done/schemas"
fi

# The copy has no tables for this one.
macvtap_db() { users && neutron-db-manage --config-file "$ETC/neutron.conf" --config-file "$ETC/ml2_conf.ini" upgrade heads; }
[ "$MECHANISM" != macvtap ] || once macvtap-db macvtap_db || exit 1

phase "host network, NET=$NET"
"$HERE/host.sh" up || exit 1

phase "services"
OS_BOOTSTRAP_PASSWORD=$PASSWORD once keystone-bootstrap keystone-manage --config-file "$ETC/keystone.conf" bootstrap --bootstrap-username admin --bootstrap-project-name admin \
    --bootstrap-role-name admin --bootstrap-service-name keystone --bootstrap-region-id RegionOne \
    --bootstrap-admin-url http://127.0.0.1:5000/v3 --bootstrap-public-url http://127.0.0.1:5000/v3 \
    --bootstrap-internal-url http://127.0.0.1:5000/v3 || exit 1
api keystone
wait_tcp rabbitmq 5672
neutron=(--config-file "$ETC/neutron.conf" --config-file "$ETC/ml2_conf.ini")
api neutron
wait_tcp keystone 5000
once "identity$([ "$WITH_BARBICAN" != 1 ] || echo -barbican)" env WITH_BARBICAN="$WITH_BARBICAN" "$PYTHON" "$HERE/bootstrap.py" identity "$PASSWORD_FILE" & identity_pid=$!
for n in placement glance nova; do api $n; done
start nova-serialproxy nova-serialproxy --config-file "$ETC/nova.conf"
# These two ask placement for its version as they start, so they need their account.
join $identity_pid
for n in nova-conductor nova-scheduler; do start $n $n --config-file "$ETC/nova.conf"; done
wait_tcp neutron-server 9696
agents=()
agent() { agents+=("$1"); start "$1" "$1" "${neutron[@]:0:2}" "${@:2}"; }
case $MECHANISM in
    linuxbridge) agent neutron-linuxbridge-agent "${neutron[@]:2}" --config-file "$ETC/linuxbridge_agent.ini"; l2=() ;;
    ovs)         l2=(--config-file "$ETC/openvswitch_agent.ini"); agent neutron-openvswitch-agent "${neutron[@]:2}" "${l2[@]}" ;;
    macvtap)     l2=(--config-file "$ETC/network_node.ini")
                 agent neutron-linuxbridge-agent "${neutron[@]:2}" --config-file "$ETC/linuxbridge_agent.ini" "${l2[@]}"
                 agent neutron-macvtap-agent "${neutron[@]:2}" --config-file "$ETC/macvtap_agent.ini" ;;
    ovn)         agent neutron-ovn-metadata-agent --config-file "$ETC/neutron_ovn_metadata_agent.ini" ;;
esac
# The mechanism binds ports where its agent is alive. The real one looks for a card's functions in netlink.
[ "$WITH_SRIOV" != 1 ] || start fake-l2-sriov "$PYTHON" "$HERE/tools/fake_l2_agent.py" "$ETC" sriov "$COMPUTE_HOST"
if [ "$MECHANISM" != ovn ]; then
    agent neutron-dhcp-agent --config-file "$ETC/dhcp_agent.ini" "${l2[@]}"
    agent neutron-l3-agent --config-file "$ETC/l3_agent.ini" "${l2[@]}"
    agent neutron-metadata-agent --config-file "$ETC/metadata_agent.ini"
fi
if [ "${WITH_HEAT:-1}" = 1 ]; then
    start heat-engine heat-engine --config-file "$ETC/heat.conf"
    api heat
fi
if [ "$WITH_BARBICAN" = 1 ]; then
    (umask 077; mkdir -p "$STATE/barbican")
    install -D -m 600 "$ETC/barbican.conf" "$STATE/barbican/.barbican/barbican.conf"
    api barbican
fi
wait_tcp placement 8778; wait_tcp glance-api 9292; wait_tcp nova-api 8774 8775; wait_tcp nova-serialproxy 6083
all=(epmd rabbitmq memcached mariadb keystone placement glance-api nova-conductor nova-scheduler nova-api nova-serialproxy neutron-server "${more_services[@]}" "${agents[@]}")
if [ "${WITH_HEAT:-1}" = 1 ]; then
    wait_tcp heat-api 8004
    all+=(heat-engine heat-api)
fi
if [ "$WITH_BARBICAN" = 1 ]; then
    wait_tcp barbican-api 9311
    all+=(barbican-api)
fi
alive "${all[@]}"
compute=
if [ -n "${NO_COMPUTE-}" ]; then
    say "   NO_COMPUTE is set: no compute service"
elif [ ! -x "$NOVALET_BIN" ]; then
    say "   no $NOVALET_BIN: no compute service (build it, then: $HERE/compute.sh start novalet)"
else
    compute=1; NOWAIT=1 "$HERE/compute.sh" start novalet || exit 1
fi
[ "${WITH_HORIZON}" != 1 ] || NOWAIT=1 "$HERE/horizon.sh" start || exit 1

phase "agents alive; flavors, images, networks"
[ "$WITH_SRIOV" != 1 ] || agents+=(neutron-sriov-nic-agent)
"$PYTHON" "$HERE/bootstrap.py" ready "$PASSWORD_FILE" "${agents[@]}" || { alive "${all[@]}"; exit 1; }
lans=()
[ "$MECHANISM" != macvtap ] || lans=(lan1 lan2)
once "resources-$MECHANISM" "$PYTHON" "$HERE/bootstrap.py" resources "$PASSWORD_FILE" "${lans[@]}" || exit 1
phase "compute service, dashboard"
[ -z "$compute" ] || "$HERE/compute.sh" wait novalet || exit 1
[ "${WITH_HORIZON}" != 1 ] || "$HERE/horizon.sh" wait || exit 1
alive "${all[@]}"
phase ''
cat <<S

The cloud is up ($((SECONDS - BEGAN)) s): OpenStack $RELEASE, NET=$NET, compute host $COMPUTE_HOST.
  command line  . $STATE/openrc-demo     (also openrc-admin, openrc-demo2)
  dashboard     $([ "$WITH_HORIZON" = 1 ] && echo "http://127.0.0.1:8080/       demo, domain Default" || echo none)
  password      $PASSWORD_FILE     (every account of this cloud)
  logs          $LOG
  stop          $HERE/down.sh  (--wipe: without a trace)
S
