package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// Exec implements novalet.Runtime. It does not wait for a Stdin whose Read blocks.
func (e *Engine) Exec(ctx context.Context, id string, x *novalet.ExecSpec) (int, error) {
	in, err := e.find(id)
	if err != nil {
		return -1, err
	}
	rec, k := in.get()
	if k == nil {
		return -1, fmt.Errorf("exec in %s: %w: it is stopped", id, novalet.ErrInvalidState)
	}
	code, err := e.execIn(ctx, k, &rec, x)
	if err != nil {
		return -1, fmt.Errorf("exec in %s: %w", id, err)
	}
	return code, nil
}

func (e *Engine) execIn(ctx context.Context, k *keeper, rec *record, x *novalet.ExecSpec) (int, error) {
	m := &wire.Exec{Process: processOf(&x.Process), Confine: e.confine(rec.ID, rec.Kind), TTY: x.TTY}
	if len(m.Process.Env) == 0 && rec.Kind == novalet.KindApplication && rec.Spec != nil {
		m.Process.Env = rec.Spec.Process.Env
	}
	s := &streams{base: int(rec.UIDBase)}
	defer s.closeOurs()
	if !x.TTY {
		if err := s.open(x); err != nil {
			s.closeTheirs()
			return -1, err
		}
	}
	c, stop, err := k.dial(ctx, wire.OpExec, rec.ID, m, s.fds()...)
	s.closeTheirs()
	if err != nil {
		return -1, err
	}
	defer c.Close()
	defer stop()
	fds, err := receive(ctx, c, nil)
	if err != nil {
		return -1, fromKeeper(err)
	}
	if x.TTY {
		if len(fds) != 1 {
			wire.CloseAll(fds)
			return -1, errors.New("the keeper sent no terminal")
		}
		if err := s.terminal(fds[0], x); err != nil {
			return -1, err
		}
	}
	s.copy(x)
	var exit wire.Exit
	if _, err := receive(ctx, c, &exit); err != nil {
		return -1, fromKeeper(err)
	}
	// A process that the program left behind may hold the output open: what it has printed until now counts.
	s.drain()
	return exit.Code, nil
}

// streams connects a process's standard streams with readers and writers.
type streams struct {
	base   int
	ours   []*os.File
	theirs []*os.File
	in     *os.File
	out    []*os.File
	to     []io.Writer
	fold   bool // stderr goes where stdout goes
	wg     sync.WaitGroup
}

// pipe makes a pipe whose inner end belongs to the instance's root, so that /dev/stdout can be opened again inside.
func (s *streams) pipe(read bool) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("open pipe: %w", err)
	}
	ours, theirs := r, w
	if !read {
		ours, theirs = w, r
	}
	s.ours, s.theirs = append(s.ours, ours), append(s.theirs, theirs)
	return ours, theirs.Chown(s.base, s.base)
}

func (s *streams) open(x *novalet.ExecSpec) error {
	if x.Stdin == nil {
		f, err := os.Open(os.DevNull)
		if err != nil {
			return err
		}
		s.theirs = append(s.theirs, f)
	} else {
		f, err := s.pipe(false)
		if err != nil {
			return err
		}
		s.in = f
	}
	for i, w := range []io.Writer{x.Stdout, x.Stderr} {
		if i == 1 && same(x.Stdout, x.Stderr) {
			// One writer for both gets the output in order, from one goroutine.
			s.fold = true
			break
		}
		f, err := s.pipe(true)
		if err != nil {
			return err
		}
		if w == nil {
			w = io.Discard
		}
		s.out, s.to = append(s.out, f), append(s.to, w)
	}
	return nil
}

// terminal uses the master side for all three.
func (s *streams) terminal(fd int, x *novalet.ExecSpec) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return fmt.Errorf("open terminal: %w", err)
	}
	f := os.NewFile(uintptr(fd), "terminal")
	s.ours = append(s.ours, f)
	w := x.Stdout
	if w == nil {
		w = io.Discard
	}
	s.out, s.to = []*os.File{f}, []io.Writer{w}
	if x.Stdin != nil {
		s.in = f
	}
	return nil
}

// same tells whether two writers are one; those that cannot be compared are not.
func same(a, b io.Writer) (eq bool) {
	defer func() {
		if recover() != nil {
			eq = false
		}
	}()
	return a != nil && a == b
}

func (s *streams) fds() []int {
	var out []int
	for _, f := range s.theirs {
		out = append(out, int(f.Fd()))
	}
	if s.fold {
		out = append(out, out[len(out)-1])
	}
	return out
}

func (s *streams) copy(x *novalet.ExecSpec) {
	if s.in != nil {
		go func() {
			_, _ = io.Copy(s.in, x.Stdin)
			if !x.TTY {
				s.in.Close()
			}
		}()
	}
	for i := range s.out {
		s.wg.Go(func() { _, _ = io.Copy(s.to[i], s.out[i]) })
	}
}

// drain waits for the end of the output, or, once the program has ended, for a moment without any.
func (s *streams) drain() {
	for _, f := range s.out {
		_ = f.SetReadDeadline(time.Now().Add(5 * time.Second))
	}
	s.wg.Wait()
}

func (s *streams) closeOurs() {
	for _, f := range s.ours {
		f.Close()
	}
	s.wg.Wait()
}

func (s *streams) closeTheirs() {
	for _, f := range s.theirs {
		f.Close()
	}
	s.theirs = nil
}
