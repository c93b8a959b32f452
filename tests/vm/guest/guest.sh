#!/bin/bash
# guest.sh: what the virtual machine runs, as root, once systemd is up: the tests of the list, each with a log in /out.
# The results go to the third disk as a tar file. Lines that begin with ## are for whoever watches the console.
set -u
export NOVALET_ROOT_TESTS=1 NOVALET_PATIENCE=8 GOTRACEBACK=all
list=$(cat /t/list)
out=/out
mkdir -p $out
say() { printf '## %s\n' "$*"; }

# watch LOG: tell the end of it now and then, so that one who watches the console knows what it is at, also when it hangs.
watch() {
    while sleep 60; do
        say "  $(tail -n 1 "$1" | tr -dc '[:print:]' | cut -c1-160)"
    done
}

# test NAME PACKAGE ARGS…: one test program, in the folder of its package. What failed is run once more, alone.
test_() {
    local name=$1 pkg=$2 rc t0=$SECONDS tests watcher
    shift 2
    say "$name"
    watch "$out/$name.log" &
    watcher=$!
    (cd "/root/src/$pkg" && "/t/go/test/$pkg.test" -test.v -test.timeout 60m "$@") >"$out/$name.log" 2>&1 </dev/null
    rc=$?
    if [ $rc != 0 ]; then
        tests=$(sed -n 's/^--- FAIL: \([^ ]*\).*/\1/p' "$out/$name.log" | paste -sd '|')
        if [ -n "$tests" ] && ! grep -q '^panic: ' "$out/$name.log"; then
            say "$name: once more, alone: $tests"
            (cd "/root/src/$pkg" && "/t/go/test/$pkg.test" -test.v -test.timeout 30m -test.run "^($tests)\$") >"$out/$name.log.again" 2>&1 </dev/null
            echo $? >"$out/$name.rc.again"
        fi
    fi
    kill $watcher
    echo $rc >"$out/$name.rc"
    say "$name: exit code $rc, $((SECONDS - t0)) s, $(grep -c '^ *--- PASS' "$out/$name.log") passed, $(grep -c '^ *--- FAIL' "$out/$name.log") failed, $(grep -c '^ *--- SKIP' "$out/$name.log") skipped"
}

say "systemd $(systemctl is-system-running), $(uname -r), $(systemd-detect-virt), $(nproc) processors, up $(cut -d' ' -f1 /proc/uptime) s"
mkdir /root/src /root/upper /root/work
mount -t overlay -o lowerdir=/t/src,upperdir=/root/upper,workdir=/root/work overlay /root/src
install -m 755 /t/go-command /usr/local/bin/go
mkdir /root/src/bin && ln -s /t/novalet /root/src/bin/novalet
export NOVALET_DEMO="bin/novalet demo --images /t/images --timeout 20m"
export NOVALET_QUOTA_TESTS=1 NOVALET_SYSTEMD_TESTS=1 NOVALET_TEST_IMAGE=/t/images/web.tar NOVALET_UPGRADE=/t/upgrade
[ ! -d /t/install ] || tar -C /t/install -cf - . | tar -C / --keep-directory-symlink -xf -
modprobe openvswitch
export NOVALET_OVS_DATAPATH=system
# Where the machine has a card with SR-IOV, that is for the tests, and the far end of its cable is known by its address.
for dev in /sys/class/net/*; do
    [ ! -e "$dev/device/sriov_totalvfs" ] || export NOVALET_SRIOV_CARD=1
    [ "$(cat "$dev/address")" != 52:54:00:00:fa:12 ] || export NOVALET_SRIOV_FAR=${dev##*/}
done
/t/novalet doctor >$out/doctor.txt 2>&1

while read -r name pkg args; do
    # shellcheck disable=SC2086  # the list holds words
    test_ "$name" "$pkg" $args
done <<<"$list"

say "bringing out the results"
{ journalctl -b --no-pager; dmesg; } >$out/journal.txt 2>&1
tar -C $out -cf /dev/vdc .
sync
say "done"
