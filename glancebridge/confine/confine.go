// Package confine takes rights away from the process that calls it, for good: the helpers that read and write
// what tenants uploaded. What namespaces and ids leave is closed by Landlock, a system call filter, resource limits
// and the loss of capabilities. It starts no goroutine and keeps nothing on disk.
package confine

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Policy says what is left to a process.
type Policy struct {
	dir int // the folder to write below, -1 for none
}

// Parser is for a process that only reads and writes descriptors it already has.
func Parser() Policy { return Policy{dir: -1} }

// Applier is for a process that writes files below one open directory, as root of a user namespace of its own. The
// directory becomes its root.
func Applier(dir int) Policy { return Policy{dir: dir} }

// Limits on resources that hold for both. They are far above what an honest image takes.
const (
	limitFiles = 512
	limitData  = 512 << 20 // bytes of private memory; buffers and the window of xz fit many times
	limitFile  = 1 << 40   // bytes of one file
)

// Apply gives up everything else. A kernel without Landlock is tolerated, since the filter forbids most of the same;
// every other failure is an error, after which the process must not touch an image.
func Apply(p Policy) error {
	// Where a call reaches one thread only, all of them must reach the same.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if p.dir >= 0 {
		if err := enter(p.dir); err != nil {
			return err
		}
	}
	if err := limitResources(); err != nil {
		return err
	}
	// The process has several threads already, and each has rights of its own.
	if err := onAllThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("forbid new privileges: %w", err)
	}
	if err := restrictFiles(p.dir); err != nil {
		return err
	}
	if err := dropCapabilities(p.dir >= 0); err != nil {
		return err
	}
	return filterCalls(p.dir >= 0)
}

// enter makes a directory the root of the process: no path leads out of it even where Landlock is missing.
func enter(dir int) error {
	if err := unix.Fchdir(dir); err != nil {
		return fmt.Errorf("enter folder: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("make folder the root: %w", err)
	}
	return nil
}

func limitResources() error {
	limits := map[int]uint64{
		unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: limitFiles, unix.RLIMIT_FSIZE: limitFile,
		unix.RLIMIT_MEMLOCK: 0, unix.RLIMIT_MSGQUEUE: 0, unix.RLIMIT_SIGPENDING: 64,
	}
	if !instrumented {
		limits[unix.RLIMIT_DATA] = limitData
	}
	for r, n := range limits {
		if err := unix.Setrlimit(r, &unix.Rlimit{Cur: n, Max: n}); err != nil {
			return fmt.Errorf("set resource limit %d: %w", r, err)
		}
	}
	return nil
}

// applierCaps are what writing files of all owners takes: chown, access to them, their modes and capabilities.
const applierCaps = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID | 1<<unix.CAP_SETFCAP

func dropCapabilities(writes bool) error {
	keep := uint32(0)
	if writes {
		keep = applierCaps
	}
	hdr := capHeader{version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]capData{{effective: keep, permitted: keep}}
	return capset(&hdr, &data)
}
