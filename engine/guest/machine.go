package guest

import (
	"errors"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// inits are where a machine's first program is looked for, in the kernel's own order with the places of
// distributions without /sbin/init put in.
var inits = []string{"/sbin/init", "/usr/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/etc/init", "/bin/init"}

// machine prepares the exec of the image's own init.
func machine(c *wire.Conn, cfg *wire.InitConfig, rep *wire.InitReport) (func() error, error) {
	args := cfg.Process.Args
	if len(args) == 0 {
		for _, p := range inits {
			if executable(p) == nil {
				args = []string{p}
				break
			}
		}
	}
	if len(args) == 0 {
		return nil, fault("the image has no /sbin/init: set the image property that makes it an application, or use an image with an init system")
	}
	if err := executable(args[0]); err != nil {
		return nil, fault("the init %q of the image is missing or not executable", args[0])
	}
	rep.Init, rep.StopSignal = initSystem(args[0])
	if cfg.StopSignal != 0 {
		rep.StopSignal = cfg.StopSignal
	}
	env := []string{"container=novalet", "container_uuid=" + cfg.ID, "TERM=linux", "PATH=" + defaultPath}
	for _, e := range cfg.Process.Env {
		if k, _, ok := strings.Cut(e, "="); ok && k != "container" && k != "container_uuid" && !strings.ContainsRune(e, 0) {
			env = append(env, e)
		}
	}
	return func() error {
		listener, err := confine(&cfg.Confine)
		if err != nil {
			return err
		}
		if err := handOver(c, listener); err != nil {
			return err
		}
		// A session of its own: the init takes the console as it likes.
		if _, err := unix.Setsid(); err != nil && !errors.Is(err, unix.EPERM) {
			return err
		}
		return execFault(args[0], unix.Exec(args[0], args, env))
	}, nil
}

// initSystem tells what an init program is by what its links lead to, and by which signal it shuts down:
// systemd(1) SIGRTMIN+3; busybox init SIGUSR2 (power off; SIGTERM reboots); OpenRC's own init listens on a
// fifo and on SIGINT alone. For sysvinit SIGINT is Ctrl-Alt-Del, by which every inittab shuts down, to start anew, which is
// then left out; what it would do by SIGPWR is in few.
func initSystem(p string) (string, int) {
	const rtMin = 34
	target := p
	for range 8 {
		buf := make([]byte, 4096)
		n, err := unix.Readlink(target, buf)
		if err != nil || n <= 0 || n >= len(buf) {
			break
		}
		next := string(buf[:n])
		if !path.IsAbs(next) {
			next = path.Join(path.Dir(target), next)
		}
		target = next
	}
	switch base := path.Base(target); {
	case base == "systemd":
		return "systemd", rtMin + 3
	case base == "busybox" || strings.HasPrefix(base, "busybox."):
		return "busybox", int(unix.SIGUSR2)
	case base == "openrc-init":
		return "openrc", int(unix.SIGINT)
	case base == "runit-init" || base == "runit":
		return "runit", int(unix.SIGCONT)
	case base == "init" || base == "sysvinit":
		return "sysvinit", int(unix.SIGINT)
	}
	return path.Base(target), int(unix.SIGPWR)
}
