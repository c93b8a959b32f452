package cgroup

import (
	"maps"
	"slices"
	"testing"

	"github.com/novalet/novalet"
)

func TestParseLayout(t *testing.T) {
	for _, c := range []struct {
		name, text, want string
		v1               []string
		dirs             int
	}{
		{"v2", "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n", "v2", nil, 0},
		{"v1", "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n37 31 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n", "v1",
			[]string{"cpu", "cpuacct", "freezer", "memory"}, 3},
		{"hybrid", "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n37 31 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", "hybrid",
			[]string{"cpu", "freezer"}, 1},
		{"a bind mount of a group", "32 31 0:29 /sub /mnt/cpu rw - cgroup cgroup rw,cpu\nnonsense\n", "v2", nil, 0},
	} {
		l := parseLayout(c.text)
		if got := slices.Sorted(maps.Keys(l.V1)); l.String() != c.want || !slices.Equal(got, c.v1) || len(l.v1Dirs()) != c.dirs {
			t.Errorf("%s: %s %v %v", c.name, l, got, l.v1Dirs())
		}
	}
}

func TestQuota(t *testing.T) {
	for _, c := range []struct {
		l         novalet.Limits
		q, period int64
	}{
		{novalet.Limits{}, 0, 100000},
		{novalet.Limits{VCPUs: 2}, 200000, 100000},
		{novalet.Limits{VCPUs: 2, CPUQuota: 50000}, 50000, 100000},
		{novalet.Limits{VCPUs: 2, CPUQuota: -1}, 0, 100000},
		{novalet.Limits{VCPUs: 3, CPUPeriod: 10000}, 30000, 10000},
	} {
		if q, p := quota(&c.l); q != c.q || p != c.period {
			t.Errorf("%+v: %d %d", c.l, q, p)
		}
	}
}

// access interprets a device program, as the kernel does.
func access(t *testing.T, prog []insn, kind, bits, major, minor uint32) bool {
	t.Helper()
	var r [11]uint64
	ctx := map[int16]uint32{0: bits<<16 | kind, 4: major, 8: minor}
	for pc := 0; pc < len(prog); pc++ {
		i := prog[pc]
		switch i.code {
		case bpfLoadW:
			r[i.dst] = uint64(ctx[i.off])
		case bpfMov:
			r[i.dst] = r[i.src]
		case bpfMovImm:
			r[i.dst] = uint64(int64(i.imm))
		case bpfAnd:
			r[i.dst] &= uint64(int64(i.imm))
		case bpfRsh:
			r[i.dst] >>= uint(i.imm)
		case bpfJneImm:
			if r[i.dst] != uint64(int64(i.imm)) {
				pc += int(i.off)
			}
		case bpfExit:
			return r[0] != 0
		default:
			t.Fatalf("instruction %d: %#x", pc, i.code)
		}
	}
	t.Fatal("no exit")
	return false
}

func TestDeviceProgram(t *testing.T) {
	prog := deviceProgram(allowedDevices)
	const mknod, read, write = 1, 2, 4
	const block, char = 1, 2
	for _, c := range []struct {
		kind, bits, major, minor uint32
		want                     bool
	}{
		{char, read | write, 1, 3, true}, {char, read, 1, 9, true}, {char, read | write, 136, 17, true}, {char, read | write, 5, 2, true},
		{char, mknod, 1, 1, true}, {block, mknod, 8, 0, true},
		{char, read, 1, 1, false}, {char, read, 1, 2, false}, {block, read, 8, 0, false}, {block, write, 254, 0, false},
		{block, mknod | read, 8, 0, false}, {char, read, 10, 237, false}, {block, read, 1, 3, false}, {char, read, 10, 232, false},
	} {
		if got := access(t, prog, c.kind, c.bits, c.major, c.minor); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}
