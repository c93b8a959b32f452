package layer

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// remove is a deletion in a stream of merged layers. What it names may be missing: a layer may delete what none below it
// has. Symlinks on the way are not followed, since overlayfs does not either.
func (a *applier) remove(dir, base string) error {
	fd := a.root
	if dir != "" {
		var err error
		fd, err = unix.Openat2(a.root, dir, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV})
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return nil
		case err != nil:
			return nameError("open", dir, err)
		}
		defer unix.Close(fd)
	}
	gone := []string{strings.TrimPrefix(base, whiteoutPrefix)}
	if base == whiteoutOpaque {
		var err error
		if _, err = unix.Seek(fd, 0, 0); err != nil {
			return nameError("read", dir, err)
		}
		if gone, err = readNames(fd); err != nil {
			return nameError("read", dir, err)
		}
	}
	a.dirs.close()
	for _, n := range gone {
		if n == "" || n == "." || n == ".." || strings.Contains(n, "/") {
			return fmt.Errorf("%w: deletion of %q", errFrame, short(n))
		}
		if err := removeAll(fd, n, 0); err != nil {
			return nameError("delete", n, err)
		}
	}
	return nil
}

// strip takes away the extended attributes of an open directory.
func strip(fd int) error {
	buf := make([]byte, 64<<10)
	n, err := unix.Flistxattr(fd, buf)
	if err != nil {
		return fmt.Errorf("list xattrs: %w", err)
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		switch {
		case strings.HasPrefix(name, "user."), strings.HasPrefix(name, "system.posix_acl_"):
			if err := unix.Fremovexattr(fd, name); err != nil && !errors.Is(err, unix.ENODATA) {
				return fmt.Errorf("remove xattr %q: %w", short(name), err)
			}
		}
	}
	return nil
}
