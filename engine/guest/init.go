// Package guest is what runs inside an instance before, and beside, the tenant's own programs: the init that
// builds the root and the mounts and then is replaced by a machine's init, or starts an application's program and is replaced
// by what waits for it (engine/pid1); and the helper that turns into a further process.
//
// It runs from a sealed memory file in the instance's own namespaces, as the root of its user namespace: it has
// no rights on the host. The file cannot be read by that root, so the kernel lets nobody inside trace what runs from it,
// whatever capabilities the tracer has there (would_dump in fs/exec.c). Until its last step nothing of the tenant has run in the namespaces; what the tenant
// can have prepared is the content of the root, and that is only opened by openat2 without a way out.
//
// It starts no goroutine and keeps nothing on disk.
package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// controlFd is the socket to the keeper; pid1Fd is of engine/pid1's program, for an init.
const (
	controlFd = 3
	pid1Fd    = 4
)

// fault makes an error whose text is for the tenant: the image or what was asked of it is wrong.
func fault(format string, args ...any) *wire.Error {
	return &wire.Error{Code: wire.CodeAbort, Text: fmt.Sprintf(format, args...)}
}

// report sends an error to the keeper.
func report(c *wire.Conn, err error) {
	var we *wire.Error
	if !errors.As(err, &we) {
		we = &wire.Error{Code: wire.CodeInternal, Detail: err.Error()}
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			we.Text = "the instance's disk is full"
		}
	}
	_ = c.Send(&wire.InitReport{Error: we})
}

// Init runs as the first process of an instance. It returns only on an error, an exit code. It must be called on the main
// thread, by a goroutine that stays there.
func Init() int {
	// The program that follows must not inherit them; that the socket closes is how the keeper knows that it runs.
	unix.CloseOnExec(controlFd)
	unix.CloseOnExec(pid1Fd)
	c, err := wire.NewBlocking(controlFd)
	if err != nil {
		return 125
	}
	r := &root{rescue: -1, view: -1}
	var notReady error
	for _, step := range []func() error{deaf, enterBase, r.prepare, warmUp} {
		if notReady == nil {
			notReady = step()
		}
	}
	var cfg wire.InitConfig
	fds, err := c.Recv(&cfg)
	if err != nil {
		return 125 // never started
	}
	if notReady != nil {
		report(c, notReady)
		return 125
	}
	report(c, run(c, r, &cfg, fds))
	return 125
}

// warmUp has encoding/json look at the types of the messages to come: the first of each takes longest.
func warmUp() error {
	b, err := json.Marshal(&wire.InitConfig{Start: wire.Start{Files: []wire.File{{}}, Trees: []wire.Tree{{}}, Disks: []wire.Disk{{}}}, View: map[string]string{"": ""}})
	if err == nil {
		err = json.Unmarshal(b, &wire.InitConfig{})
	}
	if err == nil {
		_, err = json.Marshal(&wire.InitReport{Error: &wire.Error{}})
	}
	return err
}

// run returns only on an error.
func run(c *wire.Conn, r *root, cfg *wire.InitConfig, fds []int) error {
	if len(fds) == 0 {
		return errors.New("no root")
	}
	// The cgroup namespace is rooted where this process is now: in its own cgroups.
	if !holes.Open(holes.CgroupNS) {
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return fmt.Errorf("unshare cgroup namespace: %w", err)
		}
	}
	if err := unix.Sethostname([]byte(cfg.Hostname)); err != nil {
		return fmt.Errorf("set hostname: %w", err)
	}
	if err := newTime(); err != nil {
		return err
	}
	r.cfg, r.fd = cfg, fds[0]
	rest := fds[1:]
	if cfg.Rescue != "" && len(rest) > 0 {
		r.rescue, rest = rest[0], rest[1:]
	}
	if len(rest) < len(cfg.Disks) {
		return errors.New("a disk is missing")
	}
	r.disks, rest = rest[:len(cfg.Disks)], rest[len(cfg.Disks):]
	if len(cfg.View) > 0 && len(rest) > 0 {
		r.view = rest[0]
	}
	if err := r.build(); err != nil {
		return err
	}
	if err := limits(); err != nil {
		return err
	}
	rep := &wire.InitReport{}
	var start func() error
	var err error
	if cfg.Machine {
		start, err = machine(c, cfg, rep)
	} else {
		start, err = application(c, cfg, rep)
	}
	if err != nil {
		return err
	}
	if err := c.Send(rep, r.master, r.devpts); err != nil {
		return err
	}
	unix.Close(r.master)
	unix.Close(r.devpts)
	var goOn struct{}
	if _, err := c.Recv(&goOn); err != nil {
		return err
	}
	if err := takeConsole(r.slave); err != nil {
		return err
	}
	return start()
}

// newTime gives the processes that follow a clock of their own: the monotonic and the boot clock start at zero.
// The running process enters it when it runs another program, children at their start. Before Linux 6.3 a process that
// has made one can neither enter it by running a program nor share memory with a child (vfork, threads): there the
// instance keeps the host's clocks.
func newTime() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("read kernel release: %w", err)
	}
	if !timeAtExec(unix.ByteSliceToString(u.Release[:])) {
		return nil
	}
	if err := unix.Unshare(unix.CLONE_NEWTIME); err != nil {
		return fmt.Errorf("unshare time namespace: %w", err)
	}
	var text string
	for name, clock := range map[string]int32{"monotonic": unix.CLOCK_MONOTONIC, "boottime": unix.CLOCK_BOOTTIME} {
		var ts unix.Timespec
		if err := unix.ClockGettime(clock, &ts); err != nil {
			return fmt.Errorf("read %s clock: %w", name, err)
		}
		sec, nsec := -ts.Sec, int64(0)
		if ts.Nsec > 0 {
			sec, nsec = sec-1, int64(time.Second)-ts.Nsec
		}
		text += fmt.Sprintf("%s %d %d\n", name, sec, nsec)
	}
	// The files of a process that cannot be traced belong to the host's root. Nobody is there yet who could trace this one.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become dumpable: %w", err)
	}
	if err := os.WriteFile("/proc/self/timens_offsets", []byte(text), 0); err != nil {
		return fmt.Errorf("set clock offsets: %w", err)
	}
	if holes.Open(holes.Trace) {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("become non-dumpable: %w", err)
	}
	return nil
}

// timeAtExec tells from a kernel's release whether a process enters its time namespace when it runs another program.
func timeAtExec(release string) bool {
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n != 2 {
		return false
	}
	return major > 6 || major == 6 && minor >= 3
}

// limits sets the resource limits that programs expect. Values above what this process may have are lowered.
func limits() error {
	for _, l := range []struct {
		res        int
		soft, hard uint64
	}{
		{unix.RLIMIT_NOFILE, 1024, 524288},
		{unix.RLIMIT_CORE, 0, unix.RLIM_INFINITY},
	} {
		var old unix.Rlimit
		if err := unix.Getrlimit(l.res, &old); err != nil {
			return fmt.Errorf("read limit: %w", err)
		}
		l.hard = min(l.hard, old.Max)
		l.soft = min(l.soft, l.hard)
		if err := unix.Setrlimit(l.res, &unix.Rlimit{Cur: l.soft, Max: l.hard}); err != nil {
			return fmt.Errorf("set limit: %w", err)
		}
	}
	return nil
}

// takeConsole makes the terminal stdin, stdout and stderr.
func takeConsole(slave int) error {
	for fd := range 3 {
		if err := unix.Dup3(slave, fd, 0); err != nil {
			return fmt.Errorf("open console: %w", err)
		}
	}
	unix.Close(slave)
	return nil
}
