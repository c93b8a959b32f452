package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/novalet/novalet"
)

// method is what the agent knows of one cast.
type method struct {
	// event is the name of its action event.
	event string
	// eventAfter is how long an operation has to take until its event is written while it runs.
	eventAfter time.Duration
	run        func(a *Agent, ctx context.Context, in *instance, op *novalet.Operation) error
	// vm lists the vm_states in which nova-api lets it through; nil is any but deleted.
	vm []novalet.VMState
	// task lists the task_states that nova-api sets before the cast; nil is any.
	task []novalet.TaskState
	// own: run settles its failures itself.
	own bool
	// errorOut: a failure puts the instance into vm_state error.
	errorOut bool
	// action is what is told to others than Nova, around run; "" where run tells itself. tellError: also its failure;
	// tellAlways: its end whatever came of it.
	action                novalet.Action
	tellError, tellAlways bool
	// steps are task_states that run itself sets on the way.
	steps []novalet.TaskState
	// aside: the guest has no part in it, and stays quiesced.
	aside bool
}

// methods is filled by init to break the cycle between the table and the functions that look at it.
var methods map[novalet.Method]*method

func init() {
	type (
		vm   = []novalet.VMState
		task = []novalet.TaskState
	)
	methods = map[novalet.Method]*method{
		novalet.MethodBuild:     {event: "compute__do_build_and_run_instance", run: (*Agent).build, own: true},
		novalet.MethodTerminate: {event: "compute_terminate_instance", eventAfter: eventAside, run: (*Agent).terminate, own: true},

		novalet.MethodStop: {event: "compute_stop_instance", action: novalet.ActionPowerOff, run: (*Agent).stopInstance,
			vm: vm{novalet.VMActive, novalet.VMError, novalet.VMStopped, novalet.VMShelved, novalet.VMPaused, novalet.VMSuspended, novalet.VMRescued}, task: task{novalet.TaskPoweringOff, novalet.TaskNone}},
		novalet.MethodStart: {event: "compute_start_instance", action: novalet.ActionPowerOn, run: (*Agent).startInstance,
			vm: vm{novalet.VMStopped, novalet.VMActive, novalet.VMError, novalet.VMShelved}, task: task{novalet.TaskPoweringOn}},
		novalet.MethodReboot: {event: "compute_reboot_instance", action: novalet.ActionReboot, tellError: true, run: (*Agent).rebootInstance, own: true,
			vm:   vm{novalet.VMActive, novalet.VMStopped, novalet.VMPaused, novalet.VMSuspended, novalet.VMError, novalet.VMRescued},
			task: rebootStates},
		novalet.MethodPause: {event: "compute_pause_instance", action: novalet.ActionPause, run: (*Agent).pauseInstance,
			vm: vm{novalet.VMActive}, task: task{novalet.TaskPausing}},
		novalet.MethodUnpause: {event: "compute_unpause_instance", action: novalet.ActionUnpause, run: (*Agent).unpauseInstance,
			vm: vm{novalet.VMPaused}, task: task{novalet.TaskUnpausing}},
		novalet.MethodSuspend: {event: "compute_suspend_instance", action: novalet.ActionSuspend, run: (*Agent).suspendInstance, errorOut: true,
			vm: vm{novalet.VMActive}, task: task{novalet.TaskSuspending}},
		novalet.MethodResume: {event: "compute_resume_instance", action: novalet.ActionResume, run: (*Agent).resumeInstance, errorOut: true,
			vm: vm{novalet.VMSuspended}, task: task{novalet.TaskResuming}},
		novalet.MethodSoftDelete: {event: "compute_soft_delete_instance", action: novalet.ActionSoftDelete, tellAlways: true, run: (*Agent).softDelete, errorOut: true,
			task: task{novalet.TaskSoftDeleting}},
		novalet.MethodRestore: {event: "compute_restore_instance", action: novalet.ActionRestore, run: (*Agent).restoreInstance,
			vm: vm{novalet.VMSoftDeleted}, task: task{novalet.TaskRestoring}},
		novalet.MethodRescue: {event: "compute_rescue_instance", action: novalet.ActionRescue, run: (*Agent).rescueInstance, errorOut: true,
			vm: vm{novalet.VMActive, novalet.VMStopped, novalet.VMError}, task: task{novalet.TaskRescuing}},
		novalet.MethodUnrescue: {event: "compute_unrescue_instance", action: novalet.ActionUnrescue, run: (*Agent).unrescueInstance, errorOut: true,
			vm: vm{novalet.VMRescued}, task: task{novalet.TaskUnrescuing}},
		novalet.MethodRebuild: {event: "compute_rebuild_instance", action: novalet.ActionRebuild, tellError: true, run: (*Agent).rebuildInstance, errorOut: true,
			vm: vm{novalet.VMActive, novalet.VMStopped, novalet.VMError}, task: task{novalet.TaskRebuilding},
			steps: task{novalet.TaskRebuildBlockDevice, novalet.TaskRebuildSpawning}},
		novalet.MethodSnapshot: {event: "compute_snapshot_instance", action: novalet.ActionSnapshot, run: (*Agent).snapshotInstance,
			vm:   vm{novalet.VMActive, novalet.VMStopped, novalet.VMPaused, novalet.VMSuspended},
			task: task{novalet.TaskSnapshotPending}, steps: task{novalet.TaskSnapshot, novalet.TaskImageUploading}},
		novalet.MethodBackup: {event: "compute_backup_instance", action: novalet.ActionSnapshot, run: (*Agent).backupInstance,
			vm:   vm{novalet.VMActive, novalet.VMStopped, novalet.VMPaused, novalet.VMSuspended},
			task: task{novalet.TaskBackup}, steps: task{novalet.TaskImageUploading}},
		novalet.MethodShelve: {event: "compute_shelve_instance", run: (*Agent).shelveInstance, errorOut: true,
			vm:   vm{novalet.VMActive, novalet.VMStopped, novalet.VMPaused, novalet.VMSuspended},
			task: task{novalet.TaskShelving}, steps: task{novalet.TaskShelvingUploading, novalet.TaskShelvingOffloading}},
		novalet.MethodShelveOffload: {event: "compute_shelve_offload_instance", run: (*Agent).shelveOffload, errorOut: true,
			vm: vm{novalet.VMShelved, novalet.VMActive, novalet.VMStopped, novalet.VMPaused, novalet.VMSuspended}, task: offloading},
		novalet.MethodUnshelve: {event: "compute_unshelve_instance", action: novalet.ActionUnshelve, run: (*Agent).unshelveInstance,
			vm: vm{novalet.VMShelved, novalet.VMShelvedOffloaded}, task: task{novalet.TaskUnshelving}, steps: task{novalet.TaskSpawning}},
		novalet.MethodDetachIface:   {aside: true, event: "compute_detach_interface", action: novalet.ActionInterfaceDetach, run: (*Agent).detachInterface},
		novalet.MethodInjectNetwork: {aside: true, event: "compute_inject_network_info", run: (*Agent).injectNetwork},
		novalet.MethodResetNetwork:  {aside: true, event: "compute_reset_network", run: (*Agent).injectNetwork},
		novalet.MethodAddFixedIP:    {aside: true, event: "compute_add_fixed_ip_to_instance", action: novalet.ActionAddFixedIP, run: (*Agent).addFixedIP},
		novalet.MethodRemoveFixedIP: {aside: true, event: "compute_remove_fixed_ip_from_instance", action: novalet.ActionRemoveFixedIP, run: (*Agent).removeFixedIP},
		novalet.MethodTriggerCrash:  {aside: true, event: "compute_trigger_crash_dump", action: novalet.ActionTriggerCrash, run: (*Agent).triggerCrashDump},
	}
}

