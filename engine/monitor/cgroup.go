package monitor

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// cgroupDir is one cgroup directory of an instance.
type cgroupDir struct {
	wire.CgroupRef
	dir *os.File
}

// groups are the cgroups of a child that is about to be made.
//
// The child is made in its group of cgroup2, and joins those of v1 itself, as a single thread that writes "0" to their
// "tasks". Both pass by the lock of the kernel (cgroup_threadgroup_rwsem) whose writer waits for a grace period of RCU, ten
// milliseconds and more, as does every write to "cgroup.procs" (kernel/cgroup/cgroup.c, cgroup_procs_write_start, Linux 5.5).
type groups struct {
	tasks []int    // open files of the v1 ones
	names []string // what they are called
	v2    int      // a directory of the instance's, -1 for none
}

// groups opens the instance's cgroups for a child: all the v1 ones, and of the cgroup2 sub-tree the given part.
func (in *instance) groups(kind string) (groups, error) {
	g := groups{v2: -1}
	for _, c := range in.cgroups {
		switch {
		case leavesOut(&c):
		case c.Kind == wire.CgroupV1:
			fd, err := unix.Openat(int(c.dir.Fd()), "tasks", unix.O_WRONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				wire.CloseAll(g.tasks)
				return groups{}, fmt.Errorf("join cgroup %s %s: %w", c.Kind, c.Controller, err)
			}
			g.tasks, g.names = append(g.tasks, fd), append(g.names, c.Kind+" "+c.Controller)
		case c.Kind == kind:
			g.v2 = int(c.dir.Fd())
		}
	}
	return g, nil
}

// cloneArgs are the arguments of a clone3 into the group of cgroup2.
func (g groups) cloneArgs(flags uintptr) *cloneArgs {
	a := &cloneArgs{flags: uint64(flags), exitSignal: uint64(unix.SIGCHLD)}
	if g.v2 >= 0 {
		a.flags |= unix.CLONE_INTO_CGROUP
		a.cgroup = uint64(g.v2)
	}
	return a
}

// cloneArgs is struct clone_args of clone3(2), in its third version (Linux 5.7); what has no name is not used.
type cloneArgs struct {
	flags, _, _, parentTID, exitSignal, _, _, _, _, _, cgroup uint64
}

// killCgroup kills every process at once where the kernel can (cgroup2, Linux 5.14). Elsewhere the end of init
// ends them.
func (in *instance) killCgroup() {
	for _, c := range in.cgroups {
		if c.Kind == wire.CgroupBase {
			_ = writeCgroup(c.dir, "cgroup.kill", "1")
		}
	}
}

func writeCgroup(dir *os.File, name, val string) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(val)); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func readCgroup(dir *os.File, name string) (string, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// leavesOut tells whether a defence that the cgroup is part of is switched off.
func leavesOut(c *cgroupDir) bool {
	off := func(hole, controller string) bool {
		return holes.Open(hole) && (c.Kind != wire.CgroupV1 || c.Controller == controller)
	}
	return off(holes.Devices, "devices") || off(holes.Memory, "memory") || off(holes.PIDs, "pids")
}
