package layer

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// regular writes one file: a small one is handed to a writer.
func (a *applier) regular(parent *dirFD, base, name string, e *Entry, d *Decoder) error {
	data, zeros, err := d.segment()
	if err != nil {
		return err
	}
	p := a.plan(e)
	_, replaces := a.made[name]
	if replaces {
		// Descriptors of the directory, or of what is below, may be in use.
		delete(a.made, name)
		if err := a.clear(parent, base); err != nil {
			return err
		}
	}
	if int64(len(data)) == e.Size && !replaces {
		if err := a.spend(len(data)); err != nil {
			return err
		}
		return a.w.put(parent, base, name, data, d.keep(), p)
	}
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
	for data != nil || zeros > 0 {
		if hole = zeros > 0; hole {
			off += zeros
		} else {
			if err := a.spend(len(data)); err != nil {
				return err
			}
			if err := rawWrite(fd, data, off); err != nil {
				return err
			}
			off += int64(len(data))
		}
		if data, zeros, err = d.segment(); err != nil {
			return err
		}
	}
	if hole {
		if err := unix.Ftruncate(fd, off); err != nil {
			return fmt.Errorf("set size: %w", err)
		}
	}
	return p.apply(fd, false)
}

// spend counts data that is written.
func (a *applier) spend(n int) error {
	if a.bytesLeft -= int64(n); a.bytesLeft < 0 {
		return &TooLargeError{}
	}
	a.out.Bytes += int64(n)
	return nil
}

// TooLargeError: the image unpacks to more than Limits.Bytes.
type TooLargeError struct{}

// Error implements error.
func (*TooLargeError) Error() string { return "the image unpacks to more than the limit" }

func create(dirfd int, base string) (int, error) {
	return unix.Openat(dirfd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
}

// plan is what an open file or directory gets beside its content.
type plan struct {
	owner    bool
	uid, gid int
	mode     uint32
	xattrs   [][2]string
	times    [2]unix.Timespec
	dir      bool
}

// plan decides over an entry's owner, mode and attributes.
func (a *applier) plan(e *Entry) plan {
	p := plan{owner: a.o.Owners, mode: e.Mode & 07777, times: timespecs(e), dir: e.Type == TypeDirectory}
	if p.owner {
		p.uid, p.gid = a.ids(e)
	}
	if len(e.Xattrs) == 0 {
		return p
	}
	for _, k := range sortedKeys(e.Xattrs) {
		if v, ok := a.keepXattr(k, e.Xattrs[k]); ok {
			p.xattrs = append(p.xattrs, [2]string{k, v})
			continue
		}
		ns, _, _ := strings.Cut(k, ".")
		if a.out.Dropped == nil {
			a.out.Dropped = map[string]int64{}
		}
		if len(a.out.Dropped) < 64 || a.out.Dropped[ns] > 0 {
			a.out.Dropped[ns]++
		}
	}
	return p
}

// nothing reports whether apply has nothing to do for a directory.
func (p *plan) nothing(made bool) bool {
	return made && p.mode&^0o777 == 0 && !(p.owner && (p.uid != 0 || p.gid != 0)) && len(p.xattrs) == 0
}

// apply sets it; made says that the file was made with the permission bits already. The order matters: a change of owner
// clears setuid and capabilities. The time of a directory waits until the layer is whole.
func (p *plan) apply(fd int, made bool) error {
	if p.owner && (p.uid != 0 || p.gid != 0) {
		if err := unix.Fchown(fd, p.uid, p.gid); err != nil {
			return fmt.Errorf("set owner: %w", err)
		}
	}
	if !made || p.mode&^0o777 != 0 {
		if err := unix.Fchmod(fd, p.mode); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	for _, x := range p.xattrs {
		if err := setXattr(fd, x[0], x[1]); err != nil {
			return err
		}
	}
	if p.dir {
		return nil
	}
	if err := futimens(fd, &p.times); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

// setXattr sets one extended attribute.
func setXattr(fd int, k, v string) error {
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
