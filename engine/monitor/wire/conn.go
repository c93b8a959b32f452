// Package wire is the protocol between the agent, the keepers and the processes that a keeper starts: JSON
// messages behind a four-byte length on unix sockets, with file descriptors attached to the first byte.
//
// It imports nothing heavy (not even net): a keeper's memory and the start time of an init depend on it.
// It starts no goroutine and keeps nothing on disk.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Version is sent in every message. A peer of another version is served as far as its operations are known:
// unknown operations are answered with CodeUnknown, unknown fields are ignored.
const Version = 1

const (
	// maxMessage bounds one message: injected files and a config drive have to fit.
	maxMessage = 64 << 20
	// maxFds bounds the descriptors of one message (SCM_MAX_FD is 253).
	maxFds = 64
)

// Conn is one end of a unix stream socket. One goroutine may send while another receives.
type Conn struct {
	f  *os.File
	rc syscall.RawConn
}

// NewConn takes over a connected socket.
func NewConn(fd int) (*Conn, error) { return takeOver(fd, true) }

func takeOver(fd int, nonblocking bool) (*Conn, error) {
	if err := unix.SetNonblock(fd, nonblocking); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set up socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "socket")
	rc, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Conn{f: f, rc: rc}, nil
}

// NewBlocking takes over a connected socket for a process that waits for one thing at a time: the runtime's poller and
// its thread are not needed then. It has no deadlines.
func NewBlocking(fd int) (*Conn, error) { return takeOver(fd, false) }

// Dial connects to a listening socket in the file system.
func Dial(path string) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	for {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return NewConn(fd)
}

// Pair makes two connected sockets: a Conn and a bare close-on-exec descriptor to hand to a child.
func Pair() (*Conn, int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("open socket pair: %w", err)
	}
	c, err := NewConn(fds[0])
	if err != nil {
		unix.Close(fds[1])
		return nil, -1, err
	}
	return c, fds[1], nil
}

// Listener accepts connections on a listening socket.
type Listener struct {
	f      *os.File
	rc     syscall.RawConn
	closed atomic.Bool
}

// NewListener takes over a listening socket.
func NewListener(fd int) (*Listener, error) {
	c, err := NewConn(fd)
	if err != nil {
		return nil, err
	}
	return &Listener{f: c.f, rc: c.rc}, nil
}

// Accept waits for the next connection. After Close it returns os.ErrClosed.
func (l *Listener) Accept() (*Conn, error) {
	nfd := -1
	var aerr error
	err := l.rc.Read(func(fd uintptr) bool {
		nfd, _, aerr = unix.Accept4(int(fd), unix.SOCK_CLOEXEC)
		return aerr != unix.EAGAIN && aerr != unix.EINTR
	})
	if l.closed.Load() {
		if err == nil && aerr == nil {
			unix.Close(nfd)
		}
		return nil, os.ErrClosed
	}
	if err != nil {
		return nil, err
	}
	if aerr != nil {
		return nil, fmt.Errorf("accept: %w", aerr)
	}
	return NewConn(nfd)
}

// Close ends Accept.
func (l *Listener) Close() error {
	l.closed.Store(true)
	return l.f.Close()
}

// SetDeadline bounds the sends and receives that follow; the zero time lifts it.
func (c *Conn) SetDeadline(t time.Time) error { return c.f.SetDeadline(t) }

// Close closes the socket; a blocked Recv returns.
func (c *Conn) Close() error { return c.f.Close() }

// Read reads raw bytes, for connections that became a byte stream.
func (c *Conn) Read(p []byte) (int, error) { return c.f.Read(p) }

// Write writes raw bytes, for connections that became a byte stream.
func (c *Conn) Write(p []byte) (int, error) { return c.f.Write(p) }

// PeerUID returns the user id of the process that connected.
func (c *Conn) PeerUID() (uint32, error) {
	var cred *unix.Ucred
	var err error
	if cerr := c.rc.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, fmt.Errorf("read peer credentials: %w", err)
	}
	return cred.Uid, nil
}

// Send writes one message with the descriptors attached. The caller keeps its own copies of them.
func (c *Conn) Send(v any, fds ...int) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(body) > maxMessage {
		return fmt.Errorf("encode message: %d bytes are more than %d", len(body), maxMessage)
	}
	if len(fds) > maxFds {
		return fmt.Errorf("encode message: %d descriptors are more than %d", len(fds), maxFds)
	}
	msg := make([]byte, 4, 4+len(body))
	binary.BigEndian.PutUint32(msg, uint32(len(body)))
	msg = append(msg, body...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for len(msg) > 0 {
		var n int
		var serr error
		err := c.rc.Write(func(fd uintptr) bool {
			n, serr = unix.SendmsgN(int(fd), msg, oob, nil, unix.MSG_NOSIGNAL)
			for serr == unix.EINTR {
				n, serr = unix.SendmsgN(int(fd), msg, oob, nil, unix.MSG_NOSIGNAL)
			}
			return serr != unix.EAGAIN
		})
		if err == nil {
			err = serr
		}
		if err != nil {
			return fmt.Errorf("send message: %w", err)
		}
		msg, oob = msg[n:], nil
	}
	return nil
}

// Recv reads one message into v and returns the descriptors that came with it, close-on-exec and owned by the
// caller. io.EOF means the peer closed between messages.
func (c *Conn) Recv(v any) ([]int, error) {
	var fds []int
	fail := func(err error) ([]int, error) {
		CloseAll(fds)
		return nil, err
	}
	var head [4]byte
	if err := c.full(head[:], &fds); err != nil {
		return fail(err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxMessage {
		return fail(fmt.Errorf("receive message: %d bytes are more than %d", n, maxMessage))
	}
	body := make([]byte, n)
	if err := c.full(body, &fds); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fail(err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fail(fmt.Errorf("decode message: %w", err))
	}
	return fds, nil
}

// full fills p and collects descriptors on the way.
func (c *Conn) full(p []byte, fds *[]int) error {
	oob := make([]byte, unix.CmsgSpace(maxFds*4))
	for got := 0; got < len(p); {
		var n, oobn, flags int
		var rerr error
		err := c.rc.Read(func(fd uintptr) bool {
			n, oobn, flags, _, rerr = unix.Recvmsg(int(fd), p[got:], oob, unix.MSG_CMSG_CLOEXEC)
			for rerr == unix.EINTR {
				n, oobn, flags, _, rerr = unix.Recvmsg(int(fd), p[got:], oob, unix.MSG_CMSG_CLOEXEC)
			}
			return rerr != unix.EAGAIN
		})
		if err == nil {
			err = rerr
		}
		if err != nil {
			return fmt.Errorf("receive message: %w", err)
		}
		if oobn > 0 {
			more, err := parseRights(oob[:oobn])
			*fds = append(*fds, more...)
			if err != nil {
				return err
			}
		}
		if flags&unix.MSG_CTRUNC != 0 || len(*fds) > maxFds {
			return errors.New("receive message: too many descriptors")
		}
		if n == 0 {
			if got == 0 {
				return io.EOF
			}
			return io.ErrUnexpectedEOF
		}
		got += n
	}
	return nil
}

func parseRights(oob []byte) ([]int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("receive message: %w", err)
	}
	var fds []int
	for i := range msgs {
		got, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// CloseAll closes descriptors; negative ones are skipped.
func CloseAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}
