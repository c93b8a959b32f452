package guest

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// application prepares the init of an application: it stays as the first process, reaps what is orphaned, passes
// signals on to the one program, and ends with its exit code.
func application(c *wire.Conn, cfg *wire.InitConfig, rep *wire.InitReport, signals int) (func() (int, error), error) {
	p, err := resolve(&cfg.Process, true)
	if err != nil {
		return nil, err
	}
	rep.Init = "application"
	rep.StopSignal = cfg.StopSignal
	if rep.StopSignal == 0 {
		rep.StopSignal = int(unix.SIGTERM)
	}
	return func() (int, error) {
		listener, err := confine(&cfg.Confine, true)
		if err != nil {
			return 0, err
		}
		// Before anything can call for an answer.
		if err := handOver(c, listener); err != nil {
			return 0, err
		}
		groups := p.id.groups
		if groups == nil {
			groups = []uint32{}
		}
		// What came before there was a program is not meant for it.
		if err := drop(signals); err != nil {
			return 0, err
		}
		pid, err := syscall.ForkExec(p.path, p.args, &syscall.ProcAttr{
			Dir:   p.cwd,
			Env:   p.env,
			Files: []uintptr{0, 1, 2},
			Sys: &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0,
				Credential: &syscall.Credential{Uid: p.id.uid, Gid: p.id.gid, Groups: groups}},
		})
		if err != nil {
			return 0, execFault(p.args[0], err)
		}
		if err := c.Send(&wire.InitReport{PID: pid}); err != nil {
			return 0, err
		}
		c.Close()
		// The program has the terminal: init itself must not keep it open.
		for fd := range 3 {
			unix.Close(fd)
		}
		return reap(pid, signals)
	}, nil
}

// reap waits for children and passes signals on until the program ends, and returns its exit code.
func reap(pid, signals int) (int, error) {
	for {
		for {
			var ws unix.WaitStatus
			p, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if err != nil || p <= 0 {
				break
			}
			if p != pid {
				continue
			}
			if ws.Signaled() {
				return 128 + int(ws.Signal()), nil
			}
			return ws.ExitStatus(), nil
		}
		var buf [64]byte
		n, err := unix.Read(signals, buf[:])
		if err != nil && err != unix.EINTR {
			return 0, fmt.Errorf("read signals: %w", err)
		}
		for _, sig := range buf[:max(n, 0)] {
			if sig != byte(unix.SIGCHLD) {
				_ = unix.Kill(pid, unix.Signal(sig))
			}
		}
	}
}
