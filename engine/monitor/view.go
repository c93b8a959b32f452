package monitor

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
	"github.com/novalet/novalet/engine/procview"
)

// loadEvery is the kernel's own interval between samples of the load.
const loadEvery = 5 * time.Second

func (in *instance) viewPath() string { return fmt.Sprintf("%s/%d.view", rootsDir, in.slot) }

// files lists the view. /proc/uptime needs none: the time namespace makes it, but for the idle time.
func (in *instance) files() []procview.File {
	host := func(path string, f func([]byte, *procview.Usage) []byte) func() ([]byte, error) {
		return func() ([]byte, error) {
			b, err := os.ReadFile(path)
			if err != nil {
				return nil, err
			}
			return f(b, in.lately()), nil
		}
	}
	own := func(f func(*procview.Usage) []byte) func() ([]byte, error) {
		return func() ([]byte, error) { return f(in.lately()), nil }
	}
	cpus := own(func(u *procview.Usage) []byte { return procview.CPUList(u.CPUs) })
	empty := own(func(*procview.Usage) []byte { return nil })
	return []procview.File{
		{Name: "meminfo", Path: "proc/meminfo", Read: host("/proc/meminfo", procview.Meminfo)},
		{Name: "cpuinfo", Path: "proc/cpuinfo", Read: host("/proc/cpuinfo", func(b []byte, u *procview.Usage) []byte { return procview.Cpuinfo(b, u.CPUs) })},
		{Name: "stat", Path: "proc/stat", Read: own(func(u *procview.Usage) []byte { return procview.Stat(u, time.Now()) })},
		{Name: "uptime", Path: "proc/uptime", Read: own(func(u *procview.Usage) []byte { return procview.Uptime(u, time.Now()) })},
		{Name: "loadavg", Path: "proc/loadavg", Read: own(procview.Loadavg)},
		{Name: "swaps", Path: "proc/swaps", Read: own(procview.Swaps)},
		{Name: "diskstats", Path: "proc/diskstats", Read: empty},
		{Name: "partitions", Path: "proc/partitions", Read: empty},
		{Name: "online", Path: "sys/devices/system/cpu/online", Read: cpus},
		{Name: "present", Path: "sys/devices/system/cpu/present", Read: cpus},
		{Name: "possible", Path: "sys/devices/system/cpu/possible", Read: cpus},
	}
}

// viewFiles maps the names to the places.
func viewFiles() map[string]string {
	out := map[string]string{}
	for _, f := range (&instance{}).files() {
		out[f.Name] = f.Path
	}
	return out
}

// makeView mounts the view in the keeper's own mount namespace.
func (in *instance) makeView() error {
	v, err := procview.New(in.files())
	if err != nil {
		return err
	}
	defer unix.Close(v.Mount)
	path := in.viewPath()
	if err := unix.Mkdir(path, 0o700); err != nil && err != unix.EEXIST {
		v.Close()
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := unix.MoveMount(v.Mount, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		v.Close()
		return fmt.Errorf("attach view: %w", err)
	}
	in.mu.Lock()
	in.view = v
	in.mu.Unlock()
	in.k.conns.Add(1)
	go func() {
		defer in.k.conns.Done()
		v.Serve()
	}()
	// The kernel keeps the names once they have been looked up; an init that attaches the files would wait for each.
	for _, f := range in.files() {
		if fd, err := unix.Open(path+"/"+f.Name, unix.O_PATH|unix.O_CLOEXEC, 0); err == nil {
			unix.Close(fd)
		}
	}
	return nil
}

// lately is usage for who can do with that of a moment ago: one reader asks for several files in a row.
func (in *instance) lately() *procview.Usage {
	const moment = 50 * time.Millisecond
	in.used.mu.Lock()
	defer in.used.mu.Unlock()
	if in.used.usage == nil || time.Since(in.used.at) >= moment {
		in.used.usage, in.used.at = in.usage(), time.Now()
	}
	return in.used.usage
}

// used is the last usage that was read.
type used struct {
	mu    sync.Mutex
	usage *procview.Usage // never changed
	at    time.Time
}

// forget has the next reader ask the kernel: an instance made in advance has got its limits.
func (u *used) forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.usage = nil
}

// usage reads the instance's cgroups.
func (in *instance) usage() *procview.Usage {
	u := &procview.Usage{CPUs: runtime.NumCPU()}
	in.mu.Lock()
	u.Started, u.Load = in.bootAt, in.load
	in.mu.Unlock()
	for _, c := range in.cgroups {
		num := func(name string) int64 {
			s, err := readCgroup(c.dir, name)
			if err != nil {
				return 0
			}
			n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 64)
			if err != nil || n >= 1<<60 {
				return 0
			}
			return n
		}
		switch {
		case c.Kind == wire.CgroupV1:
			in.usageV1(&c, u, num)
		case c.Kind == wire.CgroupBase:
			in.usageV2(&c, u, num)
		}
	}
	return u
}

