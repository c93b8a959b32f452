package layer

import (
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// dirFD is an open directory of the layer. It stays open while it is in the cache or a file is being written in it.
type dirFD struct {
	name string
	fd   int
	ino  uint64
	used uint64
	refs atomic.Int32      // the cache's, and one of each file that is handed over
	time *[2]unix.Timespec // what it gets when it is closed, unless nil
}

// unref gives up a use of the directory; the last one closes it. It may be called from any goroutine.
func (d *dirFD) unref() error {
	if d.refs.Add(-1) > 0 {
		return nil
	}
	var err error
	if d.time != nil {
		if err = futimens(d.fd, d.time); err != nil {
			err = nameError("set time of directory", d.name, err)
		}
	}
	rawClose(d.fd)
	return err
}

// dirCache keeps the directories that were used lately open, so that a file costs no walk. An entry is dropped
// when something on its path is replaced.
type dirCache struct {
	a    *applier
	root dirFD // never closed here
	m    map[string]*dirFD
	tick uint64
	old  []*dirFD // out of the map, perhaps still in use by the entry at hand
}

// maxDirs bounds the open directories; entries of an archive come in clusters.
const maxDirs = 64

func newDirCache(a *applier) *dirCache {
	c := &dirCache{a: a, m: map[string]*dirFD{}}
	c.root.fd, c.root.ino = a.root, a.rootIno
	c.root.refs.Store(1)
	return c
}

func (c *dirCache) get(name string) (*dirFD, error) {
	if name == "" {
		return &c.root, nil
	}
	c.tick++
	if d, ok := c.m[name]; ok {
		d.used = c.tick
		return d, nil
	}
	fd, err := c.a.openat2(name, unix.O_PATH|unix.O_DIRECTORY)
	made := err == unix.ENOENT || err == unix.ENOTDIR
	if made {
		fd, err = c.make(name)
	}
	if err != nil {
		return nil, err
	}
	d, err := c.add(name, fd)
	if err == nil && made {
		delete(c.a.timeOf, d.ino) // of another one, that is gone
	}
	return d, err
}

// make creates a directory that an entry implies, with its parents.
func (c *dirCache) make(name string) (int, error) {
	dir, base := splitName(name)
	parent, err := c.get(dir)
	if err != nil {
		return -1, err
	}
	if err := c.a.w.settle(parent, base); err != nil {
		return -1, err
	}
	err = unix.Mkdirat(parent.fd, base, 0o755)
	if err == unix.EEXIST {
		var st unix.Stat_t
		if err := unix.Fstatat(parent.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return -1, err
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			// It leads to something that is missing or no directory: entries below it have no place.
			return -1, Refuse("the image has an entry below %q, a symlink that leads to no directory", short(name))
		case unix.S_IFCHR:
			// Deleted here and made anew without an entry of its own.
			if err := unix.Unlinkat(parent.fd, base, 0); err != nil {
				return -1, err
			}
			if err := unix.Mkdirat(parent.fd, base, 0o755); err != nil {
				return -1, err
			}
			if err := c.a.markOpaque(name); err != nil {
				return -1, err
			}
		default:
			return -1, unix.ENOTDIR
		}
	} else if err != nil {
		return -1, err
	}
	c.a.out.Implied++
	c.a.made[name] = struct{}{}
	fd, err := unix.Openat(parent.fd, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Fchmod(fd, 0o755); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// add takes over an open directory.
func (c *dirCache) add(name string, fd int) (*dirFD, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if old, ok := c.m[name]; ok {
		c.release(old)
		delete(c.m, name)
	}
	if len(c.m) >= maxDirs {
		var oldest *dirFD
		for _, d := range c.m {
			if oldest == nil || d.used < oldest.used {
				oldest = d
			}
		}
		c.release(oldest)
		delete(c.m, oldest.name)
	}
	c.tick++
	d := &dirFD{name: name, fd: fd, ino: st.Ino, used: c.tick}
	d.refs.Store(1)
	c.m[name] = d
	return d, nil
}

// release gives up a directory. It gets its time when the last file in it is written: most directories are not met again,
// and to open each once more when the layer is whole would be a walk for every one. Who opens it anew sets the time anew.
func (c *dirCache) release(d *dirFD) {
	if i, ok := c.a.timeOf[d.ino]; ok {
		t := &c.a.dirTimes[i]
		ts := t.ts
		t.set, d.time = true, &ts
	}
	if err := d.unref(); err != nil {
		c.a.w.fail(err)
	}
}

// drop forgets all directories: something is about to be replaced, and a symlink there may have led to any of them.
// inUse stays open until the next drop.
func (c *dirCache) drop(inUse *dirFD) {
	delete(c.m, inUse.name)
	c.close()
	if inUse != &c.root {
		c.old = append(c.old, inUse)
	}
}

func (c *dirCache) close() {
	for k, d := range c.m {
		c.release(d)
		delete(c.m, k)
	}
	for _, d := range c.old {
		c.release(d)
	}
	c.old = c.old[:0]
}

// removeAll removes a name and, of a directory, everything below, never following a symlink.
func removeAll(dirfd int, base string, depth int) error {
	err := unix.Unlinkat(dirfd, base, 0)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM {
		return err
	}
	if err := unix.Unlinkat(dirfd, base, unix.AT_REMOVEDIR); err != unix.ENOTEMPTY && err != unix.EEXIST {
		return err
	}
	if depth > MaxDepth {
		return unix.ELOOP
	}
	fd, err := unix.Openat(dirfd, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	names, err := readNames(fd)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := removeAll(fd, n, depth+1); err != nil {
			return err
		}
	}
	return unix.Unlinkat(dirfd, base, unix.AT_REMOVEDIR)
}

func readNames(fd int) ([]string, error) {
	buf := make([]byte, 16<<10)
	var names []string
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			return nil, err
		}
		if n <= 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// whiteout turns a deletion mark of an image layer into overlayfs's own: a character device 0:0 for a name, an
// xattr for a directory that starts empty. Marks act on the layers below only, in whatever order they come.
func (a *applier) whiteout(dir, base string) error {
	switch {
	case a.flags&FlagMerge != 0:
		return a.remove(dir, base)
	case base == whiteoutOpaque:
		if _, err := a.dirs.get(dir); err != nil {
			return nameError("make", dir, err)
		}
		return a.markOpaque(dir)
	case strings.HasPrefix(base, whiteoutMeta):
		return nil // bookkeeping of aufs
	}
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return Refuse("the image has the deletion mark %q, which names nothing", short(base))
	}
	parent, err := a.dirs.get(dir)
	if err != nil {
		return nameError("make parent of", base, err)
	}
	var st unix.Stat_t
	err = unix.Fstatat(parent.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == unix.ENOENT:
		if err := unix.Mknodat(parent.fd, name, unix.S_IFCHR, 0); err != nil {
			return nameError("make deletion mark", name, err)
		}
		return nil
	case err != nil:
		return nameError("look at", name, err)
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		full := name
		if dir != "" {
			full = dir + "/" + name
		}
		return a.markOpaque(full)
	}
	return nil // the layer's own file hides the one below anyway
}

func (a *applier) markOpaque(name string) error {
	if a.opaqueSeen[name] {
		return nil
	}
	if len(a.opaqueSeen) >= maxNotes {
		return Refuse("the image has more than %d directories that replace others", maxNotes)
	}
	a.opaqueSeen[name] = true
	a.out.Opaque = append(a.out.Opaque, name)
	return nil
}
