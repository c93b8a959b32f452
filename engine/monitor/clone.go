package monitor

import (
	"math"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A child that joins nothing shares the keeper's memory until it runs its program, and the thread that made it waits for
// that (vfork): to copy the memory, and to copy again what the keeper writes to meanwhile, was one sixteenth of all that the
// life of a small instance takes. While it does, the kernel's out-of-memory killer takes it for nothing to be had (in_vfork
// in include/linux/sched/mm.h); without the wait, a child that is in the instance's cgroups already would be killed with all
// that share its memory, the keeper and every instance.
//
// One that joins a time namespace must have memory of its own (timens_install in kernel/time/namespace.c): it is forked.
//
// Neither runs any Go: what it does is in assembly, which uses no stack.

//go:linkname entersyscallblock runtime.entersyscallblock
func entersyscallblock()

//go:linkname exitsyscall runtime.exitsyscall
func exitsyscall()

// childRun is what runChild is told. It, and all that it and its calls point to, must not be on a stack, which may move.
type childRun struct {
	args        *cloneArgs
	argsSize    uintptr
	calls       *call
	n, moved    uintptr // calls, and how many of them come before the report is at its place
	early, late uintptr // where an error is reported until then, and from then on
	//lint:ignore U1000 the child's record, which is written in assembly
	rec  [2]uintptr
	mask uint64 // signals that were blocked before, as is the child's program to have them
	pid  int32  // set before the child begins

	empty, wait, self [1]byte // what calls point to
	ready             [2]uintptr
}

func newChildRun(s *spawnSpec) *childRun {
	r := &childRun{args: s.groups.cloneArgs(s.flags), argsSize: unsafe.Sizeof(cloneArgs{}), self: [1]byte{'0'}, ready: [2]uintptr{tagReady}}
	// No handler of this process may run in the child.
	r.args.flags |= unix.CLONE_PARENT_SETTID | unix.CLONE_CLEAR_SIGHAND
	if len(s.join) == 0 {
		r.args.flags |= unix.CLONE_VM | unix.CLONE_VFORK
	}
	r.args.parentTID = uint64(uintptr(unsafe.Pointer(&r.pid)))
	return r
}

// clone makes the child and returns its pid.
func (r *childRun) clone() (int, syscall.Errno) {
	syscall.ForkLock.Lock()
	pid, errno := blockedClone(r)
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(r)
	// A change of owner in shared memory makes it as dumpable as fs.suid_dumpable says (commit_creds in kernel/cred.c).
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) // to take it away always goes
	return int(pid), syscall.Errno(errno)
}

const sigSetmask = 2 // SIG_SETMASK

// blockedClone calls runChild with all signals blocked on this thread, which the scheduler does without.
//
//go:nosplit
//go:noinline
func blockedClone(r *childRun) (pid, errno uintptr) {
	all := uint64(math.MaxUint64)
	entersyscallblock()
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, sigSetmask, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&r.mask)), unsafe.Sizeof(r.mask), 0, 0)
	pid, errno = runChild(r)
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, sigSetmask, uintptr(unsafe.Pointer(&r.mask)), 0, unsafe.Sizeof(r.mask), 0, 0)
	exitsyscall()
	return pid, errno
}

// runChild clones. In the child it makes the calls and does not return: an error is reported and ends it; so does, in
// the parent of it, the call that makes the process that is to go on.
//
//go:noescape
func runChild(r *childRun) (pid, errno uintptr)
