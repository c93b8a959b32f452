package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/novalet/novalet"
)

const (
	undoInterval    = 30 * time.Second
	reclaimInterval = time.Minute
)

// Run does the periodic work until ctx or the agent ends: it follows what containers do by themselves, compares power
// states, reaps deleted instances, reclaims soft-deleted ones, collects images, tries again what is left to undo, and lets guests go on
// that nobody unquiesces.
// Call it once, after Recover.
func (a *Agent) Run(ctx context.Context) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(a.ctx, func() { cancel(errShutdown) })()
	var wg sync.WaitGroup
	every := func(d time.Duration, atOnce bool, name string, f func(context.Context) error) {
		if d <= 0 {
			return
		}
		wg.Go(func() {
			wait := d
			if atOnce {
				wait = 0
			}
			for sleep(ctx, wait) == nil {
				if err := f(ctx); err != nil && ctx.Err() == nil {
					a.log.Warn("periodic task ended", "task", name, "err", err)
				}
				wait = d
			}
		})
	}
	wg.Go(func() { a.follow(ctx) })
	every(a.cfg.SyncPowerInterval, true, "sync_power_states", a.syncPower)
	every(a.cfg.RunningDeletedInterval, true, "cleanup_running_deleted_instances", a.reapDeleted)
	if a.cfg.ReclaimInstanceInterval > 0 {
		every(reclaimInterval, false, "reclaim_queued_deletes", a.reclaim)
	}
	if a.cfg.ShelvedOffloadTime > 0 {
		every(time.Hour, false, "poll_shelved_instances", a.offloadShelved)
	}
	every(a.cfg.ImageCacheInterval, false, "image_cache", func(ctx context.Context) error {
		freed, err := a.images.Collect(ctx)
		if freed > 0 {
			a.log.Info("unused images are gone", "bytes", freed)
		}
		return err
	})
	every(undoInterval, false, "undo", func(context.Context) error {
		for _, in := range a.all() {
			in.retryUndo()
			in.quiesceOver()
		}
		return nil
	})
	wg.Wait()
}

// retryUndo tries again what is left to undo, unless the instance has other work.
func (in *instance) retryUndo() {
	in.mu.Lock()
	due := !in.rec.Pending.empty() && !in.busy
	in.mu.Unlock()
	if !due {
		return
	}
	in.post(func(ctx context.Context) {
		if err := in.a.undoPending(ctx, in); err != nil && ctx.Err() == nil {
			in.log.Warn("something is still left to undo", "err", err)
		}
	})
}

// follow listens to what containers do by themselves.
func (a *Agent) follow(ctx context.Context) {
	for e := range a.runtime.Events(ctx) {
		in, err := a.lookup(e.ID)
		if err != nil {
			continue
		}
		switch e.Type {
		case novalet.EventExited:
			in.log.Info("guest ended", "exit_code", e.ExitCode)
			in.post(func(ctx context.Context) {
				// Most often it ended because an operation ended it.
				if vm := in.view().VMState; vm == novalet.VMActive || vm == novalet.VMPaused || vm == novalet.VMRescued {
					a.evaluate(ctx, in)
				}
			})
		case novalet.EventRebooted:
			in.log.Info("guest rebooted itself")
		case novalet.EventOOM:
			in.log.Warn("the memory limit ended a process of the guest")
		}
	}
}

// syncPower compares what Nova believes with what runs, with one question to each.
func (a *Agent) syncPower(ctx context.Context) error {
	rows, err := a.conductor.InstancesByHost(ctx)
	if err != nil {
		return fmt.Errorf("list instances of this host: %w", err)
	}
	list, err := a.runtime.List(ctx)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	state := map[string]novalet.ContainerState{}
	for _, c := range list {
		state[c.ID] = c.State
	}
	for i := range rows {
		row := &rows[i]
		in, err := a.lookup(row.UUID)
		if err != nil || row.TaskState != novalet.TaskNone {
			continue
		}
		in.mu.Lock()
		busy := in.busy || len(in.rec.Ops) > 0
		in.mu.Unlock()
		power := in.powerSeen(row.VMState, state[row.UUID])
		if !busy && (power != row.PowerState || stray(row.VMState, power) != "") {
			in.post(func(ctx context.Context) { a.evaluate(ctx, in) })
		}
	}
	return nil
}

// powerSeen is the power_state of a container for an instance in a vm_state: a suspended one is frozen like a paused one.
func (in *instance) powerSeen(vm novalet.VMState, s novalet.ContainerState) novalet.PowerState {
	if vm == novalet.VMSuspended && s == novalet.ContainerPaused {
		return novalet.PowerSuspended
	}
	return in.powerOf(s)
}

// stray says what is to be done about an instance whose guest does something else than its vm_state
// (nova/compute/manager.py _sync_instance_power_state).
func stray(vm novalet.VMState, p novalet.PowerState) string {
	down := p == novalet.PowerShutdown || p == novalet.PowerCrashed
	switch vm {
	case novalet.VMActive, novalet.VMRescued:
		if down {
			return "stop"
		}
	case novalet.VMPaused:
		if down {
			return "stop"
		}
	case novalet.VMStopped, novalet.VMSoftDeleted:
		if p == novalet.PowerRunning || p == novalet.PowerPaused {
			return "halt"
		}
	}
	return ""
}

// evaluate reads row and host again and puts right what differs. It runs on the instance's goroutine.
func (a *Agent) evaluate(ctx context.Context, in *instance) {
	if err := a.evaluateRow(ctx, in); err != nil && ctx.Err() == nil {
		in.log.Warn("power state is not compared", "err", err)
	}
}

