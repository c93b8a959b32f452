package agent

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// step is one cast of a life and what it must lead to.
type step struct {
	method novalet.Method
	task   novalet.TaskState
	args   novalet.OperationArgs
	vm     novalet.VMState
	power  novalet.PowerState
	state  novalet.ContainerState
}

func (l *lab) take(uuid string, s step) {
	l.t.Helper()
	l.cast(uuid, s.method, s.task, s.args)
	l.await(uuid, s.vm)
	r := l.world.Row(uuid)
	if r.PowerState != s.power || l.world.State(uuid) != s.state || len(r.Faults) > 0 {
		l.t.Errorf("%s: power %d, container %q, faults %v; want %d, %q, none", s.method, r.PowerState, l.world.State(uuid), r.Faults, s.power, s.state)
	}
	for id, plug := range l.world.Plugs(uuid) {
		if plug.Silent != (s.state == novalet.ContainerPaused) {
			l.t.Errorf("%s: interface %s is silent: %v", s.method, id, plug.Silent)
		}
	}
	for _, e := range l.world.ActionEvents(uuid) {
		if e.Err != nil {
			l.t.Errorf("%s: event %s ended with %v", s.method, e.Name, e.Err)
		}
	}
}

func TestLife(t *testing.T) {
	const (
		pRun, pOff = novalet.PowerRunning, novalet.PowerShutdown
	)
	clean := novalet.OperationArgs{CleanShutdown: true}
	l := newLab(t)
	uuid := l.boot(func(op *novalet.Operation) { op.Instance.SystemMetadata["image_os_shutdown_timeout"] = "7" })
	for _, s := range []step{
		{novalet.MethodStop, novalet.TaskPoweringOff, clean, novalet.VMStopped, pOff, off},
		{novalet.MethodStart, novalet.TaskPoweringOn, clean, novalet.VMActive, pRun, run},
		{novalet.MethodReboot, novalet.TaskRebooting, novalet.OperationArgs{RebootType: "SOFT"}, novalet.VMActive, pRun, run},
		{novalet.MethodReboot, novalet.TaskRebootingHard, novalet.OperationArgs{RebootType: "HARD"}, novalet.VMActive, pRun, run},
		{novalet.MethodPause, novalet.TaskPausing, clean, novalet.VMPaused, novalet.PowerPaused, ice},
		{novalet.MethodUnpause, novalet.TaskUnpausing, clean, novalet.VMActive, pRun, run},
		{novalet.MethodSuspend, novalet.TaskSuspending, clean, novalet.VMSuspended, novalet.PowerSuspended, ice},
		{novalet.MethodResume, novalet.TaskResuming, clean, novalet.VMActive, pRun, run},
		{novalet.MethodRescue, novalet.TaskRescuing, novalet.OperationArgs{ImageID: diskImage, Password: "p"}, novalet.VMRescued, pRun, run},
		{novalet.MethodUnrescue, novalet.TaskUnrescuing, clean, novalet.VMActive, pRun, run},
		{novalet.MethodSoftDelete, novalet.TaskSoftDeleting, clean, novalet.VMSoftDeleted, pOff, off},
		{novalet.MethodRestore, novalet.TaskRestoring, clean, novalet.VMActive, pRun, run},
		{novalet.MethodRebuild, novalet.TaskRebuilding, novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{ImageRef: diskImage}}, novalet.VMActive, pRun, run},
		{novalet.MethodSnapshot, novalet.TaskSnapshotPending, novalet.OperationArgs{ImageID: "snap"}, novalet.VMActive, pRun, run},
		{novalet.MethodBackup, novalet.TaskBackup, novalet.OperationArgs{ImageID: "backup", BackupType: "daily", Rotation: 1}, novalet.VMActive, pRun, run},
		{novalet.MethodInjectNetwork, novalet.TaskNone, clean, novalet.VMActive, pRun, run},
	} {
		l.take(uuid, s)
	}
	l.checkRunning(uuid)
	if l.world.Uploaded("snap") != uuid || l.world.Uploaded("backup") != uuid || l.h.Faults.Calls("ImageStore.RotateBackups") != 1 {
		t.Error("snapshot or backup was not uploaded or rotated")
	}
	if l.world.Whole("snap") || l.world.Whole("backup") {
		t.Error("snapshot or backup had to be self-contained")
	}
	if got := l.world.Stops(uuid); len(got) > 0 && slices.Contains(got, 60*time.Second) {
		t.Errorf("stops %v: the image's own time was not used", got)
	}
	if got := l.world.Leased(); !slices.Equal(got, []string{uuid}) {
		t.Errorf("leases %v", got)
	}
	// An agent restart changes nothing.
	pid := l.world.PID(uuid)
	l.crash()
	l.open()
	l.await(uuid, novalet.VMActive)
	if l.world.PID(uuid) != pid {
		t.Error("the restart of the agent touched the instance")
	}
}

