package layer

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

func (a *applier) symlink(parent *dirFD, base string, e *Entry) error {
	if e.Linkname == "" || len(e.Linkname) > MaxSymlink {
		return Refuse("the image has a symlink with an impossible target")
	}
	err := unix.Symlinkat(e.Linkname, parent.fd, base)
	if err == unix.EEXIST {
		if err := a.clear(parent, base); err != nil {
			return err
		}
		err = unix.Symlinkat(e.Linkname, parent.fd, base)
	}
	if err != nil {
		return err
	}
	return a.nodeMeta(parent.fd, base, e, false)
}

func (a *applier) node(parent *dirFD, base string, kind uint32, e *Entry) error {
	err := unix.Mknodat(parent.fd, base, kind|0o600, 0)
	if err == unix.EEXIST {
		if err := a.clear(parent, base); err != nil {
			return err
		}
		err = unix.Mknodat(parent.fd, base, kind|0o600, 0)
	}
	if err != nil {
		return err
	}
	return a.nodeMeta(parent.fd, base, e, true)
}

// nodeMeta is meta for what cannot be opened.
func (a *applier) nodeMeta(dirfd int, base string, e *Entry, mode bool) error {
	if a.o.Owners {
		uid, gid := a.ids(e)
		if err := unix.Fchownat(dirfd, base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set owner: %w", err)
		}
	}
	if mode {
		// The name was made a moment ago in a folder that nobody else can reach, and is no symlink.
		if err := unix.Fchmodat(dirfd, base, e.Mode&07777, 0); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	ts := timespecs(e)
	if err := unix.UtimesNanoAt(dirfd, base, ts[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

func (a *applier) hardlink(name string, e *Entry) error {
	target, err := CleanName(e.Linkname)
	if err != nil {
		return err
	}
	if target == "" || target == name {
		return Refuse("the image has a hard link that leads nowhere: %q", short(name))
	}
	if err := a.w.wait(); err != nil {
		return err
	}
	err = a.link(name, target)
	if errors.Is(err, unix.ENOENT) {
		if len(a.pending) >= maxNotes {
			return Refuse("the image has more than %d hard links to files it does not hold", maxNotes)
		}
		a.pending = append(a.pending, Link{[]byte(name), []byte(target)})
		return nil
	}
	return err
}

func (a *applier) link(name, target string) error {
	tdir, tbase := splitName(target)
	var from *dirFD
	if tdir == "" {
		from = &dirFD{fd: a.root}
	} else {
		fd, err := a.openat2(tdir, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		from = &dirFD{fd: fd}
	}
	var st unix.Stat_t
	if err := unix.Fstatat(from.fd, tbase, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return Refuse("the image has a hard link to a directory: %q", short(name))
	case unix.S_IFCHR:
		return Refuse("the image has a hard link to a deleted file: %q", short(name))
	}
	dir, base := splitName(name)
	parent, err := a.dirs.get(dir)
	if err != nil {
		return err
	}
	err = unix.Linkat(from.fd, tbase, parent.fd, base, 0)
	if err == unix.EEXIST {
		var have unix.Stat_t
		if err := unix.Fstatat(parent.fd, base, &have, unix.AT_SYMLINK_NOFOLLOW); err == nil && have.Ino == st.Ino && have.Dev == st.Dev {
			return nil
		}
		if err := a.clear(parent, base); err != nil {
			return err
		}
		err = unix.Linkat(from.fd, tbase, parent.fd, base, 0)
	}
	return err
}
