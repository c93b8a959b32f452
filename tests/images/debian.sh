#!/bin/bash
# debian.sh OUT.tar.gz: make a Debian 12 root tarball with systemd, cloud-init and sshd, as a machine image.
# Packages come from where the host's own apt takes them. Takes about two minutes; the callers cache the result.
# shellcheck disable=SC2016  # mmdebstrap expands the hooks
set -eu
out=${1:?usage: debian.sh OUT.tar.gz}
mkdir -p "$(dirname "$out")"
tmp=$(mktemp "$out.XXXXXX"); trap 'rm -f "$tmp"' EXIT
include=systemd,systemd-sysv,dbus,cloud-init,openssh-server,sudo,ifupdown,isc-dhcp-client,netbase,iproute2,iputils-ping,procps,curl,ca-certificates,libnss-myhostname
# No documents, manuals and translations: half of the size, and what cloud images for containers leave out too.
mmdebstrap --quiet --variant=minbase --include="$include" \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-include=/usr/share/locale/locale.alias' \
    --customize-hook='rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/hostname "$1"/etc/resolv.conf' \
    --customize-hook=': >"$1"/etc/machine-id' \
    --customize-hook='echo "locale: C.UTF-8" >"$1"/etc/cloud/cloud.cfg.d/90_locale.cfg' \
    --customize-hook='rm -rf "$1"/var/cache/apt/*.bin "$1"/var/log/*.log "$1"/var/lib/apt/lists/*' \
    bookworm - | gzip -1 >"$tmp"
chmod 644 "$tmp"
mv "$tmp" "$out"
trap - EXIT
