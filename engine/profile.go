package engine

import (
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/monitor/wire"
	"github.com/novalet/novalet/engine/seccomp"
)

// applicationCaps are what programs written for containers expect of their root user.
var applicationCaps = []int{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_KILL, unix.CAP_SETGID, unix.CAP_SETUID,
	unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_RAW, unix.CAP_SYS_CHROOT, unix.CAP_SETFCAP,
}

// machineDropped are the capabilities that even a machine's root does without. They have no effect inside a user
// namespace; without them a systemd does not start the services that would fail for lack of them (clock
// setting, module loading, the kernel log).
var machineDropped = []int{
	unix.CAP_SYS_MODULE, unix.CAP_SYS_RAWIO, unix.CAP_SYS_TIME, unix.CAP_SYSLOG, unix.CAP_MAC_ADMIN, unix.CAP_MAC_OVERRIDE,
	unix.CAP_WAKE_ALARM, unix.CAP_BLOCK_SUSPEND, unix.CAP_AUDIT_READ, unix.CAP_AUDIT_CONTROL, unix.CAP_PERFMON, unix.CAP_BPF,
	unix.CAP_CHECKPOINT_RESTORE, unix.CAP_LINUX_IMMUTABLE,
}

// confine is how an instance's processes are shut in.
func (e *Engine) confine(id string, kind novalet.Kind) wire.Confine {
	if e.hasTree(id) {
		return e.trees[kind]
	}
	return e.shut[kind]
}

// confinements makes, for each kind, how its processes are shut in; on trees they may not touch the attributes that
// say which project a file counts for.
func confinements(trees bool) (map[novalet.Kind]wire.Confine, error) {
	out := map[novalet.Kind]wire.Confine{}
	for kind, profile := range map[novalet.Kind]seccomp.Kind{novalet.KindApplication: seccomp.Application, novalet.KindMachine: seccomp.Machine} {
		c := confineOf(kind)
		var err error
		if c.Seccomp, err = seccomp.Program(profile, trees); err != nil {
			return nil, err
		}
		out[kind] = c
	}
	return out, nil
}

// confineOf is the capabilities of a kind.
func confineOf(kind novalet.Kind) wire.Confine {
	var c wire.Confine
	if kind == novalet.KindMachine {
		c.Bounding = 1<<(unix.CAP_LAST_CAP+1) - 1
		for _, n := range machineDropped {
			c.Bounding &^= 1 << n
		}
		return c
	}
	for _, n := range applicationCaps {
		c.Bounding |= 1 << n
	}
	c.NoNewPrivileges = true
	return c
}
