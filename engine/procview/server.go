// Package procview shows an instance its own machine: a read-only FUSE file system with the files of /proc and /sys
// that otherwise tell about the host (memory, processors, load, swap, disks), made when they are read from the
// instance's cgroups.
//
// The protocol is the kernel's own, spoken on /dev/fuse, as far as a flat directory of small files needs it. Serve is
// the one goroutine of a view. Nothing is kept on disk.
package procview

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// File is one file of a view.
type File struct {
	Name string
	// Path is what it is shown over, from the root of the instance.
	Path string
	// Read makes the content; an error is EIO to the reader.
	Read func() ([]byte, error)
}

// View is one mounted view.
type View struct {
	dev   *os.File
	files []File
	shown map[uint64]*content // by node
	since atomic.Int64        // Unix nanoseconds; what was made before is old
	Mount int                 // detached mount; the caller's to close
}

// content is what a file shows for a moment: its size and its bytes have to agree for one reader.
type content struct {
	data []byte
	at   time.Time
}

// moment is how long a content is good for the next reader.
const moment = 50 * time.Millisecond

// The operations of the protocol (linux/fuse.h).
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opStatfs      = 17
	opRelease     = 18
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opAccess      = 34
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42

	rootNode  = 1
	firstNode = 2
	autoInval = 1 << 12 // FUSE_AUTO_INVAL_DATA: drop cached pages when an attribute says that the file changed
	maxRead   = 128 << 10
	// unknownSize is more than any file of a view has.
	unknownSize = 16 << 20
	// Nobody writes; the kernel wants room for a header and this much in each read of the device.
	maxWrite  = 4096
	headerIn  = 40
	headerOut = 16
)

// New mounts a view. Serve must run for the mount to answer.
func New(files []File) (*View, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open fuse: %w", err)
	}
	mount, err := mountView(fd)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	// Only now: a poller that is given the device before it is mounted waits on nothing.
	return &View{dev: os.NewFile(uintptr(fd), "fuse"), files: slices.Clone(files), shown: map[uint64]*content{}, Mount: mount}, nil
}

func mountView(fd int) (int, error) {
	fs, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open fuse: %w", err)
	}
	defer unix.Close(fs)
	for _, o := range [][2]string{{"source", "novalet"}, {"fd", fmt.Sprint(fd)}, {"rootmode", "40555"}, {"user_id", "0"}, {"group_id", "0"}} {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return -1, fmt.Errorf("set fuse %s: %w", o[0], err)
		}
	}
	if err := unix.FsconfigSetFlag(fs, "allow_other"); err != nil {
		return -1, fmt.Errorf("set fuse allow_other: %w", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("mount view: %w", err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mount view: %w", err)
	}
	return m, nil
}

// Renew has everything made anew for the next reader, as when the limits have changed.
func (v *View) Renew() { v.since.Store(time.Now().UnixNano()) }

// Close ends Serve; readers get ENOTCONN.
func (v *View) Close() error { return v.dev.Close() }

// Serve answers until the file system is unmounted or Close is called.
func (v *View) Serve() {
	buf := make([]byte, 4*maxWrite)
	for {
		n, err := v.dev.Read(buf)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
			continue // the request was taken back before it was read
		}
		if err != nil {
			return
		}
		if n < headerIn {
			continue
		}
		unique := binary.NativeEndian.Uint64(buf[8:])
		body, errno := v.handle(buf[:n])
		if errno == noReply {
			continue
		}
		out := make([]byte, headerOut, headerOut+len(body))
		if errno != 0 {
			body = nil
		}
		binary.NativeEndian.PutUint32(out, uint32(headerOut+len(body)))
		binary.NativeEndian.PutUint32(out[4:], uint32(-int32(errno)))
		binary.NativeEndian.PutUint64(out[8:], unique)
		// An error here means that the reader has gone.
		_, _ = v.dev.Write(append(out, body...))
	}
}

// noReply marks requests that get no answer.
const noReply = syscall.Errno(0xffff)

