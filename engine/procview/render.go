package procview

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Usage is what an instance has and uses, as its cgroups say. Zero limits are none.
type Usage struct {
	CPUs          int // that it may run on
	MemoryLimit   int64
	MemoryUsed    int64 // page cache included
	MemoryCache   int64
	MemoryActive  int64 // file pages in recent use
	MemoryReclaim int64 // file pages that can be had back at once
	SwapLimit     int64
	SwapUsed      int64
	CPUUser       time.Duration
	CPUSystem     time.Duration
	Started       time.Time
	Tasks         int64
	Load          [3]float64
}

// Meminfo rewrites the host's /proc/meminfo: sizes are the instance's, lines about the host alone are zero.
func Meminfo(host []byte, u *Usage) []byte {
	if u.MemoryLimit <= 0 {
		return host
	}
	free := max(u.MemoryLimit-u.MemoryUsed, 0)
	vals := map[string]int64{
		"MemTotal": u.MemoryLimit, "MemFree": free, "MemAvailable": min(free+u.MemoryReclaim, u.MemoryLimit), "Buffers": 0, "Cached": u.MemoryCache,
		"SwapCached": 0, "SwapTotal": u.SwapLimit, "SwapFree": max(u.SwapLimit-u.SwapUsed, 0),
		"Active": max(u.MemoryUsed-u.MemoryReclaim, 0), "Inactive": u.MemoryReclaim, "Active(file)": u.MemoryActive, "Inactive(file)": u.MemoryReclaim,
		"AnonPages": max(u.MemoryUsed-u.MemoryCache, 0), "Active(anon)": max(u.MemoryUsed-u.MemoryCache, 0), "Inactive(anon)": 0,
		"CommitLimit": u.MemoryLimit + u.SwapLimit, "Committed_AS": u.MemoryUsed,
	}
	var out bytes.Buffer
	for line := range strings.SplitSeq(strings.TrimSuffix(string(host), "\n"), "\n") {
		name, rest, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		switch v, known := vals[name]; {
		case known:
			fmt.Fprintf(&out, "%-15s %8d kB\n", name+":", v/1024)
		case strings.HasPrefix(name, "HugePages_") || name == "Hugepagesize" || name == "VmallocTotal":
			fmt.Fprintf(&out, "%s:%s\n", name, rest)
		default:
			fmt.Fprintf(&out, "%-15s %8d kB\n", name+":", 0)
		}
	}
	return out.Bytes()
}

// Cpuinfo keeps the first of the host's processors and numbers them anew. A processor is a block of lines that ends in
// an empty one; what follows the last (on some architectures) is kept.
func Cpuinfo(host []byte, cpus int) []byte {
	var out bytes.Buffer
	n := 0
	for block := range strings.SplitSeq(strings.TrimSuffix(string(host), "\n\n")+"\n", "\n\n") {
		if !strings.HasPrefix(block, "processor") {
			out.WriteString(block + "\n")
			continue
		}
		if n >= cpus {
			continue
		}
		for line := range strings.SplitSeq(strings.TrimSuffix(block, "\n"), "\n") {
			key, _, _ := strings.Cut(line, ":")
			switch strings.TrimSpace(key) {
			case "processor", "core id", "apicid", "initial apicid":
				line = key + ": " + strconv.Itoa(n)
			case "siblings", "cpu cores":
				line = key + ": " + strconv.Itoa(cpus)
			case "physical id":
				line = key + ": 0"
			}
			out.WriteString(line + "\n")
		}
		out.WriteString("\n")
		n++
	}
	return out.Bytes()
}

// ticks is the unit of /proc/stat, fixed for programs at a hundredth of a second.
func ticks(d time.Duration) int64 { return int64(max(d, 0) / (10 * time.Millisecond)) }

// Stat is a /proc/stat with the instance's processor time spread evenly over its processors, which were idle for the
// rest of its life.
func Stat(u *Usage, now time.Time) []byte {
	var out bytes.Buffer
	n := int64(max(u.CPUs, 1))
	up := ticks(now.Sub(u.Started))
	user, system := ticks(u.CPUUser), ticks(u.CPUSystem)
	idle := max(up*n-user-system, 0)
	fmt.Fprintf(&out, "cpu  %d 0 %d %d 0 0 0 0 0 0\n", user, system, idle)
	for i := range n {
		fmt.Fprintf(&out, "cpu%d %d 0 %d %d 0 0 0 0 0 0\n", i, user/n, system/n, idle/n)
	}
	fmt.Fprintf(&out, "intr 0\nctxt 0\nbtime %d\nprocesses %d\nprocs_running 1\nprocs_blocked 0\n", u.Started.Unix(), u.Tasks)
	return out.Bytes()
}

// Uptime is a /proc/uptime: life and idle time in seconds.
func Uptime(u *Usage, now time.Time) []byte {
	up := now.Sub(u.Started)
	idle := max(up*time.Duration(max(u.CPUs, 1))-u.CPUUser-u.CPUSystem, 0)
	return fmt.Appendf(nil, "%.2f %.2f\n", max(up.Seconds(), 0), idle.Seconds())
}

// Loadavg is a /proc/loadavg.
func Loadavg(u *Usage) []byte {
	return fmt.Appendf(nil, "%.2f %.2f %.2f 1/%d 1\n", u.Load[0], u.Load[1], u.Load[2], max(u.Tasks, 1))
}

// Swaps is a /proc/swaps: the flavor's swap as one partition without a device.
func Swaps(u *Usage) []byte {
	s := "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
	if u.SwapLimit > 0 {
		s += fmt.Sprintf("none%36s virtual\t%d\t%d\t0\n", "", u.SwapLimit/1024, u.SwapUsed/1024)
	}
	return []byte(s)
}

// CPUList is the list format of /sys/devices/system/cpu/online.
func CPUList(cpus int) []byte {
	if cpus <= 1 {
		return []byte("0\n")
	}
	return fmt.Appendf(nil, "0-%d\n", cpus-1)
}

// ParseCPUs counts the processors of a list such as "0-3,7"; 0 for what is none.
func ParseCPUs(list string) int {
	n := 0
	for part := range strings.SplitSeq(strings.TrimSpace(list), ",") {
		a, b, isRange := strings.Cut(part, "-")
		lo, err := strconv.Atoi(a)
		if err != nil || lo < 0 {
			return 0
		}
		hi := lo
		if isRange {
			if hi, err = strconv.Atoi(b); err != nil || hi < lo || hi > 1<<16 {
				return 0
			}
		}
		n += hi - lo + 1
	}
	return n
}
