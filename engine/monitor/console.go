package monitor

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

const (
	// LogName and OldLogName are the two halves of the console log's ring in the instance's directory: when the
	// first reaches half the bound it becomes the second.
	LogName    = "console.log"
	OldLogName = "console.log.1"

	defaultLogMax = 1 << 20
	// recentMax is what a new viewer is shown of the past.
	recentMax = 16 << 10
	// viewerMax is how far a viewer may fall behind before it is cut off.
	viewerMax = 1 << 20
)

// console is an instance's terminal: it copies what the instance prints to the log and to the viewers, and what
// viewers type to the instance. It stays while inits come and go.
type console struct {
	dir *os.File
	max int64
	wg  sync.WaitGroup

	mu      sync.Mutex
	log     *os.File
	size    int64
	recent  []byte
	viewers map[*viewer]struct{}
	master  *os.File
	slave   int // held open, so that reading the master does not fail while nobody has the console open
	rows    uint16
	cols    uint16
	closed  bool
}

type viewer struct {
	c    *wire.Conn
	wake chan struct{}
	mu   sync.Mutex
	buf  []byte
	gone bool
}

func newConsole(dir *os.File, maxBytes int64) (*console, error) {
	if maxBytes <= 0 {
		maxBytes = defaultLogMax
	}
	c := &console{dir: dir, max: maxBytes, viewers: map[*viewer]struct{}{}, slave: -1, rows: 24, cols: 80}
	return c, c.openLog()
}

func (c *console) openLog() error {
	fd, err := unix.Openat(int(c.dir.Fd()), LogName, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("open console log: %w", err)
	}
	c.log = os.NewFile(uintptr(fd), LogName)
	st, err := c.log.Stat()
	if err != nil {
		return fmt.Errorf("open console log: %w", err)
	}
	c.size = st.Size()
	return nil
}

// attach takes over the master side of a new terminal. It is foreign in so far as it was made inside, before
// anything of the tenant ran: it is checked to be one.
func (c *console) attach(master int) error {
	if _, err := unix.IoctlGetInt(master, unix.TIOCGPTN); err != nil {
		return fmt.Errorf("take terminal: %w", err)
	}
	slave, err := openPeer(master)
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(master, true); err != nil {
		unix.Close(slave)
		return fmt.Errorf("make terminal non-blocking: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.master, c.slave = os.NewFile(uintptr(master), "console"), slave
	_ = unix.IoctlSetWinsize(slave, unix.TIOCSWINSZ, &unix.Winsize{Row: c.rows, Col: c.cols})
	c.wg.Add(1)
	go c.copy(c.master)
	return nil
}

// openPeer opens the other side of a terminal without naming a path.
func openPeer(master int) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return -1, fmt.Errorf("open terminal's other side: %w", errno)
	}
	return int(fd), nil
}

// detach drains what the last init printed and closes its terminal.
func (c *console) detach() {
	c.mu.Lock()
	m, s := c.master, c.slave
	c.master, c.slave = nil, -1
	c.mu.Unlock()
	if m == nil {
		return
	}
	// With no other process left, closing our copy of the slave side is the end of the stream: the reader gets
	// what is buffered, then EIO. A process elsewhere that still holds it (an exec under way) must not hold us.
	unix.Close(s)
	m.SetReadDeadline(time.Now().Add(2 * time.Second))
	c.wg.Wait()
	m.Close()
}

// close ends all viewers and the log.
func (c *console) close() {
	c.detach()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.log != nil {
		c.log.Close()
		c.log = nil
	}
	for v := range c.viewers {
		v.end()
	}
}

func (c *console) copy(m *os.File) {
	defer c.wg.Done()
	buf := make([]byte, 4096)
	for {
		n, err := m.Read(buf)
		if n > 0 {
			c.print(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// print appends to the log and shows to the viewers. A full disk loses log lines, never the instance.
func (c *console) print(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.log != nil {
		if c.size+int64(len(p)) > c.max/2 && c.size > 0 {
			c.log.Close()
			c.log = nil
			if err := unix.Renameat(int(c.dir.Fd()), LogName, int(c.dir.Fd()), OldLogName); err == nil {
				_ = c.openLog()
			}
		}
		if c.log != nil {
			n, _ := c.log.Write(p)
			c.size += int64(n)
		}
	}
	c.recent = append(c.recent, p...)
	if n := len(c.recent); n > 2*recentMax {
		c.recent = append([]byte(nil), c.recent[n-recentMax:]...)
	}
	for v := range c.viewers {
		v.show(p)
	}
}

func (v *viewer) show(p []byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.buf)+len(p) > viewerMax {
		v.gone = true
	} else {
		v.buf = append(v.buf, p...)
	}
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

func (v *viewer) end() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.gone = true
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

// viewer serves one viewer of the console until it goes or the instance ends.
func (in *instance) viewer(c *wire.Conn) error {
	if in.status().State != wire.StateRunning {
		return &wire.Error{Code: wire.CodeState, Detail: "no console: " + in.status().State}
	}
	con := in.console
	v := &viewer{c: c, wake: make(chan struct{}, 1)}
	con.mu.Lock()
	if con.closed {
		con.mu.Unlock()
		return &wire.Error{Code: wire.CodeState, Detail: "no console"}
	}
	recent := con.recent
	if n := len(recent); n > recentMax {
		recent = recent[n-recentMax:]
	}
	v.buf = append(v.buf, recent...)
	v.wake <- struct{}{}
	con.viewers[v] = struct{}{}
	con.mu.Unlock()
	defer func() {
		con.mu.Lock()
		delete(con.viewers, v)
		con.mu.Unlock()
	}()
	if err := reply(c, nil, nil); err != nil {
		return errStreamed
	}
	typed := make(chan struct{})
	in.k.conns.Add(1)
	go func() {
		defer in.k.conns.Done()
		defer close(typed)
		for {
			kind, p, err := wire.ReadFrame(c)
			if err != nil {
				return
			}
			con.input(kind, p)
		}
	}()
	for {
		select {
		case <-typed:
			return errStreamed
		case <-v.wake:
		}
		v.mu.Lock()
		buf, gone := v.buf, v.gone
		v.buf = nil
		v.mu.Unlock()
		if len(buf) > 0 {
			c.SetDeadline(time.Now().Add(time.Minute))
			if wire.WriteFrame(c, wire.FrameData, buf) != nil {
				return errStreamed
			}
			c.SetDeadline(time.Time{})
		}
		if gone {
			return errStreamed
		}
	}
}

// input types on the console or changes its size. What the instance does not read within a while is dropped.
func (c *console) input(kind byte, p []byte) {
	c.mu.Lock()
	m := c.master
	if kind == wire.FrameResize && len(p) == 4 && m != nil {
		c.rows, c.cols = binary.BigEndian.Uint16(p), binary.BigEndian.Uint16(p[2:])
		_ = unix.IoctlSetWinsize(c.slave, unix.TIOCSWINSZ, &unix.Winsize{Row: c.rows, Col: c.cols})
	}
	c.mu.Unlock()
	if kind == wire.FrameData && m != nil {
		m.SetWriteDeadline(time.Now().Add(5 * time.Second))
		_, _ = m.Write(p)
	}
}
