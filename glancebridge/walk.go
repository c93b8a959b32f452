package glancebridge

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
)

// maxWalkDepth bounds the directories below one another: each holds a descriptor while it is walked.
const maxWalkDepth = 900

// walkEntry is one entry of a tree on disk.
type walkEntry struct {
	layer.Entry
	st unix.Stat_t
	// opaque: the directory hides what is below it. whiteout: the entry deletes that name below.
	opaque, whiteout bool
	// open gives the content of a regular file. Valid during the call only.
	open func() (*os.File, error)
}

// shift is a range of ids as the host sees them; ids of the image are 0 to size-1.
type shift struct{ base, size uint32 }

// id gives the image's number of a host id.
func (s shift) id(host uint32) uint32 {
	if s.size == 0 {
		return host
	}
	if host >= s.base && host-s.base < s.size {
		return host - s.base
	}
	return nobodyID
}

// walkTree gives every entry of a tree to f, parents first, names in byte order. It follows no symlink and opens
// nothing but regular files and directories: a running tenant may be changing the tree at the same time. What vanishes
// meanwhile is left out.
func walkTree(root int, ids shift, f func(*walkEntry) error) error {
	return walkDir(root, "", ids, 0, f)
}

func walkDir(fd int, name string, ids shift, depth int, f func(*walkEntry) error) error {
	if depth > maxWalkDepth {
		return fmt.Errorf("walk tree: directories more than %d deep", maxWalkDepth)
	}
	e := &walkEntry{}
	if err := unix.Fstat(fd, &e.st); err != nil {
		return fmt.Errorf("walk tree: %w", err)
	}
	e.Name = name
	if err := e.fill(fd, ids); err != nil {
		return err
	}
	if err := f(e); err != nil {
		return err
	}
	names, err := dirNames(fd)
	if err != nil {
		return fmt.Errorf("walk tree: %w", err)
	}
	slices.Sort(names)
	for _, base := range names {
		full := base
		if name != "" {
			full = name + "/" + base
		}
		if err := walkOne(fd, base, full, ids, depth, f); err != nil {
			return err
		}
	}
	return nil
}

func walkOne(dirfd int, base, full string, ids shift, depth int, f func(*walkEntry) error) error {
	// A path descriptor pins what is looked at; whatever takes the name afterwards is another thing.
	pin, err := unix.Openat(dirfd, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return fmt.Errorf("walk tree: %w", err)
	}
	defer unix.Close(pin)
	e := &walkEntry{}
	if err := unix.Fstat(pin, &e.st); err != nil {
		return fmt.Errorf("walk tree: %w", err)
	}
	e.Name = full
	reopen := func(flags int) (int, error) {
		return unix.Open(fmt.Sprintf("/proc/self/fd/%d", pin), flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	}
	switch e.st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		fd, err := reopen(unix.O_RDONLY | unix.O_DIRECTORY)
		if err != nil {
			return fmt.Errorf("walk tree: %w", err)
		}
		defer unix.Close(fd)
		return walkDir(fd, full, ids, depth+1, f)
	case unix.S_IFREG:
		fd, err := reopen(unix.O_RDONLY | unix.O_NOATIME)
		if err != nil {
			return fmt.Errorf("walk tree: %w", err)
		}
		file := os.NewFile(uintptr(fd), base)
		defer file.Close()
		e.open = func() (*os.File, error) { return file, nil }
		if err := e.fill(fd, ids); err != nil {
			return err
		}
	case unix.S_IFLNK:
		buf := make([]byte, layer.MaxPath)
		n, err := unix.Readlinkat(pin, "", buf)
		if err != nil {
			return fmt.Errorf("walk tree: %w", err)
		}
		e.Linkname = string(buf[:n])
		e.plain(ids)
	case unix.S_IFSOCK:
		return nil // its server makes it anew
	default:
		e.plain(ids)
	}
	return f(e)
}

// plain fills in what stat(2) knows.
func (e *walkEntry) plain(ids shift) {
	e.Mode, e.UID, e.GID = e.st.Mode&07777, ids.id(e.st.Uid), ids.id(e.st.Gid)
	e.ModTime = timeOf(e.st.Mtim)
	switch e.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Type, e.Size = layer.TypeRegular, e.st.Size
	case unix.S_IFDIR:
		e.Type = layer.TypeDirectory
	case unix.S_IFLNK:
		e.Type = layer.TypeSymlink
	case unix.S_IFIFO:
		e.Type = layer.TypeFIFO
	case unix.S_IFCHR:
		e.Type, e.Major, e.Minor = layer.TypeCharDevice, unix.Major(e.st.Rdev), unix.Minor(e.st.Rdev)
		e.whiteout = e.st.Rdev == 0
	case unix.S_IFBLK:
		e.Type, e.Major, e.Minor = layer.TypeBlockDevice, unix.Major(e.st.Rdev), unix.Minor(e.st.Rdev)
	}
}

// fill adds the extended attributes of an open file or directory, in the image's own terms.
func (e *walkEntry) fill(fd int, ids shift) error {
	e.plain(ids)
	names, err := listXattrs(fd)
	if err != nil {
		return err
	}
	for _, n := range names {
		switch {
		case n == "trusted.overlay.opaque":
			v, err := getXattr(fd, n)
			if err != nil {
				return err
			}
			e.opaque = string(v) == "y"
			continue
		case n == "trusted.overlay.metacopy", n == "trusted.overlay.redirect":
			return fmt.Errorf("walk tree: an entry has %s: the root was mounted with an option that a copy cannot express", n)
		case strings.HasPrefix(n, "trusted."), strings.HasPrefix(n, "security.") && n != "security.capability":
			continue
		}
		v, err := getXattr(fd, n)
		if err != nil {
			return err
		}
		switch n {
		case "security.capability":
			if v = unshiftCap(v, ids); v == nil {
				continue
			}
		case "system.posix_acl_access", "system.posix_acl_default":
			unshiftACL(v, ids)
		}
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		e.Xattrs[n] = string(v)
	}
	return nil
}

// unshiftCap takes the user namespace out of a file capability (vfs_ns_cap_data, linux/capability.h): one that belongs
// to the instance's own root becomes the plain form, one of another namespace is of no use elsewhere.
func unshiftCap(v []byte, ids shift) []byte {
	if len(v) != 24 || v[3] != 3 {
		return v
	}
	if ids.size > 0 && binary.LittleEndian.Uint32(v[20:]) != ids.base {
		return nil
	}
	out := slices.Clone(v[:20])
	out[3] = 2
	return out
}

// unshiftACL rewrites the ids in the kernel's ACL form (posix_acl_xattr.h).
func unshiftACL(v []byte, ids shift) {
	for b := v; len(b) >= 12; b = b[8:] {
		if tag := binary.LittleEndian.Uint16(b[4:]); tag == 0x02 || tag == 0x08 {
			binary.LittleEndian.PutUint32(b[8:], ids.id(binary.LittleEndian.Uint32(b[8:])))
		}
	}
}

func dirNames(fd int) ([]string, error) {
	if _, err := unix.Seek(fd, 0, 0); err != nil {
		return nil, err
	}
	buf := make([]byte, 32<<10)
	var names []string
	for {
		n, err := unix.Getdents(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n <= 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}