func TestStopTimeout(t *testing.T) {
	for _, c := range []struct {
		name  string
		args  novalet.OperationArgs
		image string
		want  time.Duration
	}{
		{"clean", novalet.OperationArgs{CleanShutdown: true}, "", 60 * time.Second},
		{"image", novalet.OperationArgs{CleanShutdown: true}, "7", 7 * time.Second},
		{"nonsense", novalet.OperationArgs{CleanShutdown: true}, "-1", 60 * time.Second},
		{"hard", novalet.OperationArgs{}, "7", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			uuid := l.boot(func(op *novalet.Operation) {
				if c.image != "" {
					op.Instance.SystemMetadata["image_os_shutdown_timeout"] = c.image
				}
			})
			l.cast(uuid, novalet.MethodStop, novalet.TaskPoweringOff, c.args)
			l.await(uuid, novalet.VMStopped)
			if got := l.world.Stops(uuid); !slices.Equal(got, []time.Duration{c.want}) {
				t.Errorf("stopped with %v, want %v", got, c.want)
			}
			if len(l.world.Plugs(uuid)) > 0 {
				t.Error("a stopped instance holds plugs")
			}
		})
	}
}

// Every vm_state against every method: what nova-api would not let through touches nothing and takes its task_state back.
func TestEveryStateAgainstEveryMethod(t *testing.T) {
	states := []novalet.VMState{novalet.VMActive, novalet.VMStopped, novalet.VMPaused, novalet.VMSuspended, novalet.VMRescued,
		novalet.VMSoftDeleted, novalet.VMError, novalet.VMShelved, novalet.VMShelvedOffloaded, novalet.VMResized}
	l := newLab(t)
	uuid := l.boot()
	refused := 0
	for name, m := range methods {
		if m.vm == nil {
			continue
		}
		for _, vm := range states {
			if slices.Contains(m.vm, vm) {
				continue
			}
			refused++
			pid, faults := l.world.PID(uuid), len(l.world.Row(uuid).Faults)
			l.world.SetRow(uuid, func(r *fake.Row) { r.VMState = vm })
			l.cast(uuid, name, m.task[0], novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{}, Build: &novalet.BuildArgs{}})
			l.await(uuid, vm)
			r := l.world.Row(uuid)
			if l.world.PID(uuid) != pid || l.world.State(uuid) != novalet.ContainerRunning {
				t.Fatalf("%s in %s touched the container", name, vm)
			}
			if len(r.Faults) != faults+1 || !errors.Is(r.Faults[faults], novalet.ErrInvalidState) {
				t.Errorf("%s in %s: faults %v", name, vm, r.Faults[faults:])
			}
		}
	}
	if refused < 60 {
		t.Errorf("%d refusals only: the table has holes", refused)
	}
}

