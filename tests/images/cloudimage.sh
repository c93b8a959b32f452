#!/bin/bash
# cloudimage.sh ROOT.tar.gz OUT.qcow2 [ext4|xfs|btrfs]: make of a root tarball the disk image that distributions publish for
# clouds: GPT with the root as partition 1, a BIOS boot partition 14 and an EFI system partition 15, both named in /etc/fstab;
# qcow2, compressed. The root is ext4; or XFS with the labels that SELinux keeps as attributes, as of Red Hat's family; or
# btrfs whose default is a subvolume, as of Fedora and openSUSE: those two are filled through a mount, which takes root. A
# root with a kernel and GRUB (debian.sh OUT vm) gets a boot loader and boots as a virtual machine; others have none.
set -eu
usage='usage: cloudimage.sh ROOT.tar.gz OUT.qcow2 [ext4|xfs|btrfs]'
tar=${1:?$usage} out=${2:?$usage} fs=${3:-ext4}
export PATH=$PATH:/usr/sbin:/sbin
tmp=$(mktemp -d "$out.XXXXXX")
trap '! mountpoint -q "$tmp/mnt" || umount "$tmp/mnt"; rm -rf "$tmp"' EXIT
root=6a5f3c1e-0c58-4a3c-9f0b-6a1d3c9f1a01 efi=6a5f3c1e-0c58-4a3c-9f0b-6a1d3c9f1a0f
mkdir "$tmp/root"
tar -C "$tmp/root" --numeric-owner --xattrs --xattrs-include='*' -xzf "$tar"
mkdir -p "$tmp/root/boot/efi" "$tmp/mnt"
options=rw,discard,x-systemd.growfs
[ "$fs" != ext4 ] || options=$options,errors=remount-ro
cat >"$tmp/root/etc/fstab" <<S
PARTUUID=$root / $fs $options 0 1
PARTUUID=$efi /boot/efi vfat defaults 0 0
S
mib=900
# GRUB counts a path from the top of btrfs, whatever its default is.
top=
[ "$fs" != btrfs ] || top=/root
if [ -e "$tmp/root/usr/lib/grub/i386-pc/boot.img" ]; then
    mib=1300
    mkdir -p "$tmp/root/boot/grub"
    cp -r "$tmp/root/usr/lib/grub/i386-pc" "$tmp/root/boot/grub/"
    kernel=$(cd "$tmp/root/boot" && echo vmlinuz-*)
    # A machine whose processor is software takes minutes over its devices.
    slow='systemd.default_timeout_start_sec=900 systemd.default_device_timeout_sec=900 udev.children_max=2'
    cat >"$tmp/root/boot/grub/grub.cfg" <<S
serial --unit=0 --speed=115200
terminal_output serial
linux $top/boot/$kernel root=PARTUUID=$root ro console=tty0 console=ttyS0,115200 $slow
initrd $top/boot/initrd.img-${kernel#vmlinuz-}
boot
S
    chroot "$tmp/root" grub-mkimage -O i386-pc -o /boot/grub/core.img -p "(hd0,gpt1)$top/boot/grub" \
        biosdisk part_gpt "${fs/ext4/ext2}" normal linux serial terminal
    cp "$tmp/root/boot/grub/core.img" "$tmp/root/usr/lib/grub/i386-pc/boot.img" "$tmp/"
fi
case $fs in
ext4) mke2fs -q -t ext4 -L root -d "$tmp/root" "$tmp/root.img" ${mib}M ;;
xfs)
    truncate -s ${mib}M "$tmp/root.img"
    mkfs.xfs -q -L root "$tmp/root.img"
    mount -o loop "$tmp/root.img" "$tmp/mnt"
    cp -a "$tmp/root/." "$tmp/mnt"
    # Two labels stand for SELinux's policy: what matters is that each file has one.
    find "$tmp/mnt" -xdev ! -type s -exec setfattr -h -n security.selinux -v 'system_u:object_r:default_t:s0\0' {} +
    setfattr -n security.selinux -v 'system_u:object_r:shadow_t:s0\0' "$tmp/mnt/etc/shadow"
    umount "$tmp/mnt" ;;
btrfs)
    truncate -s ${mib}M "$tmp/root.img"
    mkfs.btrfs -q -L root "$tmp/root.img" >/dev/null
    mount -o loop,compress=zstd:1 "$tmp/root.img" "$tmp/mnt"
    btrfs -q subvolume create "$tmp/mnt/root"
    btrfs -q subvolume create "$tmp/mnt/home"
    btrfs -q subvolume set-default "$tmp/mnt/root"
    # What lies at the top belongs to no default and must not show.
    echo wrong >"$tmp/mnt/top"
    cp -a "$tmp/root/." "$tmp/mnt/root"
    umount "$tmp/mnt" ;;
*) echo "$usage" >&2; exit 2 ;;
esac
rm -rf "$tmp/root"
truncate -s 128M "$tmp/efi.img"
mkfs.vfat -n EFI "$tmp/efi.img" >/dev/null
truncate -s $((mib + 200))M "$tmp/disk"
sfdisk -q "$tmp/disk" <<S
label: gpt
1: start=300000, size=$((mib * 2048)), type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, uuid=$root
14: start=2048, size=6144, type=21686148-6449-6E6F-744E-656564454649
15: start=8192, size=262144, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, uuid=$efi
S
dd if="$tmp/root.img" of="$tmp/disk" bs=512 seek=300000 conv=notrunc,sparse status=none
dd if="$tmp/efi.img" of="$tmp/disk" bs=512 seek=8192 conv=notrunc,sparse status=none
if [ -e "$tmp/core.img" ]; then
    # What grub-bios-setup does: the first sector loads the one where the BIOS boot partition begins (its number lies at byte 92
    # of it), and that loads the rest by the list at the end of itself: a first sector, how many, and the segment to load them to.
    le() { # BYTES NUMBER
        local i
        for ((i = 0; i < $1; i++)); do printf '%b' "\\x$(printf %02x $(($2 >> 8 * i & 255)))"; done
    }
    put() { dd of="$tmp/disk" bs=1 seek="$1" conv=notrunc status=none; }
    start=2048 sectors=$((($(stat -c %s "$tmp/core.img") + 511) / 512))
    head -c 440 "$tmp/boot.img" | put 0
    le 8 $start | put 92
    dd if="$tmp/core.img" of="$tmp/disk" bs=512 seek=$start conv=notrunc status=none
    { le 8 $((start + 1)); le 2 $((sectors - 1)); le 2 $((0x820)); } | put $((start * 512 + 500))
fi
qemu-img convert -c -O qcow2 "$tmp/disk" "$tmp/out"
chmod 644 "$tmp/out"
mv "$tmp/out" "$out"
