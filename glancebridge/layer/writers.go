package layer

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// writers creates small files on goroutines beside the one that reads the stream: making a file costs the file system
// far more than reading its entry. All files of one directory go to one of them, in order.
//
// What is under way is known by the directory's inode and the name, so that whatever touches the same name, by whatever
// path, waits first.
type writers struct {
	queues [2]chan *writeJob
	bufs   chan []byte
	jobs   sync.WaitGroup // under way
	ended  sync.WaitGroup // the goroutines
	failed atomic.Bool
	mu     sync.Mutex
	err    error

	// Of the reading goroutine alone.
	names   map[nameKey]struct{} // handed over since the last wait
	retired []int                // directories to close at the next wait
}

type nameKey struct {
	dir  uint64
	base string
}

// writeJob is one file.
type writeJob struct {
	dir  int
	base string
	full string
	data []byte
	buf  []byte // to give back
	plan plan
}

// The bounds of what is under way.
const (
	maxJobs    = 24
	maxNames   = 8192
	maxRetired = 128
)

func newWriters() *writers {
	w := &writers{bufs: make(chan []byte, maxJobs), names: map[nameKey]struct{}{}}
	for range maxJobs {
		w.bufs <- nil
	}
	for i := range w.queues {
		q := make(chan *writeJob, maxJobs)
		w.queues[i] = q
		w.ended.Go(func() {
			for j := range q {
				if !w.failed.Load() {
					if err := j.run(); err != nil {
						w.fail(err)
					}
				}
				w.bufs <- j.buf
				w.jobs.Done()
			}
		})
	}
	return w
}

func (w *writers) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.failed.Store(true)
}

// put hands over a file; data is copied.
func (w *writers) put(parent *dirFD, base, full string, data []byte, p plan) error {
	if w.failed.Load() {
		return w.wait()
	}
	if len(w.names) >= maxNames {
		if err := w.wait(); err != nil {
			return err
		}
	}
	buf := <-w.bufs
	if cap(buf) < len(data) {
		buf = make([]byte, max(len(data), 16<<10))
	}
	j := &writeJob{dir: parent.fd, base: base, full: full, buf: buf, data: append(buf[:0], data...), plan: p}
	w.names[nameKey{parent.ino, base}] = struct{}{}
	w.jobs.Add(1)
	w.queues[parent.ino%uint64(len(w.queues))] <- j
	return nil
}

// settle waits if the name is under way.
func (w *writers) settle(parent *dirFD, base string) error {
	if _, ok := w.names[nameKey{parent.ino, base}]; !ok {
		return nil
	}
	return w.wait()
}

// wait returns when everything handed over so far is written.
func (w *writers) wait() error {
	w.jobs.Wait()
	clear(w.names)
	for _, fd := range w.retired {
		unix.Close(fd)
	}
	w.retired = w.retired[:0]
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// release closes a directory once no file is being written in it.
func (w *writers) release(fd int) {
	w.retired = append(w.retired, fd)
	if len(w.retired) >= maxRetired {
		// The error is kept for the next call that can return it.
		_ = w.wait()
	}
}

func (w *writers) close() {
	_ = w.wait()
	for _, q := range w.queues {
		close(q)
	}
	w.ended.Wait()
}

func (j *writeJob) run() error {
	fd, err := create(j.dir, j.base)
	if err == unix.EEXIST {
		if err = removeAll(j.dir, j.base, 0); err == nil {
			fd, err = create(j.dir, j.base)
		}
	}
	if err != nil {
		return nameError("write", j.full, err)
	}
	err = pwriteAll(fd, j.data, 0)
	if err == nil {
		err = j.plan.apply(fd)
	}
	unix.Close(fd)
	if err != nil {
		return nameError("write", j.full, err)
	}
	return nil
}

// nameError names the entry in an error, unless it is a refusal, which has its own words.
func nameError(verb, name string, err error) error {
	var r *RefusedError
	var l *TooLargeError
	if errors.As(err, &r) || errors.As(err, &l) {
		return err
	}
	switch {
	case errors.Is(err, unix.ENAMETOOLONG):
		return Refuse("the image has a path that is too long: %q", short(name))
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENOENT):
		return Refuse("the image has an entry below something that is no directory: %q", short(name))
	}
	return fmt.Errorf("%s %q: %w", verb, short(name), err)
}
