package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/novalet/novalet/engine/rootfs"
)

// A disk of limited size takes tens of milliseconds to make and mount. So for each size in use a few are kept ready:
// made and mounted below StateDir/pool/<bytes>-<inodes>. One is taken by renaming its directory into the
// instance's; the mount in it goes along.

// poolDir is where the disks of a size wait.
func (e *Engine) poolDir(size, inodes int64) string {
	return filepath.Join(e.o.StateDir, "pool", fmt.Sprintf("%d-%d", size, inodes))
}

// templates is what disks are copied from.
func (e *Engine) templates() rootfs.Templates {
	return rootfs.Templates(filepath.Join(e.o.StateDir, "pool", "templates"))
}

// disk is the one that holds an instance's root.
func (e *Engine) disk(id string) rootfs.Disk {
	return rootfs.Disk{Dir: filepath.Join(e.dir(id), "disk")}
}

// ephemeral is an instance's further disk of the given number.
func (e *Engine) ephemeral(id string, n int) rootfs.Disk {
	return rootfs.Disk{Dir: filepath.Join(e.dir(id), ephemeralName+strconv.Itoa(n))}
}

const ephemeralName = "ephemeral"

// disksIn lists the disks in an instance's directory, wherever that is.
func disksIn(dir string) []rootfs.Disk {
	ds := []rootfs.Disk{{Dir: filepath.Join(dir, "disk")}}
	for n := 0; ; n++ {
		d := rootfs.Disk{Dir: filepath.Join(dir, ephemeralName+strconv.Itoa(n))}
		if _, err := os.Lstat(d.Dir); err != nil {
			return ds
		}
		ds = append(ds, d)
	}
}

// detachDisks unmounts all disks in an instance's directory.
func detachDisks(dir string) error {
	var errs []error
	for _, d := range disksIn(dir) {
		errs = append(errs, d.Detach())
	}
	return errors.Join(errs...)
}

// makeDisks gives an instance its disks and has them mounted; its root is a tree where that has a quota.
func (e *Engine) makeDisks(ctx context.Context, rec *record) error {
	var err error
	if e.hasTree(rec.ID) || e.projects.trees && rec.Limits.RootBytes > 0 && !e.disk(rec.ID).Exists() {
		err = e.limitRoot(rec)
	} else {
		err = e.makeDisk(ctx, e.disk(rec.ID), rec.Limits.RootBytes, rec.Limits.RootInodes)
	}
	if err != nil {
		return err
	}
	for n, size := range rec.Limits.EphemeralBytes {
		if err := e.makeDisk(ctx, e.ephemeral(rec.ID, n), size, 0); err != nil {
			return fmt.Errorf("ephemeral disk %d: %w", n, err)
		}
	}
	return nil
}

// makeDisk makes one, from the pool if one waits there. Nothing without a size, unless it is there already.
func (e *Engine) makeDisk(ctx context.Context, d rootfs.Disk, size, inodes int64) error {
	if d.Exists() {
		return d.Attach()
	}
	if size <= 0 {
		return nil
	}
	// What a broken creation left; never one that Exists.
	if err := os.RemoveAll(d.Dir); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	defer e.later(func() { e.fillPool(size, inodes) })
	es, err := os.ReadDir(e.poolDir(size, inodes))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("make disk: %w", err)
	}
	for _, entry := range es {
		if !ready(entry.Name()) {
			continue
		}
		// Only one taker wins a name.
		e.pool.Lock()
		err := os.Rename(filepath.Join(e.poolDir(size, inodes), entry.Name()), d.Dir)
		e.pool.Unlock()
		if err == nil {
			return d.Attach()
		}
	}
	if err := os.Mkdir(d.Dir, 0o700); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	if err := d.MakeFrom(ctx, e.templates(), size, inodes); err != nil {
		return err
	}
	if err := d.Attach(); err != nil {
		return err
	}
	e.notice(d, size, inodes)
	return nil
}

// unfinished marks a disk that is being made.
const unfinished = ".new"

// ready tells by its name whether a disk may be taken.
func ready(name string) bool {
	return !strings.HasSuffix(name, unfinished) && !strings.HasSuffix(name, used)
}

// fillPool makes disks of a size until enough wait. One goroutine at a time works on a size.
func (e *Engine) fillPool(size, inodes int64) {
	if e.o.DiskPool < 0 {
		return
	}
	dir := e.poolDir(size, inodes)
	// Close takes the lock once more after it has cancelled, and waits then for what was started.
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ctx.Err() != nil || e.filling[dir] {
		return
	}
	e.filling[dir] = true
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		defer func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			delete(e.filling, dir)
		}()
		if err := e.fill(dir, size, inodes); err != nil && e.ctx.Err() == nil {
			e.log.Warn("no disk made in advance", "bytes", size, "error", err)
		}
	}()
}

func (e *Engine) fill(dir string, size, inodes int64) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for e.ctx.Err() == nil {
		es, err := os.ReadDir(dir)
		if err != nil || len(es) >= e.o.DiskPool {
			return err
		}
		to := filepath.Join(dir, e.pooled())
		d := rootfs.Disk{Dir: to + unfinished}
		if err := os.Mkdir(d.Dir, 0o700); err != nil {
			return err
		}
		err = d.MakeFrom(e.ctx, e.templates(), size, inodes)
		if err == nil {
			err = d.Attach()
		}
		if err == nil {
			e.notice(d, size, inodes)
			err = os.Rename(d.Dir, to)
		}
		if err != nil {
			return errors.Join(err, d.Detach(), os.RemoveAll(d.Dir))
		}
	}
	return nil
}

// dropUnfinished removes what a killed agent was making or emptying, and what is left of an earlier boot of the host. It
// runs before anything is made.
func (e *Engine) dropUnfinished() {
	if err := e.templates().Tidy(); err != nil {
		e.log.Warn("disk templates", "error", err)
	}
	e.eachPooled(func(d rootfs.Disk) error {
		if name := filepath.Base(d.Dir); ready(name) && strings.HasPrefix(name, e.boot()) {
			return nil
		}
		return errors.Join(d.Detach(), os.RemoveAll(d.Dir))
	})
}

// openPool mounts what waits and tops it up.
func (e *Engine) openPool() {
	e.eachPooled(func(d rootfs.Disk) error {
		if !ready(d.Dir) {
			return nil // being made right now
		}
		// Taken in the middle of this, it would be mounted twice, and its file system damaged.
		e.pool.Lock()
		defer e.pool.Unlock()
		if !d.Exists() {
			return nil
		}
		return d.Attach()
	})
	sizes, err := os.ReadDir(filepath.Join(e.o.StateDir, "pool"))
	if err != nil {
		return
	}
	for _, s := range sizes {
		var size, inodes int64
		if _, err := fmt.Sscanf(s.Name(), "%d-%d", &size, &inodes); err == nil {
			e.trim(size, inodes)
			e.fillPool(size, inodes)
		}
	}
}

// closePool unmounts what waits: the loop devices go with the agent.
func (e *Engine) closePool() { e.eachPooled(rootfs.Disk.Detach) }

func (e *Engine) eachPooled(f func(rootfs.Disk) error) {
	dirs, err := filepath.Glob(filepath.Join(e.o.StateDir, "pool", "*-*", "*"))
	if err != nil {
		return
	}
	for _, dir := range dirs {
		if err := f(rootfs.Disk{Dir: dir}); err != nil {
			e.log.Warn("disk made in advance", "path", dir, "error", err)
		}
	}
}
