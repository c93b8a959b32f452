#!/bin/bash
# DevStack plugin: novalet as the compute service of this node. In local.conf:
#
#   enable_plugin novalet https://github.com/novalet/novalet
#
# DevStack configures n-cpu as for any driver (nova-cpu.conf has all that novalet needs) and starts the unit
# devstack@n-cpu; a drop-in of that unit runs novalet in the place of nova-compute.

_XTRACE_NOVALET=$(set +o | grep xtrace)
set +o xtrace

NOVALET_DROPIN=${SYSTEMD_DIR:-/etc/systemd/system}/devstack@n-cpu.service.d/novalet.conf

# novalet_go prints a go command that can build the project.
function novalet_go {
    local go version
    for go in "$NOVALET_GO" "$(command -v go)" /usr/local/go/bin/go /usr/lib/go-*/bin/go; do
        [[ -x "$go" ]] || continue
        version=$("$go" env GOVERSION 2>/dev/null)
        if [[ "$version" =~ ^go1\.([0-9]+) && ${BASH_REMATCH[1]} -ge 21 ]]; then
            echo "$go"
            return
        fi
    done
    return 1
}

function install_novalet {
    local go
    if ! go=$(novalet_go); then
        if is_fedora; then install_package golang; else install_package golang-go; fi
        go=$(novalet_go) || die $LINENO "novalet needs Go 1.21 or later to build: name one with NOVALET_GO in local.conf"
    fi
    install_package make iproute2
    # As the user of the stack: the sources are its own, and so is Go's cache.
    PATH=$(dirname "$go"):$PATH GOTOOLCHAIN=auto make -C "$NOVALET_DIR" build
    sudo install -D -m 0755 "$NOVALET_DIR/bin/novalet" "$NOVALET_BIN_DIR/novalet"
}

function configure_novalet {
    # DevStack makes nova-cpu.conf from nova.conf when it starts the service.
    iniset "$NOVA_CONF" novalet state_dir "$NOVALET_STATE_DIR"
    sudo install -d -m 0711 "$NOVALET_STATE_DIR"
    sudo install -d "$(dirname "$NOVALET_DROPIN")"
    sudo tee "$NOVALET_DROPIN" >/dev/null <<EOF
[Service]
ExecStart=
ExecStart=$NOVALET_BIN_DIR/novalet agent --config-file $NOVA_CPU_CONF
User=root
Group=root
# Instances outlive the agent, and are no part of its unit.
KillMode=process
Delegate=yes
OOMPolicy=continue
TasksMax=infinity
Restart=on-failure
EOF
    sudo systemctl daemon-reload
}

# A cloud that is gone must not leave its instances running: they are in cgroups of their own.
function cleanup_novalet {
    sudo STATE="$NOVALET_STATE_DIR" "$NOVALET_DIR/devstack/host.sh" guests
    sudo rm -f "$NOVALET_DROPIN" "$NOVALET_BIN_DIR/novalet"
    sudo rmdir "$(dirname "$NOVALET_DROPIN")" 2>/dev/null || true
    sudo systemctl daemon-reload
    sudo rm -rf --one-file-system "$NOVALET_STATE_DIR"
}

if is_service_enabled n-cpu; then
    case "$1 ${2-}" in
        "stack install")
            echo_summary "Building and installing novalet"
            install_novalet ;;
        "stack post-config")
            echo_summary "Configuring novalet"
            configure_novalet ;;
        "stack extra")
            # stack.sh has started n-cpu by now; discover_hosts follows after this phase.
            echo_summary "novalet: $("$NOVALET_BIN_DIR/novalet" version)"
            sudo systemctl is-active --quiet devstack@n-cpu.service || die $LINENO "novalet did not start: journalctl -u devstack@n-cpu" ;;
        "unstack ")
            # stop_nova stops the unit; instances stay, as virtual machines do.
            : ;;
        "clean ")
            cleanup_novalet ;;
    esac
fi

$_XTRACE_NOVALET
