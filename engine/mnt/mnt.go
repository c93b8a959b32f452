// Package mnt wraps the kernel's mount API by descriptor (fsopen, open_tree, move_mount, mount_setattr): nothing
// here resolves a path that a tenant could have changed, unless the caller passes one.
package mnt

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// New makes a detached mount of a new file system. options is a comma-separated list; a value must hold no comma.
func New(fstype, options string, attrs int) (int, error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", fstype, err)
	}
	defer unix.Close(fs)
	for _, o := range strings.Split(options, ",") {
		if o == "" {
			continue
		}
		k, v, found := strings.Cut(o, "=")
		if found {
			err = unix.FsconfigSetString(fs, k, v)
		} else {
			err = unix.FsconfigSetFlag(fs, k)
		}
		if err != nil {
			return -1, fmt.Errorf("set %s option %s: %w", fstype, o, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("create %s: %w", fstype, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return -1, fmt.Errorf("mount %s: %w", fstype, err)
	}
	return fd, nil
}

// Clone makes a detached bind mount of what dirfd and path name; an empty path means dirfd itself. Links are
// not followed.
func Clone(dirfd int, path string) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_SYMLINK_NOFOLLOW)
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	fd, err := unix.OpenTree(dirfd, path, flags)
	if err != nil {
		return -1, fmt.Errorf("clone mount %s: %w", path, err)
	}
	return fd, nil
}

// Attach puts a detached mount on the directory or file that target (O_PATH) names.
func Attach(mount, target int) error {
	if err := unix.MoveMount(mount, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach mount: %w", err)
	}
	return nil
}

// SetAttr sets mount attributes (MOUNT_ATTR_…) on a mount.
func SetAttr(mount int, attrs uint64) error {
	if err := unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: attrs}); err != nil {
		return fmt.Errorf("set mount attributes: %w", err)
	}
	return nil
}

// IDMap makes the ids of a detached mount appear through a user namespace.
func IDMap(mount, userns int) error {
	if err := unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{
		Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns),
	}); err != nil {
		return fmt.Errorf("id-map mount: %w", err)
	}
	return nil
}

// OpenBeneath opens name below dirfd without following any link and without crossing a mount; name is
// relative.
func OpenBeneath(dirfd int, name string, flags uint64) (int, error) {
	fd, err := openat2(dirfd, name, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV})
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", name, err)
	}
	return fd, nil
}

// OpenInRoot opens name with dirfd as the root: links are followed inside it, never out of it, and no magic link.
// Mode is for O_CREAT.
func OpenInRoot(dirfd int, name string, flags, mode uint64) (int, error) {
	if name == "" {
		name = "."
	}
	fd, err := openat2(dirfd, name, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Mode: mode,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", name, err)
	}
	return fd, nil
}

// openat2 repeats what the kernel refused only because a rename ran at the same time.
func openat2(dirfd int, name string, how *unix.OpenHow) (int, error) {
	for i := 0; ; i++ {
		fd, err := unix.Openat2(dirfd, name, how)
		if (err == unix.EAGAIN || err == unix.EINTR) && i < 128 {
			continue
		}
		return fd, err
	}
}
