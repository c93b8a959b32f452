package glancebridge

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// The namespaces that both helpers get for themselves.
const helperNamespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID |
	unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// parserAttr makes the parser nobody in a user namespace of its own: no id of it exists on the host, and as it is
// not the namespace's root, it has no capability even there.
func (s *Store) parserAttr() *syscall.SysProcAttr {
	host := int(s.o.IDBase + s.o.IDSize - 1)
	m := []syscall.SysProcIDMap{{ContainerID: nobodyID, HostID: host, Size: 1}}
	return &syscall.SysProcAttr{
		Cloneflags: helperNamespaces, UidMappings: m, GidMappings: m, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{Uid: nobodyID, Gid: nobodyID}, Setsid: true,
	}
}

// applierAttr makes the applier root of a user namespace that covers the store's own range of ids.
func (s *Store) applierAttr() *syscall.SysProcAttr {
	m := s.idMappings()
	return &syscall.SysProcAttr{
		Cloneflags: helperNamespaces, UidMappings: m, GidMappings: m, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{Uid: 0, Gid: 0}, Setsid: true,
	}
}

const nobodyID = 65534

func (s *Store) idMappings() []syscall.SysProcIDMap {
	return []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(s.o.IDBase), Size: int(s.o.IDSize)}}
}

// idMap holds the user namespace whose map the ingest folder is seen through.
type idMap struct {
	mu     sync.Mutex
	userns *os.File
}

// open gives a folder through a mount that maps the applier's ids to the image's own: what it makes as host id
// IDBase+n lies on disk as n.
func (m *idMap) open(s *Store, path string) (*os.File, error) {
	ns, err := m.namespace(s)
	if err != nil {
		return nil, err
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return nil, fmt.Errorf("clone mount of ingest folder: %w", err)
	}
	attr := &unix.MountAttr{
		Attr_set:  unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		Userns_fd: uint64(ns.Fd()),
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, attr); err != nil {
		unix.Close(fd)
		if err == unix.EINVAL {
			return nil, fmt.Errorf("%w: the file system of the image store takes no id-mapped mounts; use ext4, xfs or btrfs",
				novalet.ErrUnsupported)
		}
		return nil, fmt.Errorf("map ids of ingest folder: %w", err)
	}
	// The descriptor is that of a path alone; the applier needs one it can make files below.
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	dir, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open ingest folder: %w", err)
	}
	return os.NewFile(uintptr(dir), path), nil
}

// namespace makes the user namespace at first use: a process that does nothing enters it, and the descriptor keeps it
// when the process has gone.
func (m *idMap) namespace(s *Store) (*os.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.userns != nil {
		return m.userns, nil
	}
	argv := append(append([]string{}, s.o.Helper...), "userns", "{}")
	cmd := exec.Command(argv[0], argv[1:]...)
	ids := s.idMappings()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	cmd.Env = []string{}
	hold, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		hold.Close()
		return nil, fmt.Errorf("make user namespace: %w", err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	hold.Close()
	if err = errors.Join(err, ignoreExit(cmd.Wait())); err != nil {
		if f != nil {
			f.Close()
		}
		return nil, fmt.Errorf("make user namespace: %w", err)
	}
	m.userns = f
	return f, nil
}

func (m *idMap) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.userns == nil {
		return nil
	}
	err := m.userns.Close()
	m.userns = nil
	return err
}

// bind mounts the store on itself without setuid and devices, unless it lies on such a mount: nothing of what images
// hold has an effect on the host.
func (s *Store) bind() error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.o.Dir, &st); err != nil {
		return fmt.Errorf("look at store: %w", err)
	}
	const want = unix.MS_NOSUID | unix.MS_NODEV
	undo := func() error { return unix.Unmount(s.o.Dir, unix.MNT_DETACH) }
	if int64(st.Flags)&want == want {
		ours, err := selfBound(s.o.Dir)
		if ours {
			s.unbnd = undo // left by a process that was killed
		}
		return err
	}
	if err := unix.Mount(s.o.Dir, s.o.Dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount store on itself: %w", err)
	}
	err := unix.Mount("", s.o.Dir, "", unix.MS_PRIVATE, "")
	if err == nil {
		err = unix.Mount("", s.o.Dir, "", unix.MS_BIND|unix.MS_REMOUNT|want, "")
	}
	if err != nil {
		return errors.Join(fmt.Errorf("close store to setuid and devices: %w", err), undo())
	}
	s.unbnd = undo
	return nil
}

// selfBound reports whether a folder is a mount of itself, as bind makes, and not of a file system of its own: then
// what is mounted there is the folder and not the top of a file system (the fourth field, proc_pid_mountinfo(5)).
func selfBound(dir string) (bool, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err == nil {
		real, err = filepath.Abs(real)
	}
	if err != nil {
		return false, fmt.Errorf("look at store: %w", err)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(real))
	if err != nil {
		return false, fmt.Errorf("look at store: %w", err)
	}
	return len(mounts) > 0 && mounts[0].Root != "/", nil
}
