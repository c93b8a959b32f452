package glancebridge

import (
	"fmt"
	"io"
	"sync"
)

// trail hashes a file behind whoever writes it, so that writing does not wait for it. Its methods are called by one goroutine.
type trail struct {
	at   io.ReaderAt
	to   io.Writer
	done chan struct{}

	mu      sync.Mutex
	cond    sync.Cond
	pos     int64 // up to where it was hashed
	upto    int64 // up to where it was written
	closed  bool  // no more will be written
	stopped bool
	err     error
}

// newTrail begins at byte pos of the file. It is to be finished or stopped.
func newTrail(at io.ReaderAt, pos int64, to io.Writer) *trail {
	t := &trail{at: at, to: to, done: make(chan struct{}), pos: pos, upto: pos}
	t.cond.L = &t.mu
	go t.run()
	return t
}

func (t *trail) run() {
	defer close(t.done)
	buf := make([]byte, 256<<10)
	for {
		t.mu.Lock()
		for t.pos >= t.upto && !t.closed {
			t.cond.Wait()
		}
		b := buf[:max(min(int64(len(buf)), t.upto-t.pos), 0)]
		end := t.stopped || len(b) == 0
		t.mu.Unlock()
		if end {
			return
		}
		if _, err := t.at.ReadAt(b, t.pos); err != nil {
			t.err = fmt.Errorf("hash spooled disk: %w", err)
			return
		}
		_, _ = t.to.Write(b) // a hash takes everything
		t.pos += int64(len(b))
	}
}

// written says up to where the file may be read.
func (t *trail) written(off int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.upto = off
	t.cond.Signal()
}

// finish returns when everything that was written is hashed.
func (t *trail) finish() error { return t.close(false) }

// stop ends it where it is.
func (t *trail) stop() { _ = t.close(true) }

func (t *trail) close(stop bool) error {
	t.mu.Lock()
	t.closed, t.stopped = true, t.stopped || stop
	t.cond.Signal()
	t.mu.Unlock()
	<-t.done
	return t.err
}
