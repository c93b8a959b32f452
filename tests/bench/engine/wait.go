package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// writes tells of the first write to files. The peers' first output comes by a pipe, for which nobody has to look again and
// again: eight who do so for ours would take from the processors that are being measured.
type writes struct {
	fd int
	f  *os.File

	mu    sync.Mutex
	early map[int32]bool // before its watch was known
	waits map[int32]chan struct{}
}

func newWrites() (*writes, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open inotify: %w", err)
	}
	w := &writes{fd: fd, f: os.NewFile(uintptr(fd), "inotify"), early: map[int32]bool{}, waits: map[int32]chan struct{}{}}
	go w.read()
	return w, nil
}

// read ends when the file is closed.
func (w *writes) read() {
	buf := make([]byte, 64<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			return
		}
		w.mu.Lock()
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(b))
			if binary.NativeEndian.Uint32(b[4:])&unix.IN_MODIFY != 0 {
				if c := w.waits[wd]; c != nil {
					close(c)
					delete(w.waits, wd)
				} else {
					w.early[wd] = true
				}
			}
			b = b[unix.SizeofInotifyEvent+int(binary.NativeEndian.Uint32(b[12:])):]
		}
		w.mu.Unlock()
	}
}

// watch begins to look at a file and returns what waits for the first write to it from then on.
func (w *writes) watch(path string) (func(context.Context) error, error) {
	wd, err := unix.InotifyAddWatch(w.fd, path, unix.IN_MODIFY|unix.IN_ONESHOT)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	c := make(chan struct{})
	w.mu.Lock()
	if w.early[int32(wd)] {
		delete(w.early, int32(wd))
		close(c)
	} else {
		w.waits[int32(wd)] = c
	}
	w.mu.Unlock()
	return func(ctx context.Context) error {
		select {
		case <-c:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("nothing was written to %s: %w", path, ctx.Err())
		}
	}, nil
}

func (w *writes) close() { w.f.Close() }
