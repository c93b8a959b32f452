package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// Nova's repair table: the row and the guest as a restart finds them, and what must become of both.
func TestRepairTable(t *testing.T) {
	for _, c := range []struct {
		name  string
		vm    novalet.VMState
		task  novalet.TaskState
		guest novalet.ContainerState
		// want and state are what becomes of row and guest; keepTask leaves the task_state.
		want     novalet.VMState
		state    novalet.ContainerState
		keepTask bool
	}{
		{"nothing to do", novalet.VMActive, "", run, novalet.VMActive, run, false},
		{"soft-deleted", novalet.VMSoftDeleted, "", off, novalet.VMSoftDeleted, off, false},
		{"error stays", novalet.VMError, novalet.TaskPoweringOff, run, novalet.VMError, run, true},
		{"building", novalet.VMBuilding, novalet.TaskSpawning, run, novalet.VMError, "", false},
		{"networking", novalet.VMBuilding, novalet.TaskNetworking, "", novalet.VMError, "", false},
		{"rebuilding", novalet.VMActive, novalet.TaskRebuilding, run, novalet.VMError, run, false},
		{"rebuild spawning", novalet.VMStopped, novalet.TaskRebuildSpawning, off, novalet.VMError, off, false},
		{"snapshot", novalet.VMActive, novalet.TaskSnapshot, run, novalet.VMActive, run, false},
		{"snapshot froze it", novalet.VMActive, novalet.TaskSnapshot, ice, novalet.VMActive, run, false},
		{"uploading", novalet.VMStopped, novalet.TaskImageUploading, off, novalet.VMStopped, off, false},
		{"resize_prep", novalet.VMActive, novalet.TaskResizePrep, run, novalet.VMActive, run, false},
		{"reboot pending", novalet.VMActive, novalet.TaskRebootPending, run, novalet.VMActive, run, false},
		{"reboot started, down", novalet.VMActive, novalet.TaskRebootStartedHard, off, novalet.VMActive, run, false},
		{"reboot started, runs", novalet.VMActive, novalet.TaskRebootStarted, run, novalet.VMActive, run, false},
		{"pausing, runs", novalet.VMActive, novalet.TaskPausing, run, novalet.VMActive, run, false},
		{"pausing, frozen", novalet.VMActive, novalet.TaskPausing, ice, novalet.VMPaused, ice, false},
		{"unpausing, frozen", novalet.VMPaused, novalet.TaskUnpausing, ice, novalet.VMActive, run, false},
		{"unpausing, runs", novalet.VMPaused, novalet.TaskUnpausing, run, novalet.VMActive, run, false},
		{"powering off", novalet.VMActive, novalet.TaskPoweringOff, run, novalet.VMStopped, off, false},
		{"powering on", novalet.VMStopped, novalet.TaskPoweringOn, off, novalet.VMActive, run, false},
		{"deleting", novalet.VMActive, novalet.TaskDeleting, run, novalet.VMDeleted, "", false},
		{"deleted but for the row", novalet.VMDeleted, "", off, novalet.VMDeleted, "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			uuid := l.boot()
			ctx := context.Background()
			l.crash()
			h := l.world.Open()
			var err error
			switch c.guest {
			case off:
				err = h.Runtime.Stop(ctx, uuid, novalet.StopOptions{})
			case ice:
				err = h.Runtime.Freeze(ctx, uuid)
			case "":
				err = h.Runtime.Destroy(ctx, uuid, novalet.DestroyOptions{})
			}
			if err != nil {
				t.Fatal(err)
			}
			l.world.SetRow(uuid, func(r *fake.Row) { r.VMState, r.TaskState = c.vm, c.task })
			l.open()
			eventually(t, "it is settled: "+l.state(uuid), func() bool {
				r := l.world.Row(uuid)
				return r.VMState == c.want && (c.keepTask || r.TaskState == novalet.TaskNone) && l.world.State(uuid) == c.state && l.idle(uuid)
			})
			if c.want == novalet.VMError && c.state == "" {
				if len(l.world.Row(uuid).Faults) != 1 || l.world.Allocated(uuid) {
					t.Errorf("faults %v, allocated %v", l.world.Row(uuid).Faults, l.world.Allocated(uuid))
				}
				l.checkNothingLeft(uuid)
			}
			if c.want == novalet.VMDeleted {
				l.awaitGone(uuid)
				l.checkNothingLeft(uuid)
			}
		})
	}
}

