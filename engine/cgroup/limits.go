package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// ApplyOptions is what limits mean on this host.
type ApplyOptions struct {
	// CPUs is the set of processors to run on when the limits name none; "" is all.
	CPUs string
	// Disk is a file on the file system that holds the roots: block I/O limits are of its disk.
	Disk string
}

const defaultPeriod = 100_000 // µs, the kernel's own

// Apply sets the limits and reads the hard ones back. What a limit needs and the host lacks is an error that names
// it. Zero lifts a limit.
func (g *Group) Apply(l *novalet.Limits, o ApplyOptions) error {
	steps := []struct {
		name string
		do   func(*novalet.Limits, ApplyOptions) error
	}{{"memory", g.memory}, {"cpu", g.cpu}, {"cpuset", g.cpuset}, {"pids", g.pids}, {"block I/O", g.blkio}}
	for _, s := range steps {
		if err := s.do(l, o); err != nil {
			return fmt.Errorf("limit %s: %w", s.name, err)
		}
	}
	return nil
}

func lacks(controller string) error {
	return fmt.Errorf("%w: the host's cgroups have no %s controller", novalet.ErrUnsupported, controller)
}

// set writes a value and reads it back; the kernel rounds memory down to pages.
func set(dir, file string, v int64, slack int64) error {
	if err := write(dir, file, strconv.FormatInt(v, 10)); err != nil {
		return err
	}
	got, err := read(dir, file)
	if err != nil {
		return err
	}
	if v < 0 || got == "max" {
		return nil
	}
	n, err := strconv.ParseInt(got, 10, 64)
	if err != nil || n > v || n < v-slack {
		return fmt.Errorf("%s is %s after writing %d", file, got, v)
	}
	return nil
}

func (g *Group) memory(l *novalet.Limits, _ ApplyOptions) error {
	page := int64(os.Getpagesize())
	if dir := g.v1("memory"); dir != "" {
		mem, both := int64(-1), int64(-1)
		if l.MemoryBytes > 0 {
			mem, both = l.MemoryBytes, l.MemoryBytes+l.SwapBytes
		}
		const memFile, bothFile = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
		if !exists(filepath.Join(dir, bothFile)) {
			return set(dir, memFile, mem, page)
		}
		// The sum may never be below the memory: which is first depends on the direction.
		if err := set(dir, memFile, mem, page); err != nil {
			if err := set(dir, bothFile, both, page); err != nil {
				return err
			}
			return set(dir, memFile, mem, page)
		}
		return set(dir, bothFile, both, page)
	}
	if !g.m.Layout.HasV2("memory") {
		if l.MemoryBytes == 0 {
			return nil
		}
		return lacks("memory")
	}
	dir := g.v2()
	if l.MemoryBytes <= 0 {
		if err := write(dir, "memory.max", "max"); err != nil {
			return err
		}
		return optional(write(dir, "memory.swap.max", "max"))
	}
	if err := set(dir, "memory.max", l.MemoryBytes, page); err != nil {
		return err
	}
	if !exists(filepath.Join(dir, "memory.swap.max")) {
		return nil
	}
	return set(dir, "memory.swap.max", l.SwapBytes, page)
}

