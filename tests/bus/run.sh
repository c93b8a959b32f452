#!/bin/bash
# run.sh ARGS…: the tests of novadriver/oslomsg, built with BUS_FLAGS and run with ARGS, against a RabbitMQ that is theirs
# alone: it is stopped, cut off and starved under them. It lives in a network name space, so another broker on this host is not
# in its way. oslo.messaging on the other side of the wire is the one of the cloud's RELEASE. Needs root.
set -eu
cd "$(dirname "$0")/../.."
if [ $# -gt 0 ] && [ "$1" = inside ]; then
    shift
    ip link set lo up
    export STATE=$BUS_STATE
    # shellcheck source=devstack/vars.sh
    . devstack/vars.sh
    broker=$PWD/devstack/rabbit.sh
    # One name space of processes: whatever Erlang starts ends with this script.
    setpriv --reuid rabbitmq --regid rabbitmq --init-groups epmd -address 127.0.0.1 -port "$EPMD_PORT" >"$STATE/epmd.log" 2>&1 &
    "$broker" server >"$STATE/server.log" 2>&1 &
    if ! "$broker" ctl -q wait --timeout 120 "$STATE/rabbitmq/pid"; then
        echo "RabbitMQ did not start:" >&2
        tail -n 20 "$STATE"/server.log "$STATE"/rabbitmq/log/*.log >&2
        exit 1
    fi
    password=$(<"$STATE/password")
    export NOVALET_AMQP_URL="rabbit://bus:$password@127.0.0.1:5672/" NOVALET_RABBITMQCTL="$broker ctl" NOVALET_RABBITMQ_OWN=1
    export NOVALET_OSLO_PYTHON=$PYTHON
    cd novadriver/oslomsg
    rc=0
    "$STATE/oslomsg.test" "$@" || rc=$?
    "$broker" ctl -q stop_app >/dev/null 2>&1 || true
    exit $rc
fi

[ "$(id -u)" = 0 ] || { echo "tests/bus/run.sh: needs root" >&2; exit 1; }
BUS_STATE=$(mktemp -d /tmp/novalet-bus.XXXXXX)
trap 'rm -rf "$BUS_STATE"' EXIT
# shellcheck disable=SC2086
"${GO:-go}" test -c ${BUS_FLAGS-} -o "$BUS_STATE/oslomsg.test" ./novadriver/oslomsg
(umask 077; head -c 18 /dev/urandom | base64 | tr '+/' 'Aa' >"$BUS_STATE/password")
mkdir "$BUS_STATE/rabbitmq"
cat >"$BUS_STATE/rabbitmq/rabbitmq.conf" <<C
listeners.tcp.1 = 127.0.0.1:5672
default_user = bus
default_pass = $(<"$BUS_STATE/password")
C
chown -R rabbitmq: "$BUS_STATE/rabbitmq"
chmod 755 "$BUS_STATE"
export BUS_STATE
unshare --net --pid --fork --kill-child --mount-proc tests/bus/run.sh inside "$@"