// The host was booted: nothing starts before the conductor has answered; then the option decides.
func TestHostBoot(t *testing.T) {
	for _, resume := range []bool{false, true} {
		t.Run(map[bool]string{false: "stays down", true: "resumes"}[resume], func(t *testing.T) {
			l := newLab(t, func(l *lab) { l.cfg.ResumeGuestsStateOnHostBoot = resume })
			uuid := l.boot()
			l.crash()
			l.world.RebootHost("boot-2")
			if err := l.tryOpen(); err != nil {
				t.Fatal(err)
			}
			l.h.Faults.Fail("Conductor.InstancesByHost", novalet.ErrTryAgain, -1)
			done := make(chan error, 1)
			go func() { done <- l.agent.Recover(context.Background()) }()
			eventually(t, "a few questions", func() bool { return l.h.Faults.Calls("Conductor.InstancesByHost") >= 3 })
			if l.world.State(uuid) != novalet.ContainerStopped {
				t.Fatal("a guest was started before the conductor confirmed it")
			}
			l.h.Faults.Clear("Conductor.InstancesByHost")
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if resume {
				eventually(t, "it runs", func() bool { return l.world.State(uuid) == novalet.ContainerRunning && l.idle(uuid) })
				l.checkRunning(uuid)
				return
			}
			if err := l.agent.syncPower(context.Background()); err != nil {
				t.Fatal(err)
			}
			l.await(uuid, novalet.VMStopped)
			if a := l.world.Actions(); len(a) != 1 || a[0] != uuid+" stop" {
				t.Errorf("actions %v", a)
			}
		})
	}
}

// The agent alone was restarted and the guest had ended meanwhile: that is a stop, not a host boot.
func TestGuestEndedWhileAway(t *testing.T) {
	l := newLab(t, func(l *lab) { l.cfg.ResumeGuestsStateOnHostBoot = true })
	uuid := l.boot()
	l.crash()
	l.world.Exit(uuid, 0)
	l.open()
	if err := l.agent.syncPower(context.Background()); err != nil {
		t.Fatal(err)
	}
	l.await(uuid, novalet.VMStopped)
}

// Evacuated, deleted and moved instances are destroyed after a restart; their ports are somebody else's.
func TestGoneWhileAway(t *testing.T) {
	for _, c := range []struct {
		name string
		act  func(l *lab, uuid string)
	}{
		{"evacuated", func(l *lab, uuid string) {
			l.world.AddEvacuated(novalet.EvacuatedInstance{InstanceUUID: uuid, MigrationID: 1})
			l.world.SetRow(uuid, func(r *fake.Row) { r.Host = "host2" })
		}},
		{"deleted", func(l *lab, uuid string) {
			l.world.SetRow(uuid, func(r *fake.Row) { r.Deleted, r.VMState = true, novalet.VMDeleted })
		}},
		{"moved", func(l *lab, uuid string) { l.world.SetRow(uuid, func(r *fake.Row) { r.Host = "host2" }) }},
		{"moved with a journal", func(l *lab, uuid string) { l.world.SetRow(uuid, func(r *fake.Row) { r.Host = "host2" }) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			uuid, other := l.boot(), l.boot()
			if strings.HasSuffix(c.name, "journal") {
				release := l.h.Faults.Block("Runtime.Stop")
				defer release()
				l.cast(uuid, novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{})
				eventually(t, "the stop is under way", func() bool { return l.h.Faults.Calls("Runtime.Stop") > 0 })
			}
			l.crash()
			c.act(l, uuid)
			l.open()
			eventually(t, "the record is gone", func() bool { _, err := l.agent.lookup(uuid); return err != nil })
			if l.world.State(uuid) != "" || len(l.world.Plugs(uuid)) > 0 {
				t.Errorf("container %q, plugs %v", l.world.State(uuid), l.world.Plugs(uuid))
			}
			if len(l.world.Ports(uuid)) != 1 || !l.world.Allocated(uuid) {
				t.Error("ports or allocation were touched")
			}
			if l.world.EvacuatedLeft() > 0 {
				t.Error("the evacuation is not marked done")
			}
			l.checkRunning(other)
		})
	}
}

