//go:build !cgo

package confine

import "syscall"

// onAllThreads makes a system call on every thread of the process.
func onAllThreads(nr, a, b, c uintptr) error {
	if _, _, e := syscall.AllThreadsSyscall(nr, a, b, c); e != 0 {
		return e
	}
	return nil
}
