package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/mnt"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// appendMax bounds the file that an Append reads.
const appendMax = 1 << 20

// writeFiles puts the files into the root.
func (r *root) writeFiles() error {
	for i := range r.cfg.Files {
		if err := writeFile(r.fd, &r.cfg.Files[i]); err != nil {
			return fmt.Errorf("write file %d: %w", i, err)
		}
	}
	return nil
}

// writeFile writes one file below root: to a new name, then renamed over what is there, whatever that is, so that
// nothing existing is opened for writing. Links among the parents are followed inside the root. The file
// belongs to this process's user, the root of the instance.
func writeFile(root int, f *wire.File) error {
	name := path.Clean("/" + f.Path)
	dir, base := path.Split(name)
	if base == "" {
		return fmt.Errorf("no file name in %q", f.Path)
	}
	dirfd, err := parent(root, dir)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOENT) {
		return fault("a file has to go to %s, which is no directory of the root: remove the link or file that is in its way", dir)
	}
	if err != nil {
		return err
	}
	defer unix.Close(dirfd)
	var st unix.Stat_t
	err = unix.Fstatat(dirfd, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && f.IfAbsent {
		return nil
	}
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return fault("/%s in the image is a directory where a file has to go", strings.TrimPrefix(name, "/"))
	}
	data := f.Data
	if err == nil && f.Append && st.Mode&unix.S_IFMT == unix.S_IFREG {
		old, err := readSmall(dirfd, base)
		if err != nil {
			return err
		}
		if bytes.HasSuffix(old, f.Data) {
			return nil
		}
		data = append(old, f.Data...)
	}
	mode := f.Mode & 0o7777
	if mode == 0 {
		mode = 0o644
	}
	tmp := ".novalet-" + base
	if len(tmp) > 255 {
		tmp = tmp[:255]
	}
	_ = unix.Unlinkat(dirfd, tmp, 0)
	fd, err := mnt.OpenInRoot(dirfd, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	out := os.NewFile(uintptr(fd), base)
	_, err = out.Write(data)
	if err == nil {
		err = unix.Fchmod(fd, mode)
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = unix.Renameat(dirfd, tmp, dirfd, base)
	}
	if err != nil {
		_ = unix.Unlinkat(dirfd, tmp, 0)
		return fmt.Errorf("write %s: %w", base, err)
	}
	return nil
}

// parent opens the directory of a file, making what is missing.
func parent(root int, dir string) (int, error) {
	fd, err := mnt.OpenInRoot(root, dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	up, base := path.Split(path.Clean(dir))
	if base == "" {
		return -1, err
	}
	upfd, err := parent(root, up)
	if err != nil {
		return -1, err
	}
	defer unix.Close(upfd)
	if err := unix.Mkdirat(upfd, base, 0o755); err != nil && err != unix.EEXIST {
		return -1, fmt.Errorf("make directory %s: %w", base, err)
	}
	// Not through root again: a dangling link of this name would be missing for ever.
	return mnt.OpenBeneath(upfd, base, unix.O_PATH|unix.O_DIRECTORY)
}

// readSmall reads a regular file without following a link and without blocking on what is none.
func readSmall(dirfd int, name string) ([]byte, error) {
	fd, err := mnt.OpenBeneath(dirfd, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	return readRegular(fd, appendMax)
}

// readRegular reads an open file if it is a regular one of at most limit bytes, and closes it.
func readRegular(fd int, limit int64) ([]byte, error) {
	f := os.NewFile(uintptr(fd), "file")
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > limit {
		return nil, errors.New("not a regular file, or too large")
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// makeTrees shows read-only directories, such as a config drive.
func (r *root) makeTrees() error {
	for _, t := range r.cfg.Trees {
		at, err := r.place(strings.Trim(path.Clean("/"+t.Path), "/"), 0o755)
		if err != nil {
			return err
		}
		err = makeTree(at, &t)
		unix.Close(at)
		if err != nil {
			return fmt.Errorf("show %s: %w", t.Path, err)
		}
	}
	return nil
}

func makeTree(at int, t *wire.Tree) error {
	m, err := mnt.New("tmpfs", "mode=0755,size=64m", noExec)
	if err != nil {
		return err
	}
	defer unix.Close(m)
	for i := range t.Files {
		if err := writeFile(m, &t.Files[i]); err != nil {
			return err
		}
	}
	if err := mnt.SetAttr(m, unix.MOUNT_ATTR_RDONLY); err != nil {
		return err
	}
	return mnt.Attach(m, at)
}
