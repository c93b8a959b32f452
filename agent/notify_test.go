package agent

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/novalet/novalet"
)

// says returns what was told of an instance, as "action phase".
func (l *lab) says(uuid string) []string {
	var out []string
	for _, n := range l.told.Told(uuid) {
		s := string(n.Action)
		if n.Phase != "" {
			s += " " + string(n.Phase)
		}
		out = append(out, s)
	}
	return out
}

func TestTold(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	seen := 0
	check := func(what string, want ...string) {
		t.Helper()
		got := l.says(uuid)
		if !slices.Equal(got[seen:], want) {
			t.Errorf("%s told %q, want %q", what, got[seen:], want)
		}
		seen = len(got)
	}
	check("build", "create start", "create end")
	first, last := l.told.Told(uuid)[0], l.told.Told(uuid)[1]
	if first.Instance.VMState != novalet.VMBuilding || first.Instance.Host != "" || first.Instance.LaunchedAt != nil {
		t.Errorf("create.start shows %+v", first.Instance)
	}
	if i := last.Instance; i.VMState != novalet.VMActive || i.TaskState != novalet.TaskNone || i.Host != testHost || i.LaunchedAt == nil ||
		i.PowerState != novalet.PowerRunning || len(i.NetworkInfo) != 1 {
		t.Errorf("create.end shows %+v", i)
	}
	for _, s := range []struct {
		method novalet.Method
		task   novalet.TaskState
		args   novalet.OperationArgs
		vm     novalet.VMState
		want   []string
	}{
		{novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{}, novalet.VMStopped, []string{"power_off start", "power_off end"}},
		{novalet.MethodStart, novalet.TaskPoweringOn, novalet.OperationArgs{}, novalet.VMActive, []string{"power_on start", "power_on end"}},
		{novalet.MethodReboot, novalet.TaskRebooting, novalet.OperationArgs{RebootType: "SOFT"}, novalet.VMActive, []string{"reboot start", "reboot end"}},
		{novalet.MethodPause, novalet.TaskPausing, novalet.OperationArgs{}, novalet.VMPaused, []string{"pause start", "pause end"}},
		{novalet.MethodUnpause, novalet.TaskUnpausing, novalet.OperationArgs{}, novalet.VMActive, []string{"unpause start", "unpause end"}},
		{novalet.MethodSuspend, novalet.TaskSuspending, novalet.OperationArgs{}, novalet.VMSuspended, []string{"suspend start", "suspend end"}},
		{novalet.MethodResume, novalet.TaskResuming, novalet.OperationArgs{}, novalet.VMActive, []string{"resume start", "resume end"}},
		{novalet.MethodRescue, novalet.TaskRescuing, novalet.OperationArgs{ImageID: diskImage}, novalet.VMRescued, []string{"rescue start", "exists", "rescue end"}},
		{novalet.MethodUnrescue, novalet.TaskUnrescuing, novalet.OperationArgs{}, novalet.VMActive, []string{"unrescue start", "unrescue end"}},
		{novalet.MethodSoftDelete, novalet.TaskSoftDeleting, novalet.OperationArgs{}, novalet.VMSoftDeleted, []string{"soft_delete start", "soft_delete end"}},
		{novalet.MethodRestore, novalet.TaskRestoring, novalet.OperationArgs{}, novalet.VMActive, []string{"restore start", "restore end"}},
		{novalet.MethodRebuild, novalet.TaskRebuilding, novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{ImageRef: appImage}}, novalet.VMActive,
			[]string{"exists", "rebuild start", "rebuild end"}},
		{novalet.MethodSnapshot, novalet.TaskSnapshotPending, novalet.OperationArgs{ImageID: "snap"}, novalet.VMActive, []string{"snapshot start", "snapshot end"}},
		{novalet.MethodBackup, novalet.TaskBackup, novalet.OperationArgs{ImageID: "back", Rotation: 1}, novalet.VMActive, []string{"snapshot start", "snapshot end"}},
		{novalet.MethodInjectNetwork, novalet.TaskNone, novalet.OperationArgs{}, novalet.VMActive, nil},
		{novalet.MethodShelve, novalet.TaskShelving, novalet.OperationArgs{ImageID: "shelf"}, novalet.VMShelvedOffloaded,
			[]string{"exists", "shelve start", "shelve end", "shelve_offload start", "shelve_offload end"}},
	} {
		l.cast(uuid, s.method, s.task, s.args)
		l.await(uuid, s.vm)
		check(string(s.method), s.want...)
	}
	if n := l.told.Told(uuid); n[len(n)-1].Instance.VMState != novalet.VMShelvedOffloaded {
		t.Errorf("shelve_offload.end shows %+v", n[len(n)-1].Instance)
	}
	l.world.Allocate(uuid)
	l.cast(uuid, novalet.MethodUnshelve, novalet.TaskUnshelving, novalet.OperationArgs{Build: &novalet.BuildArgs{Image: novalet.ImageMeta{ID: appImage}, Node: testHost}})
	l.await(uuid, novalet.VMActive)
	check("unshelve_instance", "unshelve start", "unshelve end")

	vif, err := l.agent.AttachInterface(context.Background(), &novalet.InterfaceRequest{Instance: novalet.Instance{UUID: uuid}, Network: novalet.NetworkRequest{NetworkID: "net"}})
	if err != nil {
		t.Fatal(err)
	}
	check("attach_interface", "interface_attach start", "interface_attach end")
	l.cast(uuid, novalet.MethodDetachIface, novalet.TaskNone, novalet.OperationArgs{PortID: vif.ID})
	l.await(uuid, novalet.VMActive)
	check("detach_interface", "interface_detach start", "interface_detach end")

	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(uuid)
	check("terminate_instance", "delete start", "shutdown start", "shutdown end", "delete end")
	n := l.told.Told(uuid)
	if i := n[len(n)-1].Instance; i.VMState != novalet.VMDeleted || i.DeletedAt == nil || len(i.NetworkInfo) != 0 {
		t.Errorf("delete.end shows %+v", i)
	}
}