// Broken records and one instance whose every call fails do not keep the others from being recovered.
func TestBrokenRecords(t *testing.T) {
	l := newLab(t)
	good, bad := l.boot(), l.boot()
	l.crash()
	dir := filepath.Join(l.dir, "instances")
	names := map[string]string{
		"aaaaaaaa-0000-4000-8000-000000000001.json": "{",
		"aaaaaaaa-0000-4000-8000-000000000002.json": `{"version":99,"instance":{"uuid":"aaaaaaaa-0000-4000-8000-000000000002"}}`,
		"aaaaaaaa-0000-4000-8000-000000000003.json": `{"version":1,"instance":{"uuid":"../../etc/passwd"}}`,
	}
	for name, text := range names {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, bad+".json"), []byte("\x00\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.world.AddEvacuated(novalet.EvacuatedInstance{InstanceUUID: "bbbbbbbb-0000-4000-8000-000000000001", MigrationID: 2})
	if err := l.tryOpen(); err != nil {
		t.Fatal(err)
	}
	l.h.Faults.Fail("Conductor.EvacuationDone", errors.New("boom"), -1)
	if err := l.agent.Recover(context.Background()); err != nil {
		t.Fatal(err)
	}
	l.checkRunning(good)
	// The instance whose record is lost is taken over from its row, untouched.
	eventually(t, "it is here", func() bool { _, err := l.agent.lookup(bad); return err == nil && l.idle(bad) })
	l.checkRunning(bad)
	for name := range names {
		if _, err := os.Stat(filepath.Join(dir, name+".bad")); err != nil {
			t.Errorf("%s is not set aside: %v", name, err)
		}
	}
	l.cast(bad, novalet.MethodReboot, novalet.TaskRebootingHard, novalet.OperationArgs{RebootType: "HARD"})
	l.await(bad, novalet.VMActive)
	l.checkRunning(bad)
	l.cast(bad, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(bad)
	if l.world.State(bad) != "" || len(l.world.Ports(bad)) > 0 {
		t.Error("something of it is left")
	}
}

// Records of earlier versions still open.
func TestOldRecords(t *testing.T) {
	files, err := filepath.Glob("testdata/records/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no records: %v", err)
	}
	for _, f := range files {
		r, err := readRecord(f)
		if err != nil {
			t.Errorf("%s: %v", f, err)
			continue
		}
		if r.Instance.UUID == "" || !r.Resident || r.Image == nil || r.Build == nil || len(r.Ops) != 1 || r.Ops[0].Args.CleanShutdown != true ||
			r.Build.AdminPassword.Reveal() != "hunter2" || len(r.Instance.NetworkInfo) != 1 {
			t.Errorf("%s lost something: %+v", f, r)
		}
	}
}

// A message that is delivered again is carried out once, also after a restart, also when its instance is gone.
func TestDuplicates(t *testing.T) {
	l := newLab(t)
	op := l.server()
	uuid := op.Instance.UUID
	l.submit(op)
	l.submit(op)
	l.await(uuid, novalet.VMActive)
	l.submit(op)
	eventually(t, "nothing is left to do", func() bool { return l.idle(uuid) })
	if n := len(l.world.ActionEvents(uuid)); n != 1 {
		t.Errorf("%d events of a boot that came three times", n)
	}
	del := l.message(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.submit(op)
	l.submit(del)
	l.awaitGone(uuid)
	l.crash()
	l.open()
	l.submit(op)
	l.submit(del)
	if _, err := l.agent.lookup(uuid); err == nil {
		t.Error("a duplicate brought the instance back")
	}
	if n := len(l.world.ActionEvents(uuid)); n != 2 {
		t.Errorf("%d events, want 2", n)
	}
	if n := l.h.Faults.Calls("Runtime.Create"); n > 0 {
		t.Error("a duplicate ran after the restart")
	}
}

// What Submit accepted is carried out although the agent is killed before it begins.
func TestAcceptedIsDone(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	release := l.h.Faults.Block("Runtime.Freeze")
	defer release()
	l.cast(uuid, novalet.MethodPause, novalet.TaskPausing, novalet.OperationArgs{})
	eventually(t, "the pause is under way", func() bool { return l.h.Faults.Calls("Runtime.Freeze") > 0 })
	l.crash()
	l.open()
	l.awaitAfterCrash(uuid, novalet.VMPaused)
	if l.world.State(uuid) != novalet.ContainerPaused {
		t.Error("the guest is not paused")
	}
}

// A record that cannot be written is not accepted: the message must come again.
func TestSubmitIsDurable(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	l.agent.store.frozen.Store(true)
	op := l.message(uuid, novalet.MethodPause, novalet.TaskPausing, novalet.OperationArgs{})
	if err := l.agent.Submit(context.Background(), op); err == nil {
		t.Fatal("accepted without a record")
	}
	l.agent.store.frozen.Store(false)
	l.submit(op)
	l.await(uuid, novalet.VMPaused)
}

// Close leaves what runs in the journal, waits for it, and refuses what comes later.
func TestClose(t *testing.T) {
	l := newLab(t)
	op := l.server()
	uuid := op.Instance.UUID
	release := l.h.Faults.Block("ImageStore.Prepare")
	defer release()
	l.submit(op)
	eventually(t, "the boot waits for its image", func() bool { return l.h.Faults.Calls("ImageStore.Prepare") > 0 })
	old := l.agent
	l.close()
	if err := old.Submit(context.Background(), l.server()); !errors.Is(err, errShutdown) {
		t.Errorf("submit after close: %v", err)
	}
	if r := l.world.Row(uuid); r.VMState != novalet.VMBuilding || len(r.Faults) > 0 {
		t.Errorf("row %s with faults %v", r.VMState, r.Faults)
	}
	l.open()
	l.awaitAfterCrash(uuid, novalet.VMActive)
	l.checkRunning(uuid)
}

func TestSubmitRefuses(t *testing.T) {
	l := newLab(t)
	for _, c := range []struct {
		op   novalet.Operation
		want error
	}{
		{novalet.Operation{ID: "1", Method: "resize_instance", Instance: novalet.Instance{UUID: "aaaaaaaa-0000-4000-8000-000000000001"}}, novalet.ErrUnsupported},
		{novalet.Operation{ID: "2", Method: novalet.MethodStop, Instance: novalet.Instance{UUID: "../../../etc/passwd/aaaaaaaaaaaaaaaaa"}}, novalet.ErrInvalidState},
		{novalet.Operation{Method: novalet.MethodStop, Instance: novalet.Instance{UUID: "aaaaaaaa-0000-4000-8000-000000000001"}}, novalet.ErrInvalidState},
	} {
		if err := l.agent.Submit(context.Background(), &c.op); !errors.Is(err, c.want) {
			t.Errorf("%s of %q: %v, want %v", c.op.Method, c.op.Instance.UUID, err, c.want)
		}
	}
}

// run runs the periodic work for the length of a test.
func (l *lab) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	a := l.agent
	go func() { defer close(done); a.Run(ctx) }()
	l.t.Cleanup(func() { cancel(); <-done })
}

func TestGuestEndsByItself(t *testing.T) {
	l := newLab(t, func(l *lab) { l.cfg.SyncPowerInterval, l.cfg.RunningDeletedInterval = 0, 0 })
	l.run()
	uuid := l.boot()
	eventually(t, "the event arrives", func() bool {
		if l.world.State(uuid) == novalet.ContainerRunning {
			l.world.Exit(uuid, 1)
		} else {
			l.world.Emit(novalet.ContainerEvent{ID: uuid, Type: novalet.EventExited})
		}
		return l.world.Row(uuid).VMState == novalet.VMStopped && l.idle(uuid)
	})
	if r := l.world.Row(uuid); r.PowerState != novalet.PowerShutdown || r.TaskState != novalet.TaskNone || len(l.world.Plugs(uuid)) > 0 {
		t.Errorf("row %s power %d", r.VMState, r.PowerState)
	}
	if a := l.world.Actions(); len(a) != 1 {
		t.Errorf("actions %v", a)
	}
	// It can be started again.
	l.cast(uuid, novalet.MethodStart, novalet.TaskPoweringOn, novalet.OperationArgs{})
	l.await(uuid, novalet.VMActive)
	l.checkRunning(uuid)
}

// Every vm_state against what the guest does.
func TestSyncPowerStates(t *testing.T) {
	for _, c := range []struct {
		vm    novalet.VMState
		guest novalet.ContainerState
		want  novalet.VMState
		state novalet.ContainerState
		power novalet.PowerState
	}{
		{novalet.VMActive, run, novalet.VMActive, run, novalet.PowerRunning},
		{novalet.VMActive, off, novalet.VMStopped, off, novalet.PowerShutdown},
		{novalet.VMActive, ice, novalet.VMActive, ice, novalet.PowerPaused},
		{novalet.VMStopped, run, novalet.VMStopped, off, novalet.PowerShutdown},
		{novalet.VMPaused, off, novalet.VMStopped, off, novalet.PowerShutdown},
		{novalet.VMPaused, ice, novalet.VMPaused, ice, novalet.PowerPaused},
		{novalet.VMSuspended, ice, novalet.VMSuspended, ice, novalet.PowerSuspended},
		{novalet.VMSoftDeleted, run, novalet.VMSoftDeleted, off, novalet.PowerShutdown},
		{novalet.VMError, off, novalet.VMError, off, novalet.PowerShutdown},
		{novalet.VMRescued, run, novalet.VMRescued, run, novalet.PowerRunning},
	} {
		t.Run(string(c.vm)+"/"+string(c.guest), func(t *testing.T) {
			l := newLab(t)
			uuid := l.boot()
			ctx := context.Background()
			var err error
			switch c.guest {
			case off:
				err = l.h.Runtime.Stop(ctx, uuid, novalet.StopOptions{})
			case ice:
				err = l.h.Runtime.Freeze(ctx, uuid)
			}
			if err != nil {
				t.Fatal(err)
			}
			l.world.SetRow(uuid, func(r *fake.Row) { r.VMState, r.PowerState = c.vm, novalet.PowerNoState })
			if err := l.agent.syncPower(ctx); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is compared: "+l.state(uuid), func() bool {
				r := l.world.Row(uuid)
				return l.idle(uuid) && r.VMState == c.want && r.TaskState == novalet.TaskNone && r.PowerState == c.power && l.world.State(uuid) == c.state
			})
		})
	}
}

