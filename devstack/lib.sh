# shellcheck shell=bash
# Starting, stopping and waiting for services. Needs vars.sh.

say() { printf '%s\n' "$*"; }
die() { printf '!! %s\n' "$*" >&2; exit 1; }

PHASE='' PHASE_T0=0
# phase TITLE: end the running phase with its time, begin the next. phase '' only ends.
phase() {
    local now=${EPOCHREALTIME/./}
    [ -z "$PHASE" ] || printf '   %s: %d.%d s\n' "$PHASE" $(((now - PHASE_T0) / 1000000)) $(((now - PHASE_T0) / 100000 % 10))
    PHASE=$1 PHASE_T0=$now
    [ -z "$PHASE" ] || printf '== %s\n' "$PHASE"
}

need_root() { [ "$(id -u)" = 0 ] || die "run this as root"; }

# One up, down or compute command at a time. Services must not inherit the descriptor: start closes it.
lock() {
    exec 9>/run/lock/novalet-cloud.lock
    flock -n 9 || { say "   another devstack script is at work; waiting for it"; flock -w 900 9 || die "still locked after 900 s"; }
}

# NAME.pid holds the pid, NAME.start when it began (clock ticks since boot): after a reboot or a wrap the same
# pid is another process.
starttime() { awk '{sub(/.*\) /, ""); print $20}' "/proc/$1/stat" 2>/dev/null; }
# A process has its files, and their locks, until its last thread has ended; the first may be a zombie before.
lives() { cat "/proc/$1/task/"*/stat 2>/dev/null | awk '{sub(/.*\) /, ""); if ($1 !~ /^[ZX]/) n++} END {exit !n}'; }
pid_of() {
    local p t
    read -r p 2>/dev/null <"$RUN/$1.pid" && read -r t 2>/dev/null <"$RUN/$1.start" || return 1
    [ -n "$t" ] && [ "$(starttime "$p")" = "$t" ] && lives "$p" && echo "$p"
}
running() { pid_of "$1" >/dev/null; }

# start NAME CMD...: in the background, in a session of its own, with a log and a pid file.
start() {
    local n=$1 p; shift
    if p=$(pid_of "$n"); then say "   $n already runs ($p)"; return 0; fi
    # No descriptor of the caller goes along (locks, make's job server, a pipe that CI waits on).
    # shellcheck disable=SC2016
    setsid bash -c 'for f in /proc/self/fd/*; do f=${f##*/}; [ "$f" -gt 2 ] && eval "exec $f>&-"; done; exec "$@"' \
        start "$@" >>"$LOG/$n.log" 2>&1 </dev/null &
    p=$!
    # setsid forks when it is a group leader; in a script it never is, so $! is the service.
    starttime $p >"$RUN/$n.start"
    echo $p >"$RUN/$n.pid"
}

# dead NAME: the last words of a service that should run, then the end.
dead() {
    printf '!! %s %s; the end of %s:\n' "$1" "$2" "$LOG/$1.log" >&2
    tail -n 25 "$LOG/$1.log" | sed 's/^/     /' >&2
    exit 1
}
alive() { local n; for n; do running "$n" || dead "$n" "died"; done; }

# wait_for NAME SECONDS CMD...: until CMD succeeds, as long as NAME lives.
wait_for() {
    local n=$1 end=$((SECONDS + $2)); shift 2
    until "$@" >/dev/null 2>&1; do
        running "$n" || dead "$n" "died"
        [ $SECONDS -lt $end ] || dead "$n" "is not ready in time"
        sleep 0.2
    done
}
tcp() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
wait_tcp() { local p; for p in "${@:2}"; do wait_for "$1" 300 tcp "$p"; done; }

# stop NAME [SECONDS]: TERM to the process, KILL to its group if it stays.
stop() {
    local n=$1 end=$((SECONDS + ${2:-15})) p
    if p=$(pid_of "$n"); then
        kill -TERM "$p" 2>/dev/null
        while running "$n" && [ $SECONDS -lt $end ]; do sleep 0.1; done
        running "$n" && kill -KILL -- "-$p" 2>/dev/null
        say "   stopped $n"
    fi
    rm -f "$RUN/$n.pid" "$RUN/$n.start"
}
# stop_all SECONDS NAME...: side by side.
stop_all() { local n t=$1; shift; for n; do stop "$n" "$t" & done; wait; }

# once STEP CMD...: a step that is done one time in the life of a cloud.
once() {
    local s=$1; shift
    [ -e "$STATE/done/$s" ] && return 0
    "$@" >>"$LOG/step-$s.log" 2>&1 || {
        printf '!! step %s: exit %s; the end of %s:\n' "$s" $? "$LOG/step-$s.log" >&2
        tail -n 25 "$LOG/step-$s.log" | sed 's/^/     /' >&2
        return 1
    }
    touch "$STATE/done/$s"
}
# join PID...: wait for all background steps, then end the script if one failed.
join() { local p bad=0; for p; do wait "$p" || bad=1; done; [ $bad = 0 ] || exit 1; }

# sql DATABASE [ARGS]: as root, through the socket.
sql() { mariadb -S "$MYSQL_SOCK" -u root -N -B "$@"; }

# render FILE: a template with its @NAME@ replaced, on stdout. In the shell, so that the password is in no argv.
render() {
    local t k; t=$(<"$1")
    for k in STATE RUN ETC VENV SHARE ROOT_HELPER PASSWORD COMPUTE_HOST CTL_HOST VXLAN_IP NEUTRON L3_PLUGIN OVS_FIREWALL DHCP_MTU MORE_MECHANISMS SCHEDULER_FILTERS DEVICES; do
        t=${t//"@$k@"/"${!k-}"}
    done
    printf '%s\n' "$t"
}
