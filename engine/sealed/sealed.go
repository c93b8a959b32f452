// Package sealed makes the files that programs of an instance run from: in memory, so that nothing of the host is reached
// through them, and sealed, so that nothing that runs can write to them (CVE-2019-5736).
//
// It starts no goroutine and keeps nothing on disk.
package sealed

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Program returns a descriptor, opened with flags (O_RDONLY, O_PATH) and close-on-exec, of a sealed memory file with the
// program that fill writes.
func Program(name string, flags int, fill func(w *os.File) error) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err == unix.EINVAL {
		// MFD_EXEC is Linux 6.3; before, every memory file can be run.
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	w := os.NewFile(uintptr(fd), name)
	defer w.Close()
	if err := fill(w); err != nil {
		return nil, fmt.Errorf("fill memory file: %w", err)
	}
	// Run by anybody, read by the host's root alone: what runs from it cannot be traced from a user namespace.
	if err := unix.Fchmod(fd, 0o111); err != nil {
		return nil, fmt.Errorf("fill memory file: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return nil, fmt.Errorf("seal memory file: %w", err)
	}
	// A program with a writable descriptor cannot be run (ETXTBSY): what is kept is a second one.
	r, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("reopen memory file: %w", err)
	}
	return os.NewFile(uintptr(r), name), nil
}
