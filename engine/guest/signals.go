package guest

import (
	"fmt"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Until its last program runs an init is deaf. From then on, an application's holds what it is sent for that to take (see
// engine/pid1), and the keeper hears of the start only when no other thread is left that could take it instead.

// lastSignal is the kernel's last (SIGRTMAX).
const lastSignal = 64

// notOurs are not passed on to an application's program. A fault is its own; the runtime stops its threads by SIGURG up to the last
// moment; 32 and 33 are what C libraries cancel threads and change their ids by.
var notOurs = []unix.Signal{32, 33, unix.SIGILL, unix.SIGTRAP, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGSTKFLT, unix.SIGSYS, unix.SIGURG}

// deaf takes the signals' handlers from the runtime. What is sent to a process without one, which does not block it, the kernel
// drops if it is the first one of its namespace (sig_task_ignored in kernel/signal.c): no signal ends an init, nor has
// it do what the runtime does by one.
func deaf() error {
	var a struct{ handler, flags, restorer, mask uintptr } // the kernel's sigaction: the default
	for sig := unix.Signal(1); sig <= lastSignal; sig++ {
		if sig == unix.SIGKILL || sig == unix.SIGSTOP {
			continue
		}
		if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&a)), 0, unsafe.Sizeof(a.mask), 0, 0); errno != 0 {
			return fmt.Errorf("take signal %d from the runtime: %w", sig, errno)
		}
	}
	return nil
}

// hold blocks, on this thread, the signals that are passed on.
func hold() error {
	var s unix.Sigset_t
	for sig := unix.Signal(1); sig <= lastSignal; sig++ {
		if !slices.Contains(notOurs, sig) {
			s.Val[0] |= 1 << (sig - 1)
		}
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &s, nil); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	return nil
}
