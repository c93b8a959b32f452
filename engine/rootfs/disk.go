package rootfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Disk is a file system of limited size for one root: an image file and its mount.
type Disk struct {
	// Dir holds root.img and the mount point fs.
	Dir string
}

const (
	imageName = "root.img"
	mountName = "fs"
	// MinDisk is the least that holds an ext4 with a journal.
	MinDisk = 16 << 20
)

// Image and Mount are the paths of the image file and of the mount point.
func (d Disk) Image() string { return filepath.Join(d.Dir, imageName) }

// Mount is where the file system is mounted.
func (d Disk) Mount() string { return filepath.Join(d.Dir, mountName) }

// Exists tells whether the disk has been made.
func (d Disk) Exists() bool {
	_, err := os.Lstat(d.Image())
	return err == nil
}

// Make makes a sparse image file with an ext4 of the given bytes and inodes (0 lets mkfs choose). A half-made one
// is replaced; it may be repeated.
func (d Disk) Make(ctx context.Context, size, inodes int64) error {
	if size < MinDisk && !d.Exists() {
		return fmt.Errorf("make disk: %d bytes are less than %d", size, MinDisk)
	}
	return d.write(func(f *os.File) error {
		if err := f.Truncate(size); err != nil {
			return err
		}
		args := []string{"-q", "-F", "-m", "0", "-O", "^resize_inode,metadata_csum,metadata_csum_seed", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"}
		if inodes > 0 {
			args = append(args, "-N", strconv.FormatInt(max(inodes, 128), 10))
		}
		if size <= 1<<30 {
			args = append(args, "-J", "size=4")
		}
		cmd := exec.CommandContext(ctx, "mkfs.ext4", append(args, f.Name())...)
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("mkfs.ext4: %w: %s", err, bytes.TrimSpace(out.Bytes()))
		}
		return nil
	})
}

// write makes the image file with what fill puts into it, durably and as a whole. Nothing where it exists.
func (d Disk) write(fill func(f *os.File) error) error {
	if d.Exists() {
		return nil
	}
	tmp := d.Image() + ".new"
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err == nil {
		defer f.Close()
		err = fill(f)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(tmp, d.Image())
	}
	if err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	return nil
}

// Attach mounts the disk by a loop device that goes away with the mount. Nil when it is mounted.
func (d Disk) Attach() error {
	if err := os.Mkdir(d.Mount(), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("mount disk: %w", err)
	}
	mounted, err := isMountPoint(d.Mount())
	if err != nil || mounted {
		return err
	}
	loop, err := attachLoop(d.Image())
	if err != nil {
		return fmt.Errorf("mount disk: %w", err)
	}
	// The loop device lives as long as this descriptor or the mount.
	defer loop.Close()
	// noinit_itable: the unwritten inode tables of a sparse file are zero anyway.
	// nodiscard: deletes inside must not wait for the host's file system; fstrim frees space in bulk.
	if err := unix.Mount(loop.Name(), d.Mount(), "ext4", unix.MS_NODEV|unix.MS_NOATIME, "nodiscard,noinit_itable,errors=remount-ro"); err != nil {
		return fmt.Errorf("mount disk: %w", err)
	}
	// Private: no other mount namespace is to keep it busy.
	if err := unix.Mount("", d.Mount(), "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mount disk: %w", err)
	}
	return nil
}

// Detach unmounts the disk; nil when it is not mounted.
func (d Disk) Detach() error {
	if err := unix.Unmount(d.Mount(), unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount disk: %w", err)
	}
	return nil
}

// Usage is the bytes and inodes in use.
func (d Disk) Usage() (bytes, inodes int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.Mount(), &st); err != nil {
		return 0, 0, fmt.Errorf("read disk usage: %w", err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, int64(st.Files - st.Ffree), nil
}

// isMountPoint compares the mount ids of a directory and its parent.
func isMountPoint(dir string) (bool, error) {
	id := func(p string) (uint64, error) {
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, p, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &st); err != nil {
			return 0, fmt.Errorf("look at mount %s: %w", p, err)
		}
		return st.Mnt_id, nil
	}
	a, err := id(dir)
	if err != nil {
		return false, err
	}
	b, err := id(filepath.Dir(dir))
	return a != b, err
}

// attachLoop attaches a file to a free loop device with direct I/O, so that its pages are not cached twice, where
// the file system below can do that.
func attachLoop(path string) (*os.File, error) {
	back, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop devices: %w", err)
	}
	defer ctl.Close()
	for range 64 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find loop device: %w", err)
		}
		dev, err := openLoop(n)
		if err != nil {
			return nil, err
		}
		cfg := unix.LoopConfig{Fd: uint32(back.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO}}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if err == unix.EINVAL {
			cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
			err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		}
		if err == nil {
			return dev, nil
		}
		dev.Close()
		// Another process took it in between.
		if err != unix.EBUSY {
			return nil, fmt.Errorf("configure loop device: %w", err)
		}
	}
	return nil, errors.New("find loop device: all are busy")
}

// openLoop opens a loop device; on hosts without devtmpfs its node may have to be made.
func openLoop(n int) (*os.File, error) {
	path := fmt.Sprintf("/dev/loop%d", n)
	dev, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(n)))); err != nil {
			return nil, fmt.Errorf("make loop device: %w", err)
		}
		dev, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	return dev, err
}
