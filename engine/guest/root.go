package guest

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/mnt"
	"github.com/novalet/novalet/engine/monitor/wire"
)

const (
	newRoot = "/new" // directories of the base
	viewDir = hostDir + "/view"
	ownDir  = hostDir + "/own"

	noExec  = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	noSetID = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
)

// masked are hidden, readOnly are shown read-only, for an application. A machine's root could undo both, so for
// it they are left to what the kernel itself refuses outside the first user namespace; what is masked there too
// only tells about the host.
var (
	maskedFiles   = []string{"kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug"}
	maskedDirs    = []string{"acpi", "asound", "scsi"}
	readOnlyProc  = []string{"bus", "fs", "irq", "sys", "sysrq-trigger"}
	maskedSysDirs = []string{"firmware", "devices/virtual/powercap", "kernel/security"}
)

// root builds the file system of an instance.
type root struct {
	cfg    *wire.InitConfig
	fd     int // the root mount
	rescue int // the instance's own root, during a rescue
	view   int // the /proc view
	disks  []int

	dev, proc, sys, empty int
	master, slave, devpts int
	terminal              string // the slave's name on devpts
}

// prepare makes what does not depend on the root, beside the base, while there is nothing to wait for.
func (r *root) prepare() error {
	for _, step := range []func() error{r.makeProc, r.makeSys, r.makeDev, r.makeTerminal, r.makeEmpty, r.maskHost} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// build attaches the root and everything on it, and makes it the root of this process. Each place is opened once,
// without following links, and mounts go onto that descriptor: a root whose /dev or /proc is a link to somewhere
// else is refused.
func (r *root) build() error {
	if err := unix.MoveMount(r.fd, "", unix.AT_FDCWD, newRoot, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach root: %w", err)
	}
	for _, step := range []func() error{r.writeFiles, r.attachOwn, r.makeCgroups, r.makeDevices, r.makeRun, r.protectProc, r.showBlocks, r.showView, r.makeTrees, r.showRescue, r.showDisks, r.enter} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// place opens a directory to mount on, made when it is absent. The path is taken component by component without
// following links.
func (r *root) place(path string, mode uint32) (int, error) {
	fd, err := mkdirAll(r.fd, path, mode)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return -1, fault("/%s in the image is not a directory: remove the link or file from the image", path)
	}
	return fd, err
}

// mkdirAll opens a directory below dirfd, making what is missing.
func mkdirAll(dirfd int, path string, mode uint32) (int, error) {
	fd, err := mnt.OpenBeneath(dirfd, path, unix.O_PATH|unix.O_DIRECTORY)
	if !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	cur, err := unix.FcntlInt(uintptr(dirfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for _, part := range strings.Split(path, "/") {
		if part == "" {
			continue
		}
		if err := unix.Mkdirat(cur, part, mode); err != nil && err != unix.EEXIST {
			unix.Close(cur)
			return -1, fmt.Errorf("make directory %s: %w", path, err)
		}
		next, err := mnt.OpenBeneath(cur, part, unix.O_PATH|unix.O_DIRECTORY)
		unix.Close(cur)
		if err != nil {
			return -1, err
		}
		cur = next
	}
	return cur, nil
}

// put makes a file system and attaches it in the root.
func (r *root) put(path string, mode uint32, fstype, options string, attrs int) (int, error) {
	at, err := r.place(path, mode)
	if err != nil {
		return -1, err
	}
	fd, err := attachNew(at, fstype, options, attrs)
	if err != nil {
		return -1, fmt.Errorf("/%s: %w", path, err)
	}
	return fd, nil
}

// attachNew makes a file system and attaches it at a directory, which it closes.
func attachNew(at int, fstype, options string, attrs int) (int, error) {
	defer unix.Close(at)
	fd, err := mnt.New(fstype, options, attrs)
	if err != nil {
		return -1, err
	}
	if err := mnt.Attach(fd, at); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// own makes a file system of the instance's and attaches it where it waits for the root.
func own(name, fstype, options string, attrs int) (int, error) {
	at, err := unix.Open(ownDir+"/"+name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s/%s: %w", ownDir, name, err)
	}
	fd, err := attachNew(at, fstype, options, attrs)
	if err != nil {
		return -1, fmt.Errorf("/%s: %w", name, err)
	}
	return fd, nil
}

// attachOwn moves what was prepared into the root.
func (r *root) attachOwn() error {
	for _, m := range []struct {
		path string
		mode uint32
		fd   int
	}{{"proc", 0o555, r.proc}, {"sys", 0o555, r.sys}, {"dev", 0o755, r.dev}} {
		at, err := r.place(m.path, m.mode)
		if err != nil {
			return err
		}
		err = mnt.Attach(m.fd, at)
		unix.Close(at)
		if err != nil {
			return fmt.Errorf("/%s: %w", m.path, err)
		}
	}
	return nil
}

func (r *root) makeProc() (err error) {
	r.proc, err = own("proc", "proc", "", noExec)
	return err
}

// makeSys mounts sysfs read-only, for machines too: it is how systemd and udev know that the devices are not
// theirs to manage (https://systemd.io/CONTAINER_INTERFACE/).
func (r *root) makeSys() (err error) {
	r.sys, err = own("sys", "sysfs", "", noExec|unix.MOUNT_ATTR_RDONLY)
	return err
}

// makeCgroups mounts the instance's part of the cgroup2 tree.
func (r *root) makeCgroups() error {
	if !r.cfg.CgroupV2 {
		return nil
	}
	attrs := noExec
	if !r.cfg.Machine {
		attrs |= unix.MOUNT_ATTR_RDONLY
	}
	at, err := mnt.OpenBeneath(r.sys, "fs/cgroup", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	fd, err := mnt.New("cgroup2", "", attrs)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return mnt.Attach(fd, at)
}

// nodes are the devices of every instance. They are clones of the keeper's own checked nodes.
var nodes = []string{"null", "zero", "full", "random", "urandom", "tty"}

func (r *root) makeDev() error {
	var err error
	if r.dev, err = own("dev", "tmpfs", "size=4m,nr_inodes=16k,mode=0755", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC); err != nil {
		return err
	}
	names := nodes
	if holes.Open(holes.Devices) {
		_ = unix.Mkdirat(r.dev, "net", 0o755)
		names = append(names[:len(names):len(names)], "net/tun")
	}
	for _, name := range names {
		if err := r.showNode(name); err != nil {
			return err
		}
	}
	for _, l := range [][2]string{{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
		{"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}} {
		if err := unix.Symlinkat(l[0], r.dev, l[1]); err != nil {
			return fmt.Errorf("link /dev/%s: %w", l[1], err)
		}
	}
	for _, d := range []struct {
		name, fstype, options string
		mode                  uint32
		attrs                 int
	}{
		{"pts", "devpts", "newinstance,ptmxmode=0666,mode=0620,gid=5", 0o755, unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC},
		{"shm", "tmpfs", "mode=1777", 0o1777, noExec},
		{"mqueue", "mqueue", "", 0o755, noExec},
	} {
		if err := unix.Mkdirat(r.dev, d.name, d.mode); err != nil {
			return fmt.Errorf("make /dev/%s: %w", d.name, err)
		}
		fd, err := r.putAt(r.dev, d.name, d.fstype, d.options, d.attrs)
		if err != nil {
			return err
		}
		if d.name == "pts" {
			r.devpts = fd
		} else {
			unix.Close(fd)
		}
	}
	return nil
}

// showNode shows one of the keeper's nodes in /dev.
func (r *root) showNode(name string) error {
	node, err := mnt.Clone(unix.AT_FDCWD, "/dev/"+name)
	if err != nil {
		return err
	}
	defer unix.Close(node)
	return r.bindFile(node, name)
}

// makeDevices adds what only a machine has in /dev.
func (r *root) makeDevices() error {
	if !r.cfg.Machine {
		return nil
	}
	if err := r.showNode("fuse"); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	// Inits other than systemd run a getty on the first virtual terminal.
	return r.showTerminal("tty1")
}

// putAt makes a file system and attaches it on an entry of a directory that this process made.
func (r *root) putAt(dir int, name, fstype, options string, attrs int) (int, error) {
	at, err := mnt.OpenBeneath(dir, name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	fd, err := attachNew(at, fstype, options, attrs)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", name, err)
	}
	return fd, nil
}

// bindFile makes an empty file in /dev and attaches a mount there.
func (r *root) bindFile(mount int, name string) error {
	fd, err := unix.Openat(r.dev, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fmt.Errorf("make /dev/%s: %w", name, err)
	}
	unix.Close(fd)
	at, err := mnt.OpenBeneath(r.dev, name, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	if err := mnt.Attach(mount, at); err != nil {
		return fmt.Errorf("/dev/%s: %w", name, err)
	}
	return nil
}

// makeTerminal opens the console on the instance's own devpts. The other side is opened from the master's
// descriptor, never by a path.
func (r *root) makeTerminal() error {
	var err error
	r.master, err = mnt.OpenBeneath(r.devpts, "ptmx", unix.O_RDWR|unix.O_NOCTTY)
	if err != nil {
		return err
	}
	if err := unix.IoctlSetPointerInt(r.master, unix.TIOCSPTLCK, 0); err != nil {
		return fmt.Errorf("unlock console: %w", err)
	}
	n, err := unix.IoctlGetInt(r.master, unix.TIOCGPTN)
	if err != nil {
		return fmt.Errorf("number console: %w", err)
	}
	slave, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(r.master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return fmt.Errorf("open console: %w", errno)
	}
	r.slave = int(slave)
	r.terminal = fmt.Sprint(n)
	return r.showTerminal("console")
}

// showTerminal shows the console under a name.
func (r *root) showTerminal(name string) error {
	m, err := mnt.Clone(r.devpts, r.terminal)
	if err != nil {
		return err
	}
	defer unix.Close(m)
	return r.bindFile(m, name)
}

// makeRun gives a machine its /run, as the container interface of systemd asks.
func (r *root) makeRun() error {
	if !r.cfg.Machine {
		return nil
	}
	run, err := r.put("run", 0o755, "tmpfs", "mode=0755,size=20%,nr_inodes=200k", noSetID)
	if err != nil {
		return err
	}
	defer unix.Close(run)
	if err := unix.Mkdirat(run, "lock", 0o1777); err != nil {
		return fmt.Errorf("make /run/lock: %w", err)
	}
	lock, err := r.putAt(run, "lock", "tmpfs", "mode=1777,size=5m", noExec)
	if err != nil {
		return err
	}
	unix.Close(lock)
	return nil
}

// makeEmpty makes the one directory that all covers of directories show.
func (r *root) makeEmpty() (err error) {
	r.empty, err = own("empty", "tmpfs", "size=4k,nr_inodes=2,mode=0555", noExec|unix.MOUNT_ATTR_RDONLY)
	return err
}

// protectProc makes read-only what steers the host.
func (r *root) protectProc() error {
	if r.cfg.Machine || holes.Open(holes.Masks) {
		return nil
	}
	for _, name := range readOnlyProc {
		if err := r.over(r.proc, name, r.proc, name, unix.MOUNT_ATTR_RDONLY|noExec); err != nil {
			return err
		}
	}
	return nil
}

// maskHost hides what tells about the host.
func (r *root) maskHost() error {
	if holes.Open(holes.Masks) {
		return nil
	}
	for _, name := range maskedFiles {
		if err := r.over(r.proc, name, r.dev, "null", 0); err != nil {
			return err
		}
	}
	for _, name := range maskedDirs {
		if err := r.over(r.proc, name, 0, "", 0); err != nil {
			return err
		}
	}
	for _, name := range maskedSysDirs {
		if err := r.over(r.sys, name, 0, "", 0); err != nil {
			return err
		}
	}
	return nil
}

// over attaches a clone of src on an entry of a file system that this process has just mounted; with no src, an
// empty directory. An entry that this kernel does not have needs no cover.
func (r *root) over(dir int, name string, srcDir int, src string, attrs uint64) error {
	at, err := mnt.OpenBeneath(dir, name, unix.O_PATH)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(at)
	var m int
	if src == "" {
		m, err = mnt.Clone(r.empty, "")
	} else {
		m, err = mnt.Clone(srcDir, src)
	}
	if err != nil {
		return err
	}
	defer unix.Close(m)
	if attrs != 0 {
		if err := mnt.SetAttr(m, attrs); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := mnt.Attach(m, at); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// showView attaches the files of the /proc view. Those that this kernel has no place for are left out.
func (r *root) showView() error {
	if r.view < 0 {
		return nil
	}
	// Attached first: only what is in this mount namespace can be cloned (until Linux 6.15).
	if err := unix.MoveMount(r.view, "", unix.AT_FDCWD, viewDir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach view: %w", err)
	}
	defer unix.Close(r.view)
	for name, over := range r.cfg.View {
		dir := r.proc
		path, ok := strings.CutPrefix(over, "proc/")
		if !ok {
			if path, ok = strings.CutPrefix(over, "sys/"); !ok {
				continue
			}
			dir = r.sys
		}
		if err := r.over(dir, path, unix.AT_FDCWD, viewDir+"/"+name, 0); err != nil {
			return err
		}
	}
	return nil
}

// showRescue attaches the instance's own root in the rescue system.
func (r *root) showRescue() error {
	if r.rescue < 0 {
		return nil
	}
	at, err := r.place(strings.Trim(r.cfg.Rescue, "/"), 0o755)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	defer unix.Close(r.rescue)
	return mnt.Attach(r.rescue, at)
}

// enter makes the new tree the root.
func (r *root) enter() error {
	if err := leaveBase(); err != nil {
		return err
	}
	for _, fd := range []int{r.fd, r.dev, r.proc, r.sys, r.empty} {
		unix.Close(fd)
	}
	return nil
}
