package monitor

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// TestCPUTime: the load is made of the processor time that either version of cgroups tells.
func TestCPUTime(t *testing.T) {
	group := func(kind, controller, file, text string) cgroupDir {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return cgroupDir{CgroupRef: wire.CgroupRef{Kind: kind, Controller: controller}, dir: f}
	}
	memory := group(wire.CgroupV1, "memory", "cpuacct.stat", "user 1000\nsystem 1000\n")
	v1 := group(wire.CgroupV1, "cpuacct", "cpuacct.stat", "user 5\nsystem 3\n")
	v2 := group(wire.CgroupBase, "", "cpu.stat", "usage_usec 9\nuser_usec 4000\nsystem_usec 2000\n")
	for want, dirs := range map[time.Duration][]cgroupDir{80 * time.Millisecond: {memory, v1, v2}, 6 * time.Millisecond: {v2}, 0: {memory}} {
		if got := (&instance{cgroups: dirs}).cpuTime(); got != want {
			t.Errorf("%d groups: %v, want %v", len(dirs), got, want)
		}
	}
}
