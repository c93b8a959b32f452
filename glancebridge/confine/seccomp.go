package confine

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// baseCalls are what the Go runtime and plain input and output take, the frequent ones first.
var baseCalls = []uintptr{
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_FUTEX, unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_LSEEK, unix.SYS_CLOSE,
	unix.SYS_FSTAT, unix.SYS_FTRUNCATE, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME,
	unix.SYS_GETTIMEOFDAY, unix.SYS_MUNMAP, unix.SYS_MREMAP, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_BRK,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_SCHED_YIELD,
	unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_TGKILL, unix.SYS_EPOLL_CREATE1,
	unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EVENTFD2, unix.SYS_PIPE2, unix.SYS_FCNTL, unix.SYS_GETRANDOM,
	unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_RESTART_SYSCALL, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ,
	unix.SYS_READV, unix.SYS_WRITEV,
}

// writeCalls are what the applier writes with, always relative to an open directory.
var writeCalls = []uintptr{
	unix.SYS_OPENAT, unix.SYS_FCHOWN, unix.SYS_FCHMOD, unix.SYS_UTIMENSAT, unix.SYS_OPENAT2, unix.SYS_MKDIRAT,
	unix.SYS_SYMLINKAT, unix.SYS_LINKAT, unix.SYS_MKNODAT, unix.SYS_UNLINKAT, unix.SYS_FCHOWNAT, unix.SYS_FCHMODAT,
	unix.SYS_FSETXATTR, unix.SYS_FLISTXATTR, unix.SYS_FREMOVEXATTR, sysFstatat, unix.SYS_GETDENTS64, unix.SYS_FALLOCATE,
}

// forbidden calls end the process: no honest path leads to them, so whoever makes one is not us any more.
var forbidden = []uintptr{
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_PTRACE, unix.SYS_SOCKET, unix.SYS_CONNECT, unix.SYS_MOUNT, unix.SYS_SETNS,
	unix.SYS_UNSHARE, unix.SYS_BPF, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_KEXEC_LOAD,
	unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PROCESS_VM_READV, unix.SYS_IO_URING_SETUP, unix.SYS_USERFAULTFD, unix.SYS_KEYCTL,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_PERF_EVENT_OPEN,
}

// Offsets in struct seccomp_data (linux/seccomp.h), little endian.
const (
	dataNr   = 0
	dataArch = 4
	dataArgs = 16
)

func stmt(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }

func jump(code uint16, k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: code, Jt: yes, Jf: no, K: k}
}

const (
	load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	ifEq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	ifGe  = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	ifSet = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
	ret   = unix.BPF_RET | unix.BPF_K

	deny = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
)

// program builds the filter. What is neither allowed nor forbidden fails with EPERM, so that a newer Go runtime which
// tries a call and can do without goes on.
func program(writes bool) []unix.SockFilter {
	p := []unix.SockFilter{
		stmt(load, dataArch), jump(ifEq, auditArch, 1, 0), stmt(ret, unix.SECCOMP_RET_KILL_PROCESS),
		stmt(load, dataNr),
	}
	if x32Bit != 0 {
		p = append(p, jump(ifGe, x32Bit, 0, 1), stmt(ret, unix.SECCOMP_RET_KILL_PROCESS))
	}
	calls := baseCalls
	if writes {
		calls = append(append([]uintptr{}, baseCalls...), writeCalls...)
	}
	for _, nr := range append(append([]uintptr{}, calls...), archCalls...) {
		p = append(p, jump(ifEq, uint32(nr), 0, 1), stmt(ret, unix.SECCOMP_RET_ALLOW))
	}
	// Memory is never both written by us and run.
	for _, nr := range []uintptr{unix.SYS_MMAP, unix.SYS_MPROTECT} {
		p = append(p, jump(ifEq, uint32(nr), 0, 4), stmt(load, dataArgs+2*8), jump(ifSet, unix.PROT_EXEC, 0, 1),
			stmt(ret, deny), stmt(ret, unix.SECCOMP_RET_ALLOW))
	}
	// Threads, but no processes and no namespaces. clone3 hides its flags from a filter; callers fall back.
	p = append(p, jump(ifEq, unix.SYS_CLONE, 0, 4), stmt(load, dataArgs), jump(ifSet, unix.CLONE_THREAD, 1, 0),
		stmt(ret, deny), stmt(ret, unix.SECCOMP_RET_ALLOW),
		jump(ifEq, unix.SYS_CLONE3, 0, 1), stmt(ret, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS)))
	for _, nr := range forbidden {
		p = append(p, jump(ifEq, uint32(nr), 0, 1), stmt(ret, unix.SECCOMP_RET_KILL_PROCESS))
	}
	return append(p, stmt(ret, deny))
}

// filterCalls puts the filter on all threads.
func filterCalls(writes bool) error {
	p := program(writes)
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	r, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(p)
	if e != 0 {
		return fmt.Errorf("filter system calls: %w", e)
	}
	if r != 0 {
		return fmt.Errorf("filter system calls: thread %d could not be filtered", r)
	}
	return nil
}
