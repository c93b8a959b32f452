package layer

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// regular writes one file.
func (a *applier) regular(parent *dirFD, base string, e *Entry, d *Decoder) error {
	fd, err := create(parent.fd, base)
	if err == unix.EEXIST {
		if err := a.clear(parent, base); err != nil {
			return err
		}
		fd, err = create(parent.fd, base)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var off int64
	hole := false
	for {
		data, zeros, err := d.segment()
		if err != nil {
			return err
		}
		if data == nil && zeros == 0 {
			break
		}
		if zeros > 0 {
			off += zeros
			hole = true
			continue
		}
		if a.bytesLeft -= int64(len(data)); a.bytesLeft < 0 {
			return &TooLargeError{}
		}
		a.out.Bytes += int64(len(data))
		if err := pwriteAll(fd, data, off); err != nil {
			return err
		}
		off += int64(len(data))
		hole = false
	}
	if hole {
		if err := unix.Ftruncate(fd, off); err != nil {
			return fmt.Errorf("set size: %w", err)
		}
	}
	if err := a.meta(fd, e); err != nil {
		return err
	}
	ts := timespecs(e)
	if err := futimens(fd, ts[:]); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

// TooLargeError: the image unpacks to more than Limits.Bytes.
type TooLargeError struct{}

// Error implements error.
func (*TooLargeError) Error() string { return "the image unpacks to more than the limit" }

func create(dirfd int, base string) (int, error) {
	return unix.Openat(dirfd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
}

func pwriteAll(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// meta sets owner, mode and extended attributes of an open file or directory. The order matters: a change of owner
// clears setuid and capabilities.
func (a *applier) meta(fd int, e *Entry) error {
	if a.o.Owners {
		uid, gid := a.ids(e)
		if uid != 0 || gid != 0 {
			if err := unix.Fchown(fd, uid, gid); err != nil {
				return fmt.Errorf("set owner: %w", err)
			}
		}
	}
	if err := unix.Fchmod(fd, e.Mode&07777); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	if len(e.Xattrs) == 0 {
		return nil
	}
	for _, k := range sortedKeys(e.Xattrs) {
		v, ok := a.keepXattr(k, e.Xattrs[k])
		if !ok {
			ns, _, _ := strings.Cut(k, ".")
			if a.out.Dropped == nil {
				a.out.Dropped = map[string]int64{}
			}
			if len(a.out.Dropped) < 64 || a.out.Dropped[ns] > 0 {
				a.out.Dropped[ns]++
			}
			continue
		}
		if err := a.xattr(fd, k, v); err != nil {
			return err
		}
	}
	return nil
}

// xattr sets one extended attribute.
func (a *applier) xattr(fd int, k, v string) error {
	err := unix.Fsetxattr(fd, k, []byte(v), 0)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EINVAL) && (strings.HasPrefix(k, "system.posix_acl_") || k == capXattr):
		return Refuse("the image has a damaged %s", k)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE):
		return Refuse("the image has more extended attributes on a file than the host's file system can hold")
	}
	return fmt.Errorf("set xattr %q: %w", short(k), err)
}

const capXattr = "security.capability"

// keepXattr decides over one extended attribute. Kept are user.*, ACLs and file capabilities. trusted.* and overlay's
// own marks would let an image act on the layers of others; the labels of the host's security modules are the
// host's.
func (a *applier) keepXattr(name, value string) (string, bool) {
	switch {
	case strings.HasPrefix(name, "user.overlay."):
		return "", false
	case strings.HasPrefix(name, "user."):
		return value, true
	case name == capXattr:
		if !a.o.Owners {
			return "", false
		}
		return capability(value)
	case name == "system.posix_acl_access", name == "system.posix_acl_default":
		return value, a.o.Owners
	}
	return "", false
}

// capability takes a file capability in the form it has without namespaces (vfs_cap_data revision 2,
// linux/capability.h). The kernel adds the root id of the id-mapped mount it is written through (revision 3), and
// translates it for each mount it is read by. A revision 3 of another namespace than the image's own is of no use
// here and dropped.
func capability(v string) (string, bool) {
	if len(v) < 4 {
		return "", false
	}
	switch v[3] {
	case 1:
		return v, len(v) == 12
	case 2:
		return v, len(v) == 20
	case 3:
		if len(v) != 24 || v[20:] != "\x00\x00\x00\x00" {
			return "", false
		}
		return v[:3] + "\x02" + v[4:20], true
	}
	return "", false
}

// timespecs gives the access and modification time to set. What does not fit is cut to what the kernel takes;
// the file system cuts further to what it can store.
func timespecs(e *Entry) [2]unix.Timespec {
	sec := e.ModTime.Unix()
	sec = max(min(sec, 1<<40), -(1 << 40))
	ts := unix.Timespec{Sec: sec, Nsec: int64(e.ModTime.Nanosecond())}
	return [2]unix.Timespec{ts, ts}
}
