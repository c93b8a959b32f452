#!/bin/bash
# bothways.sh: one file boots as a virtual machine in QEMU, to the login prompt on its serial console, and as a machine instance
# of `novalet demo`, and is the same afterwards. The file is made as distributions publish theirs (cloudimage.sh): on ext4, on
# XFS with SELinux's labels, on btrfs with a default subvolume; of those two, what novalet reads is also compared with what the
# kernel shows. KVM is used only when VM_ACCEL=kvm asks for it, so QEMU's half takes minutes. IMAGE_FS names some of the three.
# Needs root, bin/novalet and Go.
set -eu
cd "$(dirname "$0")/../.."
[ "$(uname -m)" = x86_64 ] || { echo "the virtual machine is made for x86_64" >&2; exit 1; }
cache=${NOVALET_IMAGE_CACHE:-/var/cache/novalet/images}
root=$cache/debian-12-vm.tar.gz
deadline=${VM_TIMEOUT:-1200} # seconds
mkdir -p "$cache"
work=$(mktemp -d); pid=
trap '[ -z "$pid" ] || kill -9 "$pid" 2>/dev/null || true; rm -rf "$work"' EXIT
if [ ! -s "$root" ] || [ tests/images/debian.sh -nt "$root" ]; then
    echo "   making $root: some minutes, once"
    tests/images/debian.sh "$root" vm
fi
sum() { sha256sum "$1" | cut -d' ' -f1; }

# there FILE: the file boots in QEMU. What the guest writes goes to a file of QEMU's own (snapshot=on).
there() {
    local t0=$SECONDS
    : >"$work/console"
    TMPDIR=$work qemu-system-x86_64 -accel "${VM_ACCEL:-tcg,thread=multi}" -cpu max -smp 2 -m 1024 -nodefaults -no-user-config -no-reboot -display none \
        -drive "file=$1,if=none,id=root,format=qcow2,snapshot=on" -device virtio-blk-pci,drive=root -device virtio-rng-pci \
        -serial "file:$work/console" >"$work/qemu.log" 2>&1 </dev/null &
    pid=$!
    until tr -d '\r' <"$work/console" | grep -aq ' login: '; do # what the kernel says may follow on the line
        if ! kill -0 "$pid" 2>/dev/null || [ $((SECONDS - t0)) -gt "$deadline" ]; then
            echo "no login prompt in QEMU after $((SECONDS - t0)) s; the end of its console:" >&2
            tail -n 5 "$work/qemu.log" >&2
            tail -n 30 "$work/console" | tr -d '\r' >&2
            exit 1
        fi
        sleep 1
    done
    kill -9 "$pid"
    wait "$pid" 2>/dev/null || true
    pid=
    echo "   QEMU: login prompt after $((SECONDS - t0)) s"
}

# here FILE: the file boots as the machine of the demo, whose application comes from its own folder.
here() {
    rm -rf "$work/images"
    mkdir "$work/images"
    cp "$cache/web.tar" "$cache/web.tar.json" "$work/images/"
    ln "$1" "$work/images/machine" 2>/dev/null || cp "$1" "$work/images/machine"
    printf '{"id": "00000000-0000-4000-8000-000000000012", "name": "debian-12", "status": "active", "container_format": "bare", "disk_format": "qcow2", "size": %s, "os_hash_algo": "sha256", "os_hash_value": "%s", "file": "machine"}\n' \
        "$(stat -c %s "$1")" "$(sum "$1")" >"$work/images/machine.json"
    bin/novalet demo --images "$work/images" --timeout 10m
}
tests/images/demo.sh "$cache" >/dev/null
for fs in ${IMAGE_FS:-ext4 xfs btrfs}; do
    image=$work/$fs.qcow2
    echo "   $fs:"
    tests/images/cloudimage.sh "$root" "$image" "$fs"
    before=$(sum "$image")
    there "$image"
    [ "$(sum "$image")" = "$before" ] || { echo "QEMU changed the file" >&2; exit 1; }
    [ "$fs" = ext4 ] || NOVALET_ROOT_TESTS=1 NOVALET_DISK_IMAGE=$image ${GO:-go} test -count=1 -run '^TestDistributionImage$' ./glancebridge/disk
    here "$image"
    [ "$(sum "$image")" = "$before" ] || { echo "novalet changed the file" >&2; exit 1; }
    echo "   the file is the same: $before"
done
