package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/statefile"
	"github.com/novalet/novalet/internal/thread"
)

// The files of a layer beside its tree and meta.json.
const (
	sumName     = "tar.json"
	corruptName = "corrupt"
)

// Verify implements novalet.ImageStore.
func (s *Store) Verify(ctx context.Context, heal bool) ([]novalet.LayerCheck, error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, errClosed
	}
	ids := slices.Sorted(maps.Keys(s.layers))
	s.mu.Unlock()
	out := []novalet.LayerCheck{}
	for _, id := range ids {
		problem, err := s.verifyLayer(ctx, id)
		switch {
		case errors.Is(err, novalet.ErrNotFound):
			continue // removed meanwhile
		case err != nil:
			return out, fmt.Errorf("verify layer %s: %w", id, err)
		}
		c := novalet.LayerCheck{DiffID: id, Problem: problem}
		s.mu.Lock()
		if m := s.layers[id]; m != nil {
			c.Size = m.Bytes
		}
		for _, rec := range s.images {
			if slices.Contains(rec.Layers, id) {
				c.Images = append(c.Images, rec.ID)
			}
		}
		s.mu.Unlock()
		slices.Sort(c.Images)
		out = append(out, c)
	}
	if heal {
		for i := range out {
			if out[i].Problem != "" {
				s.heal(ctx, &out[i])
			}
		}
	}
	return out, nil
}

// heal fetches an image that has a corrupt layer.
func (s *Store) heal(ctx context.Context, c *novalet.LayerCheck) {
	c.Error = "no stored image has the layer any more; what runs on it keeps it"
	for _, id := range c.Images {
		if _, err := s.Cache(ctx, novalet.RequestContext{}, id); err != nil {
			c.Error = err.Error()
			continue
		}
		if s.has(c.DiffID) {
			c.Healed, c.Error = true, ""
			return
		}
	}
}

// verifyLayer reads one layer. A problem that is found is noted on disk, so that it is known after a restart.
func (s *Store) verifyLayer(ctx context.Context, id string) (problem string, err error) {
	s.mu.Lock()
	m := s.layers[id]
	s.mu.Unlock()
	if m == nil {
		return "", novalet.ErrNotFound
	}
	sum, newest, err := s.sumLayer(ctx, m)
	if cause := context.Cause(ctx); cause != nil {
		return "", cause
	}
	path := filepath.Join(s.layerDir(id), sumName)
	var want tarSum
	rerr := statefile.Read(path, &want)
	switch {
	case err != nil:
		// Files that cannot be read are as bad as wrong ones.
		problem = "cannot be read: " + err.Error()
	case rerr == nil && want != *sum:
		problem = "its files are not what was stored"
	case rerr != nil && !m.Written.IsZero() && newest.After(m.Written):
		problem = "it was altered at " + newest.UTC().Format(time.RFC3339) + ", after it was stored"
	}
	// Nothing but this under the lock: the thread may be one that hardly runs.
	s.mu.Lock()
	current, known := s.layers[id] == m, m.corrupt
	if current && known == "" {
		m.corrupt = problem
	}
	s.mu.Unlock()
	switch {
	case !current:
		return "", novalet.ErrNotFound // removed or replaced while it was read
	case known != "":
		return known, nil
	case problem != "":
		s.log.Error("a stored layer is corrupt; images with it are fetched again at their next use", "layer", id, "problem", problem)
		err = statefile.WriteBytes(filepath.Join(s.layerDir(id), corruptName), []byte(problem), true)
	case rerr != nil:
		err = statefile.WriteBytes(path, sum.encode(), false)
	}
	if errors.Is(err, os.ErrNotExist) {
		return "", novalet.ErrNotFound
	}
	return problem, err
}

// sumLayer reads a layer: what it comes to as a tar of ours, and the latest change of an inode in it.
func (s *Store) sumLayer(ctx context.Context, m *layerMeta) (*tarSum, time.Time, error) {
	var newest time.Time
	size, hex, err := measure(func(w io.Writer) error {
		return tarLayer(&ctxWriter{ctx, w}, filepath.Join(s.layerDir(m.ID), "fs"), m, func(e *walkEntry) {
			if t := timeOf(e.st.Ctim); t.After(newest) {
				newest = t
			}
		})
	})
	return &tarSum{Size: size, Hex: hex}, newest, err
}

// ctxWriter ends with its context.
type ctxWriter struct {
	ctx context.Context
	w   io.Writer
}

func (w *ctxWriter) Write(p []byte) (int, error) {
	if err := context.Cause(w.ctx); err != nil {
		return 0, err
	}
	return w.w.Write(p)
}

// sealSoon records in the background what the layers come to that have not been read since they were stored. Nobody
// waits for it: it takes the processor and the disk only when nothing else does.
func (s *Store) sealSoon() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.unsealed = true
	if s.sealing {
		return
	}
	s.sealing = true
	s.wg.Go(func() {
		// The thread has its priority until it ends.
		_ = thread.Run(func() error {
			idleThread()
			for s.sealNext() {
			}
			return nil
		})
	})
}

// sealNext seals one layer and reports whether there may be more.
func (s *Store) sealNext() bool {
	s.mu.Lock()
	ids := slices.Sorted(maps.Keys(s.layers))
	s.unsealed = false
	s.mu.Unlock()
	for _, id := range ids {
		if _, err := os.Lstat(filepath.Join(s.layerDir(id), sumName)); err == nil {
			continue
		}
		s.mu.Lock()
		bad := s.layers[id] == nil || s.layers[id].corrupt != ""
		s.mu.Unlock()
		if bad {
			continue
		}
		_, err := s.verifyLayer(s.ctx, id)
		if err == nil || errors.Is(err, novalet.ErrNotFound) {
			return true
		}
		if s.ctx.Err() == nil {
			s.log.Warn("read a layer after it was stored", "layer", id, "err", err)
		}
		break
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealing = s.unsealed && !s.closed
	return s.sealing
}

// idleThread gives the calling thread the lowest priority for processor and disk (ioprio_set(2)). What the kernel refuses
// is left as it is.
func idleThread() {
	const whoProcess, classIdle = 1, 3 << 13
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, whoProcess, 0, classIdle)
}