// rebootStates are what reboot_instance may find and leave, soft and hard.
var rebootStates = []novalet.TaskState{
	novalet.TaskRebooting, novalet.TaskRebootPending, novalet.TaskRebootStarted,
	novalet.TaskRebootingHard, novalet.TaskRebootPendingHard, novalet.TaskRebootStartedHard,
}

// allowed answers a method in a wrong state as Nova answers it, before anything is touched.
func (m *method) allowed(op *novalet.Operation, replayed bool) error {
	inst := &op.Instance
	// An operation that a restart interrupted may have come as far as a state of its own.
	own := replayed && slices.Contains(m.steps, inst.TaskState)
	if m.task != nil && !slices.Contains(m.task, inst.TaskState) && !own {
		return fmt.Errorf("%s instance %s: task_state is %q: %w", op.Method, inst.UUID, inst.TaskState, novalet.ErrTaskState)
	}
	if m.vm != nil && inst.VMState != "" && !slices.Contains(m.vm, inst.VMState) && !own {
		f := novalet.Faultf(novalet.ErrInvalidState, "InstanceInvalidState",
			"Instance %s in vm_state %s. Cannot %s while the instance is in this state.", inst.UUID, inst.VMState, op.Method)
		f.Details = map[string]any{"attr": "vm_state", "instance_uuid": inst.UUID, "state": string(inst.VMState), "method": string(op.Method)}
		return f
	}
	return nil
}

