#!/bin/bash
# run.sh: boot the virtual machine, run the tests of tests/vm/list (or VM_LIST) in it and bring the results to build/test/vm:
# NAME.log and NAME.rc of each line of the list, NAME.log.again and NAME.rc.again where something failed. Fails when the
# machine did not get to the end of the list; which tests failed is for the caller to read. Needs root and an image's
# packages; KVM is not needed, and used only when VM_ACCEL=kvm asks for it. VM_QEMU, VM_MACHINE, VM_SMP and VM_DEVICES are
# another QEMU, machine, number of processors, and further devices; VM_MEMORY is in MiB.
set -eu
cd "$(dirname "$0")/../.."
GO=${GO:-go}
accel=${VM_ACCEL:-tcg,thread=multi}
out=build/test/vm
stage=build/vm
[ "$(uname -m)" = x86_64 ] || { echo "the virtual machine is made for x86_64" >&2; exit 1; }

# In seconds: generous, for another machine may have half as much time for it.
deadline=${VM_DEADLINE:-5400}
list=$(grep -E "^(${VM_ONLY:-[a-z]+}) " "${VM_LIST:-tests/vm/list}")

rm -rf "$stage" "$out"
image=$(tests/vm/image.sh)

mkdir -p "$stage/disk/go" "$out"
trap 'rm -rf "$stage"' EXIT
disk=$stage/disk

# What the tests find in their folders, and the programs: nothing is built in there.
mkdir "$disk/src"
tar -cf - --exclude=./.git --exclude=./build --exclude=./bin --exclude='./engine/shim/novalet-shim' . | tar -xf - -C "$disk/src"
while read -r _ pkg _; do
    [ -e "$disk/go/test/$pkg.test" ] || "$GO" test -c -ldflags='-s -w' -o "$disk/go/test/$pkg.test" "./$pkg"
done <<<"$list"
for p in cmd/novalet-shim engine/testdata/attack; do
    "$GO" build -ldflags='-s -w' -o "$disk/go/build/$p" "./$p"
done
"$GO" build -tags novalet_holes -ldflags='-s -w' -o "$disk/go/build/cmd/novalet-shim@novalet_holes" ./cmd/novalet-shim
cp bin/novalet "$disk/novalet"
if grep -qE '^(demo|unit) ' <<<"$list"; then
    images=/var/cache/novalet/images
    tests/images/demo.sh "$images"
    mkdir "$disk/images"
    cp "$images"/{web.tar,debian-12.tar.gz}{,.json} "$disk/images/"
fi
if grep -q '^unit ' <<<"$list"; then
    make --no-print-directory install GO="$GO" DESTDIR="$PWD/$disk/install"
    "$GO" build -trimpath -tags shim -ldflags='-s -w -X main.version=0.2.0-next' -o "$disk/upgrade" ./cmd/novalet
fi
cp tests/vm/guest/guest.sh "$disk/guest.sh"
cp tests/vm/guest/go "$disk/go-command"
printf '%s\n' "$list" >"$disk/list"
truncate -s 1G "$stage/tests.img"
mkfs.ext4 -q -F -m 0 -O ^has_journal -d "$disk" "$stage/tests.img"
rm -rf "$disk"
truncate -s 256M "$stage/result.img"

disk_of() { # ID FILE OPTIONS
    echo -drive "file=$2,if=none,id=$1,format=raw,$3" -device "virtio-blk-pci,drive=$1"
}
t0=$(date +%s)
: >"$out/console.log"
# shellcheck disable=SC2046,SC2086  # words
TMPDIR=$PWD/$stage "${VM_QEMU:-qemu-system-x86_64}" -machine "${VM_MACHINE:-pc}" -accel "$accel" -cpu "${VM_CPU:-max}" -smp "${VM_SMP:-2}" -m "${VM_MEMORY:-3072}" -nodefaults -no-user-config -no-reboot -display none \
    -kernel "$image/vmlinuz" -initrd "$image/initrd.img" \
    -append 'console=ttyS0 loglevel=4 panic=-1 systemd.show_status=0 mitigations=off' \
    $(disk_of root "$image/root.img" snapshot=on,cache=unsafe) \
    $(disk_of tests "$stage/tests.img" readonly=on,cache=unsafe) \
    $(disk_of result "$stage/result.img" cache=unsafe) \
    -device virtio-rng-pci ${VM_DEVICES:-} -serial "file:$out/console.log" >"$out/qemu.log" 2>&1 </dev/null &
pid=$!
trap 'kill -9 $pid 2>/dev/null || true; rm -rf "$stage"' EXIT

# Show how far it got; end it when it takes too long.
shown=0
progress() {
    local lines
    lines=$(tr -d '\r' <"$out/console.log" | grep -a '^## ' || true)
    [ -z "$lines" ] || tail -n +$((shown + 1)) <<<"$lines" | sed "s/^##/   vm $(($(date +%s) - t0)) s:/"
    [ -z "$lines" ] || shown=$(wc -l <<<"$lines")
}
while kill -0 $pid 2>/dev/null; do
    sleep 1
    progress
    if [ $(($(date +%s) - t0)) -gt "$deadline" ]; then
        echo "   the virtual machine is not done after $deadline s; the end of its console:"
        kill -9 $pid
        wait $pid 2>/dev/null || true
        tail -n 15 "$out/console.log" | tr -d '\r' | sed 's/^/     /'
        exit 1
    fi
done
rc=0
wait $pid || rc=$?
progress
if ! tr -d '\r' <"$out/console.log" | grep -aq '^## done'; then
    echo "   the virtual machine ended (exit code $rc) before it was done; qemu.log and the end of its console:"
    tail -n 5 "$out/qemu.log" | sed 's/^/     /'
    tail -n 15 "$out/console.log" | tr -d '\r' | sed 's/^/     /'
    exit 1
fi
tar -xf "$stage/result.img" -C "$out"
