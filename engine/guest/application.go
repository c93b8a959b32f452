package guest

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
	"github.com/novalet/novalet/engine/pid1"
)

// application prepares the init of an application: it starts the one program, and goes on to be what reaps, passes signals on
// and ends with its exit code (see engine/pid1).
func application(c *wire.Conn, cfg *wire.InitConfig, rep *wire.InitReport) (func() error, error) {
	p, err := resolve(&cfg.Process, true)
	if err != nil {
		return nil, err
	}
	rep.Init = "application"
	rep.StopSignal = cfg.StopSignal
	if rep.StopSignal == 0 {
		rep.StopSignal = int(unix.SIGTERM)
	}
	return func() error {
		listener, err := confine(&cfg.Confine)
		if err != nil {
			return err
		}
		// Before anything can call for an answer.
		if err := handOver(c, listener); err != nil {
			return err
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
			return execFault(p.args[0], err)
		}
		if err := hold(); err != nil {
			return err
		}
		// The program has the terminal: init itself must not keep it open.
		for fd := range 3 {
			unix.Close(fd)
		}
		return pid1.Exec(pid1Fd, pid)
	}, nil
}
