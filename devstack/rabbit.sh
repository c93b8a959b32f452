#!/bin/bash
# rabbit.sh server | rabbit.sh ctl ARGS...: a broker of its own (node name, cookie, data and ports).
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
D=$STATE/rabbitmq
export HOME=$D RABBITMQ_NODENAME=novalet@localhost RABBITMQ_CONFIG_FILE=$D/rabbitmq.conf \
    RABBITMQ_MNESIA_BASE=$D/mnesia RABBITMQ_LOG_BASE=$D/log RABBITMQ_PID_FILE=$D/pid \
    RABBITMQ_ENABLED_PLUGINS_FILE=$D/enabled_plugins RABBITMQ_CONF_ENV_FILE=/nonexistent \
    ERL_EPMD_ADDRESS=127.0.0.1 ERL_EPMD_PORT=$EPMD_PORT RABBITMQ_DIST_PORT=25672 \
    RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
cd "$D" || exit 1
as=(setpriv --reuid rabbitmq --regid rabbitmq --init-groups)
c=${1-}; [ $# -gt 0 ] && shift
case $c in
    server) exec "${as[@]}" /usr/lib/rabbitmq/bin/rabbitmq-server ;;
    ctl)    exec "${as[@]}" /usr/lib/rabbitmq/bin/rabbitmqctl "$@" ;;
    *)      echo "usage: rabbit.sh server | ctl ARGS..." >&2; exit 2 ;;
esac
