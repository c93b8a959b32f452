package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/novalet/novalet"
)

// classify says what becomes of a build that failed, in Nova's terms.
func (b *boot) classify(ctx context.Context, err error) *failure {
	f := &failure{Cause: err.Error()}
	var fault *novalet.Fault
	if errors.As(err, &fault) {
		f.Class, f.Text, f.Details = fault.Class, fault.Text, fault.Details
	}
	switch {
	case errors.Is(context.Cause(ctx), errDeleted), errors.Is(err, novalet.ErrInstanceGone):
		f.Quiet, f.Gone = true, true
	case errors.Is(err, novalet.ErrTaskState):
		f.Quiet = true
	case errors.Is(err, novalet.ErrAbort), errors.Is(err, novalet.ErrUnsupported), errors.Is(err, novalet.ErrInvalidState):
	default:
		// What nobody classified may be this host's fault: another one gets its chance, as in Nova.
		f.Reschedule = b.args.MayReschedule
	}
	return f
}

// fail takes the build back and tells Nova. The failure is recorded first, so that a crash on the way does not turn
// into a second try.
func (b *boot) fail(ctx context.Context, f *failure, cause error) error {
	a, in := b.a, b.in
	if errors.Is(context.Cause(ctx), errDeleted) {
		// The delete that ended this build runs next and takes everything away.
		b.undo.Drop()
		in.set(func(r *record) { r.Failed = nil })
		return cause
	}
	opCtx := ctx
	ctx = a.ctx
	in.note(func(r *record) { r.Failed = f })
	// A delete does not wait for an undo that hangs: it takes everything away itself.
	undoCtx, stop := context.WithCancelCause(ctx)
	release := context.AfterFunc(opCtx, func() {
		if errors.Is(context.Cause(opCtx), errDeleted) {
			stop(errDeleted)
		}
	})
	failed, undoErr := b.undo.Unwind(undoCtx)
	release()
	stop(nil)
	if errors.Is(context.Cause(ctx), errShutdown) {
		return errShutdown
	}
	if errors.Is(context.Cause(opCtx), errDeleted) {
		in.set(func(r *record) { r.Failed = nil })
		return cause
	}
	left := &pending{Context: b.op.Context, Info: in.portsToFree(b.info),
		Container: slices.Contains(failed, "container"), Plugs: slices.Contains(failed, "plugs"),
		Image: slices.Contains(failed, "image"), Ports: slices.Contains(failed, "ports")}
	if undoErr != nil {
		in.log.Error("build is not undone yet", "err", undoErr)
	}
	if f.Reschedule && left.Ports {
		// Ports that are still bound here would be taken for the next host's.
		f.Reschedule = false
	}
	var err error
	switch {
	case f.Quiet:
		if f.Gone {
			left.Allocation = a.dropAllocation(ctx, in) != nil
		}
	case f.Reschedule:
		if err = b.reschedule(ctx, f, cause); err != nil && ctx.Err() == nil && !quiet(ctx, err) {
			f.Reschedule = false
			err = b.abort(ctx, f, cause, left)
		}
	default:
		err = b.abort(ctx, f, cause, left)
	}
	if errors.Is(context.Cause(ctx), errShutdown) {
		return errShutdown
	}
	if err != nil && !quiet(ctx, err) {
		in.log.Error("failed build is not settled with the conductor", "err", err)
	}
	in.set(func(r *record) {
		r.Resident, r.Allocated, r.Failed, r.CPUSet = false, false, nil, ""
		r.Instance.NetworkInfo, r.Instance.Host, r.Instance.Node = nil, "", ""
		r.Build, r.Image = nil, nil
		if !left.Plugs {
			r.PCI = nil
		}
		if !f.Quiet && !f.Reschedule {
			r.Instance.VMState, r.Instance.TaskState = novalet.VMError, novalet.TaskNone
		}
		if r.Pending = left; left.empty() {
			r.Pending = nil
		}
	})
	return cause
}

// afterBuild are the task_states a build of ours, or of a stock agent before us, may have left in the row.
var afterBuild = []novalet.TaskState{novalet.TaskSpawning, novalet.TaskScheduling, novalet.TaskNone, novalet.TaskNetworking, novalet.TaskBlockDeviceMapping}

// noHost are the columns of a row that no host has.
func noHost(fields map[string]any) map[string]any {
	for _, k := range []string{"host", "node", "launched_on", "availability_zone"} {
		fields[k] = nil
	}
	return fields
}

