package layer

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// writers creates small files on goroutines beside the one that reads the stream: making a file costs the file system
// far more than reading its entry. Files go to them in batches: to wake somebody for each file would cost as much as the file.
// A batch is of directories with even or with odd inodes, since in one directory only one file is made at a time; any of them
// takes the next one, since a large directory must not keep one busy and the other waiting.
//
// What is under way is known by the directory's inode and the name, so that whatever touches the same name, by whatever
// path, waits first.
type writers struct {
	queue      chan *batch
	free       chan *batch
	jobs       sync.WaitGroup // batches under way
	ended      sync.WaitGroup // the goroutines
	failed     atomic.Bool
	exactModes bool
	done       func(block int) // with the content of a file
	mu         sync.Mutex
	err        error

	// Of the reading goroutine alone.
	open  [2]*batch            // not yet handed over
	names map[nameKey]struct{} // put since the last wait
}

type nameKey struct {
	dir  uint64
	base string
}

// batch is some files for one of the goroutines. Their names lie in data, and their contents unless these are in a block of
// the shared memory.
type batch struct {
	jobs []writeJob
	data []byte
}

// writeJob is one file. base ends with a NUL byte.
type writeJob struct {
	dir   *dirFD
	full  string
	base  []byte
	data  []byte
	block int // that data lies in, else -1
	plan  plan
}

// The bounds of what is under way.
const (
	maxWriters = 2
	maxBatches = 6
	maxJobs    = 32        // of a batch
	batchBytes = 256 << 10 // of a batch; the largest file and its name fit
	maxNames   = 8192
)

// newWriters starts the goroutines. With exactModes the umask is known to be 0, so that a mode given to open(2) is the one
// that the file gets.
func newWriters(exactModes bool, done func(block int)) *writers {
	w := &writers{done: done, queue: make(chan *batch, maxBatches), free: make(chan *batch, maxBatches), names: map[nameKey]struct{}{}, exactModes: exactModes}
	for range maxBatches {
		w.free <- nil
	}
	for range maxWriters {
		w.ended.Go(w.run)
	}
	return w
}

// run writes batches until there are no more.
func (w *writers) run() {
	for b := range w.queue {
		for i := range b.jobs {
			j := &b.jobs[i]
			if !w.failed.Load() {
				if err := j.run(w.exactModes); err != nil {
					w.fail(err)
				}
			}
			w.done(j.block)
			if err := j.dir.unref(); err != nil {
				w.fail(err)
			}
		}
		clear(b.jobs)
		b.jobs, b.data = b.jobs[:0], b.data[:0]
		w.free <- b
		w.jobs.Done()
	}
}

func (w *writers) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.failed.Store(true)
}

// put hands over a file; data is copied, unless it is in a block of the shared memory, which is kept until it is written.
func (w *writers) put(parent *dirFD, base, full string, data []byte, block int, p plan) error {
	if w.failed.Load() {
		return w.wait()
	}
	if len(w.names) >= maxNames {
		if err := w.wait(); err != nil {
			return err
		}
	}
	q := parent.ino % uint64(len(w.open))
	size := len(base) + 1
	if block < 0 {
		size += len(data)
	}
	if b := w.open[q]; b != nil && len(b.data)+size > cap(b.data) {
		w.send(q)
	}
	b := w.open[q]
	if b == nil {
		if b = <-w.free; b == nil {
			b = &batch{jobs: make([]writeJob, 0, maxJobs), data: make([]byte, 0, batchBytes)}
		}
		w.open[q] = b
	}
	at := len(b.data)
	b.data = append(append(b.data, base...), 0)
	end := len(b.data)
	if block < 0 {
		b.data = append(b.data, data...)
		data = b.data[end:]
	}
	parent.refs.Add(1)
	b.jobs = append(b.jobs, writeJob{dir: parent, full: full, base: b.data[at:end], data: data, block: block, plan: p})
	w.names[nameKey{parent.ino, base}] = struct{}{}
	if len(b.jobs) == maxJobs {
		w.send(q)
	}
	return nil
}

// send hands over a batch.
func (w *writers) send(q uint64) {
	w.jobs.Add(1)
	w.queue <- w.open[q]
	w.open[q] = nil
}

// sendAll gives away what is not full yet.
func (w *writers) sendAll() {
	for q, b := range w.open {
		if b != nil {
			w.send(uint64(q))
		}
	}
}

// settle waits if the name is under way.
func (w *writers) settle(parent *dirFD, base string) error {
	if _, ok := w.names[nameKey{parent.ino, base}]; !ok {
		return nil
	}
	return w.wait()
}

// wait returns when everything put so far is written.
func (w *writers) wait() error {
	w.sendAll()
	w.jobs.Wait()
	clear(w.names)
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *writers) close() {
	_ = w.wait()
	close(w.queue)
	w.ended.Wait()
}

func (j *writeJob) run(exactModes bool) error {
	fd, err := rawCreate(j.dir.fd, j.base, j.plan.mode)
	if err == unix.EEXIST {
		if err = removeAll(j.dir.fd, string(j.base[:len(j.base)-1]), 0); err == nil {
			fd, err = rawCreate(j.dir.fd, j.base, j.plan.mode)
		}
	}
	if err != nil {
		return nameError("write", j.full, err)
	}
	err = rawWrite(fd, j.data, 0)
	if err == nil {
		err = j.plan.apply(fd, exactModes)
	}
	rawClose(fd)
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
