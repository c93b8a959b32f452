package guest

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// everyThread makes a system call on all threads of the process: the Go runtime's own threads are as much part of
// the confined process as the one that goes on.
func everyThread(nr uintptr, a ...uintptr) error {
	var v [6]uintptr
	copy(v[:], a)
	if _, _, errno := syscall.AllThreadsSyscall6(nr, v[0], v[1], v[2], v[3], v[4], v[5]); errno != 0 {
		return errno
	}
	return nil
}

// confine drops the capabilities that are not in the bounding set, empties the inheritable and the ambient set,
// and installs the filter, on all threads. After it the process can only go on to the tenant's program. What it
// returns is for the keeper (see seccomp).
func confine(c *wire.Confine) (listener int, err error) {
	if holes.Open(holes.Descriptors) {
		_, _ = unix.Open("/", unix.O_PATH, 0)
	}
	for cp := range uintptr(64) {
		if c.Bounding&(1<<cp) != 0 || holes.Open(holes.Caps) {
			continue
		}
		if err := everyThread(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, cp); err != nil {
			if err == unix.EINVAL {
				break // above the kernel's last
			}
			return -1, fmt.Errorf("drop capability %d: %w", cp, err)
		}
	}
	if err := everyThread(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL); err != nil {
		return -1, fmt.Errorf("clear ambient capabilities: %w", err)
	}
	if c.NoNewPrivileges && !holes.Open(holes.NoNewPrivs) {
		if err := everyThread(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
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
	if err := everyThread(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&data[0]))); err != nil {
		return -1, fmt.Errorf("set capabilities: %w", err)
	}
	return listener, nil
}
