#!/bin/bash
# guest.sh: what the virtual machine runs, as root, once systemd is up: the tests of the list, each with a log in /out.
# The results go to the third disk as a tar file. Lines that begin with ## are for whoever watches the console.
set -u
export NOVALET_ROOT_TESTS=1 NOVALET_PATIENCE=8 GOTRACEBACK=all
list=$(cat /t/list)
out=/out
mkdir -p $out
say() { printf '## %s\n' "$*"; }

# test NAME PACKAGE ARGS…: one test program, in the folder of its package. What failed is run once more, alone.
test_() {
    local name=$1 pkg=$2 rc t0=$SECONDS tests
    shift 2
    say "$name"
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
    echo $rc >"$out/$name.rc"
    say "$name: exit code $rc, $((SECONDS - t0)) s, $(grep -c '^ *--- PASS' "$out/$name.log") passed, $(grep -c '^ *--- FAIL' "$out/$name.log") failed, $(grep -c '^ *--- SKIP' "$out/$name.log") skipped"
}

say "systemd $(systemctl is-system-running), $(uname -r), $(systemd-detect-virt), $(nproc) processors, up $(cut -d' ' -f1 /proc/uptime) s"
mkdir /root/src /root/upper /root/work
mount -t overlay -o lowerdir=/t/src,upperdir=/root/upper,workdir=/root/work overlay /root/src
install -m 755 /t/go-command /usr/local/bin/go
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
