package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/novalet/novalet"
)

// Recover is Nova's init_host: it compares the records with what runs here and with what Nova believes, and lets the journal
// go on. It blocks until the conductor answers; nothing is started, ended or changed before. The host is the authority
// on what runs, Nova on whether it may: what is deleted, evacuated or on another host is destroyed here without
// touching its ports. One broken instance never stops the rest. It must be called once, before messages are consumed.
func (a *Agent) Recover(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(a.ctx, func() { cancel(errShutdown) })()

	containers, err := a.runtime.List(ctx)
	if err != nil {
		return fmt.Errorf("recover: list containers: %w", err)
	}
	r := &recovery{a: a, rows: map[string]*novalet.Instance{}, running: map[string]novalet.ContainerStatus{}}
	for _, c := range containers {
		r.running[c.ID] = c
	}
	if err := r.ask(ctx); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	for i := range r.evacuated {
		if err := r.evacuate(ctx, &r.evacuated[i]); err != nil {
			a.log.Error("evacuated instance is not cleaned up", "instance", r.evacuated[i].InstanceUUID, "err", err)
		}
	}
	for _, uuid := range r.uuids() {
		if err := r.settle(ctx, uuid); err != nil {
			a.log.Error("instance is not recovered", "instance", uuid, "err", err)
		}
	}
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	keep := map[string]bool{}
	for _, in := range a.all() {
		keep[in.uuid] = true
	}
	for id := range r.running {
		keep[id] = true
	}
	if swept, err := a.plugger.Sweep(ctx, keep); err != nil {
		a.log.Warn("leftover interfaces are not swept", "err", err)
	} else if len(swept) > 0 {
		a.log.Info("leftover interfaces are gone", "vifs", swept)
	}
	a.mu.Lock()
	a.recovered = true
	a.mu.Unlock()
	for _, in := range a.all() {
		in.kick()
		a.dropIfIdle(in)
	}
	return nil
}

// recovery is what Recover knows.
type recovery struct {
	a         *Agent
	rows      map[string]*novalet.Instance
	running   map[string]novalet.ContainerStatus
	evacuated []novalet.EvacuatedInstance
}