func TestReapDeleted(t *testing.T) {
	for action, want := range map[string]novalet.ContainerState{"reap": "", "shutdown": novalet.ContainerStopped, "log": novalet.ContainerRunning, "noop": novalet.ContainerRunning} {
		t.Run(action, func(t *testing.T) {
			l := newLab(t, func(l *lab) { l.cfg.RunningDeletedAction = action })
			uuid, other := l.boot(), l.boot()
			l.world.SetRow(uuid, func(r *fake.Row) { r.Deleted = true })
			if err := l.agent.reapDeleted(context.Background()); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the action is taken", func() bool { return l.idle(uuid) && l.world.State(uuid) == want })
			l.checkRunning(other)
			if len(l.world.Ports(uuid)) != 1 {
				t.Error("its ports were touched")
			}
		})
	}
}

func TestReclaim(t *testing.T) {
	l := newLab(t, func(l *lab) { l.cfg.ReclaimInstanceInterval = time.Hour })
	young, old := l.boot(), l.boot()
	for uuid, age := range map[string]time.Duration{young: time.Minute, old: 2 * time.Hour} {
		l.cast(uuid, novalet.MethodSoftDelete, novalet.TaskSoftDeleting, novalet.OperationArgs{})
		l.await(uuid, novalet.VMSoftDeleted)
		at := time.Now().Add(-age)
		l.world.SetRow(uuid, func(r *fake.Row) { r.DeletedAt = &at })
	}
	if err := l.agent.reclaim(context.Background()); err != nil {
		t.Fatal(err)
	}
	l.awaitGone(old)
	l.checkNothingLeft(old)
	if l.world.Row(young).VMState != novalet.VMSoftDeleted {
		t.Error("the young one was reclaimed too")
	}
}
