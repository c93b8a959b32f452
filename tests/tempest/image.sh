#!/bin/bash
# image.sh DIR: make the two images that Tempest boots, in DIR. Both have one small root with sshd (dropbear), busybox and
# the few programs that Tempest calls in its guests, taken with their libraries from this host:
#   machine.tar.gz      a root tarball: busybox init, DHCP, the key pair from the metadata service
#   application.tar     the same as `docker save` writes it, with a command: addresses and key pair come from the host
# What is there and newer than this folder is left alone.
set -eu
dir=${1:?usage: image.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)
stamp=$dir/tempest-$(cat "$here/image.sh" "$here"/guest/* /usr/sbin/dropbear /bin/busybox | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0
mkdir -p "$dir"
t=$(mktemp -d); trap 'rm -rf "$t"' EXIT
r=$t/root
mkdir -p "$r"/{bin,sbin,lib,lib64,usr/bin,usr/sbin,etc/dropbear,dev,proc,sys,run,mnt,srv}
install -d -m 1777 "$r/tmp"; install -d -m 700 "$r/root" "$r/root/.ssh"
install -d "$r/var" "$r/var/log" "$r/var/lib"; ln -s /run "$r/var/run"

# program PATH: copy it and every library it is linked to.
program() {
    install -D -m 755 "$1" "$r$1"
    { ldd "$1" 2>/dev/null || true; } | awk '$2 == "=>" {print $3} $1 ~ /^\// {print $1}' | while read -r lib; do
        [ -e "$r$lib" ] || install -D -m 755 "$(readlink -f "$lib")" "$r$lib"
    done
}
program /bin/busybox
for a in $(/bin/busybox --list); do
    case $a in
        busybox|ip|lsblk|blkid|sudo|su|login|init|halt|poweroff|reboot|rpm|dpkg|dpkg-deb) ;;
        *) ln -s /bin/busybox "$r/bin/$a" ;;
    esac
done
for a in init halt poweroff reboot; do ln -s /bin/busybox "$r/sbin/$a"; done
pam=$(dpkg -L libpam-modules | grep '/pam_unix\.so$')
for p in /usr/sbin/dropbear /usr/bin/curl /bin/ip /bin/lsblk /sbin/blkid /usr/sbin/chpasswd "$pam"; do program "$p"; done
install -d "$r/etc/pam.d"; echo 'password required pam_unix.so sha512' >"$r/etc/pam.d/chpasswd"
cp "$here"/guest/{passwd,group,inittab} "$r/etc/"
install -m 600 "$here/guest/shadow" "$r/etc/"
install -m 755 "$here"/guest/{rc,keys,serve,dhcp} "$r/etc/"
install -m 755 "$here/guest/sudo" "$r/usr/bin/sudo"

tar=(tar --owner=0 --group=0 --numeric-owner --sort=name)
"${tar[@]}" -C "$r" -cf "$t/layer.tar" .
gzip -1 <"$t/layer.tar" >"$t/machine.tar.gz"
id=$(sha256sum "$t/layer.tar" | cut -d' ' -f1)
mkdir -p "$t/image/$id"; mv "$t/layer.tar" "$t/image/$id/"
printf '{"architecture": "%s", "os": "linux", "config": {"Cmd": ["/etc/serve"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}, "rootfs": {"type": "layers", "diff_ids": ["sha256:%s"]}}' \
    "$(dpkg --print-architecture)" "$id" >"$t/image/config.json"
printf '[{"Config": "config.json", "RepoTags": ["novalet/tempest:latest"], "Layers": ["%s/layer.tar"]}]' "$id" >"$t/image/manifest.json"
"${tar[@]}" -C "$t/image" -cf "$t/application.tar" .
rm -f "$dir"/tempest-*
mv "$t/machine.tar.gz" "$dir/tempest-machine.tar.gz"; mv "$t/application.tar" "$dir/tempest-application.tar"
touch "$stamp"
