package engine

import (
	"strings"
	"testing"

	"github.com/novalet/novalet"
)

// TestSysinfo: what programs ask of sysinfo(2), which knows no namespaces, is the instance's: in its first process, in its
// children, in an exec, and after a change of the limits.
func TestSysinfo(t *testing.T) {
	te := newEngine(t)
	limits := novalet.Limits{MemoryBytes: 128 << 20, SwapBytes: 64 << 20}
	te.run("app", limits, app(busybox(t), "busybox free | awk '/^Mem/{print \"total \" $2}'; sleep 1000"))
	te.waitLog("app", "total 131072")
	te.run("deb", limits, machineOf(debian(t)))
	te.run("free", novalet.Limits{}, app(busybox(t), "sleep 1000"))
	for _, c := range [][3]string{
		{"app", "free -k | awk '/^Mem/{print $2}'", "131072"},
		{"app", "free -k | awk '/^Mem/{print ($3 < 65536 && $3 > 0)}'", "1"},
		{"app", "uptime | grep -cE 'up (0|1) min'", "1"},
		{"app", "uptime | sed 's/.*average: //' | awk -F, '{print ($1 < 1.5)}'", "1"},
		{"deb", "getconf _PHYS_PAGES", "32768"},
		{"deb", "echo $(($(getconf _AVPHYS_PAGES) < 32768))", "1"},
		// The same answer whoever asks, through a child of a child.
		{"app", "(sh -c 'free -k') | awk '/^Mem/{print $2}'", "131072"},
	} {
		if out, _ := te.sh(c[0], c[1]); strings.TrimSpace(out) != c[2] {
			t.Errorf("%s: %s: %q, want %q", c[0], c[1], out, c[2])
		}
	}
	if out, _ := te.sh("free", "free -k | awk '/^Mem/{print ($2 > 0)}'"); strings.TrimSpace(out) != "1" {
		t.Errorf("without a limit: %q", out)
	}
	limits.MemoryBytes = 256 << 20
	if err := te.Update(te.ctx(), "app", limits); err != nil {
		t.Fatal(err)
	}
	eventually(t, "free shows the new limit", func() string {
		if out, _ := te.sh("app", "free -k | awk '/^Mem/{print $2}'"); strings.TrimSpace(out) != "262144" {
			return out
		}
		return ""
	})
}

// TestAttackSysinfo: callers that die while they wait, call without end, and ask for the answer where nothing is, keep
// neither the keeper nor a neighbour from working.
func TestAttackSysinfo(t *testing.T) {
	bothKinds(t, func(t *testing.T, te *testEngine, id string) {
		other := map[string]string{"app": "machine", "machine": "app"}[id]
		before := te.waitState(other, novalet.ContainerRunning)
		done := make(chan struct{})
		go func() {
			defer close(done)
			te.try(t, id, "flood 1500")
		}()
		for ask := true; ask; {
			select {
			case <-done:
				ask = false
			default:
			}
			if out, code := te.sh(other, "free -k | grep -c Mem"); code != 0 || out != "1\n" {
				t.Errorf("the neighbour: %q %d", out, code)
			}
		}
		if after := te.waitState(other, novalet.ContainerRunning); after.PID != before.PID {
			t.Error("the neighbour was restarted")
		}
	})
}

// TestAttackHangingAnswer: a machine has the answer of sysinfo written to memory that a file system of its own backs,
// which never gives a byte. Whether the kernel refuses or waits, the neighbour on the same keeper goes on; and stop and
// destroy work, although the process that serves the file system also has a file of it open, and so waits for itself
// when it dies.
func TestAttackHangingAnswer(t *testing.T) {
	te := newEngine(t)
	layers := attacker(t)
	te.run("m", novalet.Limits{}, machineOf(layers))
	te.run("other", novalet.Limits{MemoryBytes: 64 << 20}, app(layers, "sleep 1000"))
	end := te.hang("hang", "/tmp")
	for range 20 {
		if out, _ := te.sh("other", "free -k | awk '/^Mem/{print $2}'"); strings.TrimSpace(out) != "65536" {
			t.Fatalf("the neighbour: %q", out)
		}
	}
	if out, _ := te.sh("m", "free -k | grep -c Mem"); out != "1\n" {
		t.Errorf("another process of the same machine: %q", out)
	}
	if err := te.Stop(te.ctx(), "m", novalet.StopOptions{}); err != nil {
		t.Error(err)
	}
	if out := end(); strings.Contains(out, "answered") && !strings.Contains(out, "answered bad address") {
		t.Errorf("the file system gave nothing, and the answer is there: %q", out)
	}
}
