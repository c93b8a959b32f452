package httpapi

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// Frames of an upgraded connection: one type byte, four bytes of length (big endian), the payload.
const (
	frameStdin  byte = iota // client: bytes typed
	frameEOF                // client: nothing more will be typed
	frameResize             // client: rows and cols, two uint16
	frameStdout             // server
	frameStderr             // server
	frameExit               // server: exit code, int32; the last frame
	frameError              // server: text; the last frame
)

// maxFrame bounds what one frame may carry, so that a broken peer cannot make us allocate.
const maxFrame = 1 << 20

// frameConn writes and reads frames. Writes of several goroutines do not mix.
type frameConn struct {
	rw io.ReadWriter

	mu  sync.Mutex // guards writes
	buf [5]byte
}

func (c *frameConn) write(kind byte, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf[0] = kind
	binary.BigEndian.PutUint32(c.buf[1:], uint32(len(p)))
	if _, err := c.rw.Write(c.buf[:]); err != nil {
		return err
	}
	_, err := c.rw.Write(p)
	return err
}

func (c *frameConn) read() (byte, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(c.rw, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("read frame: %d bytes is more than %d", n, maxFrame)
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(c.rw, p); err != nil {
		return 0, nil, err
	}
	return head[0], p, nil
}

// frameWriter is an io.Writer that sends each Write as frames of one type.
type frameWriter struct {
	conn *frameConn
	kind byte
}

func (w frameWriter) Write(p []byte) (int, error) {
	done := 0
	for len(p) > 0 {
		n := min(len(p), maxFrame)
		if err := w.conn.write(w.kind, p[:n]); err != nil {
			return done, err
		}
		done += n
		p = p[n:]
	}
	return done, nil
}
