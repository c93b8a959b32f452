package monitor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// The kernel hands calls of sysinfo(2) to the keeper (seccomp_unotify(2)): the caller sleeps until it has an answer, some
// 20 µs where the kernel's own takes half of one. One goroutine serves the listener of one filter, that is of an instance's
// init or of one process that the host started inside, with all their children; it ends with the last of them.
//
// The callers are hostile. What they can do to a goroutine that serves them is make it slow: a write into their memory
// may have to wait, for the pages of a file or for what their memory limit gives. So nothing is locked during the write, an
// instance has a bounded number of listeners and is answered at a bounded rate, and no other instance shares its
// goroutines.

const (
	// maxListeners bounds an instance's listeners. Beyond it callers get ENOSYS.
	maxListeners = 64
	// An instance gets so many answers per window; further callers wait for the next one.
	answersPerWindow = 200
	window           = 100 * time.Millisecond
)

// asked is what an instance's listeners share.
type asked struct {
	mu        sync.Mutex
	listeners int
	since     time.Time // begin of the window
	answers   int
}

// notification is a struct seccomp_notif, response a struct seccomp_notif_resp.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type response struct {
	id    uint64
	val   int64
	errno int32
	flags uint32
}

// lastReport receives what an init or an exec helper says before its program runs: perhaps a listener, then one report or
// the end of the connection.
func (in *instance) lastReport(ctl *wire.Conn) (wire.InitReport, error) {
	var rep wire.InitReport
	fds, err := ctl.Recv(&rep)
	if err != nil || !rep.Listener {
		wire.CloseAll(fds)
		return rep, err
	}
	if err := in.serveListener(fds); err != nil {
		fmt.Fprintf(os.Stderr, "keeper: listener of %s: %v\n", in.name(), err)
	}
	rep = wire.InitReport{}
	fds, err = ctl.Recv(&rep)
	wire.CloseAll(fds)
	return rep, err
}

// serveListener takes over a listener and starts its goroutine. An exec helper can be in the hands of a root inside, which
// traces it: the descriptor is foreign until the kernel says what it is. A file of a FUSE server in its place would answer
// the requests below as it likes, and name any process.
func (in *instance) serveListener(fds []int) error {
	fail := func(err error) error {
		wire.CloseAll(fds)
		return err
	}
	if len(fds) != 1 {
		return fail(errors.New("wrong number of descriptors"))
	}
	fd := fds[0]
	name, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return fail(err)
	}
	if name != "anon_inode:seccomp notify" {
		return fail(fmt.Errorf("it is %q", name))
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return fail(err)
	}
	in.asked.mu.Lock()
	full := in.asked.listeners >= maxListeners
	if !full {
		in.asked.listeners++
	}
	in.asked.mu.Unlock()
	if full {
		return fail(fmt.Errorf("there are %d", maxListeners))
	}
	// Faster on kernels that know it (Linux 6.6): the caller runs next where the keeper ran.
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SET_FLAGS, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
	f := os.NewFile(uintptr(fd), "listener")
	in.k.conns.Add(1)
	go func() {
		defer in.k.conns.Done()
		defer func() {
			f.Close()
			in.asked.mu.Lock()
			defer in.asked.mu.Unlock()
			in.asked.listeners--
		}()
		in.listen(f)
	}()
	return nil
}

// listen answers until no process carries the filter.
func (in *instance) listen(f *os.File) {
	rc, err := f.SyscallConn()
	if err != nil {
		return
	}
	for {
		var n notification
		var rerr error
		over := false
		err := rc.Read(func(fd uintptr) bool {
			// Only asked for what is there: receiving would wait, not fail.
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if _, perr := unix.Poll(p, 0); perr != nil {
				return false
			}
			if p[0].Revents&unix.POLLIN == 0 {
				over = p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
				return over
			}
			rerr = control(fd, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n))
			return true
		})
		switch {
		case err != nil || over:
			return
		case rerr == unix.ENOENT || rerr == unix.EINTR:
			continue // the caller is gone, or a signal called it away
		case rerr != nil:
			fmt.Fprintf(os.Stderr, "keeper: listener of %s: %v\n", in.name(), rerr)
			return
		}
		in.pace()
		_ = rc.Control(func(fd uintptr) {
			r := response{id: n.id, errno: -int32(in.answer(fd, &n))}
			// An error means that the caller is gone.
			_ = control(fd, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
		})
	}
}

func control(fd, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// pace counts an answer and waits for the next window when this one's are used up.
func (in *instance) pace() {
	a := &in.asked
	a.mu.Lock()
	now := time.Now()
	if now.Sub(a.since) >= window {
		a.since, a.answers = now, 0
	}
	a.answers++
	wait := time.Duration(0)
	if a.answers > answersPerWindow {
		wait = a.since.Add(window).Sub(now)
	}
	a.mu.Unlock()
	time.Sleep(wait)
}

// answer writes the instance's sysinfo to where the caller wants it.
func (in *instance) answer(listener uintptr, n *notification) syscall.Errno {
	if n.nr != unix.SYS_SYSINFO {
		return unix.ENOSYS
	}
	// The memory that is opened by a pid may be another process's, if the caller has died. If the notification is still
	// valid after the open, the caller has not: then this is its memory, and stays so whatever becomes of the pid.
	mem, err := unix.Open("/proc/"+strconv.FormatUint(uint64(n.pid), 10)+"/mem", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return unix.EFAULT
	}
	defer unix.Close(mem)
	if control(listener, unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&n.id)) != nil {
		return unix.ESRCH
	}
	data := in.sysinfo()
	if w, err := unix.Pwrite(mem, data, int64(n.args[0])); err != nil || w != len(data) {
		return unix.EFAULT
	}
	return 0
}

// sysinfo makes a struct sysinfo: what the cgroups limit is the instance's, what they do not is the host's.
func (in *instance) sysinfo() []byte {
	var s unix.Sysinfo_t
	_ = unix.Sysinfo(&s)
	unit := max(uint64(s.Unit), 1)
	u := in.lately()
	total, free, swap, swapFree := s.Totalram*unit, s.Freeram*unit, s.Totalswap*unit, s.Freeswap*unit
	buffers, shared := s.Bufferram*unit, s.Sharedram*unit
	if u.MemoryLimit > 0 {
		total, free = uint64(u.MemoryLimit), uint64(max(u.MemoryLimit-u.MemoryUsed, 0))
		swap, swapFree = uint64(u.SwapLimit), uint64(max(u.SwapLimit-u.SwapUsed, 0))
		buffers, shared = 0, 0
	}
	out := make([]byte, 0, unsafe.Sizeof(s))
	word := func(v uint64) { out = binary.NativeEndian.AppendUint64(out, v) }
	word(uint64(max(time.Since(u.Started), 0) / time.Second))
	for _, l := range u.Load {
		word(uint64(math.Round(l * 65536))) // SI_LOAD_SHIFT
	}
	for _, v := range []uint64{total, free, shared, buffers, swap, swapFree} {
		word(v)
	}
	out = binary.NativeEndian.AppendUint16(out, uint16(min(u.Tasks, math.MaxUint16)))
	out = append(out, make([]byte, 6)...)
	word(0) // high memory, of 32-bit machines
	word(0)
	out = binary.NativeEndian.AppendUint32(out, 1) // bytes
	out = append(out, make([]byte, int(unsafe.Sizeof(s))-len(out))...)
	return out
}
