package novadriver

import (
	"context"
	"errors"
	"time"

	"github.com/novalet/novalet"
)

// wraps says which of the stock wrappers a method has (nova/compute/manager.py). Methods that become operations have
// theirs in the agent.
type wraps struct {
	event  bool // an action event "compute_<method>" around it
	fault  bool // a fault record when it fails
	revert bool // task_state null when it fails
}

// undoTime bounds what is saved after a failure: the request may have ended by then.
const undoTime = 2 * time.Minute

// wrap runs fn as stock runs a method with these wrappers. A failure to write down what happened is logged and
// does not hide fn's own result.
func (d *Driver) wrap(ctx context.Context, r *request, name string, w wraps, fn func(inst *novalet.Instance) (any, error)) (any, error) {
	inst, err := d.argInstance(r.args)
	if err != nil {
		return nil, err
	}
	c := d.Conductor()
	event := "compute_" + name
	if w.event {
		if err := c.StartEvent(ctx, r.rc, inst.UUID, event); err != nil {
			return nil, err
		}
	}
	res, failed := fn(inst)
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	gone := failed != nil && failureOf(failed, inst.UUID).Class == "InstanceNotFound"
	if failed != nil && w.fault && !gone {
		d.note(r, inst, name, c.CreateFault(after, r.rc, inst.UUID, failed))
	}
	if w.event {
		d.note(r, inst, name, c.FinishEvent(after, r.rc, inst.UUID, event, failed))
	}
	if failed != nil && w.revert && !errors.Is(failed, novalet.ErrTaskState) {
		err := c.SaveInstance(after, r.rc, &novalet.InstanceUpdate{UUID: inst.UUID, Fields: map[string]any{"task_state": novalet.TaskNone}})
		if !errors.Is(err, novalet.ErrInstanceGone) {
			d.note(r, inst, name, err)
		}
	}
	return res, failed
}

func (d *Driver) note(r *request, inst *novalet.Instance, name string, err error) {
	if err != nil {
		d.log.Warn("what happened could not be written down", "method", name, "instance", inst.UUID, "request_id", r.rc.RequestID, "err", err)
	}
}

// refuse answers a method with an exception, within the wrappers.
func refuse(name string, w wraps, f func(inst *novalet.Instance) *failure) func(context.Context, *Driver, *request) (any, error) {
	return func(ctx context.Context, d *Driver, r *request) (any, error) {
		return d.wrap(ctx, r, name, w, func(inst *novalet.Instance) (any, error) { return nil, f(inst) })
	}
}

// notImplemented answers with NotImplementedError, which nova-api turns into 501.
func notImplemented(text string) func(context.Context, *Driver, *request) (any, error) {
	return func(context.Context, *Driver, *request) (any, error) {
		return nil, novalet.Faultf(novalet.ErrUnsupported, "NotImplementedError", "%s", text)
	}
}
