package monitor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// A process that joins an existing user namespace must be single-threaded when it does, so neither the Go
// runtime's own fork and exec nor setns on a locked thread can do it. spawn forks by hand: the child runs a
// prepared list of system calls, on the copied stack, and ends in execveat. It is plain fork, not vfork:
// setns into a time namespace is refused while memory is shared.

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()

// call is one prepared system call of a child.
type call struct {
	nr      uintptr
	a       [5]uintptr
	name    string // for messages, instead of the number
	mayFail bool
	// fork marks the second clone: the parent side reports the pid and ends, the child side goes on.
	fork bool
}

// spawnSpec describes a child.
type spawnSpec struct {
	// flags are the namespaces of the first clone.
	flags uintptr
	// join, when set, is a list of setns calls after the first clone; fork is then the flags of a second clone,
	// made with CLONE_PARENT so that the child of it is the keeper's.
	join []call
	fork *uintptr
	// groups are what it joins first; spawn closes them.
	groups groups
	// files become 0, 1, 2 … of the child; nothing else stays open but the program.
	files []int
	// prog is an open program, argv and env its arguments.
	prog      int
	argv, env []string
	// attach runs in the parent when the first clone exists and waits: id maps.
	attach func(pid int) error
}

// fdBase is where the child parks descriptors while it sorts them: above all that it was given.
const fdBase = 200

// spawn starts the child and returns its pid and the channel that gets its status. claim gives the channel of a pid.
func spawn(s *spawnSpec, claim func(int) <-chan unix.WaitStatus) (int, <-chan unix.WaitStatus, error) {
	defer wire.CloseAll(s.groups.tasks)
	var sync, report [2]int
	if err := unix.Pipe2(sync[:], unix.O_CLOEXEC); err != nil {
		return 0, nil, fmt.Errorf("spawn: open pipe: %w", err)
	}
	defer func() { closeFd(&sync[0]); closeFd(&sync[1]) }()
	if err := unix.Pipe2(report[:], unix.O_CLOEXEC); err != nil {
		return 0, nil, fmt.Errorf("spawn: open pipe: %w", err)
	}
	defer func() { closeFd(&report[0]); closeFd(&report[1]) }()

	argv, err := syscall.SlicePtrFromStrings(s.argv)
	if err != nil {
		return 0, nil, fmt.Errorf("spawn: %w", err)
	}
	env, err := syscall.SlicePtrFromStrings(s.env)
	if err != nil {
		return 0, nil, fmt.Errorf("spawn: %w", err)
	}
	empty := [1]byte{}
	var waitByte [1]byte
	self := [1]byte{'0'}

	// Descriptors: park all above fdBase, close everything below, put them in place. The pipes and the program
	// keep fixed numbers so that the rest of the list can name them.
	const syncFd, reportFd, progFd = fdBase, fdBase + 1, fdBase + 2
	const parked = fdBase + 3
	var calls []call
	add := func(nr uintptr, a ...uintptr) {
		c := call{nr: nr}
		copy(c.a[:], a)
		calls = append(calls, c)
	}
	src := append([]int{sync[0], report[1], s.prog}, s.files...)
	var joins []int
	for _, j := range s.join {
		if j.nr == unix.SYS_SETNS {
			joins = append(joins, int(j.a[0]))
		}
	}
	src = append(src, joins...)
	tasks := fdBase + len(src)
	src = append(src, s.groups.tasks...)
	// Copies above every source and every fixed number first, then the fixed ones: no step overwrites what a
	// later one needs.
	ceil := uintptr(fdBase + len(src))
	for _, fd := range src {
		ceil = max(ceil, uintptr(fd)+1)
	}
	moved := 2 * len(src)
	for i, fd := range src {
		add(unix.SYS_DUP3, uintptr(fd), ceil+uintptr(i), unix.O_CLOEXEC)
	}
	for i := range src {
		add(unix.SYS_DUP3, ceil+uintptr(i), uintptr(fdBase+i), unix.O_CLOEXEC)
	}
	add(unix.SYS_CLOSE_RANGE, 0, fdBase-1, 0)
	add(unix.SYS_CLOSE_RANGE, uintptr(fdBase+len(src)), ^uintptr(0)>>32, 0)
	for i := range s.files {
		add(unix.SYS_DUP3, uintptr(parked+i), uintptr(i), 0)
	}
	for i, name := range s.groups.names {
		calls = append(calls, call{nr: unix.SYS_WRITE, a: [5]uintptr{uintptr(tasks + i), uintptr(unsafe.Pointer(&self[0])), 1}, name: "join cgroup " + name})
	}
	add(unix.SYS_READ, syncFd, uintptr(unsafe.Pointer(&waitByte[0])), 1)
	k := parked + len(s.files)
	for _, j := range s.join {
		if j.nr == unix.SYS_SETNS {
			j.a[0] = uintptr(k)
			k++
		}
		calls = append(calls, j)
	}
	if s.flags&unix.CLONE_NEWUSER != 0 || len(s.join) > 0 {
		add(unix.SYS_SETGROUPS, 0, 0)
		add(unix.SYS_SETRESGID, 0, 0, 0)
		add(unix.SYS_SETRESUID, 0, 0, 0)
	}
	if s.fork != nil {
		calls = append(calls, call{nr: unix.SYS_CLONE, a: [5]uintptr{*s.fork | unix.CLONE_PARENT | uintptr(unix.SIGCHLD)}, fork: true})
	}
	add(unix.SYS_EXECVEAT, progFd, uintptr(unsafe.Pointer(&empty[0])), uintptr(unsafe.Pointer(&argv[0])),
		uintptr(unsafe.Pointer(&env[0])), unix.AT_EMPTY_PATH)

	var rec [2]uintptr
	args := s.groups.cloneArgs(s.flags)
	runtime.LockOSThread()
	syscall.ForkLock.Lock()
	pid, errno := rawFork(args, calls, moved, uintptr(report[1]), reportFd, &rec)
	syscall.ForkLock.Unlock()
	runtime.UnlockOSThread()
	runtime.KeepAlive(argv)
	runtime.KeepAlive(env)
	runtime.KeepAlive(calls)
	if errno != 0 {
		return 0, nil, fmt.Errorf("spawn: clone: %w", errno)
	}
	first := claim(int(pid))
	closeFd(&report[1])
	closeFd(&sync[0])

	if s.attach != nil {
		if err := s.attach(int(pid)); err != nil {
			unix.Kill(int(pid), unix.SIGKILL)
			<-first
			return 0, nil, err
		}
	}
	if _, err := unix.Write(sync[1], []byte{1}); err != nil {
		unix.Kill(int(pid), unix.SIGKILL)
		<-first
		return 0, nil, fmt.Errorf("spawn: release child: %w", err)
	}
	closeFd(&sync[1])

	// Records: a pid (tag 1) from the middle process, then an error (tag 2), or the end of the pipe at exec.
	final := int(pid)
	if s.fork != nil {
		final = 0
	}
	rf := os.NewFile(uintptr(report[0]), "report")
	report[0] = -1
	defer rf.Close()
	var failed error
	var buf [16]byte
	for {
		n, err := rf.Read(buf[:])
		if n < 16 || err != nil {
			break
		}
		tag, val := binary.NativeEndian.Uint64(buf[:8]), binary.NativeEndian.Uint64(buf[8:])
		if tag == 1 {
			final = int(val)
			continue
		}
		c := calls[tag-2]
		if c.name == "" {
			c.name = fmt.Sprintf("step %d (system call %d)", tag-2, c.nr)
		}
		failed = fmt.Errorf("spawn: %s: %w", c.name, syscall.Errno(val))
	}
	done := first
	if s.fork != nil {
		<-first
		if final != 0 {
			done = claim(final)
		}
	}
	if failed == nil && final == 0 {
		failed = errors.New("spawn: the child died before it ran the program")
	}
	if failed != nil {
		if final != 0 {
			unix.Kill(final, unix.SIGKILL)
			<-done
		}
		return 0, nil, failed
	}
	return final, done, nil
}

