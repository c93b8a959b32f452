package contracttest

import (
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// ConductorFixture is a conductor and the means to make a row.
type ConductorFixture struct {
	Conductor novalet.Conductor
	// NewRow makes a row in vm_state building and the given task_state, and returns it. Host stays empty.
	NewRow func(task novalet.TaskState) *novalet.Instance
	// Host is the host the conductor speaks for.
	Host string
}

// Conductor runs the suite of novalet.Conductor.
func Conductor(t *testing.T, fixture func(t *testing.T) *ConductorFixture) {
	rc := novalet.RequestContext{RequestID: "req-contract"}
	const nobody = "0f0c2d8a-0000-4000-8000-00000000ffff"
	building := map[string]any{"vm_state": novalet.VMBuilding, "task_state": novalet.TaskSpawning}
	t.Run("a boot's two saves", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		row := f.NewRow(novalet.TaskScheduling)
		fields := map[string]any{"vm_state": novalet.VMBuilding, "task_state": novalet.TaskSpawning, "host": f.Host, "node": f.Host, "launched_on": f.Host}
		err := f.Conductor.SaveInstance(ctx, rc, &novalet.InstanceUpdate{UUID: row.UUID, Fields: fields, Expected: []novalet.TaskState{novalet.TaskScheduling, novalet.TaskNone}})
		if err != nil {
			t.Fatal(err)
		}
		err = f.Conductor.SaveInstance(ctx, rc, &novalet.InstanceUpdate{UUID: row.UUID, Expected: []novalet.TaskState{novalet.TaskSpawning}, Fields: map[string]any{
			"vm_state": novalet.VMActive, "task_state": nil, "power_state": novalet.PowerRunning, "launched_at": time.Date(2026, 11, 28, 1, 2, 3, 0, time.UTC), "root_device_name": "/dev/vda"}})
		if err != nil {
			t.Fatal(err)
		}
		got, err := f.Conductor.Instance(ctx, row.UUID)
		if err != nil || got.VMState != novalet.VMActive || got.TaskState != novalet.TaskNone || got.PowerState != novalet.PowerRunning || got.Host != f.Host || got.LaunchedAt == nil {
			t.Errorf("row %+v, %v", got, err)
		}
		here, err := f.Conductor.InstancesByHost(ctx)
		found := false
		for i := range here {
			found = found || here[i].UUID == row.UUID
		}
		if err != nil || !found {
			t.Errorf("instances of the host %v, %v", here, err)
		}
	})
	t.Run("expected states", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		row := f.NewRow(novalet.TaskPausing)
		save := func(expected ...novalet.TaskState) error {
			return f.Conductor.SaveInstance(ctx, rc, &novalet.InstanceUpdate{UUID: row.UUID, Fields: building, Expected: expected})
		}
		is(t, "save expecting another state", save(novalet.TaskScheduling), novalet.ErrTaskState)
		is(t, "save expecting none", save(novalet.TaskNone), novalet.ErrTaskState)
		if err := save(); err != nil {
			t.Errorf("save expecting nothing: %v", err)
		}
		deleting := f.NewRow(novalet.TaskDeleting)
		err := f.Conductor.SaveInstance(ctx, rc, &novalet.InstanceUpdate{UUID: deleting.UUID, Fields: building, Expected: []novalet.TaskState{novalet.TaskSpawning}})
		is(t, "save of what is being deleted", err, novalet.ErrInstanceGone)
	})
	t.Run("deleted", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		row := f.NewRow(novalet.TaskDeleting)
		twice(t, "destroy", func() error { return f.Conductor.DestroyInstance(ctx, rc, row.UUID) })
		err := f.Conductor.SaveInstance(ctx, rc, &novalet.InstanceUpdate{UUID: row.UUID, Fields: building})
		is(t, "save", err, novalet.ErrInstanceGone)
		twice(t, "save of a deleted row", func() error {
			return f.Conductor.SaveInstance(ctx, rc, &novalet.InstanceUpdate{UUID: row.UUID, Fields: map[string]any{"vm_state": novalet.VMDeleted}, Deleted: true})
		})
		got, err := f.Conductor.Instances(ctx, []string{row.UUID, nobody})
		if err != nil || len(got) != 1 || !got[0].Deleted || got[0].VMState != novalet.VMDeleted {
			t.Errorf("instances %+v, %v; want the deleted one alone", got, err)
		}
		_, err = f.Conductor.Instance(ctx, nobody)
		is(t, "instance", err, novalet.ErrNotFound)
	})
	t.Run("contexts of our own", func(t *testing.T) {
		f := fixture(t)
		if x, y := f.Conductor.NewContext(), f.Conductor.NewContext(); x.RequestID == "" || x.RequestID == y.RequestID {
			t.Errorf("request ids %q and %q", x.RequestID, y.RequestID)
		}
	})
}

// Placement runs the suite of novalet.Placement. The fixture returns it and an instance that holds an allocation.
func Placement(t *testing.T, fixture func(t *testing.T) (novalet.Placement, string)) {
	t.Run("delete", func(t *testing.T) {
		p, uuid := fixture(t)
		twice(t, "delete allocation", func() error { return p.DeleteAllocation(testContext(t), uuid) })
	})
}
