package rootfs

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Room is what a file system has in all and what of it is free, in bytes and in inodes, and the bytes that its image takes.
type Room struct{ Bytes, FreeBytes, Files, FreeFiles, Image int64 }

// What a disk that is emptied may hold: more is removed as fast with the whole disk.
const (
	maxEmptyBytes = 4 << 20
	maxEmptyFiles = 512
)

// Room reads how much room the mounted disk has.
func (d Disk) Room() (Room, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.Mount(), &st); err != nil {
		return Room{}, fmt.Errorf("read disk usage: %w", err)
	}
	var image unix.Stat_t
	if err := unix.Stat(d.Image(), &image); err != nil {
		return Room{}, fmt.Errorf("read disk usage: %w", err)
	}
	return Room{Bytes: int64(st.Blocks) * st.Bsize, FreeBytes: int64(st.Bfree) * st.Bsize, Files: int64(st.Files), FreeFiles: int64(st.Ffree), Image: image.Blocks * 512}, nil
}

// Empty removes all files of the mounted disk, whose Room was fresh when it was new. It is an error if there are too many, if
// one cannot be removed, or if something still uses one: only a disk with all its room is empty. It blocks for up to five
// seconds, and must not run while the instance does.
func (d Disk) Empty(fresh Room) error {
	now, err := d.Room()
	if err != nil {
		return err
	}
	if now.Bytes != fresh.Bytes || now.Files != fresh.Files {
		return errors.New("empty disk: it is not of that size")
	}
	if fresh.FreeBytes-now.FreeBytes > maxEmptyBytes || fresh.FreeFiles-now.FreeFiles > maxEmptyFiles {
		return errors.New("empty disk: it holds too much")
	}
	// What earlier ones wrote has left its blocks there.
	if now.Image-fresh.Image > 4*maxEmptyBytes {
		return errors.New("empty disk: its image has grown")
	}
	if err := d.removeAll(); err != nil {
		return fmt.Errorf("empty disk: %w", err)
	}
	// Files that are still in use, or a root that is being unmounted, hold theirs.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if now, err = d.Room(); err != nil || now.FreeBytes == fresh.FreeBytes && now.FreeFiles == fresh.FreeFiles {
			return err
		}
		if time.Now().After(deadline) {
			return errors.New("empty disk: something of it is still in use")
		}
	}
}

// removeAll removes what the disk holds. It has been a tenant's: os.Root lets no link lead out of it.
func (d Disk) removeAll() error {
	root, err := os.OpenRoot(d.Mount())
	if err != nil {
		return err
	}
	defer root.Close()
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	dir.Close()
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == "lost+found" {
			continue // the file system's own
		}
		if err := root.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}