// execute runs one operation to its end, and writes its event and its fault. It returns errShutdown when the agent goes
// before that end; the operation then stays in the journal.
func (a *Agent) execute(ctx context.Context, in *instance, op *novalet.Operation) error {
	m := methods[op.Method]
	if m == nil {
		// A journal written by an agent that knows more.
		in.log.Error("operation of the journal is unknown here", "method", op.Method)
		return nil
	}
	began := time.Now()
	log := in.log.With("request_id", op.Context.RequestID, "method", op.Method)
	in.adopt(op)
	ev := a.startEvent(in.log, op.Context, in.uuid, m)
	in.mu.Lock()
	replayed := in.replayed
	in.mu.Unlock()
	err := m.allowed(op, replayed)
	if err != nil {
		// Nothing was touched, so whatever it is it stays.
		refused := *m
		refused.errorOut = false
		err = a.failed(ctx, in, op, &refused, err)
	} else {
		a.tellStart(in, op, m)
		a.rouse(in, op.Method)
		if err = m.run(a, ctx, in, op); err != nil && !m.own && !errors.Is(context.Cause(ctx), errShutdown) {
			err = a.failed(ctx, in, op, m, err)
		}
		a.tellEnd(ctx, in, op, m, err)
	}
	if err != nil && errors.Is(context.Cause(a.ctx), errShutdown) {
		log.Info("operation is left in the journal", "took", time.Since(began))
		return errShutdown
	}
	ev.finish(err)
	a.announce(in)
	if err != nil {
		log.Warn("operation ended", "took", time.Since(began), "err", err)
	} else {
		log.Info("operation done", "took", time.Since(began))
	}
	return nil
}

// adopt takes over what the message knows of the instance. Interfaces are our own knowledge once we have any: this
// host is the only one that writes the info cache.
func (in *instance) adopt(op *novalet.Operation) {
	in.set(func(r *record) {
		info, old := r.Instance.NetworkInfo, r.Instance
		r.Instance = op.Instance
		if r.Resident && (len(info) > 0 || op.Method != novalet.MethodBuild) {
			r.Instance.NetworkInfo = info
		}
		if r.Instance.LaunchedAt == nil {
			r.Instance.LaunchedAt = old.LaunchedAt
		}
		if r.Instance.TrustedCertificates == nil {
			r.Instance.TrustedCertificates = old.TrustedCertificates
		}
	})
}

// announce tells the resource tracker how the instance stands.
func (a *Agent) announce(in *instance) {
	var resident bool
	in.read(func(r *record) { resident = r.Resident })
	a.conductor.InstanceChanged(in.view(), !resident)
}

