package procview

import (
	"strings"
	"testing"
	"time"
)

const hostMeminfo = "MemTotal:       24683656 kB\nMemFree:        22000000 kB\nMemAvailable:   23000000 kB\nSlab:             100000 kB\nSwapTotal:             0 kB\nSwapFree:              0 kB\nHugePages_Total:       0\nHugepagesize:       2048 kB\n"

func TestMeminfo(t *testing.T) {
	got := string(Meminfo([]byte(hostMeminfo), &Usage{MemoryLimit: 512 << 20, MemoryUsed: 128 << 20, MemoryReclaim: 64 << 20, SwapLimit: 1 << 30, SwapUsed: 1 << 20}))
	want := "MemTotal:         524288 kB\nMemFree:          393216 kB\nMemAvailable:     458752 kB\nSlab:                  0 kB\nSwapTotal:       1048576 kB\nSwapFree:        1047552 kB\nHugePages_Total:       0\nHugepagesize:       2048 kB\n"
	if got != want {
		t.Fatalf("got\n%s", got)
	}
	if got := string(Meminfo([]byte(hostMeminfo), &Usage{})); got != hostMeminfo {
		t.Fatalf("without a limit:\n%s", got)
	}
}

func TestCpuinfo(t *testing.T) {
	host := ""
	for _, n := range []string{"0", "1", "2", "3"} {
		host += "processor\t: " + n + "\nmodel name\t: X\ncore id\t\t: " + n + "\ncpu cores\t: 4\n\n"
	}
	got := string(Cpuinfo([]byte(host), 2))
	if strings.Count(got, "processor\t: ") != 2 || !strings.Contains(got, "processor\t: 1\n") || strings.Contains(got, "cpu cores\t: 4") || strings.Count(got, "model name\t: X\n") != 2 {
		t.Fatalf("got\n%s", got)
	}
}

func TestStatAndUptime(t *testing.T) {
	now := time.Unix(1000, 0)
	u := &Usage{CPUs: 2, CPUUser: 3 * time.Second, CPUSystem: time.Second, Started: now.Add(-10 * time.Second), Tasks: 5}
	if got := string(Stat(u, now)); !strings.HasPrefix(got, "cpu  300 0 100 1600 0 0 0 0 0 0\ncpu0 150 0 50 800") || !strings.Contains(got, "btime 990\n") {
		t.Fatalf("got\n%s", got)
	}
	if got := string(Uptime(u, now)); got != "10.00 16.00\n" {
		t.Fatalf("got %q", got)
	}
}

func TestParseCPUs(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-3": 4, "0-1,4,6-7\n": 5, "": 0, "x": 0, "3-1": 0, "0-99999999999": 0} {
		if got := ParseCPUs(list); got != want {
			t.Errorf("%q: %d, want %d", list, got, want)
		}
	}
	if string(CPUList(1)) != "0\n" || string(CPUList(4)) != "0-3\n" {
		t.Error("list format")
	}
}

// FuzzHandle throws requests at the protocol: whatever comes, it answers or refuses.
func FuzzHandle(f *testing.F) {
	for op := range byte(48) {
		f.Add(append([]byte{40, 0, 0, 0, op}, make([]byte, 60)...))
	}
	f.Fuzz(func(t *testing.T, req []byte) {
		if len(req) < headerIn {
			return
		}
		v := &View{files: []File{{Name: "a", Read: func() ([]byte, error) { return []byte("x"), nil }}}, shown: map[uint64]*content{}}
		v.handle(req)
	})
}
