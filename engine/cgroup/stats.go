package cgroup

import (
	"strconv"
	"strings"
	"time"

	"github.com/novalet/novalet"
)

// Stats reads the counters; what the host does not count is zero.
func (g *Group) Stats() *novalet.ContainerStats {
	s := &novalet.ContainerStats{}
	num := func(dir, file string) int64 {
		if dir == "" {
			return 0
		}
		v, err := read(dir, file)
		if err != nil {
			return 0
		}
		n, _ := strconv.ParseInt(v, 10, 64)
		return n
	}
	if dir := g.v1("cpuacct"); dir != "" {
		s.CPU = time.Duration(num(dir, "cpuacct.usage"))
	} else if text, err := read(g.v2(), "cpu.stat"); err == nil {
		s.CPU = time.Duration(field(text, "usage_usec")) * time.Microsecond
	}
	if dir := g.v1("memory"); dir != "" {
		s.MemoryBytes, s.MemoryMaxBytes = num(dir, "memory.usage_in_bytes"), num(dir, "memory.max_usage_in_bytes")
	} else {
		s.MemoryBytes, s.MemoryMaxBytes = num(g.v2(), "memory.current"), num(g.v2(), "memory.peak")
	}
	if dir := g.v1("pids"); dir != "" {
		s.PIDs = num(dir, "pids.current")
	} else {
		s.PIDs = num(g.v2(), "pids.current")
	}
	if dir := g.v1("blkio"); dir != "" {
		bytes, _ := read(dir, "blkio.throttle.io_service_bytes_recursive")
		ops, _ := read(dir, "blkio.throttle.io_serviced_recursive")
		s.DiskReadBytes, s.DiskWriteBytes = perDevice(bytes, "Read"), perDevice(bytes, "Write")
		s.DiskReadOps, s.DiskWriteOps = perDevice(ops, "Read"), perDevice(ops, "Write")
	} else if text, err := read(g.v2(), "io.stat"); err == nil {
		s.DiskReadBytes, s.DiskWriteBytes = keyed(text, "rbytes"), keyed(text, "wbytes")
		s.DiskReadOps, s.DiskWriteOps = keyed(text, "rios"), keyed(text, "wios")
	}
	return s
}

// field finds "key number" in lines.
func field(text, key string) int64 {
	for line := range strings.SplitSeq(text, "\n") {
		if v, ok := strings.CutPrefix(line, key+" "); ok {
			n, _ := strconv.ParseInt(v, 10, 64)
			return n
		}
	}
	return 0
}

// perDevice sums "8:0 Read 123" lines of one kind.
func perDevice(text, kind string) int64 {
	var sum int64
	for line := range strings.SplitSeq(text, "\n") {
		if f := strings.Fields(line); len(f) == 3 && f[1] == kind {
			n, _ := strconv.ParseInt(f[2], 10, 64)
			sum += n
		}
	}
	return sum
}

// keyed sums key=value over the lines of io.stat.
func keyed(text, key string) int64 {
	var sum int64
	for _, f := range strings.Fields(text) {
		if v, ok := strings.CutPrefix(f, key+"="); ok {
			n, _ := strconv.ParseInt(v, 10, 64)
			sum += n
		}
	}
	return sum
}
