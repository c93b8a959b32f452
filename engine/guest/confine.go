package guest

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// confine drops the capabilities that are not in the bounding set, empties the inheritable and the ambient set, and
// installs the filter. After it the process can only go on to the tenant's program, or, with that as its child, to
// engine/pid1's. What it returns is for the keeper (see seccomp).
//
// All is of this thread alone, from which the programs come: by running one the process loses its others, the Go runtime's own. The
// kernel empties the ambient set with the capabilities.
func confine(c *wire.Confine) (listener int, err error) {
	if holes.Open(holes.Descriptors) {
		_, _ = unix.Open("/", unix.O_PATH, 0)
	}
	for cp := range uintptr(64) {
		if c.Bounding&(1<<cp) != 0 || holes.Open(holes.Caps) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, cp, 0, 0, 0); err != nil {
			if err == unix.EINVAL {
				break // above the kernel's last
			}
			return -1, fmt.Errorf("drop capability %d: %w", cp, err)
		}
	}
	if c.NoNewPrivileges && !holes.Open(holes.NoNewPrivs) {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return -1, fmt.Errorf("set no_new_privs: %w", err)
		}
	}
	// The filter needs CAP_SYS_ADMIN when new privileges are allowed, so it comes before the capabilities go.
	if listener, err = seccomp(c.Seccomp); err != nil {
		return -1, err
	}
	if holes.Open(holes.Caps) {
		return listener, nil
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	lo, hi := uint32(c.Bounding), uint32(c.Bounding>>32)
	data := [2]unix.CapUserData{{Effective: lo, Permitted: lo}, {Effective: hi, Permitted: hi}}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return -1, fmt.Errorf("set capabilities: %w", err)
	}
	return listener, nil
}
