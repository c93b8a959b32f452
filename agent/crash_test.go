package agent

import (
	"slices"
	"strings"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// crashCase is an operation and what it ends in, killed or not.
type crashCase struct {
	name   string
	before []step // how the instance gets there
	op     step
}

func crashCases() []crashCase {
	const (
		pRun, pOff = novalet.PowerRunning, novalet.PowerShutdown
	)
	none := novalet.OperationArgs{}
	stop := step{novalet.MethodStop, novalet.TaskPoweringOff, none, novalet.VMStopped, pOff, off}
	pause := step{novalet.MethodPause, novalet.TaskPausing, none, novalet.VMPaused, novalet.PowerPaused, ice}
	suspend := step{novalet.MethodSuspend, novalet.TaskSuspending, none, novalet.VMSuspended, novalet.PowerSuspended, ice}
	rescue := step{novalet.MethodRescue, novalet.TaskRescuing, novalet.OperationArgs{ImageID: diskImage}, novalet.VMRescued, pRun, run}
	soft := step{novalet.MethodSoftDelete, novalet.TaskSoftDeleting, none, novalet.VMSoftDeleted, pOff, off}
	shelve := step{novalet.MethodShelve, novalet.TaskShelving, novalet.OperationArgs{ImageID: "shelf"}, novalet.VMShelvedOffloaded, pOff, ""}
	rebuild := novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{ImageRef: diskImage}}
	return []crashCase{
		{"stop", nil, stop},
		{"start", []step{stop}, step{novalet.MethodStart, novalet.TaskPoweringOn, none, novalet.VMActive, pRun, run}},
		{"reboot", nil, step{novalet.MethodReboot, novalet.TaskRebootingHard, novalet.OperationArgs{RebootType: "HARD"}, novalet.VMActive, pRun, run}},
		{"soft reboot", nil, step{novalet.MethodReboot, novalet.TaskRebooting, novalet.OperationArgs{RebootType: "SOFT"}, novalet.VMActive, pRun, run}},
		{"pause", nil, pause},
		{"unpause", []step{pause}, step{novalet.MethodUnpause, novalet.TaskUnpausing, none, novalet.VMActive, pRun, run}},
		{"suspend", nil, suspend},
		{"resume", []step{suspend}, step{novalet.MethodResume, novalet.TaskResuming, none, novalet.VMActive, pRun, run}},
		{"rescue", nil, rescue},
		{"unrescue", []step{rescue}, step{novalet.MethodUnrescue, novalet.TaskUnrescuing, none, novalet.VMActive, pRun, run}},
		{"soft delete", nil, soft},
		{"restore", []step{soft}, step{novalet.MethodRestore, novalet.TaskRestoring, none, novalet.VMActive, pRun, run}},
		{"rebuild", nil, step{novalet.MethodRebuild, novalet.TaskRebuilding, rebuild, novalet.VMActive, pRun, run}},
		{"rebuild of a stopped one", []step{stop}, step{novalet.MethodRebuild, novalet.TaskRebuilding, rebuild, novalet.VMStopped, pOff, ""}},
		{"snapshot", nil, step{novalet.MethodSnapshot, novalet.TaskSnapshotPending, novalet.OperationArgs{ImageID: "snap"}, novalet.VMActive, pRun, run}},
		{"backup", nil, step{novalet.MethodBackup, novalet.TaskBackup, novalet.OperationArgs{ImageID: "snap"}, novalet.VMActive, pRun, run}},
		{"shelve", nil, shelve},
		{"unshelve", []step{shelve}, step{novalet.MethodUnshelve, novalet.TaskUnshelving,
			novalet.OperationArgs{Build: &novalet.BuildArgs{Image: novalet.ImageMeta{ID: "shelf"}, Node: testHost}}, novalet.VMActive, pRun, run}},
	}
}

// The agent is killed before and after the effect of every call that an operation makes, and opened again: the instance
// ends as if nothing had happened, and so do its ports, its leases and its allocation.
func TestCrashDuringEveryOperation(t *testing.T) {
	for _, c := range crashCases() {
		t.Run(c.name, func(t *testing.T) {
			calls := c.calls(t)
			if len(calls) < 2 {
				t.Fatalf("the operation made the calls %v only", calls)
			}
			for _, call := range calls {
				for _, phase := range []fake.Phase{fake.Before, fake.After} {
					t.Run(call+"/"+string(phase), func(t *testing.T) { c.crashAt(t, call, phase) })
				}
			}
		})
	}
}

