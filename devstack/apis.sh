# shellcheck shell=bash disable=SC2034
# api NAME: start a REST service. Zed's are programs or scripts for uwsgi; those of the releases from PyPI are Python
# modules that a WSGI server loads. Needs vars.sh and lib.sh.

# wsgi NAME PORT MODULE [VARIABLE=VALUE...]; WORKERS are options of uwsgi, PYARGV of the module.
wsgi() {
    local n=$1 port=$2 module=$3; shift 3
    # shellcheck disable=SC2086
    start "$n" env "$@" uwsgi --ini "$ETC/uwsgi.ini" --http-socket "127.0.0.1:$port" --module "$module:application" \
        ${WORKERS-} --pyargv "${PYARGV-}"
}

api_debian() {
    case $1 in
        keystone)  start keystone env OS_KEYSTONE_CONFIG_FILES=keystone.conf OS_KEYSTONE_CONFIG_DIR="$ETC" uwsgi --ini "$ETC/keystone-uwsgi.ini" ;;
        placement) start placement env OS_PLACEMENT_CONFIG_DIR="$ETC" uwsgi --ini "$ETC/placement-uwsgi.ini" ;;
        glance)    start glance-api glance-api --config-file "$ETC/glance-api.conf" ;;
        neutron)   start neutron-server neutron-server --config-file "$ETC/neutron.conf" --config-file "$ETC/ml2_conf.ini" ;;
        nova)      start nova-api nova-api --config-file "$ETC/nova.conf" ;;
        heat)      start heat-api heat-api --config-file "$ETC/heat.conf" ;;
        # It finds its configuration below its home only.
        barbican)  start barbican-api env HOME="$STATE/barbican" uwsgi --ini "$ETC/barbican-uwsgi.ini" ;;
    esac
}

api_venv() {
    local n
    case $1 in
        keystone)  wsgi keystone 5000 keystone.wsgi.api OS_KEYSTONE_CONFIG_FILES=keystone.conf OS_KEYSTONE_CONFIG_DIR="$ETC" ;;
        placement) wsgi placement 8778 placement.wsgi.api OS_PLACEMENT_CONFIG_DIR="$ETC" ;;
        glance)    wsgi glance-api 9292 glance.wsgi.api OS_GLANCE_CONFIG_DIR="$ETC" ;;
        neutron)   wsgi neutron-server 9696 neutron.wsgi.api OS_NEUTRON_CONFIG_DIR="$ETC" "OS_NEUTRON_CONFIG_FILES=neutron.conf;ml2_conf.ini"
                   # What neutron-server did beside its API.
                   for n in "${neutron_workers[@]}"; do
                       start "$n" "$n" --config-file "$ETC/neutron.conf" --config-file "$ETC/ml2_conf.ini"
                   done ;;
        nova)      # Until Nova left eventlet, threads of the WSGI server lost each other's answers from the bus.
                   [ "$RELEASE" != 2025.1 ] || local WORKERS="--threads 1 --processes 3"
                   wsgi nova-api 8774 nova.wsgi.osapi_compute OS_NOVA_CONFIG_DIR="$ETC" "OS_NOVA_CONFIG_FILES=$SHARE/nova/api-paste.ini;nova.conf"
                   wsgi nova-metadata 8775 nova.wsgi.metadata OS_NOVA_CONFIG_DIR="$ETC" "OS_NOVA_CONFIG_FILES=$SHARE/nova/api-paste.ini;nova.conf" ;;
        heat)      PYARGV="--config-file $ETC/heat.conf" wsgi heat-api 8004 heat.wsgi.api ;;
    esac
}

# more_services are those that have processes of their own only in the releases from PyPI.
neutron_workers=() more_services=()
if [ -n "$VENV" ]; then
    neutron_workers=(neutron-rpc-server neutron-periodic-workers)
    [ "$MECHANISM" != ovn ] || neutron_workers+=(neutron-ovn-maintenance-worker)
    more_services=(nova-metadata "${neutron_workers[@]}")
fi
api() { if [ -n "$VENV" ]; then api_venv "$1"; else api_debian "$1"; fi; }
