package engine

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// syncsAtOnce bounds the threads that a disk which does not answer can hold: nothing ends a syncfs.
const syncsAtOnce = 4

// Sync implements novalet.Runtime.
func (e *Engine) Sync(ctx context.Context, id string) error {
	st, err := e.Status(ctx, id)
	if err != nil {
		return err
	}
	if st.State != novalet.ContainerRunning && st.State != novalet.ContainerPaused {
		return fmt.Errorf("sync container %s: %w: it is %s", id, novalet.ErrInvalidState, st.State)
	}
	select {
	case e.syncs <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("sync container %s: %w", id, context.Cause(ctx))
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-e.syncs }()
		done <- e.syncDirs(id)
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("sync container %s: %w", id, err)
	}
	return nil
}

// syncDirs syncs the file systems that hold an instance's files: those of its disks first, for what they write back is written
// to their image files.
func (e *Engine) syncDirs(id string) error {
	dirs := []string{e.dir(id)}
	for _, d := range disksIn(e.dir(id)) {
		if d.Exists() {
			dirs = append([]string{d.Mount()}, dirs...)
		}
	}
	for _, dir := range dirs {
		fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == nil {
			err = errors.Join(unix.Syncfs(fd), unix.Close(fd))
		}
		if err != nil {
			return &os.PathError{Op: "syncfs", Path: dir, Err: err}
		}
	}
	return nil
}
