package guest

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// Exec runs inside an instance that is running already, and turns into a further process. It returns only on an
// error. The tenant may see and disturb this process: it holds nothing but its standard streams and a socket on
// which the keeper expects no more than a listener, which it checks to be one, and one report.
func Exec() int {
	if holes.Open(holes.Trace) {
		_ = unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0)
	}
	// The program that follows must not inherit it; that it closes is how the keeper knows that the program runs.
	unix.CloseOnExec(controlFd)
	c, err := wire.NewBlocking(controlFd)
	if err != nil {
		return 125
	}
	var m wire.Exec
	if _, err := c.Recv(&m); err != nil {
		return 125
	}
	report(c, become(c, &m))
	return 125
}

func become(c *wire.Conn, m *wire.Exec) error {
	p, err := resolve(&m.Process, m.TTY)
	if err != nil {
		return err
	}
	if err := limits(); err != nil {
		return err
	}
	if _, err := unix.Setsid(); err != nil {
		return fmt.Errorf("start session: %w", err)
	}
	if m.TTY {
		if err := unix.IoctlSetInt(0, unix.TIOCSCTTY, 0); err != nil {
			return fmt.Errorf("take terminal: %w", err)
		}
	}
	for fd := range 3 {
		// Pipes that the agent made belong to the host's root: /dev/stdout must be usable by the process.
		_ = unix.Fchown(fd, int(p.id.uid), int(p.id.gid))
	}
	listener, err := confine(&m.Confine)
	if err != nil {
		return err
	}
	if err := handOver(c, listener); err != nil {
		return err
	}
	if err := p.id.become(); err != nil {
		return err
	}
	if err := unix.Chdir(p.cwd); err != nil {
		return fault("the working directory %q may not be entered by the user", p.cwd)
	}
	return execFault(p.args[0], unix.Exec(p.path, p.args, p.env))
}
