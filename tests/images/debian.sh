#!/bin/bash
# debian.sh OUT.tar.gz [vm]: make a Debian 12 root tarball with systemd, cloud-init and sshd, as a machine image; with vm also
# what a virtual machine takes: kernel, initrd and GRUB.
# Packages come from where the host's own apt takes them. Takes one to two minutes and says how far it is; the callers
# cache the result.
# shellcheck disable=SC2016  # mmdebstrap expands the hooks
set -eu -o pipefail
out=${1:?usage: debian.sh OUT.tar.gz [vm]}
mkdir -p "$(dirname "$out")"
tmp=$(mktemp "$out.XXXXXX"); trap 'rm -f "$tmp" "$tmp.log"' EXIT
# progress: of what mmdebstrap tells, its stages and every twentieth package; all of it goes to the log.
progress() {
    local line n=0
    while IFS= read -r line; do
        printf '%s\n' "$line" >&3
        case $line in
            'I: running apt'* | 'I: downloading '* | 'I: extracting '* | 'I: installing '* | 'I: creating '*) line=${line#I: } ;;
            'Setting up '*) n=$((n + 1)); [ $((n % 20)) = 0 ] || continue; line="$n packages are set up" ;;
            *) continue ;;
        esac
        printf '   %3d s: %s\n' "$SECONDS" "$line" >&2
    done 3>"$tmp.log"
}
include=systemd,systemd-sysv,dbus,cloud-init,openssh-server,sudo,ifupdown,isc-dhcp-client,netbase,iproute2,iputils-ping,procps,curl,ca-certificates,libnss-myhostname
[ "${2:-}" != vm ] || include=$include,linux-image-cloud-amd64,initramfs-tools,udev,zstd,grub-common,grub-pc-bin,cloud-guest-utils
# No documents, manuals and translations: half of the size, and what cloud images for containers leave out too.
{ mmdebstrap --verbose --variant=minbase --include="$include" \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-include=/usr/share/locale/locale.alias' \
    --customize-hook='rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/hostname "$1"/etc/resolv.conf' \
    --customize-hook=': >"$1"/etc/machine-id' \
    --customize-hook='echo "locale: C.UTF-8" >"$1"/etc/cloud/cloud.cfg.d/90_locale.cfg' \
    --customize-hook='rm -rf "$1"/var/cache/apt/*.bin "$1"/var/log/*.log "$1"/var/lib/apt/lists/*' \
    bookworm - 2>&1 >&4 4>&- | progress 4>&-; } 4>&1 >&2 | gzip -1 >"$tmp" || { tail -n 20 "$tmp.log" >&2; exit 1; }
chmod 644 "$tmp"
mv "$tmp" "$out"
rm -f "$tmp.log"
trap - EXIT
