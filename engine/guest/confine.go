package guest

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// everyThread makes a system call on all threads of the process: of one that stays, the Go runtime's own threads are as
// much part of it as the one that goes on.
func everyThread(nr uintptr, a ...uintptr) error {
	var v [6]uintptr
	copy(v[:], a)
	if _, _, errno := syscall.AllThreadsSyscall6(nr, v[0], v[1], v[2], v[3], v[4], v[5]); errno != 0 {
		return errno
	}
	return nil
}

// confine drops the capabilities that are not in the bounding set, empties the inheritable and the ambient set, and
// installs the filter. After it the process can only go on to the tenant's program. What it returns is for the keeper
// (see seccomp).
//
// Filter, no_new_privs and, where the process stays beside the program, the capabilities are of all threads; one that turns
// into the program loses its other threads by that. The bounding set is of this thread alone, from
// which the tenant's program comes: the others run none, and each change on all threads costs as much as all else here.
// The kernel takes no_new_privs over with the filter, and empties the ambient set with the capabilities.
func confine(c *wire.Confine, stays bool) (listener int, err error) {
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
	if stays {
		err = everyThread(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&data[0])))
	} else {
		err = unix.Capset(&hdr, &data[0])
	}
	if err != nil {
		return -1, fmt.Errorf("set capabilities: %w", err)
	}
	return listener, nil
}
