package glancebridge

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// syncSoonLocked makes what was published survive a loss of power, in the background: nothing on the way to a
// running instance waits for the disk. s.mu is held.
func (s *Store) syncSoonLocked() {
	if !s.dirty || s.syncing || s.closed {
		return
	}
	s.syncing = true
	s.wg.Go(func() {
		s.syncNow()
		s.mu.Lock()
		s.syncing = false
		s.syncSoonLocked()
		s.mu.Unlock()
	})
}

// syncNow writes everything out and marks the layers that lie safely on disk.
func (s *Store) syncNow() {
	s.mu.Lock()
	if !s.dirty {
		s.mu.Unlock()
		return
	}
	s.dirty = false
	var ids []string
	for id := range s.layers {
		ids = append(ids, id)
	}
	s.mu.Unlock()
	// One call for the file system costs less than one for each of tens of thousands of files.
	if err := unix.Syncfs(int(s.dir.Fd())); err != nil {
		s.log.Error("sync image store", "err", err)
		return
	}
	for _, id := range ids {
		p := filepath.Join(s.layerDir(id), "durable")
		if _, err := os.Lstat(p); err == nil {
			continue
		}
		// Written after the sync and lost by itself at worst: then the layer is fetched again.
		f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE, 0o600)
		if err == nil {
			err = f.Close()
		}
		atStage("layer durable")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			s.log.Error("mark layer durable", "layer", id, "err", err)
		}
	}
	s.sealSoon()
}
