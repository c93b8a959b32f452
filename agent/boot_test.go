package agent

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

func TestBoot(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	l.checkRunning(uuid)
	r := l.world.Row(uuid)
	if r.LaunchedAt == nil || r.LaunchedOn != testHost || r.Node != testHost || r.RootDeviceName != "/dev/vda" {
		t.Errorf("row %+v", r)
	}
	if want := []string{"building/spawning", "active/"}; !slices.Equal(r.History, want) {
		t.Errorf("states %v, want %v", r.History, want)
	}
	if len(r.VIFRows) != 1 {
		t.Errorf("interface rows %v", r.VIFRows)
	}
	for _, p := range l.world.Plugs(uuid) {
		if !p.Static || p.Index != 0 || p.Address == "" {
			t.Errorf("plug %+v, want static with an address", p)
		}
	}
	ev := l.world.ActionEvents(uuid)
	if len(ev) != 1 || ev[0].Name != "compute__do_build_and_run_instance" || !ev[0].Finished || ev[0].Err != nil {
		t.Errorf("events %+v", ev)
	}
	calls := 0
	for _, name := range l.h.Faults.Log() {
		if strings.HasPrefix(name, "Conductor.") && name != "Conductor.InstancesByHost" && name != "Conductor.Evacuated" {
			calls++
		}
	}
	if calls > 7 {
		t.Errorf("%d conductor calls for a boot, want 7 at most", calls)
	}
	_, spec := l.world.Specs(uuid)
	if !slices.Equal(spec.Process.Args, []string{"/bin/sleep", "1d"}) || !slices.Equal(spec.Process.Env, []string{"A=image", "B=meta", "C=meta"}) {
		t.Errorf("process %+v", spec.Process)
	}
	timings, ok := l.agent.Timings(uuid)
	if !ok || len(timings.Steps) < 7 {
		t.Errorf("timings %+v", timings)
	}
}

func TestBootThenDelete(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	l.h.Faults.Log()
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(uuid)
	l.checkNothingLeft(uuid)
	if l.world.Allocated(uuid) {
		t.Error("allocation is left")
	}
	if r := l.world.Row(uuid); r.VMState != novalet.VMDeleted || r.TerminatedAt == nil {
		t.Errorf("row is %s, terminated at %v", r.VMState, r.TerminatedAt)
	}
	calls := 0
	for _, name := range l.h.Faults.Log() {
		if strings.HasPrefix(name, "Conductor.") {
			calls++
		}
	}
	if calls > 6 {
		t.Errorf("%d conductor calls for a delete, want 6 at most", calls)
	}
}

// What an order protects: an address is given away only when nothing on this host uses it any more, a host's resources
// only when they are free, and the row goes last, so that whoever saw the server go finds its ports gone.
func TestDeleteOrder(t *testing.T) {
	t.Run("cut", func(t *testing.T) { testDeleteOrder(t, newLab(t)) })
	t.Run("unplugged where it cannot be cut", func(t *testing.T) {
		l := newLab(t)
		l.h.Faults.Fail("VIFPlugger.Cut", novalet.ErrTryAgain, -1)
		testDeleteOrder(t, l)
	})
}

func testDeleteOrder(t *testing.T, l *lab) {
	uuid := l.boot()
	var mu sync.Mutex
	seen := map[string]bool{}
	l.h.Faults.Hook(func(_ context.Context, name string, p fake.Phase) {
		if p != fake.Before {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		seen[name] = true
		switch name {
		case "NetworkAPI.Deallocate":
			for id, p := range l.world.Plugs(uuid) {
				if !p.Cut {
					t.Errorf("port %s is freed while traffic passes it", id)
				}
			}
		case "Placement.DeleteAllocation":
			if s := l.world.State(uuid); s != "" {
				t.Errorf("the allocation is freed while the container is %s", s)
			}
			if !seen["Conductor.DestroyInstance"] {
				t.Error("the allocation is freed before the row goes: the user waits for it")
			}
		case "Conductor.DestroyInstance":
			if ports := l.world.Ports(uuid); len(ports) > 0 || l.world.State(uuid) != "" {
				t.Errorf("the row goes before ports %v or the container", ports)
			}
		}
	})
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(uuid)
	if plugs := l.world.Plugs(uuid); len(plugs) > 0 {
		t.Errorf("the delete ended with plugs %v", plugs)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, name := range []string{"NetworkAPI.Deallocation", "NetworkAPI.Deallocate", "Placement.DeleteAllocation", "Conductor.DestroyInstance"} {
		if !seen[name] {
			t.Errorf("%s was not called", name)
		}
	}
}

// An operator may have every task_state of a boot shown, as nova-compute shows them; a restart on the way changes nothing.
func TestIntermediateStates(t *testing.T) {
	l := newLab(t, func(l *lab) { l.cfg.IntermediateStates = true })
	uuid := l.boot()
	want := []string{"building/networking", "building/block_device_mapping", "building/spawning", "active/"}
	if got := l.world.Row(uuid).History; !slices.Equal(got, want) {
		t.Errorf("states %q, want %q", got, want)
	}
	for nth := 1; nth <= len(want); nth++ {
		op := l.server()
		dead := l.killAt("Conductor.SaveInstance", fake.After, nth)
		l.submit(op)
		dead()
		l.open()
		l.awaitAfterCrash(op.Instance.UUID, novalet.VMActive)
		l.checkRunning(op.Instance.UUID)
		if f := l.world.Row(op.Instance.UUID).Faults; len(f) > 0 {
			t.Errorf("killed after save %d: faults %v", nth, f)
		}
	}
}
