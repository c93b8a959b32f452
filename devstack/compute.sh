#!/bin/bash
# compute.sh start|wait|stop|restart|kill9|log novalet
# compute.sh start|wait|stop|log stock HOST [DRIVER]
#
# novalet runs as COMPUTE_HOST. To compare with, a stock nova-compute runs as HOST with a fake driver (default
# fake.FakeDriver), which starts nothing and plugs nothing: tools/fake_l2_agent.py makes Neutron bind ports
# there. stop removes the records of HOST, too, so that nothing is scheduled to it.
# NOWAIT=1: do not wait until Nova schedules to the host. HTTP_DEBUG=1: the stock one logs its REST requests.
set -u
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"
usage() { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
need_root
[ -e "$STATE/.novalet-cloud" ] || die "no cloud in $STATE: run $HERE/up.sh"
action=${1-} kind=${2-} host=${3-}

# mapped HOST NAME: Nova schedules to a host once it is mapped to its cell; the scheduler looks every 10 s.
mapped() {
    have() { [ "$(sql nova_api -e "SELECT COUNT(*) FROM host_mappings WHERE host = '$1'")" = 1 ]; }
    wait_for "$2" 300 have "$1"
    say "   $2 serves as $1"
}

start_novalet() {
    [ -x "$NOVALET_BIN" ] || die "no program $NOVALET_BIN"
    [ "$WITH_SRIOV" != 1 ] || export NOVALET_STANDIN_SYSFS=$STATE/sysfs
    start novalet "$NOVALET_BIN" agent --config-file "$ETC/nova-compute.conf"
    [ -n "${NOWAIT-}" ] || mapped "$COMPUTE_HOST" novalet
}
# The agent alone: its instances live in sessions of their own and stay.
stop_novalet() { stop novalet 60; }

kill9_novalet() {
    local p end=$((SECONDS + 60))
    p=$(pid_of novalet) || die "novalet does not run"
    kill -KILL "$p"
    while running novalet; do
        [ $SECONDS -lt $end ] || die "novalet ($p) does not end"
        sleep 0.05
    done
    rm -f "$RUN"/novalet.{pid,start}
    say "   killed novalet ($p)"
}

start_stock() {
    local d=$STATE/nova-$host c=$ETC/nova-compute-$host.conf
    mkdir -p "$d"/{instances,lock}
    {
        printf '[DEFAULT]\nhost = %s\ncompute_driver = %s\nstate_path = %s\ninstances_path = %s/instances\n' "$host" "$1" "$d" "$d"
        [ -z "${HTTP_DEBUG-}" ] || printf 'debug = true\ndefault_log_levels = keystoneauth=DEBUG,neutronclient=INFO,glanceclient=DEBUG,amqp=WARN,oslo.messaging=INFO,oslo_messaging=INFO,stevedore=INFO,urllib3=INFO\n'
        printf '[oslo_concurrency]\nlock_path = %s/lock\n' "$d"
    } >"$c"
    start "fake-l2-$host" "$PYTHON" "$HERE/tools/fake_l2_agent.py" "$ETC" "$MECHANISM" "$host"
    start "nova-compute-$host" nova-compute --config-file "$ETC/nova-compute.conf" --config-file "$c"
    [ -n "${NOWAIT-}" ] || mapped "$host" "nova-compute-$host"
    alive "fake-l2-$host"
}

case $kind in
novalet) name=novalet ;;
stock) [[ $host =~ ^[A-Za-z0-9][A-Za-z0-9.-]*$ ]] || usage; name=nova-compute-$host
    [ "$host" != "$COMPUTE_HOST" ] || die "$host is novalet's own host name" ;;
*) usage ;;
esac
case $action-$kind in
    start-novalet)   start_novalet ;;
    wait-novalet)    mapped "$COMPUTE_HOST" novalet ;;
    wait-stock)      mapped "$host" "$name" ;;
    stop-novalet)    stop_novalet ;;
    restart-novalet) stop_novalet; start_novalet ;;
    kill9-novalet)   kill9_novalet ;;
    start-stock)     start_stock "${4-fake.FakeDriver}" ;;
    stop-stock)      stop "$name" 40; stop "fake-l2-$host" 5
                     "$PYTHON" "$HERE/bootstrap.py" forget "$PASSWORD_FILE" "$host" || say "   Nova keeps the records of $host" ;;
    log-*)           say "== $LOG/$name.log"; tail -n "${LINES:-200}" "$LOG/$name.log" ;;
    *) usage ;;
esac