func TestToldOfFailures(t *testing.T) {
	broken := novalet.Faultf(novalet.ErrAbort, "ImageUnacceptable", "no")
	l := newLab(t)
	l.h.Faults.Fail("Runtime.Start", broken, 1)
	op := l.server()
	uuid := op.Instance.UUID
	l.submit(op)
	l.await(uuid, novalet.VMError)
	if got := l.says(uuid); !slices.Equal(got, []string{"create start", "create error"}) {
		t.Errorf("a build that fails told %q", got)
	}
	if n := l.told.Told(uuid)[1]; !errors.Is(n.Err, novalet.ErrAbort) || n.Instance.VMState != novalet.VMBuilding {
		t.Errorf("create.error shows %v of %+v", n.Err, n.Instance)
	}

	uuid = l.boot()
	before := len(l.says(uuid))
	l.h.Faults.Fail("Runtime.Start", broken, 1)
	l.cast(uuid, novalet.MethodReboot, novalet.TaskRebootingHard, novalet.OperationArgs{RebootType: "HARD"})
	l.await(uuid, novalet.VMError)
	if got := l.says(uuid)[before:]; !slices.Equal(got, []string{"reboot start", "reboot error"}) {
		t.Errorf("a reboot that fails told %q", got)
	}

	// Most actions have no form for a failure: their end does not come.
	uuid = l.boot()
	before = len(l.says(uuid))
	l.h.Faults.Fail("Runtime.Freeze", broken, 1)
	l.cast(uuid, novalet.MethodPause, novalet.TaskPausing, novalet.OperationArgs{})
	eventually(t, "the pause has failed", func() bool { return len(l.world.Row(uuid).Faults) == 1 && l.idle(uuid) })
	if got := l.says(uuid)[before:]; !slices.Equal(got, []string{"pause start"}) {
		t.Errorf("a pause that fails told %q", got)
	}

	before = len(l.says(uuid))
	l.h.Faults.Fail("NetworkAPI.Allocate", broken, 1)
	if _, err := l.agent.AttachInterface(context.Background(), &novalet.InterfaceRequest{Instance: novalet.Instance{UUID: uuid}}); err == nil {
		t.Fatal("an interface was attached")
	}
	if got := l.says(uuid)[before:]; !slices.Equal(got, []string{"interface_attach start", "interface_attach error"}) {
		t.Errorf("an attach that fails told %q", got)
	}
}

// A guest that ends by itself is told as the stop that Nova makes of it.
func TestToldOfOwnEnd(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.agent.Run(ctx)
	}()
	defer func() {
		stop()
		<-done
	}()
	l.world.Exit(uuid, 0)
	l.await(uuid, novalet.VMStopped)
	eventually(t, "the stop was told", func() bool {
		return slices.Equal(l.says(uuid), []string{"create start", "create end", "power_off start", "power_off end"})
	})
}
