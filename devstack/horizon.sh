#!/bin/bash
# horizon.sh start | wait | stop: the dashboard on http://127.0.0.1:8080/
set -u
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"
case ${1-} in
start)
    D=/etc/openstack-dashboard/local_settings.d
    mkdir -p "$STATE/horizon/settings.d"
    cp $D/*.py "$STATE/horizon/settings.d/" && cp "$ETC/horizon_local.py" "$STATE/horizon/settings.d/_9999_cloud.py" || exit 1
    # The dashboard sees our settings in the place of the packaged ones in a mount name space of its own:
    # nothing is written to /etc.
    # shellcheck disable=SC2016
    start horizon unshare --mount --propagation private sh -c 'mount --bind "$0" "$1" && shift && exec "$@"' \
        "$STATE/horizon/settings.d" $D uwsgi --ini "$ETC/horizon-uwsgi.ini"
    [ -n "${NOWAIT-}" ] || exec "$0" wait ;;
wait) wait_for horizon 300 curl -sf -m 60 -o /dev/null http://127.0.0.1:8080/auth/login/ ;;
stop) stop horizon ;;
*) echo "usage: horizon.sh start | wait | stop" >&2; exit 2 ;;
esac