// ask reads from Nova all it has to say about what is here.
func (r *recovery) ask(ctx context.Context) error {
	a := r.a
	var rows []novalet.Instance
	err := a.insist(ctx, a.log, "list instances of this host", func(ctx context.Context) (err error) {
		rows, err = a.conductor.InstancesByHost(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("list instances of this host: %w", err)
	}
	for i := range rows {
		r.rows[rows[i].UUID] = &rows[i]
	}
	err = a.insist(ctx, a.log, "list evacuations", func(ctx context.Context) (err error) {
		r.evacuated, err = a.conductor.Evacuated(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("list evacuations: %w", err)
	}
	var missing []string
	for _, uuid := range r.uuids() {
		if r.rows[uuid] == nil {
			missing = append(missing, uuid)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	err = a.insist(ctx, a.log, "list instances", func(ctx context.Context) (err error) {
		rows, err = a.conductor.Instances(ctx, missing)
		return err
	})
	if err != nil {
		return fmt.Errorf("list instances: %w", err)
	}
	for i := range rows {
		r.rows[rows[i].UUID] = &rows[i]
	}
	return nil
}

// uuids are the instances that a record, a container or a row names, in order.
func (r *recovery) uuids() []string {
	set := map[string]bool{}
	for _, in := range r.a.all() {
		set[in.uuid] = true
	}
	for id := range r.running {
		set[id] = true
	}
	for id := range r.rows {
		set[id] = true
	}
	var out []string
	for id := range set {
		if validUUID(id) {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// evacuate removes what an evacuation left here. Its ports and volumes are the new host's.
func (r *recovery) evacuate(ctx context.Context, e *novalet.EvacuatedInstance) error {
	if err := r.remove(ctx, e.InstanceUUID); err != nil {
		return err
	}
	delete(r.running, e.InstanceUUID)
	return r.a.insist(ctx, r.a.log, "mark evacuation done", func(ctx context.Context) error {
		return r.a.conductor.EvacuationDone(ctx, e)
	})
}

// remove destroys what is here of an instance, ports aside, and forgets its journal.
func (r *recovery) remove(ctx context.Context, uuid string) error {
	a := r.a
	if err := a.runtime.Destroy(ctx, uuid, novalet.DestroyOptions{}); err != nil {
		return fmt.Errorf("destroy container: %w", err)
	}
	in, err := a.lookup(uuid)
	if err != nil {
		return a.images.Release(ctx, uuid)
	}
	left := &pending{Context: a.conductor.NewContext(), Info: in.view().NetworkInfo}
	in.read(func(rec *record) {
		if rec.Pending != nil {
			left = &pending{Context: rec.Pending.Context, Info: rec.Pending.Info, Ports: rec.Pending.Ports, Allocation: rec.Pending.Allocation}
		}
	})
	left.Plugs = a.unplugAll(ctx, uuid, in.view().NetworkInfo) != nil
	left.Image = a.images.Release(ctx, uuid) != nil
	in.forgetHere(left)
	in.note(func(rec *record) { rec.Ops = nil })
	return nil
}

// settle decides on one instance.
func (r *recovery) settle(ctx context.Context, uuid string) error {
	a, row := r.a, r.rows[uuid]
	st, here := r.running[uuid]
	in, err := a.lookup(uuid)
	known := err == nil
	switch {
	case known && !here && in.onlyPending():
		return nil // it went; what is left to undo is tried again later
	case row == nil && known:
		if here {
			in.log.Warn("Nova does not know this instance (any more); it is left alone")
			return nil
		}
		// A build of the journal finds out by itself; anything else has no object.
		if op := in.first(); op == nil || op.Method != novalet.MethodBuild {
			in.forgetHere(nil)
			in.note(func(rec *record) { rec.Ops = nil })
		}
		return nil
	case row == nil:
		a.log.Warn("Nova does not know this container; it is left alone", "instance", uuid)
		return nil
	case row.Deleted:
		return r.deleted(ctx, uuid, in)
	case row.Host != a.host:
		if known {
			if op := in.first(); op != nil && row.Host == "" && (op.Method == novalet.MethodBuild || op.Method == novalet.MethodUnshelve || op.Method == novalet.MethodTerminate) {
				in.refreshOps(row)
				return nil
			}
			if op := in.first(); op != nil && evacuates(op) && op.Args.Rebuild.SourceHost == row.Host {
				in.refreshOps(row) // an evacuation that had not begun
				return nil
			}
		}
		if known || here {
			a.log.Warn("instance is on another host; what is here is destroyed", "instance", uuid, "host", row.Host)
		}
		return r.remove(ctx, uuid)
	}
	if !known {
		if in, err = a.obtain(row); err != nil {
			return err
		}
	}
	in.set(func(rec *record) {
		info := rec.Instance.NetworkInfo
		rec.Instance = *row
		if len(info) > 0 || rec.Allocated {
			rec.Instance.NetworkInfo = info
		}
		rec.Resident = true
	})
	in.setPower(in.powerSeen(row.VMState, st.State))
	a.announce(in)
	r.quiesce(in, st)
	if in.first() != nil {
		in.refreshOps(row)
		return nil
	}
	if !known {
		in.note(func(*record) {})
	}
	r.table(in, row, st)
	return nil
}

// quiesce leaves a guest quiesced that the agent before has said is, and lets one go on that it had not come so far with.
func (r *recovery) quiesce(in *instance, st novalet.ContainerStatus) {
	var until *time.Time
	in.read(func(rec *record) { until = rec.Quiesced })
	if until != nil && (st.State != novalet.ContainerPaused || !r.a.now().Before(*until)) {
		in.post(func(context.Context) { r.a.endQuiesce(in) })
	}
}

// deleted handles an instance that was deleted while the agent was away.
func (r *recovery) deleted(ctx context.Context, uuid string, in *instance) error {
	a := r.a
	if in == nil {
		if a.cfg.RunningDeletedAction != "reap" {
			a.log.Warn("a deleted instance is still here", "instance", uuid, "action", a.cfg.RunningDeletedAction)
			return nil
		}
		a.log.Info("deleted instance is reaped", "instance", uuid)
		return r.remove(ctx, uuid)
	}
	op := in.first()
	if op != nil && op.Method == novalet.MethodTerminate {
		return nil // it goes on, and repeats nothing
	}
	if op != nil && op.Method == novalet.MethodBuild {
		// The boot never ended, so nobody but this host knows the ports it made.
		in.note(func(rec *record) {
			rec.Failed = &failure{Quiet: true, Gone: true, Cause: "instance was deleted while the agent was away"}
			rec.Ops = rec.Ops[:1]
		})
		return nil
	}
	in.log.Info("instance was deleted while the agent was away")
	return r.remove(ctx, uuid)
}

// first returns the operation at the head of the journal.
func (in *instance) first() *novalet.Operation {
	if in == nil {
		return nil
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.rec.Ops) == 0 {
		return nil
	}
	o := in.rec.Ops[0]
	return &o
}

// onlyPending says that the instance is not here, has nothing to do, and left something to undo.
func (in *instance) onlyPending() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return !in.rec.Resident && len(in.rec.Ops) == 0 && !in.rec.Pending.empty()
}

// refreshOps lets the journal's operations see the instance as Nova has it now, and drops a build that had ended.
func (in *instance) refreshOps(row *novalet.Instance) {
	var evacuated *novalet.Operation
	in.note(func(rec *record) {
		ops := slices.Clone(rec.Ops)
		if evacuates(&ops[0]) && row.Host == in.a.host && row.TaskState == novalet.TaskNone && row.VMState != novalet.VMError {
			// All but the migration's record was written.
			evacuated, ops = &ops[0], ops[1:]
			in.replayed = len(ops) > 0
		}
		if len(ops) > 0 && ops[0].Method == novalet.MethodBuild && row.Host == in.a.host && rec.Failed == nil {
			switch {
			case row.VMState == novalet.VMActive && row.TaskState == novalet.TaskNone:
				// The last save was answered to nobody.
				ops = ops[1:]
				rec.FirstBoot, rec.Allocated, rec.BootID = false, false, in.a.bootID
				in.replayed = len(ops) > 0
			case row.VMState == novalet.VMError:
				rec.Failed = &failure{Quiet: true, Cause: "instance is in error"}
			}
		}
		for i := range ops {
			info := ops[i].Instance.NetworkInfo
			ops[i].Instance = *row
			if len(row.NetworkInfo) == 0 {
				ops[i].Instance.NetworkInfo = info
			}
		}
		rec.Ops = ops
	})
	if evacuated != nil {
		in.post(func(context.Context) { in.a.endEvacuation(in, evacuated, true) })
	}
}

// table is Nova's repair table (nova/compute/manager.py _init_instance) for an instance that is ours and has no journal.
func (r *recovery) table(in *instance, row *novalet.Instance, st novalet.ContainerStatus) {
	a := r.a
	running, paused := st.State == novalet.ContainerRunning, st.State == novalet.ContainerPaused
	if paused && in.quiesced() {
		running, paused = true, false
	}
	vm, task := row.VMState, row.TaskState
	own := func(m novalet.Method, args novalet.OperationArgs) {
		in.post(func(ctx context.Context) { a.ownOperation(ctx, in, m, args) })
	}
	put := func(vm novalet.VMState, why string) {
		in.log.Info("state is put right", "vm_state", vm, "was", row.TaskState, "why", why)
		in.post(func(ctx context.Context) { a.putState(ctx, in, []novalet.TaskState{task}, vm) })
	}
	switch {
	case task == novalet.TaskDeleting:
		own(novalet.MethodTerminate, novalet.OperationArgs{})
	case vm == novalet.VMSoftDeleted, vm == novalet.VMError && task != novalet.TaskResizeMigrating:
	case vm == novalet.VMDeleted:
		own(novalet.MethodTerminate, novalet.OperationArgs{})
	case vm == novalet.VMBuilding, oneOf(task, novalet.TaskScheduling, novalet.TaskBlockDeviceMapping, novalet.TaskNetworking, novalet.TaskSpawning):
		in.post(func(ctx context.Context) { a.buildLost(ctx, in, task) })
	case oneOf(task, novalet.TaskRebuilding, novalet.TaskRebuildBlockDevice, novalet.TaskRebuildSpawning):
		put(novalet.VMError, "rebuild was interrupted")
	case oneOf(task, novalet.TaskSnapshotPending, novalet.TaskSnapshot, novalet.TaskImagePendingUpload, novalet.TaskImageUploading, novalet.TaskBackup, novalet.TaskResizePrep):
		if paused && vm != novalet.VMPaused && vm != novalet.VMSuspended {
			// Frozen for the copy, and never thawed.
			in.post(func(ctx context.Context) {
				if err := a.runtime.Thaw(ctx, in.uuid); err != nil && ctx.Err() == nil {
					in.log.Error("guest is not thawed", "err", err)
				}
			})
		}
		put(vm, "operation was interrupted")
	case oneOf(task, rebootStates...):
		if running && oneOf(task, novalet.TaskRebootStarted, novalet.TaskRebootStartedHard) {
			put(novalet.VMActive, "guest runs")
		} else {
			own(novalet.MethodReboot, novalet.OperationArgs{RebootType: "HARD"})
		}
	case running && oneOf(task, novalet.TaskPausing, novalet.TaskUnpausing):
		put(novalet.VMActive, "guest runs")
	case paused && task == novalet.TaskUnpausing:
		own(novalet.MethodUnpause, novalet.OperationArgs{})
	case paused && task == novalet.TaskPausing:
		put(novalet.VMPaused, "guest is paused")
	case task == novalet.TaskPoweringOff:
		own(novalet.MethodStop, novalet.OperationArgs{CleanShutdown: true})
	case task == novalet.TaskPoweringOn:
		own(novalet.MethodStart, novalet.OperationArgs{})
	case running || paused:
		in.post(func(ctx context.Context) { a.replug(ctx, in, st.NetNS) })
	case row.PowerState == novalet.PowerRunning && (vm == novalet.VMActive || vm == novalet.VMRescued) && task == novalet.TaskNone && a.hostRebooted(in, st) && a.cfg.ResumeGuestsStateOnHostBoot:
		in.log.Info("guest ran before the host was booted; it is started")
		in.post(func(ctx context.Context) {
			if err := a.bring(ctx, in); err != nil && ctx.Err() == nil {
				in.log.Error("guest is not started again", "err", err)
				a.evaluate(ctx, in)
				return
			}
			in.note(func(*record) {})
		})
	}
}

// hostRebooted says whether the host was booted since the instance last ran.
func (a *Agent) hostRebooted(in *instance, st novalet.ContainerStatus) bool {
	var last string
	in.read(func(r *record) { last = r.BootID })
	if last == "" {
		last = st.BootID
	}
	return last != "" && last != a.bootID
}

func oneOf(t novalet.TaskState, of ...novalet.TaskState) bool { return slices.Contains(of, t) }

// replug repairs the host's side of the interfaces of a running instance.
func (a *Agent) replug(ctx context.Context, in *instance, netns string) {
	// A host with a thousand instances does not do them all at once.
	if netns == "" || a.repairs.acquire(ctx) != nil {
		return
	}
	defer a.repairs.release()
	if err := a.plugCurrent(ctx, in, netns); err != nil && ctx.Err() == nil {
		in.log.Warn("interfaces are not repaired", "err", err)
	}
}

// putState saves a vm_state and no task_state.
func (a *Agent) putState(ctx context.Context, in *instance, expected []novalet.TaskState, vm novalet.VMState) {
	power := novalet.PowerShutdown
	if st, err := a.runtime.Status(ctx, in.uuid); err == nil {
		power = in.powerOf(st.State)
	}
	if err := a.settleAs(ctx, in, a.conductor.NewContext(), expected, vm, power, nil); err != nil && ctx.Err() == nil {
		in.log.Warn("state is not put right", "err", err)
		return
	}
	in.note(func(*record) {})
	a.announce(in)
}

// ownOperation runs a method that no message asked for, as if one had.
func (a *Agent) ownOperation(ctx context.Context, in *instance, m novalet.Method, args novalet.OperationArgs) {
	op := &novalet.Operation{ID: "own", Method: m, Context: a.conductor.NewContext(), Instance: *in.view(), Args: args, Received: a.now()}
	what := methods[m]
	a.rouse(in, m)
	err := what.run(a, ctx, in, op)
	if err != nil && !what.own && ctx.Err() == nil {
		err = a.failed(ctx, in, op, what, err)
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		in.log.Warn("own operation ended", "method", m, "err", err)
	} else {
		in.log.Info("own operation done", "method", m)
	}
	in.note(func(*record) {})
	a.announce(in)
}

// buildLost ends a build of which nothing is in the journal: the instance goes to ERROR and what it holds is freed.
func (a *Agent) buildLost(ctx context.Context, in *instance, task novalet.TaskState) {
	op := &novalet.Operation{ID: "own", Method: novalet.MethodBuild, Context: a.conductor.NewContext(), Instance: *in.view(), Args: novalet.OperationArgs{Build: &novalet.BuildArgs{}}}
	b := &boot{a: a, in: in, op: op, args: op.Args.Build, info: in.view().NetworkInfo, time: newTiming(a.now())}
	b.registerUndo()
	f := &failure{Cause: "build was lost in a restart", Text: "the host was restarted while it built the server. Delete it and create it again."}
	if err := b.fail(ctx, f, errors.New(f.Cause)); err != nil && ctx.Err() == nil {
		in.log.Warn("lost build is in error now", "was", task)
	}
	in.note(func(*record) {})
	a.announce(in)
}
