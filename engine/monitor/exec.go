package monitor

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// exec runs a further process inside: it answers once when the program runs and once when it has ended. When the
// peer goes away the process is killed.
func (in *instance) exec(c *wire.Conn, m *wire.Exec, fds *[]int) error {
	if in.status().State != wire.StateRunning {
		return &wire.Error{Code: wire.CodeState, Detail: in.status().State}
	}
	stdio := *fds
	master := -1
	defer func() { closeFd(&master) }()
	if m.TTY {
		var slave int
		var err error
		if master, slave, err = in.newTerminal(m.Rows, m.Cols); err != nil {
			return err
		}
		defer unix.Close(slave)
		stdio = []int{slave, slave, slave}
	}
	if len(stdio) != 3 {
		return &wire.Error{Code: wire.CodeInternal, Detail: "exec: wrong number of descriptors"}
	}
	ctl, child, err := wire.Pair()
	if err != nil {
		return err
	}
	defer ctl.Close()
	pidfd, done, err := in.spawnExec(append(stdio[:3:3], child))
	unix.Close(child)
	if err != nil {
		return err
	}
	defer pidfd.Close()
	killed := func() {
		_ = signalPidfd(pidfd, unix.SIGKILL)
		<-done
	}
	if err := ctl.Send(m); err != nil {
		killed()
		return fmt.Errorf("hand over to exec: %w", err)
	}
	rep, err := in.lastReport(ctl)
	if err != nil && !isEOF(err) {
		killed()
		return fmt.Errorf("exec: %w", err)
	}
	if rep.Error != nil {
		<-done
		return rep.Error
	}
	if m.TTY {
		err = reply(c, nil, nil, master)
	} else {
		err = reply(c, nil, nil)
	}
	if err != nil {
		killed()
		return errStreamed
	}
	closeFd(&master)
	wire.CloseAll(*fds)
	*fds = nil
	gone := make(chan struct{})
	in.k.conns.Add(1)
	go func() {
		defer in.k.conns.Done()
		defer close(gone)
		var b [1]byte
		c.Read(b[:])
	}()
	select {
	case ws := <-done:
		_ = reply(c, &wire.Exit{Code: exitCode(ws)}, nil)
	case <-gone:
		killed()
	}
	return errStreamed
}

// newTerminal makes a terminal on the instance's own devpts, reached by the descriptor that its init handed out
// before anything of the tenant ran: no path of the guest is looked up.
func (in *instance) newTerminal(rows, cols uint16) (master, slave int, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.devpts == nil {
		return -1, -1, &wire.Error{Code: wire.CodeState, Detail: "no terminals"}
	}
	master, err = unix.Openat(int(in.devpts.Fd()), "ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("open terminal: %w", err)
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		unix.Close(master)
		return -1, -1, fmt.Errorf("unlock terminal: %w", err)
	}
	if slave, err = openPeer(master); err != nil {
		unix.Close(master)
		return -1, -1, err
	}
	if err := unix.Fchown(slave, int(in.spec.UIDBase), int(in.spec.UIDBase)+5); err != nil {
		unix.Close(master)
		unix.Close(slave)
		return -1, -1, fmt.Errorf("hand over terminal: %w", err)
	}
	if rows > 0 && cols > 0 {
		_ = unix.IoctlSetWinsize(slave, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	}
	return master, slave, nil
}

// spawnExec starts the program as "exec" inside all of the instance's namespaces.
func (in *instance) spawnExec(files []int) (*os.File, <-chan unix.WaitStatus, error) {
	in.mu.Lock()
	if in.state != wire.StateRunning {
		in.mu.Unlock()
		return nil, nil, &wire.Error{Code: wire.CodeState, Detail: in.state}
	}
	pid := in.pid
	init, err := dupFile(in.pidfd)
	in.mu.Unlock()
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(init)
	// The one that an init which is about to run its last program enters by that.
	timens, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/ns/time_for_children", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open time namespace: %w", err)
	}
	defer unix.Close(timens)
	// Where the kernel is too old for it to have one of its own (see guest), it is the keeper's, which nobody without
	// rights on the host may enter.
	ownTime, err := differs(timens, "/proc/self/ns/time")
	if err != nil {
		return nil, nil, err
	}
	// The pid may have been reused between: a signal to the pidfd tells.
	if err := unix.PidfdSendSignal(init, 0, nil, 0); err != nil {
		return nil, nil, &wire.Error{Code: wire.CodeState, Detail: "init is gone"}
	}
	setns := func(fd int, flags uintptr) call {
		return call{nr: unix.SYS_SETNS, a: [5]uintptr{uintptr(fd), flags}}
	}
	joins, err := in.groups(wire.CgroupExec)
	if err != nil {
		return nil, nil, err
	}
	var none uintptr
	s := &spawnSpec{
		join: []call{
			setns(init, unix.CLONE_NEWUSER|unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWNET|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC|unix.CLONE_NEWCGROUP),
		},
		fork:   &none,
		groups: joins,
		files:  files,
		prog:   in.k.cfg.Program,
		argv:   []string{"exec"},
		env:    append(runtimeEnv[:len(runtimeEnv):len(runtimeEnv)], holes.Env()...),
		attach: resetOOM,
	}
	if ownTime {
		s.join = append(s.join, setns(timens, unix.CLONE_NEWTIME))
	}
	_, pidfd, done, err := in.k.reaper.spawn(s)
	return pidfd, done, err
}

// differs tells whether a descriptor is of another namespace than a path names.
func differs(ns int, path string) (bool, error) {
	var a, b unix.Stat_t
	if err := unix.Fstat(ns, &a); err != nil {
		return false, fmt.Errorf("look at namespace: %w", err)
	}
	if err := unix.Stat(path, &b); err != nil {
		return false, fmt.Errorf("look at namespace: %w", err)
	}
	return a.Dev != b.Dev || a.Ino != b.Ino, nil
}

func dupFile(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	var derr error
	if err := rc.Control(func(p uintptr) { fd, derr = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return -1, err
	}
	return fd, derr
}

func signalPidfd(f *os.File, sig unix.Signal) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	return errors.Join(err, serr)
}
