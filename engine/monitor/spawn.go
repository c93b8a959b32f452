package monitor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// A process that joins an existing user namespace must be single-threaded when it does, so neither the Go
// runtime's own fork and exec nor setns on a locked thread can do it. spawn makes the child by hand: it runs a
// prepared list of system calls and ends in execveat (see clone.go).

// call is one prepared system call of a child.
type call struct {
	nr   uintptr
	a    [5]uintptr
	name string // for messages, instead of the number
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
	// attach runs in the parent when the first clone has joined its groups and waits: id maps.
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
	run := newChildRun(s)

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
		calls = append(calls, call{nr: unix.SYS_WRITE, a: [5]uintptr{uintptr(tasks + i), uintptr(unsafe.Pointer(&run.self[0])), 1}, name: "join cgroup " + name})
	}
	add(unix.SYS_WRITE, reportFd, uintptr(unsafe.Pointer(&run.ready)), unsafe.Sizeof(run.ready))
	add(unix.SYS_READ, syncFd, uintptr(unsafe.Pointer(&run.wait[0])), 1)
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
	add(unix.SYS_RT_SIGPROCMASK, sigSetmask, uintptr(unsafe.Pointer(&run.mask)), 0, unsafe.Sizeof(run.mask))
	add(unix.SYS_EXECVEAT, progFd, uintptr(unsafe.Pointer(&run.empty[0])), uintptr(unsafe.Pointer(&argv[0])),
		uintptr(unsafe.Pointer(&env[0])), unix.AT_EMPTY_PATH)

	run.calls, run.n, run.moved = &calls[0], uintptr(len(calls)), uintptr(moved)
	run.early, run.late = uintptr(report[1]), reportFd
	// Beside the clone, which may return no sooner than the child runs its program.
	f := &follower{report: os.NewFile(uintptr(report[0]), "report"), release: sync[1], run: run, attach: s.attach, calls: calls, done: make(chan struct{})}
	report[0], sync[1] = -1, -1
	go f.follow()
	pid, errno := run.clone()
	runtime.KeepAlive(argv)
	runtime.KeepAlive(env)
	closeFd(&report[1])
	closeFd(&sync[0])
	if errno != 0 {
		<-f.done
		return 0, nil, fmt.Errorf("spawn: clone: %w", errno)
	}
	first := claim(pid)
	<-f.done
	final, failed, done := pid, f.err, first
	if s.fork != nil {
		final = f.second
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

// follower reads what a child reports, until it runs its program or dies, and attaches it when it waits for that.
type follower struct {
	report  *os.File
	release int // what it waits at
	run     *childRun
	attach  func(pid int) error
	calls   []call

	done   chan struct{} // closed when what follows is set
	err    error
	second int // the pid of its child, where that goes on
}

// The tags of a child's records. An error's is its call's number and the first tag that is free.
const (
	tagChild = iota + 1
	tagReady
	tagError
)

func (f *follower) follow() {
	defer close(f.done)
	defer f.report.Close()
	defer closeFd(&f.release)
	var buf [16]byte
	for {
		n, err := f.report.Read(buf[:])
		if n < 16 || err != nil {
			return
		}
		tag, val := binary.NativeEndian.Uint64(buf[:8]), binary.NativeEndian.Uint64(buf[8:])
		switch tag {
		case tagChild:
			f.second = int(val)
		case tagReady:
			if f.err = f.ready(int(atomic.LoadInt32(&f.run.pid))); f.err != nil {
				return
			}
		default:
			c := f.calls[tag-tagError]
			if c.name == "" {
				c.name = fmt.Sprintf("step %d (system call %d)", tag-tagError, c.nr)
			}
			f.err = fmt.Errorf("spawn: %s: %w", c.name, syscall.Errno(val))
		}
	}
}

func (f *follower) ready(pid int) error {
	err := f.attach(pid)
	if err == nil {
		if _, err = unix.Write(f.release, []byte{1}); err == nil {
			return nil
		}
		err = fmt.Errorf("spawn: release child: %w", err)
	}
	unix.Kill(pid, unix.SIGKILL)
	return err
}

func closeFd(fd *int) {
	if *fd >= 0 {
		unix.Close(*fd)
		*fd = -1
	}
}
