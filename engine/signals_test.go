package engine

import (
	"fmt"
	"strings"
	"testing"

	"github.com/novalet/novalet"
)

// TestSignalsOfAnApplication: what its init is sent reaches the program, whose own handling of signals is the usual one at its start;
// what would end a process does not end init; and none of many at once keeps it from its work.
func TestSignalsOfAnApplication(t *testing.T) {
	te := newEngine(t)
	passed := []int{1, 2, 3, 6, 10, 12, 13, 14, 15, 20, 21, 22, 24, 27, 28, 30, 34, 35, 64}
	var script strings.Builder
	for _, n := range passed {
		fmt.Fprintf(&script, "trap 'echo got %d.' %d\n", n, n)
	}
	script.WriteString("grep -E '^Sig(Blk|Ign)' /proc/self/status; echo ready\nwhile :; do sleep 0.05; done")
	te.run("s", novalet.Limits{}, app(busybox(t), script.String()))
	te.waitLog("s", "ready")
	te.waitLog("s", "SigBlk:\t0000000000000000")
	te.waitLog("s", "SigIgn:\t0000000000000000")
	for _, n := range passed {
		if out, code := te.sh("s", fmt.Sprintf("kill -%d 1", n)); code != 0 {
			t.Fatalf("send %d: %q %d", n, out, code)
		}
		te.waitLog("s", fmt.Sprintf("got %d.", n))
	}
	before := te.waitState("s", novalet.ContainerRunning)
	for _, n := range []int{4, 5, 7, 8, 9, 11, 16, 19, 23, 31, 32} {
		te.sh("s", fmt.Sprintf("kill -%d 1", n))
	}
	if out, code := te.sh("s", "for i in $(seq 20000); do kill -28 1; done; (sleep 0.01 & exec true); echo sent"); code != 0 || out != "sent\n" {
		t.Fatalf("many signals: %q %d", out, code)
	}
	// It still reaps what is orphaned, and passes on.
	eventually(t, "no orphan stays", func() string {
		out, _ := te.sh("s", "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null")
		return out
	})
	te.sh("s", "kill -10 1")
	if after := te.waitState("s", novalet.ContainerRunning); after.PID != before.PID {
		t.Errorf("init is %d, was %d", after.PID, before.PID)
	}
}
