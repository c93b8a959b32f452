package guest

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// application prepares the init of an application: it stays as the first process, reaps what is orphaned, passes
// signals on to the one program, and ends with its exit code.
func application(c *wire.Conn, cfg *wire.InitConfig, rep *wire.InitReport, sigs <-chan os.Signal) (func() (int, error), error) {
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
		listener, err := confine(&cfg.Confine)
		if err != nil {
			return 0, err
		}
		// Before anything can call for an answer.
		if err := handOver(c, listener); err != nil {
			return 0, err
		}
		// What came before there was a program is not meant for it.
		for len(sigs) > 0 {
			<-sigs
		}
		groups := p.id.groups
		if groups == nil {
			groups = []uint32{}
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
		return reap(pid, sigs), nil
	}, nil
}

// reap waits for children until the program ends and returns its exit code.
func reap(pid int, sigs <-chan os.Signal) int {
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
				return 128 + int(ws.Signal())
			}
			return ws.ExitStatus()
		}
		sig, ok := (<-sigs).(unix.Signal)
		// SIGURG is how the Go runtime interrupts its own threads.
		if ok && sig != unix.SIGCHLD && sig != unix.SIGURG {
			_ = unix.Kill(pid, sig)
		}
	}
}