func (a *Agent) evaluateRow(ctx context.Context, in *instance) error {
	var row *novalet.Instance
	err := a.insist(ctx, in.log, "read instance", func(ctx context.Context) (err error) {
		row, err = a.conductor.Instance(ctx, in.uuid)
		return err
	})
	if errors.Is(err, novalet.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read instance: %w", err)
	}
	if row.Deleted || row.Host != a.host || row.TaskState != novalet.TaskNone {
		return nil
	}
	state := novalet.ContainerState("")
	st, err := a.runtime.Status(ctx, in.uuid)
	if err == nil {
		state = st.State
	} else if !errors.Is(err, novalet.ErrNotFound) {
		return fmt.Errorf("read container: %w", err)
	}
	power := in.powerSeen(row.VMState, state)
	in.setPower(power)
	none := []novalet.TaskState{novalet.TaskNone}
	rc := a.conductor.NewContext()
	switch stray(row.VMState, power) {
	case "stop":
		return a.ownStop(ctx, in, rc)
	case "halt":
		in.log.Warn("guest runs though it should not; it is ended", "vm_state", row.VMState)
		if err := a.halt(ctx, in, 0); err != nil {
			return err
		}
		power = novalet.PowerShutdown
	}
	if power == row.PowerState {
		return nil
	}
	if err := a.save(ctx, in, rc, none, map[string]any{"power_state": power}); err != nil {
		return fmt.Errorf("save power state: %w", err)
	}
	in.note(func(r *record) { r.Instance.PowerState = power })
	a.announce(in)
	return nil
}

// ownStop stops an instance whose guest ended by itself, through the states and with the records of a stop.
func (a *Agent) ownStop(ctx context.Context, in *instance, rc novalet.RequestContext) error {
	in.log.Info("guest ended by itself; the instance is stopped")
	err := a.save(ctx, in, rc, []novalet.TaskState{novalet.TaskNone}, map[string]any{"task_state": novalet.TaskPoweringOff})
	if err != nil {
		return fmt.Errorf("save powering-off: %w", err)
	}
	in.set(func(r *record) { r.Instance.TaskState = novalet.TaskPoweringOff })
	err = a.insist(ctx, in.log, "start action", func(ctx context.Context) error {
		return a.conductor.StartAction(ctx, rc, in.uuid, "stop")
	})
	if err != nil {
		in.log.Warn("action is not recorded", "err", err)
	}
	op := &novalet.Operation{ID: "own", Method: novalet.MethodStop, Context: rc, Instance: *in.view()}
	ev := a.startEvent(in.log, rc, in.uuid, methods[op.Method])
	a.tellStart(in, op, methods[op.Method])
	if err = a.stopInstance(ctx, in, op); err != nil {
		err = a.failed(ctx, in, op, methods[op.Method], err)
	}
	a.tellEnd(ctx, in, op, methods[op.Method], err)
	ev.finish(err)
	in.note(func(*record) {})
	a.announce(in)
	return err
}

// reapDeleted looks for guests whose row is deleted, which happens when nova-api took this service for dead.
func (a *Agent) reapDeleted(ctx context.Context) error {
	action := a.cfg.RunningDeletedAction
	if action == "noop" {
		return nil
	}
	list, err := a.runtime.List(ctx)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	var uuids []string
	for _, c := range list {
		if validUUID(c.ID) {
			uuids = append(uuids, c.ID)
		}
	}
	if len(uuids) == 0 {
		return nil
	}
	rows, err := a.conductor.Instances(ctx, uuids)
	if err != nil {
		return fmt.Errorf("list instances: %w", err)
	}
	for i := range rows {
		if !rows[i].Deleted {
			continue
		}
		in, err := a.obtain(&rows[i])
		if err != nil {
			return err
		}
		in.mu.Lock()
		busy := in.busy || len(in.rec.Ops) > 0
		in.mu.Unlock()
		if busy {
			continue
		}
		in.log.Warn("a deleted instance is still here", "action", action)
		switch action {
		case "reap":
			in.post(func(ctx context.Context) {
				r := &recovery{a: a}
				if err := r.remove(ctx, in.uuid); err != nil && ctx.Err() == nil {
					in.log.Error("deleted instance is not reaped", "err", err)
				}
				a.announce(in)
			})
		case "shutdown":
			in.post(func(ctx context.Context) {
				if err := a.halt(ctx, in, 0); err != nil && ctx.Err() == nil {
					in.log.Error("deleted instance is not shut down", "err", err)
				}
			})
		}
	}
	return nil
}

// reclaim deletes what was soft-deleted longer ago than reclaim_instance_interval.
func (a *Agent) reclaim(ctx context.Context) error {
	rows, err := a.conductor.InstancesByHost(ctx)
	if err != nil {
		return fmt.Errorf("list instances of this host: %w", err)
	}
	for i := range rows {
		row := &rows[i]
		if row.VMState != novalet.VMSoftDeleted || row.TaskState != novalet.TaskNone || row.DeletedAt == nil ||
			a.now().Sub(*row.DeletedAt) < a.cfg.ReclaimInstanceInterval {
			continue
		}
		in, err := a.obtain(row)
		if err != nil {
			return err
		}
		in.log.Info("soft-deleted instance is reclaimed")
		in.post(func(ctx context.Context) { a.ownOperation(ctx, in, novalet.MethodTerminate, novalet.OperationArgs{}) })
	}
	return nil
}
