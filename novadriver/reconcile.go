package novadriver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

const (
	// reconcileFirst and reconcileEvery are when the consumers of our provider are looked at. Not at once: casts sent
	// while this host was away still wait in its queue.
	reconcileFirst = 5 * time.Minute
	reconcileEvery = 30 * time.Minute
	// lostAfter is how old a build must be that nobody works on.
	lostAfter = 10 * time.Minute
)

// reconcile looks from time to time for what holds resources here without being here.
func (d *Driver) reconcile(ctx context.Context) {
	if d.o.Placement == nil {
		return
	}
	for wait := reconcileFirst; sleep(ctx, jitter(wait)); wait = reconcileEvery {
		if err := d.reconcileOnce(ctx); err != nil && ctx.Err() == nil {
			d.log.Warn("look for forgotten allocations", "err", err)
		}
	}
}

// reconcileOnce frees what deleted instances still hold on this host, and ends builds whose cast was lost, as with a
// broker that restarted: stock does so at its start. What it does not know it leaves alone: migrations hold allocations
// too, and so do instances that are on their way to another host.
func (d *Driver) reconcileOnce(ctx context.Context) error {
	node := d.nodeUUID()
	consumers, err := d.o.Placement.Consumers(ctx, node)
	if err != nil {
		return err
	}
	here := map[string]bool{}
	for _, t := range d.agent().Tracked() {
		here[t.Instance.UUID] = true
	}
	d.notes.prune(here, d.o.now())
	var unknown []string
	for _, id := range consumers {
		if !here[id] && isUUID(id) {
			unknown = append(unknown, id)
		}
	}
	if len(unknown) == 0 {
		return nil
	}
	c := d.Conductor()
	rows, err := c.Instances(ctx, unknown)
	if err != nil {
		return err
	}
	var failed error
	for i := range rows {
		inst := &rows[i]
		o, err := ovo.Decode(inst.Wire)
		if err != nil {
			continue
		}
		switch {
		case inst.Deleted && !o.Bool("hidden"):
			failed = errors.Join(failed, d.o.Placement.RemoveFromAllocation(ctx, inst.UUID, node))
		case d.lostBuild(inst, latest(o.Time("created_at"), o.Time("updated_at"), d.since)):
			failed = errors.Join(failed, d.endLostBuild(ctx, c, inst))
		}
	}
	return failed
}

// lostBuild reports whether nobody works on a build. A build that waits here for its turn is known by its cast, one of
// the agent's journal is at work since the start. touched is when the row last changed, or this process began: a cast
// that came while it was away waits in the queue no longer than until then.
func (d *Driver) lostBuild(inst *novalet.Instance, touched time.Time) bool {
	return !inst.Deleted && inst.VMState == novalet.VMBuilding && (inst.Host == "" || inst.Host == d.o.Host) &&
		(inst.TaskState == novalet.TaskScheduling || inst.TaskState == novalet.TaskNone) &&
		d.o.now().Sub(touched) > lostAfter && !d.notes.knows(inst.UUID) && d.consuming()
}

// consuming reports whether messages reach this process now.
func (d *Driver) consuming() bool {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	return d.Ready(ctx) == nil
}

func latest(times ...time.Time) time.Time {
	var l time.Time
	for _, t := range times {
		if t.After(l) {
			l = t
		}
	}
	return l
}

func (d *Driver) endLostBuild(ctx context.Context, c novalet.Conductor, inst *novalet.Instance) error {
	d.log.Warn("the request to build an instance never arrived", "instance", inst.UUID)
	rc := c.NewContext()
	err := c.SaveInstance(ctx, rc, &novalet.InstanceUpdate{
		UUID: inst.UUID, Fields: map[string]any{"vm_state": novalet.VMError, "task_state": novalet.TaskNone},
		Expected: []novalet.TaskState{novalet.TaskScheduling, novalet.TaskNone},
	})
	if errors.Is(err, novalet.ErrTaskState) || errors.Is(err, novalet.ErrInstanceGone) {
		return nil // it moves after all
	}
	if err != nil {
		return fmt.Errorf("end the lost build of %s: %w", inst.UUID, err)
	}
	cause := &novalet.Fault{
		Kind: novalet.ErrAbort, Class: "BuildAbortException", Details: map[string]any{"instance_uuid": inst.UUID},
		Text: "Build of instance " + inst.UUID + " aborted: the request was lost on the way to the compute host. Create the server again.",
	}
	return errors.Join(c.CreateFault(ctx, rc, inst.UUID, cause), d.o.Placement.DeleteAllocation(ctx, inst.UUID))
}
