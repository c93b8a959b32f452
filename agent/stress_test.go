package agent

import (
	"os"
	"runtime"
	"testing"

	"github.com/novalet/novalet"
)

// Many operations leave the agent as large as the first two thousand did, with no record and no goroutine behind: ten
// thousand where the time is (make test), fewer elsewhere.
func TestManyOperations(t *testing.T) {
	if testing.Short() {
		t.Skip("thousands of operations take some seconds")
	}
	rounds := 8
	if os.Getenv("NOVALET_ROOT_TESTS") == "1" {
		rounds = 25
	}
	l := newLab(t, func(l *lab) {
		// A disk's own speed is no part of this test, where there is something faster.
		if dir, err := os.MkdirTemp("/dev/shm", "novalet-test-"); err == nil {
			l.dir = dir
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
		}
	})
	heap := func() uint64 {
		l.h.Faults.Log()
		l.told.Forget()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	const width = 100
	round := func() {
		var uuids []string
		for range width {
			op := l.server()
			uuids = append(uuids, op.Instance.UUID)
			l.submit(op)
		}
		for _, s := range []struct {
			method novalet.Method
			task   novalet.TaskState
			vm     novalet.VMState
		}{
			{"", "", novalet.VMActive},
			{novalet.MethodStop, novalet.TaskPoweringOff, novalet.VMStopped},
			{novalet.MethodStart, novalet.TaskPoweringOn, novalet.VMActive},
		} {
			for _, uuid := range uuids {
				if s.method != "" {
					l.cast(uuid, s.method, s.task, novalet.OperationArgs{})
				}
			}
			for _, uuid := range uuids {
				l.await(uuid, s.vm)
			}
		}
		for _, uuid := range uuids {
			l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
		}
		for _, uuid := range uuids {
			l.awaitGone(uuid)
			l.world.ForgetRow(uuid)
		}
	}
	var first uint64
	for i := range rounds {
		round()
		if i == 4 {
			first = heap()
		}
	}
	if last := heap(); last > first+8<<20 {
		t.Errorf("the heap grew from %d to %d bytes over %d operations", first, last, (rounds-5)*4*width)
	}
	if n := len(l.agent.all()); n > 0 {
		t.Errorf("%d instances are left in memory", n)
	}
	l.agent.events.mu.Lock()
	defer l.agent.events.mu.Unlock()
	if n := len(l.agent.events.waiters); n > 0 {
		t.Errorf("%d waiters are left", n)
	}
	l.agent.timings.mu.Lock()
	defer l.agent.timings.mu.Unlock()
	if n := len(l.agent.timings.boots); n > 0 {
		t.Errorf("timings of %d boots are left", n)
	}
}