// rawFork clones and, in the child, runs the calls. Nothing here may grow the stack or allocate: in the child
// only this thread exists. Errors go to early until the first moved calls are done, then to late.
//
//go:norace
//go:nosplit
//go:noinline
func rawFork(args *cloneArgs, calls []call, moved int, early, late uintptr, rec *[2]uintptr) (uintptr, syscall.Errno) {
	beforeFork()
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args), 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		afterFork()
		return pid, errno
	}
	afterForkInChild()
	for i := range calls {
		c := &calls[i]
		r, _, e := syscall.RawSyscall6(c.nr, c.a[0], c.a[1], c.a[2], c.a[3], c.a[4], 0)
		to := late
		if i < moved {
			to = early
		}
		if e != 0 && !c.mayFail {
			rec[0], rec[1] = uintptr(i)+2, uintptr(e)
			syscall.RawSyscall(unix.SYS_WRITE, to, uintptr(unsafe.Pointer(rec)), 16)
			for {
				syscall.RawSyscall(unix.SYS_EXIT_GROUP, 127, 0, 0)
			}
		}
		if c.fork && r != 0 {
			rec[0], rec[1] = 1, r
			syscall.RawSyscall(unix.SYS_WRITE, to, uintptr(unsafe.Pointer(rec)), 16)
			for {
				syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
			}
		}
	}
	for {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, 126, 0, 0)
	}
}

func closeFd(fd *int) {
	if *fd >= 0 {
		unix.Close(*fd)
		*fd = -1
	}
}
