package guest

import (
	"fmt"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An init takes its signals itself: a handler writes the number of each into a pipe. os/signal would ask the runtime for one after the
// other, each by way of a thread of its own and back: for all of them a quarter of what the start of an init takes; and its threads stay.

// lastSignal is the kernel's last (SIGRTMAX).
const lastSignal = 64

// notOurs have no handler of ours. A fault would come again when it returned; the runtime stops its threads by SIGURG, which it
// can do without, and has a call made on each by the signal 33 (sigPerThreadSyscall). 32 is what C libraries cancel threads by.
var notOurs = []unix.Signal{32, unix.SIGILL, unix.SIGTRAP, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGSTKFLT, unix.SIGSYS, unix.SIGURG}

const perThread unix.Signal = 33

// signalFd is where onSignal writes.
//
//lint:ignore U1000 it is read in assembly
var signalFd int32

// onSignal is the handler, in assembly: it runs on whatever thread a signal comes to, on the stack that the runtime has set
// aside for that, and calls nothing of Go. onSignalPC is its address, sigreturnPC that of what it returns to.
var onSignalPC, sigreturnPC uintptr

// sigaction is the kernel's, with its flags (asm-generic/signal-defs.h).
type sigaction struct{ handler, flags, restorer, mask uintptr }

const (
	saNoChildStop = 1
	saRestorer    = 0x04000000
	saOnStack     = 0x08000000
	saRestart     = 0x10000000
)

// catch takes the signals over from the runtime and returns where they can be read, a byte each. What a process without a
// handler is sent from its own namespace the kernel drops if it is the first one of it (sig_task_ignored in
// kernel/signal.c): so nothing inside can end init by the others.
func catch() (int, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return -1, fmt.Errorf("open signal pipe: %w", err)
	}
	// A full pipe must not stop what was interrupted: there is enough in it to wake the reader.
	if err := unix.SetNonblock(p[1], true); err != nil {
		return -1, fmt.Errorf("open signal pipe: %w", err)
	}
	signalFd = int32(p[1])
	for sig := unix.Signal(1); sig <= lastSignal; sig++ {
		if sig == unix.SIGKILL || sig == unix.SIGSTOP || sig == perThread {
			continue
		}
		a := sigaction{handler: onSignalPC, flags: saOnStack | saRestart | saNoChildStop}
		if sigreturnPC != 0 {
			a.flags, a.restorer = a.flags|saRestorer, sigreturnPC
		}
		if slices.Contains(notOurs, sig) {
			a = sigaction{}
		}
		if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&a)), 0, unsafe.Sizeof(a.mask), 0, 0); errno != 0 {
			return -1, fmt.Errorf("catch signal %d: %w", sig, errno)
		}
	}
	return p[0], nil
}

// drop throws away what has come.
func drop(signals int) error {
	n, err := unix.IoctlGetInt(signals, unix.TIOCINQ)
	if err == nil && n > 0 {
		_, err = unix.Read(signals, make([]byte, n))
	}
	if err != nil {
		return fmt.Errorf("drop signals: %w", err)
	}
	return nil
}