// optional drops the error of a file that this kernel does not have.
func optional(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// quota returns the hard limit in microseconds per period: the flavor's own, else its processors, since an
// instance of one vcpu is one processor's worth whatever the host has. Zero is none.
func quota(l *novalet.Limits) (q, period int64) {
	period = l.CPUPeriod
	if period <= 0 {
		period = defaultPeriod
	}
	q = l.CPUQuota
	if q == 0 && l.VCPUs > 0 {
		q = l.VCPUs * period
	}
	return max(q, 0), period
}

func (g *Group) cpu(l *novalet.Limits, _ ApplyOptions) error {
	q, period := quota(l)
	shares := l.CPUShares
	if shares <= 0 {
		shares = 1024
	}
	shares = min(max(shares, 2), 262144)
	if dir := g.v1("cpu"); dir != "" {
		if err := set(dir, "cpu.shares", shares, 0); err != nil {
			return err
		}
		if q == 0 {
			return optional(write(dir, "cpu.cfs_quota_us", "-1"))
		}
		if err := write(dir, "cpu.cfs_quota_us", "-1"); err != nil {
			return err
		}
		if err := set(dir, "cpu.cfs_period_us", period, 0); err != nil {
			return err
		}
		return set(dir, "cpu.cfs_quota_us", q, 0)
	}
	if !g.m.Layout.HasV2("cpu") {
		if q == 0 && l.CPUShares == 0 {
			return nil
		}
		return lacks("cpu")
	}
	// The kernel's own conversion of a v1 weight (2..262144) to a v2 weight (1..10000).
	if err := set(g.v2(), "cpu.weight", 1+((shares-2)*9999)/262142, 0); err != nil {
		return err
	}
	v := "max"
	if q > 0 {
		v = strconv.FormatInt(q, 10)
	}
	return write(g.v2(), "cpu.max", v+" "+strconv.FormatInt(period, 10))
}

func (g *Group) cpuset(l *novalet.Limits, o ApplyOptions) error {
	cpus := l.CPUSet
	if cpus == "" {
		cpus = o.CPUs
	}
	if dir := g.v1("cpuset"); dir != "" {
		if cpus == "" {
			var err error
			if cpus, err = read(filepath.Dir(dir), "cpuset.cpus"); err != nil {
				return err
			}
		}
		if have, err := read(dir, "cpuset.cpus"); err == nil && have == cpus {
			return nil // a write rebuilds the scheduler's domains
		}
		return write(dir, "cpuset.cpus", cpus)
	}
	if !g.m.Layout.HasV2("cpuset") {
		if l.CPUSet != "" {
			return lacks("cpuset")
		}
		return nil
	}
	// A blank line, not an empty write, lifts it.
	return write(g.v2(), "cpuset.cpus", cpus+"\n")
}

func (g *Group) pids(l *novalet.Limits, _ ApplyOptions) error {
	dir := g.v1("pids")
	if dir == "" && g.m.Layout.HasV2("pids") {
		dir = g.v2()
	}
	switch {
	case dir == "" && l.PIDs > 0:
		return lacks("pids")
	case dir == "":
		return nil
	case l.PIDs <= 0:
		return write(dir, "pids.max", "max")
	}
	return set(dir, "pids.max", l.PIDs, 0)
}

func (g *Group) blkio(l *novalet.Limits, o ApplyOptions) error {
	vals := []struct {
		v1, v2 string
		v      int64
	}{
		{"blkio.throttle.read_bps_device", "rbps", l.ReadBPS}, {"blkio.throttle.write_bps_device", "wbps", l.WriteBPS},
		{"blkio.throttle.read_iops_device", "riops", l.ReadIOPS}, {"blkio.throttle.write_iops_device", "wiops", l.WriteIOPS},
	}
	asked := false
	for _, v := range vals {
		asked = asked || v.v > 0
	}
	disk, err := diskOf(o.Disk)
	if err != nil || disk == "" {
		if asked {
			return fmt.Errorf("%w: the instances' file system is on no block device", novalet.ErrUnsupported)
		}
		return nil
	}
	if dir := g.v1("blkio"); dir != "" {
		for _, v := range vals {
			if have, err := read(dir, v.v1); v.v <= 0 && err == nil && have == "" {
				continue
			}
			if err := write(dir, v.v1, disk+" "+strconv.FormatInt(max(v.v, 0), 10)); err != nil && (v.v > 0 || !errors.Is(err, fs.ErrNotExist)) {
				return err
			}
		}
		return nil
	}
	if !g.m.Layout.HasV2("io") {
		if asked {
			return lacks("io")
		}
		return nil
	}
	line := disk
	for _, v := range vals {
		s := "max"
		if v.v > 0 {
			s = strconv.FormatInt(v.v, 10)
		}
		line += " " + v.v2 + "=" + s
	}
	if err := write(g.v2(), "io.max", line); err != nil && asked {
		return err
	}
	return nil
}

// diskOf returns the number of the whole disk that a file lies on, "" for none.
func diskOf(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return "", err
	}
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	if !exists(dir) {
		return "", nil
	}
	if exists(dir + "/partition") {
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return "", err
		}
		dir = filepath.Dir(real)
	}
	dev, err := read(dir, "dev")
	return strings.TrimSpace(dev), err
}