func (c *crashCase) setUp(t *testing.T) (*lab, string) {
	l := newLab(t)
	uuid := l.boot()
	for _, s := range c.before {
		l.take(uuid, s)
	}
	l.world.Allocate(uuid)
	return l, uuid
}

// calls runs the operation undisturbed and returns the calls that it made.
func (c *crashCase) calls(t *testing.T) []string {
	l, uuid := c.setUp(t)
	l.h.Faults.Log()
	l.take(uuid, c.op)
	calls := slices.DeleteFunc(l.h.Faults.Log(), func(s string) bool { return strings.HasSuffix(s, "Event") })
	slices.Sort(calls)
	return slices.Compact(calls)
}

func (c *crashCase) crashAt(t *testing.T, call string, phase fake.Phase) {
	l, uuid := c.setUp(t)
	dead := l.killAt(call, phase, 1)
	l.cast(uuid, c.op.method, c.op.task, c.op.args)
	dead()
	l.open()
	l.awaitAfterCrash(uuid, c.op.vm)
	if l.world.Row(uuid).PowerState != c.op.power || l.world.State(uuid) != c.op.state {
		t.Errorf("power %d, container %q; want %d, %q", l.world.Row(uuid).PowerState, l.world.State(uuid), c.op.power, c.op.state)
	}
	if f := l.world.Row(uuid).Faults; len(f) > 0 {
		t.Errorf("faults %v", f)
	}
	if len(l.world.Ports(uuid)) != 1 {
		t.Errorf("ports %v", l.world.Ports(uuid))
	}
	here := c.op.vm != novalet.VMShelvedOffloaded
	if here != l.world.Allocated(uuid) || here != slices.Contains(l.world.Leased(), uuid) {
		t.Errorf("allocated %v, leases %v", l.world.Allocated(uuid), l.world.Leased())
	}
	if c.op.state == novalet.ContainerRunning && len(l.world.Plugs(uuid)) != 1 || c.op.power == novalet.PowerShutdown && len(l.world.Plugs(uuid)) > 0 {
		t.Errorf("plugs %v", l.world.Plugs(uuid))
	}
	if image := c.op.args.ImageID; image == "snap" && l.world.Uploaded(image) != uuid {
		t.Error("the snapshot is not there")
	}
	if !here {
		return
	}
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(uuid)
	l.checkNothingLeft(uuid)
	if n := l.world.Leased(); len(n) > 0 {
		t.Errorf("leases are left: %v", n)
	}
}

// A rebuild whose image cannot be had leaves the guest as it is; its files and password are the new ones.
func TestRebuild(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	port, pid := l.world.Ports(uuid)[0].ID, l.world.PID(uuid)
	l.cast(uuid, novalet.MethodRebuild, novalet.TaskRebuilding, novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{ImageRef: "nothing"}})
	l.await(uuid, novalet.VMError)
	if l.world.PID(uuid) != pid || l.world.State(uuid) != novalet.ContainerRunning {
		t.Error("the guest was destroyed for an image that does not exist")
	}
	l.cast(uuid, novalet.MethodRebuild, novalet.TaskRebuilding, novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{ImageRef: diskImage,
		InjectedFiles: []novalet.InjectedFile{{Path: "/etc/motd", Data: "aGk="}}}})
	l.await(uuid, novalet.VMActive)
	_, spec := l.world.Specs(uuid)
	if spec.Kind != novalet.KindMachine || fileNamed(spec, "/etc/motd") == nil || fileNamed(spec, "/etc/machine-id") == nil {
		t.Errorf("spec %+v", spec)
	}
	if l.world.Ports(uuid)[0].ID != port || l.world.PID(uuid) == pid {
		t.Error("the port changed, or the root did not")
	}
	l.cast(uuid, novalet.MethodReboot, novalet.TaskRebootingHard, novalet.OperationArgs{RebootType: "HARD"})
	l.await(uuid, novalet.VMActive)
	if _, spec = l.world.Specs(uuid); fileNamed(spec, "/etc/motd") != nil {
		t.Error("a later start writes the files again")
	}
}
