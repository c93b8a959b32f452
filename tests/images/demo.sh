#!/bin/bash
# demo.sh DIR: make the two images of the demo in DIR, with progress; what is there is left alone. An image is a data
# file and a record NAME.json beside it.
set -eu
dir=${1:?usage: demo.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$dir"
record() { # ID NAME CONTAINER_FORMAT FILE
    printf '{"id": "%s", "name": "%s", "status": "active", "container_format": "%s", "disk_format": "raw", "size": %s, "file": "%s"}\n' \
        "$1" "$2" "$3" "$(stat -c %s "$dir/$4")" "$4" >"$dir/$4.json.tmp"
    mv "$dir/$4.json.tmp" "$dir/$4.json"
}
if [ ! -s "$dir/web.tar.json" ]; then
    echo "   making the application image (busybox)"
    t=$(mktemp -d); trap 'rm -rf "$t"' EXIT
    mkdir -p "$t/root"/{bin,etc,tmp,www,proc,sys,dev}
    cp /bin/busybox "$t/root/bin/busybox"
    for a in $(/bin/busybox --list); do [ "$a" = busybox ] || ln -s busybox "$t/root/bin/$a"; done
    echo 'root:x:0:0:root:/:/bin/sh' >"$t/root/etc/passwd"
    echo 'root:x:0:' >"$t/root/etc/group"
    echo 'Hello from an application instance.' >"$t/root/www/index.html"
    tar -C "$t/root" --owner=0 --group=0 --numeric-owner -cf "$t/layer.tar" .
    id=$(sha256sum "$t/layer.tar" | cut -d' ' -f1)
    mkdir "$t/image" "$t/image/$id"
    mv "$t/layer.tar" "$t/image/$id/layer.tar"
    # shellcheck disable=SC2016  # the instance's shell expands it
    printf '{"architecture": "%s", "os": "linux", "config": {"Cmd": ["/bin/sh", "-c", "echo \\"$(hostname) serves port 80\\"; exec httpd -f -p 80 -h /www"], "Env": ["PATH=/bin"]}, "rootfs": {"type": "layers", "diff_ids": ["sha256:%s"]}}' \
        "$(dpkg --print-architecture)" "$id" >"$t/image/config.json"
    printf '[{"Config": "config.json", "RepoTags": ["novalet/web:demo"], "Layers": ["%s/layer.tar"]}]' "$id" >"$t/image/manifest.json"
    tar -C "$t/image" -cf "$dir/web.tar" .
    record 00000000-0000-4000-8000-000000000001 web docker web.tar
fi
if [ ! -s "$dir/debian-12.tar.gz.json" ]; then
    [ -s "$dir/debian-12.tar.gz" ] || {
        echo "   making the machine image (Debian 12 with systemd, cloud-init and sshd): a minute or two, once"
        "$here/debian.sh" "$dir/debian-12.tar.gz"
    }
    record 00000000-0000-4000-8000-000000000002 debian-12 bare debian-12.tar.gz
fi