// handle answers one request: opcode at 4, node at 16, the operation's own fields from 40 on.
func (v *View) handle(req []byte) ([]byte, syscall.Errno) {
	op, node, in := binary.NativeEndian.Uint32(req[4:]), binary.NativeEndian.Uint64(req[16:]), req[headerIn:]
	switch op {
	case opForget, opBatchForget, opInterrupt:
		return nil, noReply
	case opInit:
		out := make([]byte, 64)
		binary.NativeEndian.PutUint32(out, 7)      // major
		binary.NativeEndian.PutUint32(out[4:], 31) // minor
		binary.NativeEndian.PutUint32(out[12:], autoInval)
		binary.NativeEndian.PutUint32(out[20:], maxWrite)
		return out, 0
	case opGetattr:
		if !v.valid(node) {
			return nil, unix.ENOENT
		}
		// Good for no time: each read asks again, finds another time of change and reads anew. Direct I/O would do
		// the same but gives sendfile (busybox cat) an empty file.
		return append(make([]byte, 16, 104), v.attr(node, true)...), 0
	case opLookup:
		name := string(cstring(in))
		i := slices.IndexFunc(v.files, func(f File) bool { return f.Name == name })
		if node != rootNode || i < 0 {
			return nil, unix.ENOENT
		}
		out := make([]byte, 40, 128)
		binary.NativeEndian.PutUint64(out, uint64(i+firstNode))
		binary.NativeEndian.PutUint64(out[16:], 3600)

		return append(out, v.attr(uint64(i+firstNode), false)...), 0
	case opOpen, opOpendir:
		if !v.valid(node) || (node == rootNode) != (op == opOpendir) {
			return nil, unix.ENOENT
		}
		return make([]byte, 16), 0
	case opRead:
		return v.read(node, in)
	case opReaddir:
		return v.readdir(in)
	case opRelease, opReleasedir, opFlush, opAccess, opDestroy:
		return nil, 0
	case opStatfs:
		out := make([]byte, 80)
		binary.NativeEndian.PutUint32(out[40:], 512)
		binary.NativeEndian.PutUint32(out[44:], 255)
		return out, 0
	}
	return nil, unix.ENOSYS
}

func cstring(b []byte) []byte {
	if i := slices.Index(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}

func (v *View) valid(node uint64) bool {
	return node >= rootNode && node < uint64(len(v.files)+firstNode)
}

// attr is a struct fuse_attr, of a file with its size if that is asked for.
func (v *View) attr(node uint64, size bool) []byte {
	a := make([]byte, 88)
	binary.NativeEndian.PutUint64(a, node)
	mode, nlink := uint32(unix.S_IFREG|0o444), uint32(1)
	if node == rootNode {
		mode, nlink = unix.S_IFDIR|0o555, 2
	} else if !size {
		// Not yet known, and asked for by whoever wants to know. What reads without asking (sendfile) stops where a read is short of it.
		binary.NativeEndian.PutUint64(a[8:], unknownSize)
	} else if c := v.content(node, true); c != nil {
		binary.NativeEndian.PutUint64(a[8:], uint64(len(c.data)))
		binary.NativeEndian.PutUint64(a[16:], uint64(len(c.data)+511)/512)
		binary.NativeEndian.PutUint64(a[32:], uint64(c.at.Unix()))
		binary.NativeEndian.PutUint32(a[52:], uint32(c.at.Nanosecond()))
	}
	binary.NativeEndian.PutUint32(a[60:], mode)
	binary.NativeEndian.PutUint32(a[64:], nlink)
	binary.NativeEndian.PutUint32(a[80:], 4096)
	return a
}

// content returns what a file shows, made anew when it is old and fresh is asked for; nil when it cannot be made.
func (v *View) content(node uint64, fresh bool) *content {
	c := v.shown[node]
	if c != nil && (!fresh || time.Since(c.at) < moment && c.at.UnixNano() > v.since.Load()) {
		return c
	}
	data, err := v.files[node-firstNode].Read()
	if err != nil {
		return nil
	}
	c = &content{data: data, at: time.Now()}
	v.shown[node] = c
	return c
}

func (v *View) read(node uint64, in []byte) ([]byte, syscall.Errno) {
	if len(in) < 20 || !v.valid(node) || node == rootNode {
		return nil, unix.EINVAL
	}
	off, size := binary.NativeEndian.Uint64(in[8:]), binary.NativeEndian.Uint32(in[16:])
	c := v.content(node, off == 0)
	if c == nil {
		return nil, unix.EIO
	}
	if off >= uint64(len(c.data)) {
		return nil, 0
	}
	rest := c.data[off:]
	return rest[:min(len(rest), int(min(size, maxRead)))], 0
}

// readdir lists the files, each a struct fuse_dirent padded to eight bytes.
func (v *View) readdir(in []byte) ([]byte, syscall.Errno) {
	if len(in) < 20 {
		return nil, unix.EINVAL
	}
	off, size := binary.NativeEndian.Uint64(in[8:]), int(binary.NativeEndian.Uint32(in[16:]))
	var out []byte
	for i := int(min(off, uint64(len(v.files)))); i < len(v.files); i++ {
		name := v.files[i].Name
		n := (24 + len(name) + 7) &^ 7
		if len(out)+n > size {
			break
		}
		d := make([]byte, n)
		binary.NativeEndian.PutUint64(d, uint64(i+firstNode))
		binary.NativeEndian.PutUint64(d[8:], uint64(i+1))
		binary.NativeEndian.PutUint32(d[16:], uint32(len(name)))
		binary.NativeEndian.PutUint32(d[20:], unix.DT_REG)
		copy(d[24:], name)
		out = append(out, d...)
	}
	return out, 0
}
