// Package bpf gives small programs of eBPF to the kernel.
package bpf

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// progLoad is the part of union bpf_attr that BPF_PROG_LOAD reads (linux/bpf.h).
type progLoad struct {
	progType, insnCnt    uint32
	insns, license       uint64
	logLevel, logSize    uint32
	logBuf               uint64
	kernVersion, flags   uint32
	name                 [16]byte
	ifindex, attachTypeE uint32
}

// tries is how often a load is asked for: the verifier gives up with EAGAIN when a signal waits for its thread.
const tries = 20

// Load gives the kernel a program of a type (BPF_PROG_TYPE_…); code is an array of struct bpf_insn in this machine's byte order.
// The descriptor that it returns is the caller's to close. It needs CAP_BPF, or CAP_SYS_ADMIN on kernels before 5.8; the error
// is an errno.
func Load(progType uint32, code []byte) (int, error) {
	license := []byte("Apache-2.0\x00")
	// The runtime sends signals to threads that compute for long. What is blocked does not count as waiting.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, &old); err != nil {
		return -1, err
	}
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }()
	a := progLoad{progType: progType, insnCnt: uint32(len(code) / 8),
		insns: uint64(uintptr(unsafe.Pointer(&code[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0])))}
	var fd uintptr
	errno := unix.EAGAIN
	// Stopping a process (a debugger, a freezer) counts as a signal that cannot be blocked.
	for n := 0; n < tries && errno == unix.EAGAIN; n++ {
		fd, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a))
	}
	runtime.KeepAlive(code)
	runtime.KeepAlive(license)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}
