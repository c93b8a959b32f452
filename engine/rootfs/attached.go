package rootfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/mnt"
	"github.com/novalet/novalet/internal/thread"
)

// attached is overlay for kernels whose overlayfs takes layers by name only (lowerdir+ with a descriptor is Linux 6.13),
// and only such as are mounted in the caller's namespace (clone_private_mount, before Linux 6.15). It puts
// the layers into a mount namespace that lasts as long as the call, so that nothing of them is seen on the host or left
// when this process is killed.
func attached(lowers []int, upper, work string) (int, error) {
	fd := -1
	// The thread has a root and a working directory of its own then.
	err := thread.Run(func() (err error) {
		fd, err = attachedHere(lowers, upper, work)
		return err
	})
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return -1, fmt.Errorf("mount root: %w", err)
	}
	return fd, nil
}

// attachedHere works in a mount namespace that it makes for this thread.
func attachedHere(lowers []int, upper, work string) (_ int, err error) {
	home, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open mount namespace: %w", err)
	}
	defer unix.Close(home)
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return -1, fmt.Errorf("make mount namespace: %w", err)
	}
	// The namespace and its mounts end here and now, not when the thread does: until then the copies in it keep the
	// file system of upper busy.
	defer func() {
		if back := unix.Setns(home, unix.CLONE_NEWNS); back != nil && err == nil {
			err = fmt.Errorf("leave mount namespace: %w", back)
		}
	}()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return -1, fmt.Errorf("make mounts private: %w", err)
	}
	// Upper and work by descriptor, for a path may hold a comma or a colon; layers by their number in a directory of
	// their own, for all must fit into one page.
	place := filepath.Dir(upper)
	var dirs [3]*os.File
	for i, p := range []string{upper, work, place} {
		if dirs[i], err = openDir(p); err != nil {
			return -1, err
		}
		defer dirs[i].Close()
	}
	at := int(dirs[2].Fd())
	names, err := attach(lowers, at)
	if err != nil {
		return -1, err
	}
	options := "lowerdir=" + names + ",upperdir=" + byDescriptor(int(dirs[0].Fd())) + ",workdir=" + byDescriptor(int(dirs[1].Fd()))
	for _, o := range features {
		options += "," + o[0] + "=" + o[1]
	}
	if len(options) >= os.Getpagesize() {
		return -1, fmt.Errorf("%d layers are more than mount options hold", len(lowers))
	}
	if err := unix.Mount("overlay", byDescriptor(at), "overlay", unix.MS_NODEV, options); err != nil {
		return -1, fmt.Errorf("mount overlay: %w", err)
	}
	// It lies over everything else here.
	return mnt.Clone(unix.AT_FDCWD, place)
}

// attach mounts the layers in a directory that it lays over place, makes that this thread's working directory, and
// returns their names as lowerdir wants them, top first.
func attach(lowers []int, place int) (string, error) {
	dir, err := mnt.New("tmpfs", "mode=700,size=1m", 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(dir)
	if err := mnt.Attach(dir, place); err != nil {
		return "", err
	}
	if err := unix.Fchdir(dir); err != nil {
		return "", fmt.Errorf("enter the layers' directory: %w", err)
	}
	var names []string
	for i := len(lowers) - 1; i >= 0; i-- {
		name := strconv.Itoa(i)
		if err := unix.Mkdir(name, 0o700); err != nil {
			return "", fmt.Errorf("make a layer's place: %w", err)
		}
		if err := unix.MoveMount(lowers[i], "", unix.AT_FDCWD, name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return "", fmt.Errorf("attach layer: %w", err)
		}
		names = append(names, name)
	}
	return strings.Join(names, ":"), nil
}
