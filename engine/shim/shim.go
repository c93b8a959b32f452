// Package shim carries the second program, cmd/novalet-shim, and puts it into a sealed memory file, from which
// every keeper, init and exec helper runs: nothing that runs can write to it (CVE-2019-5736), and a package upgrade
// under running instances changes nothing for them.
package shim

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Open returns a read-only descriptor of the sealed program, close-on-exec. With an empty path it is the program
// built into this binary (build tag shim).
func Open(path string) (*os.File, error) {
	var src io.Reader
	switch {
	case path != "":
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("open shim: %w", err)
		}
		defer f.Close()
		src = f
	case len(embedded) > 0:
		src = strings.NewReader(embedded)
	default:
		return nil, errors.New("open shim: this binary was built without it (make build sets the tag shim); name one with the option shim_path")
	}
	fd, err := unix.MemfdCreate("novalet-shim", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err == unix.EINVAL {
		// MFD_EXEC is Linux 6.3; before, every memory file can be run.
		fd, err = unix.MemfdCreate("novalet-shim", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	w := os.NewFile(uintptr(fd), "novalet-shim")
	defer w.Close()
	if _, err := io.Copy(w, src); err != nil {
		return nil, fmt.Errorf("fill memory file: %w", err)
	}
	// Run by anybody, read by the host's root alone: what runs from it cannot be traced from a user namespace.
	if err := unix.Fchmod(fd, 0o111); err != nil {
		return nil, fmt.Errorf("fill memory file: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return nil, fmt.Errorf("seal memory file: %w", err)
	}
	// A program with a writable descriptor cannot be run (ETXTBSY): what is kept is a second, read-only one.
	r, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("reopen memory file: %w", err)
	}
	return os.NewFile(uintptr(r), "novalet-shim"), nil
}

// Embedded tells whether the program is built in.
func Embedded() bool { return len(embedded) > 0 }