// A method whose task_state nova-api did not set is overtaken: nothing is touched, not even the row.
func TestWrongTaskState(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	pid := l.world.PID(uuid)
	for name, m := range methods {
		if m.task == nil || slices.Contains(m.task, novalet.TaskMigrating) {
			continue
		}
		l.world.SetRow(uuid, func(r *fake.Row) { r.VMState = novalet.VMActive })
		if m.vm != nil {
			l.world.SetRow(uuid, func(r *fake.Row) { r.VMState = m.vm[0] })
		}
		op := l.message(uuid, name, novalet.TaskMigrating, novalet.OperationArgs{})
		l.submit(op)
		eventually(t, fmt.Sprintf("%s is over", name), func() bool { return l.idle(uuid) })
		if r := l.world.Row(uuid); r.TaskState != novalet.TaskMigrating || len(r.Faults) > 0 || l.world.PID(uuid) != pid {
			t.Errorf("%s: row %s/%s, faults %v", name, r.VMState, r.TaskState, r.Faults)
		}
	}
}

// Each method fails at the host: the fault is there, the task_state is not, and the vm_state is Nova's.
func TestFailures(t *testing.T) {
	boom := errors.New("boom")
	for _, c := range []struct {
		name   string
		method novalet.Method
		vm     novalet.VMState
		task   novalet.TaskState
		call   string
		want   novalet.VMState
		args   novalet.OperationArgs
	}{
		{"stop", novalet.MethodStop, novalet.VMActive, novalet.TaskPoweringOff, "Runtime.Stop", novalet.VMActive, novalet.OperationArgs{}},
		{"pause", novalet.MethodPause, novalet.VMActive, novalet.TaskPausing, "Runtime.Freeze", novalet.VMActive, novalet.OperationArgs{}},
		{"suspend", novalet.MethodSuspend, novalet.VMActive, novalet.TaskSuspending, "Runtime.Freeze", novalet.VMError, novalet.OperationArgs{}},
		{"soft delete", novalet.MethodSoftDelete, novalet.VMActive, novalet.TaskSoftDeleting, "Runtime.Stop", novalet.VMError, novalet.OperationArgs{}},
		{"reboot, guest runs", novalet.MethodReboot, novalet.VMActive, novalet.TaskRebootingHard, "Runtime.Stop", novalet.VMActive, novalet.OperationArgs{}},
		{"reboot, guest down", novalet.MethodReboot, novalet.VMActive, novalet.TaskRebootingHard, "Runtime.Create", novalet.VMError, novalet.OperationArgs{}},
		{"rescue, no image", novalet.MethodRescue, novalet.VMActive, novalet.TaskRescuing, "ImageStore.Prepare", novalet.VMError, novalet.OperationArgs{}},
		{"rebuild, no image", novalet.MethodRebuild, novalet.VMActive, novalet.TaskRebuilding, "ImageStore.Prepare", novalet.VMError, novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{}}},
		{"snapshot", novalet.MethodSnapshot, novalet.VMActive, novalet.TaskSnapshotPending, "ImageStore.Snapshot", novalet.VMActive, novalet.OperationArgs{ImageID: "s"}},
		{"crash dump", novalet.MethodTriggerCrash, novalet.VMActive, novalet.TaskNone, "", novalet.VMActive, novalet.OperationArgs{}},
		{"evacuate", novalet.MethodRebuild, novalet.VMActive, novalet.TaskRebuilding, "", novalet.VMActive, novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{Recreate: true}}},
		{"detach unknown", novalet.MethodDetachIface, novalet.VMActive, novalet.TaskNone, "", novalet.VMActive, novalet.OperationArgs{PortID: "x"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			uuid := l.boot()
			if c.call != "" {
				l.h.Faults.Fail(c.call, boom, 1)
			}
			l.cast(uuid, c.method, c.task, c.args)
			l.await(uuid, c.want)
			if r := l.world.Row(uuid); len(r.Faults) != 1 {
				t.Errorf("faults %v", r.Faults)
			}
			// Events are written beside the operation.
			eventually(t, "the event has ended", func() bool {
				ev := l.world.ActionEvents(uuid)
				return len(ev) == 2 && ev[1].Finished
			})
			if ev := l.world.ActionEvents(uuid); ev[1].Err == nil {
				t.Errorf("events %+v", ev)
			}
			if c.name == "snapshot" && !slices.Contains(l.world.DeletedImages(), "s") {
				t.Error("the image of the failed snapshot is left in Glance")
			}
		})
	}
}