// reschedule hands the build back for another host.
func (b *boot) reschedule(ctx context.Context, f *failure, cause error) error {
	a, in, rc := b.a, b.in, b.op.Context
	if f.Freed {
		// A crash came about when the conductor was told. By now the row and the allocation may be another host's.
		if taken, err := b.taken(ctx); taken || err != nil {
			return err
		}
	} else {
		if in.replayed && b.inst.Host != a.host && b.inst.Host != "" {
			return nil // handed back before the crash, and taken by another host
		}
		if err := b.free(ctx); err != nil {
			return err
		}
		freed := *f
		freed.Freed = true
		in.note(func(r *record) { r.Failed = &freed })
	}
	in.log.Info("build goes back to the conductor for another host", "request_id", rc.RequestID, "cause", f.Cause)
	return a.insist(ctx, in.log, "reschedule", func(ctx context.Context) error {
		return a.conductor.RescheduleBuild(ctx, b.op, b.fault(f, cause))
	})
}

// free lets go of the row and of what the instance holds in Placement.
func (b *boot) free(ctx context.Context) error {
	if err := b.forgetInterfaces(ctx); err != nil {
		return err
	}
	err := b.a.save(ctx, b.in, b.op.Context, afterBuild, noHost(map[string]any{"task_state": novalet.TaskScheduling}))
	if err != nil {
		return fmt.Errorf("save scheduling: %w", err)
	}
	return b.a.dropAllocation(ctx, b.in)
}

// taken says whether somebody works on the instance that was handed back, or it is over.
func (b *boot) taken(ctx context.Context) (bool, error) {
	var row *novalet.Instance
	err := b.a.insist(ctx, b.in.log, "read instance", func(ctx context.Context) (err error) {
		row, err = b.a.conductor.Instance(ctx, b.in.uuid)
		return err
	})
	if errors.Is(err, novalet.ErrNotFound) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read instance: %w", err)
	}
	return row.Deleted || row.Host != "" || row.VMState != novalet.VMBuilding || row.TaskState != novalet.TaskScheduling, nil
}

// abort puts the instance into ERROR with a text for its owner, and frees what it held. It names no host then, so that a
// later delete is done by nova-api alone.
func (b *boot) abort(ctx context.Context, f *failure, cause error, left *pending) error {
	a, in, rc := b.a, b.in, b.op.Context
	if err := b.forgetInterfaces(ctx); err != nil {
		return err
	}
	err := a.insist(ctx, in.log, "create fault", func(ctx context.Context) error {
		return a.conductor.CreateFault(ctx, rc, in.uuid, b.fault(f, cause))
	})
	if err != nil {
		in.log.Warn("fault is not recorded", "err", err)
	}
	err = a.save(ctx, in, rc, afterBuild, noHost(map[string]any{"vm_state": novalet.VMError, "task_state": nil}))
	left.Allocation = a.dropAllocation(ctx, in) != nil
	if err != nil {
		return fmt.Errorf("save error: %w", err)
	}
	return nil
}

// forgetInterfaces clears what the boot wrote about its interfaces.
func (b *boot) forgetInterfaces(ctx context.Context) error {
	if len(b.info) == 0 {
		return nil
	}
	a, in, rc := b.a, b.in, b.op.Context
	err := a.insist(ctx, in.log, "save network info", func(ctx context.Context) error {
		return a.conductor.SaveNetworkInfo(ctx, rc, in.uuid, novalet.NetworkInfo{})
	})
	if err == nil {
		err = a.insist(ctx, in.log, "delete vifs", func(ctx context.Context) error {
			return a.conductor.DeleteVIFs(ctx, rc, in.uuid)
		})
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, novalet.ErrInstanceGone) {
		in.log.Warn("interfaces of a failed build stay recorded", "err", err)
		return nil
	}
	return err
}

// fault is the error that the owner of the instance reads.
func (b *boot) fault(f *failure, cause error) *novalet.Fault {
	text := f.Text
	if text == "" {
		text = "the host could not start it; the operator finds the reason in the compute host's log under this id. Try again, or ask the operator."
	}
	out := &novalet.Fault{Kind: novalet.ErrAbort, Class: "BuildAbortException", Err: cause,
		Text:    fmt.Sprintf("Build of instance %s aborted: %s", b.in.uuid, text),
		Details: map[string]any{"instance_uuid": b.in.uuid, "reason": text}}
	if f.Reschedule {
		out.Kind, out.Class = novalet.ErrReschedule, "RescheduledException"
		out.Text = fmt.Sprintf("Build of instance %s was re-scheduled: %s", b.in.uuid, text)
	}
	return out
}

// dropAllocation frees the instance in Placement, with a few tries; what is left then is tried again later.
func (a *Agent) dropAllocation(ctx context.Context, in *instance) error {
	var err error
	for i, delay := 0, 200*time.Millisecond; i < 4; i, delay = i+1, 2*delay {
		if i > 0 {
			if serr := sleep(ctx, delay); serr != nil {
				return serr
			}
		}
		if err = a.placement.DeleteAllocation(ctx, in.uuid); err == nil || !errors.Is(err, novalet.ErrTryAgain) {
			break
		}
	}
	if err != nil {
		in.log.Warn("allocation is not deleted", "err", err)
		return fmt.Errorf("delete allocation: %w", err)
	}
	return nil
}