// failed is what Nova's wrappers do around a method: a fault, and the task_state taken back, or vm_state error. It
// returns the error for the event.
func (a *Agent) failed(ctx context.Context, in *instance, op *novalet.Operation, m *method, err error) error {
	if quiet(ctx, err) {
		return err
	}
	ctx = a.ctx
	if ferr := a.insist(ctx, in.log, "create fault", func(ctx context.Context) error {
		return a.conductor.CreateFault(ctx, op.Context, in.uuid, err)
	}); ferr != nil {
		in.log.Warn("fault is not recorded", "err", ferr)
	}
	fields := map[string]any{"task_state": nil}
	if m.errorOut && !errors.Is(err, novalet.ErrUnsupported) {
		fields["vm_state"] = novalet.VMError
	}
	if st, serr := a.runtime.Status(ctx, in.uuid); serr == nil {
		fields["power_state"] = in.powerOf(st.State)
		in.setPower(in.powerOf(st.State))
	}
	expected := append(append(append([]novalet.TaskState{}, m.task...), m.steps...), novalet.TaskNone)
	if serr := a.save(ctx, in, op.Context, expected, fields); serr != nil {
		in.log.Info("task_state is not taken back", "err", serr)
		return err
	}
	in.set(func(r *record) {
		r.Instance.TaskState = novalet.TaskNone
		if vm, ok := fields["vm_state"].(novalet.VMState); ok {
			r.Instance.VMState = vm
		}
	})
	return err
}

// quiet says whether an error means that the operation was overtaken: then nothing is to be told to anybody.
func quiet(ctx context.Context, err error) bool {
	return errors.Is(err, novalet.ErrInstanceGone) || errors.Is(err, novalet.ErrTaskState) ||
		errors.Is(context.Cause(ctx), errDeleted) || errors.Is(context.Cause(ctx), errShutdown)
}

// actionEvent is an event of the instance's action list, written beside the operation.
type actionEvent struct {
	a          *Agent
	log        *slog.Logger
	rc         novalet.RequestContext
	uuid, name string
	ended      chan struct{} // closed by finish
	started    chan struct{}
	ok         bool
}

// startEvent writes a method's event_start without waiting for it. Its loss must not fail the operation.
func (a *Agent) startEvent(log *slog.Logger, rc novalet.RequestContext, uuid string, m *method) *actionEvent {
	name := m.event
	e := &actionEvent{a: a, log: log, rc: rc, uuid: uuid, name: name, ended: make(chan struct{}), started: make(chan struct{})}
	run := func() {
		defer close(e.started)
		if m.eventAfter > 0 {
			select {
			case <-time.After(m.eventAfter):
			case <-e.ended:
			case <-a.ctx.Done():
			}
		}
		err := a.insist(a.ctx, log, "start event", func(ctx context.Context) error {
			return a.conductor.StartEvent(ctx, rc, uuid, name)
		})
		e.ok = err == nil
		if err != nil && a.ctx.Err() == nil {
			log.Warn("event is not recorded", "event", name, "err", err)
		}
	}
	if !a.goRun(run) {
		close(e.started)
	}
	return e
}

// finish writes event_finish once event_start is through. It does not wait.
func (e *actionEvent) finish(opErr error) {
	close(e.ended)
	e.a.goRun(func() {
		<-e.started
		if !e.ok {
			return
		}
		err := e.a.insist(e.a.ctx, e.log, "finish event", func(ctx context.Context) error {
			return e.a.conductor.FinishEvent(ctx, e.rc, e.uuid, e.name, opErr)
		})
		if err != nil && e.a.ctx.Err() == nil {
			e.log.Warn("end of event is not recorded", "event", e.name, "err", err)
		}
	})
}

// powerOf is Nova's word for what the instance's container does. One that is quiesced has not changed its state.
func (in *instance) powerOf(s novalet.ContainerState) novalet.PowerState {
	switch s {
	case novalet.ContainerRunning:
		return novalet.PowerRunning
	case novalet.ContainerPaused:
		if in.quiesced() {
			return novalet.PowerRunning
		}
		return novalet.PowerPaused
	case novalet.ContainerStopped:
		return novalet.PowerShutdown
	}
	return novalet.PowerNoState
}
