package guest

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/mnt"
)

// The base is the root of an instance's mount namespace while init waits for what it shall start: a small tmpfs with a
// place for the root to come and, on a mount that is dropped before anything of the tenant runs, what the making of the root needs:
// some of what the keeper's own root has of the host, and places for the /proc view and for what is made of the instance's own before its root is there.
//
// It is made before there is anything to wait for. To change the root of a namespace the kernel looks at every process
// of the machine (chroot_fs_refs), and to drop the copies of what a keeper has mounted for others takes the longer the more
// there is: milliseconds on a host with many instances, which a start does not have to take.
const hostDir = "/host"

// enterBase makes the base the root of this process and drops all else that is mounted.
func enterBase() error {
	base, err := mnt.New("tmpfs", "size=64k,nr_inodes=16,mode=0755", noSetID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(base)
	for _, d := range []string{newRoot, hostDir} {
		if err := unix.Mkdirat(base, d[1:], 0o755); err != nil {
			return fmt.Errorf("make %s: %w", d, err)
		}
	}
	for _, d := range []string{"proc", "sys", "dev"} {
		if err := unix.Symlinkat(hostDir[1:]+"/"+d, base, d); err != nil {
			return fmt.Errorf("link %s: %w", d, err)
		}
	}
	// The place is hidden in this namespace only, and goes with the keeper's tree.
	if err := unix.MoveMount(base, "", unix.AT_FDCWD, newRoot, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach base: %w", err)
	}
	if err := showHost(base); err != nil {
		return err
	}
	return pivot(base)
}

// showHost attaches in the base what the making of a root needs of the host: /proc and /sys, for new ones may be mounted
// only where whole ones are seen, and the device nodes.
func showHost(base int) error {
	host, err := mnt.New("tmpfs", "size=64k,nr_inodes=40,mode=0755", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(host)
	if err := unix.MoveMount(host, "", base, hostDir[1:], unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach %s: %w", hostDir, err)
	}
	attach := func(name string) error {
		m, err := mnt.Clone(unix.AT_FDCWD, "/"+name)
		if err != nil {
			return err
		}
		defer unix.Close(m)
		if err := unix.MoveMount(m, "", host, name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("attach %s: %w", name, err)
		}
		return nil
	}
	for _, d := range []string{"proc", "sys", "dev", "view", "own", "own/proc", "own/sys", "own/dev", "own/empty"} {
		if err := unix.Mkdirat(host, d, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", d, err)
		}
	}
	for _, d := range []string{"proc", "sys"} {
		if err := attach(d); err != nil {
			return err
		}
	}
	names := append(append([]string(nil), nodes...), "fuse")
	if holes.Open(holes.Devices) {
		_ = unix.Mkdirat(host, "dev/net", 0o755)
		names = append(names, "net/tun")
	}
	for _, n := range names {
		if err := unix.Faccessat(unix.AT_FDCWD, "/dev/"+n, unix.F_OK, unix.AT_SYMLINK_NOFOLLOW); errors.Is(err, unix.ENOENT) {
			continue // the keeper's host has none
		}
		fd, err := unix.Openat(host, "dev/"+n, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return fmt.Errorf("make dev/%s: %w", n, err)
		}
		unix.Close(fd)
		if err := attach("dev/" + n); err != nil {
			return err
		}
	}
	return nil
}

// pivot makes a mount the root and drops the tree above which it lay.
func pivot(root int) error {
	if err := unix.Fchdir(root); err != nil {
		return fmt.Errorf("enter new root: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("drop old root: %w", err)
	}
	return unix.Chdir("/")
}

// leaveBase lays the finished tree over the base and makes it the root. What is left below is an empty tmpfs: nothing
// that a chroot without a pivot_root could be left for.
func leaveBase() error {
	dir, err := unix.Open(newRoot, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open new root: %w", err)
	}
	defer unix.Close(dir)
	if err := unix.Unmount(hostDir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("drop what is the host's: %w", err)
	}
	base, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open base: %w", err)
	}
	defer unix.Close(base)
	for _, name := range []string{"proc", "sys", "dev"} {
		if err := unix.Unlinkat(base, name, 0); err != nil {
			return fmt.Errorf("empty base: %w", err)
		}
	}
	if err := mnt.SetAttr(base, unix.MOUNT_ATTR_RDONLY); err != nil {
		return err
	}
	if err := unix.Fchdir(dir); err != nil {
		return fmt.Errorf("enter new root: %w", err)
	}
	if err := unix.MoveMount(dir, "", base, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("lay new root over the base: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	return unix.Chdir("/")
}