// cpuTime is the processor time alone: it is read often, of every instance.
func (in *instance) cpuTime() time.Duration {
	// Where the two v1 controllers share a mount it goes by the name of the first.
	for _, want := range []wire.CgroupRef{{Kind: wire.CgroupV1, Controller: "cpuacct"}, {Kind: wire.CgroupV1, Controller: "cpu"}, {Kind: wire.CgroupBase}} {
		for _, c := range in.cgroups {
			if c.CgroupRef != want {
				continue
			}
			if s, err := readCgroup(c.dir, "cpuacct.stat"); err == nil {
				f := fields(s)
				return time.Duration(f["user"]+f["system"]) * 10 * time.Millisecond
			}
			if s, err := readCgroup(c.dir, "cpu.stat"); err == nil && want.Kind == wire.CgroupBase {
				f := fields(s)
				return time.Duration(f["user_usec"]+f["system_usec"]) * time.Microsecond
			}
		}
	}
	return 0
}

func (in *instance) usageV1(c *cgroupDir, u *procview.Usage, num func(string) int64) {
	if s, err := readCgroup(c.dir, "cpuset.cpus"); err == nil {
		if n := procview.ParseCPUs(s); n > 0 {
			u.CPUs = n
		}
	}
	if s, err := readCgroup(c.dir, "cpuacct.stat"); err == nil {
		f := fields(s)
		u.CPUUser, u.CPUSystem = time.Duration(f["user"])*10*time.Millisecond, time.Duration(f["system"])*10*time.Millisecond
	}
	if s, err := readCgroup(c.dir, "memory.stat"); err == nil {
		f := fields(s)
		u.MemoryLimit, u.MemoryUsed = num("memory.limit_in_bytes"), num("memory.usage_in_bytes")
		u.MemoryCache, u.MemoryActive, u.MemoryReclaim = f["cache"], f["active_file"], f["inactive_file"]
		if both := num("memory.memsw.limit_in_bytes"); both > 0 {
			u.SwapLimit = max(both-u.MemoryLimit, 0)
			u.SwapUsed = max(num("memory.memsw.usage_in_bytes")-u.MemoryUsed, 0)
		}
	}
	if n := num("pids.current"); n > 0 {
		u.Tasks = n
	}
}

func (in *instance) usageV2(c *cgroupDir, u *procview.Usage, num func(string) int64) {
	if s, err := readCgroup(c.dir, "cpuset.cpus.effective"); err == nil {
		if n := procview.ParseCPUs(s); n > 0 {
			u.CPUs = n
		}
	}
	if s, err := readCgroup(c.dir, "cpu.stat"); err == nil && u.CPUUser == 0 {
		f := fields(s)
		u.CPUUser, u.CPUSystem = time.Duration(f["user_usec"])*time.Microsecond, time.Duration(f["system_usec"])*time.Microsecond
	}
	if s, err := readCgroup(c.dir, "memory.stat"); err == nil {
		f := fields(s)
		u.MemoryLimit, u.MemoryUsed = num("memory.max"), num("memory.current")
		u.MemoryCache, u.MemoryActive, u.MemoryReclaim = f["file"], f["active_file"], f["inactive_file"]
		u.SwapLimit, u.SwapUsed = num("memory.swap.max"), num("memory.swap.current")
	}
	if n := num("pids.current"); n > 0 {
		u.Tasks = n
	}
}

// fields reads "name number" lines.
func fields(s string) map[string]int64 {
	out := map[string]int64{}
	for line := range strings.SplitSeq(s, "\n") {
		k, v, _ := strings.Cut(line, " ")
		if n, err := strconv.ParseInt(v, 10, 64); err == nil {
			out[k] = n
		}
	}
	return out
}

// sampleLoads keeps each instance's load: the processors it kept busy, averaged as the kernel averages its load.
// What waits for a processor is not counted, as cgroups do not tell. Now and then it sees to a keeper that nobody needs.
func (k *keeper) sampleLoads(stop <-chan struct{}) {
	t := time.NewTicker(loadEvery)
	defer t.Stop()
	for alone := 0; ; {
		select {
		case <-stop:
			return
		case <-t.C:
		}
		if alone++; !k.abandoned() {
			alone = 0
		} else if alone >= abandonedLooks {
			k.leave()
		}
		k.mu.Lock()
		var ins []*instance
		for _, in := range k.instances {
			ins = append(ins, in)
		}
		k.mu.Unlock()
		for _, in := range ins {
			if in.status().State != wire.StateRunning {
				continue
			}
			cpu := in.cpuTime()
			in.mu.Lock()
			busy := float64(cpu-in.loadCPU) / float64(loadEvery)
			in.loadCPU = cpu
			for i, minutes := range []float64{1, 5, 15} {
				keep := math.Exp(-loadEvery.Minutes() / minutes)
				in.load[i] = in.load[i]*keep + max(busy, 0)*(1-keep)
			}
			in.mu.Unlock()
		}
	}
}
