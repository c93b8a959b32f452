package monitor

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/mnt"
)

// rootsDir holds the mounts of the instances' roots; newRoot and viewDir are where an init puts its own root and its
// /proc view before it pivots.
const (
	rootsDir = "/roots"
	newRoot  = "/new"
	viewDir  = "/view"
)

type hostNode struct {
	name         string
	major, minor uint32
}

// hostNodes are the devices that an instance may see, with their numbers: a node of another number is not used.
var hostNodes = []hostNode{
	{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}, {"fuse", 10, 229},
}

// enterOwnRoot replaces the root of this mount namespace by a small tmpfs that has /proc and /sys (an
// instance may only mount its own where a whole one is visible), the allowed device nodes, and room for roots.
func enterOwnRoot() error {
	clone := func(path string) (int, error) { return mnt.Clone(unix.AT_FDCWD, path) }
	proc, err := clone("/proc")
	if err != nil {
		return err
	}
	defer unix.Close(proc)
	sys, err := clone("/sys")
	if err != nil {
		return err
	}
	defer unix.Close(sys)
	nodes := map[string]int{}
	defer func() {
		for _, fd := range nodes {
			unix.Close(fd)
		}
	}()
	wanted := hostNodes
	if holes.Open(holes.Devices) {
		wanted = append(wanted[:len(wanted):len(wanted)], hostNode{"net/tun", 10, 200})
	}
	for _, n := range wanted {
		var st unix.Stat_t
		path := "/dev/" + n.name
		if err := unix.Lstat(path, &st); err != nil {
			if n.name == "fuse" {
				continue
			}
			return fmt.Errorf("own root: %s: %w", path, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(uint64(st.Rdev)) != n.major || unix.Minor(uint64(st.Rdev)) != n.minor {
			return fmt.Errorf("own root: %s is not the device %d:%d", path, n.major, n.minor)
		}
		fd, err := clone(path)
		if err != nil {
			return err
		}
		nodes[n.name] = fd
	}
	root, err := mnt.New("tmpfs", "size=1m,mode=0755", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	for _, d := range []string{"proc", "sys", "dev", rootsDir[1:], newRoot[1:], viewDir[1:]} {
		if err := unix.Mkdirat(root, d, 0o755); err != nil {
			return fmt.Errorf("own root: make %s: %w", d, err)
		}
	}
	if holes.Open(holes.Devices) {
		_ = unix.Mkdirat(root, "dev/net", 0o755)
	}
	for name := range nodes {
		fd, err := unix.Openat(root, "dev/"+name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return fmt.Errorf("own root: make dev/%s: %w", name, err)
		}
		unix.Close(fd)
	}
	// The place is hidden in this namespace only, and goes with the old tree.
	const place = "/sys"
	if err := unix.MoveMount(root, "", unix.AT_FDCWD, place, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("own root: attach: %w", err)
	}
	attach := func(fd int, name string) error {
		if err := unix.MoveMount(fd, "", root, name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("own root: attach %s: %w", name, err)
		}
		return nil
	}
	if err := attach(proc, "proc"); err != nil {
		return err
	}
	if err := attach(sys, "sys"); err != nil {
		return err
	}
	for name, fd := range nodes {
		if err := attach(fd, "dev/"+name); err != nil {
			return err
		}
	}
	if err := unix.Fchdir(root); err != nil {
		return fmt.Errorf("own root: enter: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("own root: pivot: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("own root: drop the host's tree: %w", err)
	}
	return unix.Chdir("/")
}
