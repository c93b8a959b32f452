#!/bin/bash
# cloudimage.sh ROOT.tar.gz OUT.qcow2: make of a root tarball the disk image that distributions publish for clouds: GPT with
# the root as partition 1, a BIOS boot partition 14 and an EFI system partition 15, both named in /etc/fstab; ext4; qcow2,
# compressed. There is no kernel in it.
set -eu
tar=${1:?usage: cloudimage.sh ROOT.tar.gz OUT.qcow2} out=${2:?usage: cloudimage.sh ROOT.tar.gz OUT.qcow2}
export PATH=$PATH:/usr/sbin:/sbin
tmp=$(mktemp -d "$out.XXXXXX"); trap 'rm -rf "$tmp"' EXIT
root=6a5f3c1e-0c58-4a3c-9f0b-6a1d3c9f1a01 efi=6a5f3c1e-0c58-4a3c-9f0b-6a1d3c9f1a0f
mkdir "$tmp/root"
tar -C "$tmp/root" --numeric-owner --xattrs --xattrs-include='*' -xzf "$tar"
mkdir -p "$tmp/root/boot/efi"
cat >"$tmp/root/etc/fstab" <<S
PARTUUID=$root / ext4 rw,discard,errors=remount-ro,x-systemd.growfs 0 1
PARTUUID=$efi /boot/efi vfat defaults 0 0
S
mke2fs -q -t ext4 -L root -d "$tmp/root" "$tmp/root.img" 900M
rm -rf "$tmp/root"
truncate -s 128M "$tmp/efi.img"
mkfs.vfat -n EFI "$tmp/efi.img" >/dev/null
truncate -s 1100M "$tmp/disk"
sfdisk -q "$tmp/disk" <<S
label: gpt
1: start=300000, size=1843200, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, uuid=$root
14: start=2048, size=6144, type=21686148-6449-6E6F-744E-656564454649
15: start=8192, size=262144, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, uuid=$efi
S
dd if="$tmp/root.img" of="$tmp/disk" bs=512 seek=300000 conv=notrunc,sparse status=none
dd if="$tmp/efi.img" of="$tmp/disk" bs=512 seek=8192 conv=notrunc,sparse status=none
qemu-img convert -c -O qcow2 "$tmp/disk" "$tmp/out"
chmod 644 "$tmp/out"
mv "$tmp/out" "$out"
