package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// The two halves of the console log's ring; names shared with the keeper (monitor.LogName).
const (
	logName    = "console.log"
	oldLogName = "console.log.1"
)

// ConsoleLog implements novalet.Runtime. The log is read from disk, whether a keeper runs or not.
func (e *Engine) ConsoleLog(_ context.Context, id string, limit int) ([]byte, error) {
	if _, err := e.find(id); err != nil {
		return nil, err
	}
	if limit <= 0 {
		return nil, nil
	}
	last, err := tail(filepath.Join(e.dir(id), logName), limit)
	if err != nil {
		return nil, fmt.Errorf("read console log: %w", err)
	}
	if len(last) < limit {
		old, err := tail(filepath.Join(e.dir(id), oldLogName), limit-len(last))
		if err != nil {
			return nil, fmt.Errorf("read console log: %w", err)
		}
		last = append(old, last...)
	}
	return last, nil
}

// tail reads the last bytes of a file; an absent one is empty.
func tail(path string, limit int) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	n := min(st.Size(), int64(limit))
	buf := make([]byte, n)
	got, err := f.ReadAt(buf, st.Size()-n)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return buf[:got], err
}

// Console implements novalet.Runtime. The viewer ends with ctx.
func (e *Engine) Console(ctx context.Context, id string) (novalet.Terminal, error) {
	in, err := e.find(id)
	if err != nil {
		return nil, err
	}
	rec, k := in.get()
	if k == nil {
		return nil, fmt.Errorf("console of %s: %w: it is stopped", id, novalet.ErrInvalidState)
	}
	c, stop, err := k.dial(ctx, wire.OpConsole, rec.ID, nil)
	if err != nil {
		return nil, err
	}
	if _, err := receive(ctx, c, nil); err != nil {
		stop()
		c.Close()
		return nil, fmt.Errorf("console of %s: %w", id, fromKeeper(err))
	}
	return &terminal{c: c, stop: stop}, nil
}

// terminal is one viewer.
type terminal struct {
	c    *wire.Conn
	stop func() bool
	rest []byte

	mu sync.Mutex // one frame at a time
}

// Read implements io.Reader; io.EOF is the end of the instance.
func (t *terminal) Read(p []byte) (int, error) {
	for len(t.rest) == 0 {
		kind, b, err := wire.ReadFrame(t.c)
		if err != nil {
			return 0, err
		}
		if kind == wire.FrameData {
			t.rest = b
		}
	}
	n := copy(p, t.rest)
	t.rest = t.rest[n:]
	return n, nil
}

// Write implements io.Writer: it types.
func (t *terminal) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := wire.WriteFrame(t.c, wire.FrameData, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Resize implements novalet.Terminal.
func (t *terminal) Resize(rows, cols uint16) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b [4]byte
	binary.BigEndian.PutUint16(b[:], rows)
	binary.BigEndian.PutUint16(b[2:], cols)
	return wire.WriteFrame(t.c, wire.FrameResize, b[:])
}

// Close ends the viewer.
func (t *terminal) Close() error {
	t.stop()
	return t.c.Close()
}
