package engine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/rootfs"
)

// The root disk of an instance that wrote little is emptied and given to the next one that asks for its size. To unmount,
// remove, copy and mount one takes a sixth of all that a short life takes, most of it in the kernel's block layer. What was
// freed on it cannot be read by the next instance, no more than on a file system that all instances share: the kernel
// shows no block that was not written through the file that it belongs to.

const (
	// used marks a disk that is being emptied.
	used = ".used"
	// maxSpare bounds the disks of one size that wait, those made in advance among them; spareTime is how long it may be more
	// than those.
	maxSpare  = 8
	spareTime = 30 * time.Second
)

// pooled is the name of a disk that waits. It tells the host's boot: after another one nobody knows what of the emptying
// has reached the disk.
func (e *Engine) pooled() string { return fmt.Sprintf("%s.%d", e.boot(), time.Now().UnixNano()) }

// boot is the host's boot as a part of a name that nobody takes for an instance's.
func (e *Engine) boot() string { return strings.ReplaceAll(e.bootID, "-", "") }

// notice remembers how much room a disk has that nobody has used yet.
func (e *Engine) notice(d rootfs.Disk, size, inodes int64) {
	room, err := d.Room()
	if err != nil {
		return
	}
	e.pool.Lock()
	defer e.pool.Unlock()
	e.fresh[e.poolDir(size, inodes)] = room
}

// reclaim takes the root disk out of what was put aside of an instance, as one to be emptied. ok is false where it is not
// worth it.
func (e *Engine) reclaim(aside string, size, inodes int64) (d rootfs.Disk, ok bool) {
	dir := e.poolDir(size, inodes)
	e.pool.Lock()
	defer e.pool.Unlock()
	if _, known := e.fresh[dir]; !known || e.o.DiskPool < 0 || e.ctx.Err() != nil || os.MkdirAll(dir, 0o700) != nil {
		return d, false
	}
	if es, err := os.ReadDir(dir); err != nil || len(es) >= max(maxSpare, e.o.DiskPool) {
		return d, false
	}
	d.Dir = filepath.Join(dir, e.pooled()+used)
	return d, os.Rename(filepath.Join(aside, "disk"), d.Dir) == nil
}

// recycle empties a disk and lets it wait, or removes it.
func (e *Engine) recycle(d rootfs.Disk, size, inodes int64) {
	e.pool.Lock()
	room := e.fresh[e.poolDir(size, inodes)]
	e.pool.Unlock()
	err := d.Empty(room)
	if err == nil {
		e.pool.Lock()
		err = os.Rename(d.Dir, strings.TrimSuffix(d.Dir, used))
		e.pool.Unlock()
	}
	if err == nil {
		time.AfterFunc(e.o.spareTime, func() { e.background(func() { e.trim(size, inodes) }) })
		return
	}
	e.log.Debug("disk is not used again", "path", d.Dir, "reason", err)
	e.dropUsed(d)
}

// dropUsed removes a disk that nobody can take. One that cannot be unmounted stays until the next start.
func (e *Engine) dropUsed(d rootfs.Disk) {
	err := detached(d.Detach)
	if err == nil {
		err = os.RemoveAll(d.Dir)
	}
	if err != nil {
		e.log.Error("remove used disk", "path", d.Dir, "error", err)
	}
}

// trim removes what waits of a size beyond what is made in advance.
func (e *Engine) trim(size, inodes int64) {
	for e.ctx.Err() == nil {
		d, ok := e.surplus(e.poolDir(size, inodes))
		if !ok {
			return
		}
		e.dropUsed(d)
	}
}

// surplus takes one disk too many out of those that wait.
func (e *Engine) surplus(dir string) (d rootfs.Disk, ok bool) {
	e.pool.Lock()
	defer e.pool.Unlock()
	es, err := os.ReadDir(dir)
	es = slices.DeleteFunc(es, func(entry os.DirEntry) bool { return !ready(entry.Name()) })
	if err != nil || len(es) <= max(e.o.DiskPool, 0) {
		return d, false
	}
	d.Dir = filepath.Join(dir, es[0].Name()+used)
	return d, os.Rename(strings.TrimSuffix(d.Dir, used), d.Dir) == nil
}

// background runs f unless the engine has closed, which waits for it.
func (e *Engine) background(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ctx.Err() == nil {
		e.wg.Go(f)
	}
}

// detached repeats an unmount for as long as a keeper may still be unmounting what lies above.
func detached(detach func() error) error {
	err := detach()
	for range 100 {
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(20 * time.Millisecond)
		err = detach()
	}
	return err
}