func TestShelve(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	port := l.world.Ports(uuid)[0].ID
	l.cast(uuid, novalet.MethodShelve, novalet.TaskShelving, novalet.OperationArgs{ImageID: "shelf", CleanShutdown: true})
	l.await(uuid, novalet.VMShelvedOffloaded)
	if !l.world.Whole("shelf") {
		t.Error("what the server comes back from may depend on another image")
	}
	r := l.world.Row(uuid)
	if r.Host != "" || r.Node != "" || l.world.Allocated(uuid) || l.world.State(uuid) != "" || len(l.world.Plugs(uuid)) > 0 || len(l.world.Leased()) > 0 {
		t.Errorf("row on %q, allocated %v, container %q, leases %v", r.Host, l.world.Allocated(uuid), l.world.State(uuid), l.world.Leased())
	}
	if p := l.world.Ports(uuid); len(p) != 1 || p[0].Host != "" {
		t.Errorf("ports %v: want the port kept, bound nowhere", p)
	}
	if r.SystemMetadata["shelved_image_id"] != "shelf" || r.SystemMetadata["shelved_host"] != testHost || r.SystemMetadata["shelved_at"] == "" {
		t.Errorf("system_metadata %v", r.SystemMetadata)
	}
	eventually(t, "the record is gone", func() bool { _, err := l.agent.lookup(uuid); return err != nil })
	l.world.Allocate(uuid)
	l.cast(uuid, novalet.MethodUnshelve, novalet.TaskUnshelving, novalet.OperationArgs{Build: &novalet.BuildArgs{Image: novalet.ImageMeta{ID: "shelf"}, Node: testHost}})
	l.await(uuid, novalet.VMActive)
	l.checkRunning(uuid)
	if l.world.Ports(uuid)[0].ID != port {
		t.Error("the instance has another port now")
	}
	if !slices.Contains(l.world.DeletedImages(), "shelf") || l.world.Row(uuid).SystemMetadata["shelved_image_id"] != "" {
		t.Error("the shelf is not cleared")
	}
}

// With shelved_offload_time -1 the instance stays, and an unshelve is a start.
func TestShelveWithoutOffload(t *testing.T) {
	l := newLab(t, func(l *lab) { l.cfg.ShelvedOffloadTime = -1 })
	uuid := l.boot()
	l.cast(uuid, novalet.MethodShelve, novalet.TaskShelving, novalet.OperationArgs{ImageID: "shelf"})
	l.await(uuid, novalet.VMShelved)
	l.cast(uuid, novalet.MethodStart, novalet.TaskPoweringOn, novalet.OperationArgs{})
	l.await(uuid, novalet.VMActive)
	l.checkRunning(uuid)
	if !slices.Contains(l.world.DeletedImages(), "shelf") {
		t.Error("the shelved image is left")
	}
}

func TestUnshelveFails(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	l.cast(uuid, novalet.MethodShelve, novalet.TaskShelving, novalet.OperationArgs{ImageID: "shelf"})
	l.await(uuid, novalet.VMShelvedOffloaded)
	l.world.Allocate(uuid)
	l.h.Faults.Fail("Runtime.Start", errors.New("boom"), 1)
	l.cast(uuid, novalet.MethodUnshelve, novalet.TaskUnshelving, novalet.OperationArgs{Build: &novalet.BuildArgs{Image: novalet.ImageMeta{ID: "shelf"}, Node: testHost}})
	l.await(uuid, novalet.VMShelvedOffloaded)
	eventually(t, "the record is gone", func() bool { _, err := l.agent.lookup(uuid); return err != nil })
	r := l.world.Row(uuid)
	if r.Host != "" || l.world.Allocated(uuid) || l.world.State(uuid) != "" || len(r.Faults) != 1 || len(l.world.Ports(uuid)) != 1 {
		t.Errorf("row on %q, allocated %v, container %q, faults %v", r.Host, l.world.Allocated(uuid), l.world.State(uuid), r.Faults)
	}
	if slices.Contains(l.world.DeletedImages(), "shelf") {
		t.Error("the only copy of the root was deleted")
	}
}
