package monitor

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// cgroupDir is one cgroup directory of an instance.
type cgroupDir struct {
	wire.CgroupRef
	dir *os.File
}

// join moves a process into the instance's cgroups: all the v1 ones, and of the cgroup2 sub-tree the given part.
func (in *instance) join(pid int, kind string) error {
	for _, c := range in.cgroups {
		if c.Kind != wire.CgroupV1 && c.Kind != kind {
			continue
		}
		if leavesOut(&c) {
			continue
		}
		if err := writeCgroup(c.dir, "cgroup.procs", strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("join cgroup %s %s: %w", c.Kind, c.Controller, err)
		}
	}
	return nil
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
