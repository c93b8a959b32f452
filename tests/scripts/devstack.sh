#!/bin/bash
# devstack.sh WORK: take the plugin through DevStack's phases, in DevStack's order, with its services in WORK. What DevStack
# brings is either its own library (DEVSTACK_SRC, a checkout of it) or the few functions below that say the same.
# shellcheck disable=SC2034  # DevStack and the plugin read these
set -eu
WORK=$1
HERE=$(cd "$(dirname "$0")/../.." && pwd)
export DEST=$WORK/dest DATA_DIR=$WORK/data SYSTEMD_DIR=$WORK/systemd NOVA_CONF_DIR=$WORK/nova
mkdir -p "$DEST" "$DATA_DIR" "$SYSTEMD_DIR" "$NOVA_CONF_DIR" "$WORK/path" "$WORK/bin"
NOVA_CONF=$NOVA_CONF_DIR/nova.conf NOVA_CPU_CONF=$NOVA_CONF_DIR/nova-cpu.conf
NOVALET_DIR=$HERE NOVALET_BIN_DIR=$WORK/bin
# No unit of this machine is touched: systemctl writes down what it was asked.
printf '#!/bin/sh\nexec env "$@"\n' >"$WORK/path/sudo"
printf '#!/bin/sh\necho "$*" >>%s/systemctl.log\n' "$WORK" >"$WORK/path/systemctl"
chmod 755 "$WORK"/path/*
PATH=$WORK/path:$PATH
ENABLED_SERVICES=n-api,n-cpu,n-novnc,key
STACK_USER=$(id -un)
if [ -n "${DEVSTACK_SRC-}" ]; then
    TOP_DIR=$DEVSTACK_SRC
    set +eu
    # shellcheck source=/dev/null
    . "$DEVSTACK_SRC/functions"
    SYSTEMCTL="sudo systemctl" KILL_PATH=/bin/kill
    declare -A GITDIR=([novalet]=$HERE)
    DEVSTACK_PLUGINS=novalet
    overrides() { plugin_override_defaults; }
    settings() { load_plugin_settings; }
    phase() { run_plugins "$@"; }
    start() { run_process n-cpu "/opt/stack/bin/nova-compute --config-file $NOVA_CPU_CONF" nova; }
else
    is_service_enabled() { [[ ,$ENABLED_SERVICES, == *,$1,* ]]; }
    enable_service() { ENABLED_SERVICES+=,$1; }
    disable_service() { for s; do ENABLED_SERVICES=${ENABLED_SERVICES//,$s/}; done; }
    iniset() { grep -q "^\[$2\]" "$1" || printf '[%s]\n' "$2" >>"$1"; sed -i "/^\[$2\]/a $3 = $4" "$1"; }
    echo_summary() { echo "summary: $*"; }
    install_package() { echo "install_package $*"; }
    is_fedora() { false; }
    die() { echo "die: $*" >&2; exit 1; }
    # shellcheck source=devstack/override-defaults
    overrides() { . "$HERE/devstack/override-defaults"; }
    # shellcheck source=devstack/settings
    settings() { . "$HERE/devstack/settings"; }
    # shellcheck source=devstack/plugin.sh
    phase() { . "$HERE/devstack/plugin.sh" "$@"; }
    start() { printf '[Service]\nExecStart = /opt/stack/bin/nova-compute\n' >"$SYSTEMD_DIR/devstack@n-cpu.service"; systemctl start devstack@n-cpu.service; }
fi
: >"$NOVA_CONF"
overrides
settings
echo "VIRT_DRIVER=$VIRT_DRIVER ENABLED_SERVICES=$ENABLED_SERVICES"
phase stack pre-install
phase stack install
iniset "$NOVA_CONF" DEFAULT transport_url rabbit://stackrabbit:secret@192.0.2.1:5672/
phase stack post-config
cp "$NOVA_CONF" "$NOVA_CPU_CONF" # as start_nova_compute does
start
phase stack extra
phase stack test-config
cp -r "$SYSTEMD_DIR" "$WORK/systemd-stacked"
"$NOVALET_BIN_DIR/novalet" version
phase unstack ''
[ -x "$NOVALET_BIN_DIR/novalet" ] || { echo "unstack removed the program" >&2; exit 1; }
phase clean ''
