// Package rootfs makes the roots of instances: read-only layers, shown through an id map, below a writable upper
// directory of the instance's own, which may lie in a file system of limited size.
//
// It starts no goroutine. On disk it owns the directory it is given for each root: upper and work, or an image file
// and the mount of it.
package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/mnt"
)

// Overlay makes a detached mount: layers (base first) are shown through the user namespace's id map, upper and work
// hold ids as the host sees them. The mount honours syncs: a host crash loses nothing that the guest has
// synced. Renames of directories and changes of metadata copy whole files, so that upper is a plain difference
// without overlayfs's own redirects.
func Overlay(layers []string, upper, work string, userns int) (int, error) {
	if len(layers) == 0 {
		return -1, errors.New("mount root: no layers")
	}
	var lowers []int
	defer func() {
		for _, fd := range lowers {
			unix.Close(fd)
		}
	}()
	for _, l := range layers {
		fd, err := mnt.Clone(unix.AT_FDCWD, l)
		if err != nil {
			return -1, err
		}
		lowers = append(lowers, fd)
		if err := mnt.IDMap(fd, userns); err != nil {
			return -1, err
		}
	}
	fd, known, err := detached(lowers, upper, work)
	if !known {
		return attached(lowers, upper, work)
	}
	return fd, err
}

// features are switched off so that upper is a plain difference.
var features = [][2]string{{"redirect_dir", "off"}, {"metacopy", "off"}, {"index", "off"}, {"xino", "off"}}

// detached mounts layers, base first, by descriptor. known is false when the kernel cannot have them so.
func detached(lowers []int, upper, work string) (_ int, known bool, err error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, true, fmt.Errorf("mount root: open overlay: %w", err)
	}
	defer unix.Close(fs)
	fail := func(what string, err error) (int, bool, error) {
		return -1, true, fmt.Errorf("mount root: %s: %w%s", what, err, kernelLog(fs))
	}
	// Top first.
	for i := len(lowers) - 1; i >= 0; i-- {
		if err := unix.FsconfigSetFd(fs, "lowerdir+", lowers[i]); err != nil {
			if i == len(lowers)-1 {
				return -1, false, err
			}
			return fail("add layer", err)
		}
	}
	options := append([][2]string(nil), features...)
	// By descriptor: the mount table, which the instance reads, shows the name that was given.
	for _, o := range [][2]string{{"upperdir", upper}, {"workdir", work}} {
		dir, err := openDir(o[1])
		if err != nil {
			return fail("set "+o[0], err)
		}
		defer dir.Close()
		options = append(options, [2]string{o[0], byDescriptor(int(dir.Fd()))})
	}
	for _, o := range options {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return fail("set "+o[0], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		_, _, failed := fail("create", err)
		// Linux 6.13 and 6.14 take the descriptors, but not that nothing is mounted.
		return -1, !errors.Is(err, unix.EINVAL), failed
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return fail("mount", err)
	}
	return fd, true, nil
}

// openDir opens a directory for its place alone. The host's own directories lead to it, a link at its end does not.
func openDir(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

func byDescriptor(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// kernelLog returns what the kernel has to say about a refused configuration.
func kernelLog(fs int) string {
	buf := make([]byte, 1024)
	n, err := unix.Read(fs, buf)
	if err != nil || n <= 0 {
		return ""
	}
	return " (" + strings.TrimSpace(string(buf[:n])) + ")"
}

// MakeDirs makes upper and work below dir for a root whose ids start at base. The top layer's root decides mode
// and owner of the root directory. It may be repeated.
func MakeDirs(dir, top string, base, size uint32) (upper, work string, err error) {
	upper, work = filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	var st unix.Stat_t
	if err := unix.Lstat(top, &st); err != nil {
		return "", "", fmt.Errorf("look at layer: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return "", "", errors.New("look at layer: not a directory")
	}
	if st.Uid >= size || st.Gid >= size {
		return "", "", fmt.Errorf("look at layer: its root belongs to %d:%d", st.Uid, st.Gid)
	}
	if err := os.Mkdir(work, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", "", fmt.Errorf("make root: %w", err)
	}
	// An existing upper has been the guest's: it is not touched.
	err = os.Mkdir(upper, 0o700)
	if errors.Is(err, os.ErrExist) {
		return upper, work, nil
	}
	if err != nil {
		return "", "", fmt.Errorf("make root: %w", err)
	}
	if err := os.Chown(upper, int(base+st.Uid), int(base+st.Gid)); err != nil {
		return "", "", fmt.Errorf("make root: %w", err)
	}
	return upper, work, unix.Chmod(upper, st.Mode&0o7777)
}
