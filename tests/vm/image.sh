#!/bin/bash
# image.sh: make the virtual machine of `make test-vm`, unless one of this very script is there, and print its folder:
# root.img (Debian 12 with systemd and a production host's kernel and services), vmlinuz and initrd. Packages come from
# where the host's own apt takes them. VM_KERNEL is the package of another kernel, for a VM_CACHE of its own. Takes one to
# three minutes; needs root.
# shellcheck disable=SC2016  # mmdebstrap expands the hooks
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cache=${VM_CACHE:-/var/cache/novalet/vm}
layers=${NOVALET_TEST_CACHE:-/var/tmp/novalet-testcache}

# The host: kernel, systemd, AppArmor, Open vSwitch. Then what the tests run.
kernel=${VM_KERNEL:-linux-image-cloud-amd64}
host=systemd,systemd-sysv,dbus,udev,kmod,$kernel,apparmor,openvswitch-switch,netbase
tools=busybox-static,mount,iproute2,iptables,e2fsprogs,xfsprogs,btrfs-progs,dosfstools,squashfs-tools,gdisk,fdisk,qemu-utils,umoci,skopeo
tools=$tools,xz-utils,zstd,bzip2,acl,attr,libcap2-bin,procps,util-linux,ethtool,iputils-ping,curl
guest=systemd,systemd-sysv,login,util-linux,procps,iproute2,sudo,passwd

key=$({ cat "$here/image.sh"; echo "$kernel"; } | sha256sum | cut -c1-16)
out=$cache/$key
if [ -s "$out/root.img" ]; then
    echo "$out"
    exit 0
fi
mkdir -p "$cache" "$layers"
exec 8>"$cache/lock"
flock 8
[ ! -s "$out/root.img" ] || { echo "$out"; exit 0; }
# Images of older scripts are of no use any more.
find "$cache" -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
work=$(mktemp -d "$cache/make.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
root=$work/root

# The root of machine instances that engine's tests boot: the same folder, made in the same way and under the same lock.
(
    flock 7
    if [ ! -e "$layers/debian-systemd/usr/bin/login" ] && [ ! -e "$layers/debian-systemd/bin/login" ]; then
        rm -rf "$layers/debian-systemd"
        mmdebstrap --quiet --mode=root --variant=minbase --include=$guest bookworm "$layers/debian-systemd" >&2
    fi
) 7>"$layers/lock"

# The kernel is booted with an initramfs of our own that has the drivers a root disk needs: Debian's takes longer to make
# and to run than all of ours.
export INITRD=No DEBIAN_FRONTEND=noninteractive
mmdebstrap --quiet --mode=root --variant=minbase --include="$host,$tools" \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='rm -rf "$1"/var/cache/apt/*.bin "$1"/var/lib/apt/lists/*' \
    bookworm "$root" >&2
modules=$(echo "$root"/lib/modules/*)
cp "$root"/boot/vmlinuz-* "$work/vmlinuz"

mkdir -p "$work/initrd"/{bin,proc,sys,dev,root}
cp "$root/bin/busybox" "$work/initrd/bin/"
load=
for m in virtio_pci virtio_blk ext4; do
    while read -r kind file _; do
        if [ "$kind" = insmod ] && [ ! -e "$work/initrd/${file##*/}" ]; then
            cp "$root$file" "$work/initrd/"
            load+=" ${file##*/}"
        fi
    done < <(chroot "$root" modprobe -S "${modules##*/}" --show-depends $m)
done
cat >"$work/initrd/init" <<EOF
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for m in$load; do /bin/busybox insmod /\$m; done
for i in \$(/bin/busybox seq 200); do [ -e /dev/vda ] && break; /bin/busybox usleep 50000; done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox poweroff -f
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
EOF
chmod 755 "$work/initrd/init"
(cd "$work/initrd" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$work/initrd.gz"
mv "$work/initrd.gz" "$work/initrd.img"
rm -rf "$work/initrd"

# One unit: run what the second disk brings, then power off, whatever became of it.
cat >"$root/etc/systemd/system/novalet-test.service" <<'EOF'
[Unit]
Description=tests of novalet
After=multi-user.target
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=exec
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
TimeoutStartSec=infinity
Environment=HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ExecStart=/bin/sh -c 'mkdir -p /t && mount -o ro /dev/vdb /t && exec /t/guest.sh'
EOF
mkdir -p "$root/etc/systemd/system/graphical.target.wants"
# Nothing of these is looked at, and all of it costs seconds without hardware virtualisation.
for u in getty@tty1.service serial-getty@ttyS0.service systemd-networkd-wait-online.service e2scrub_reap.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer systemd-update-utmp.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$u"
done
rm -f "$root"/etc/systemd/system/multi-user.target.wants/openvswitch-switch.service "$root/etc/resolv.conf"
ln -s /etc/systemd/system/novalet-test.service "$root/etc/systemd/system/graphical.target.wants/"
ln -sf /lib/systemd/system/graphical.target "$root/etc/systemd/system/default.target"
echo novalet-vm >"$root/etc/hostname"
printf '127.0.0.1 localhost novalet-vm\n::1 localhost\n' >"$root/etc/hosts"
rm -f "$root"/boot/vmlinuz-* "$root"/boot/System.map-*
mkdir -p "$root/var/tmp/novalet-testcache"
cp -a "$layers/debian-systemd" "$root/var/tmp/novalet-testcache/"

truncate -s 6G "$work/root.img"
mkfs.ext4 -q -F -L root -O verity -d "$root" "$work/root.img"
rm -rf "$root"
chmod -R go+rX "$work"
mv "$work" "$out"
trap - EXIT
echo "$out"
