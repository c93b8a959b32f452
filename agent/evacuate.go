package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/novalet/novalet"
)

// rebuildStates are the task_states that a rebuild finds and leaves.
var rebuildStates = []novalet.TaskState{novalet.TaskRebuilding, novalet.TaskRebuildBlockDevice, novalet.TaskRebuildSpawning}

// evacuateHere is rebuild_instance for an instance whose host is dead: it is made anew here from its image, with the ports
// and addresses it had. What the failed one had written is lost, as with every evacuation without shared storage. When it
// fails, the row names the dead host again, and the instance can be evacuated once more.
func (a *Agent) evacuateHere(ctx context.Context, in *instance, op *novalet.Operation) error {
	args := op.Args.Rebuild
	var here bool
	in.read(func(r *record) { here = r.Resident && !in.replayed })
	if here || args.SourceHost == a.host {
		// Nothing of it is touched: it runs here, or did when another host took it, and a restart tidies up then.
		a.endEvacuation(in, op, false)
		f := novalet.Faultf(novalet.ErrUnsupported, "InstanceExists", "Instance %s already exists.", op.Instance.Name)
		f.Details = map[string]any{"name": op.Instance.Name}
		return f
	}
	err := a.evacuate(ctx, in, op)
	if err == nil {
		a.endEvacuation(in, op, true)
		if errors.Is(context.Cause(a.ctx), errShutdown) {
			return errShutdown // the record of the migration may not be written
		}
		return nil
	}
	if cause := context.Cause(ctx); errors.Is(cause, errShutdown) || errors.Is(cause, errDeleted) {
		return err // it goes on later, or the delete takes everything away
	}
	inst := in.view()
	left := &pending{Context: op.Context, Info: inst.NetworkInfo}
	a.retrieveDevices(a.ctx, in, inst.NetworkInfo)
	left.Container = a.runtime.Destroy(a.ctx, in.uuid, novalet.DestroyOptions{}) != nil
	left.Plugs = a.unplugAll(a.ctx, in.uuid, inst.NetworkInfo) != nil
	left.Image = a.images.Release(a.ctx, in.uuid) != nil
	if !quiet(ctx, err) {
		serr := a.save(a.ctx, in, op.Context, rebuildStates, map[string]any{"host": orNull(args.SourceHost), "node": orNull(args.SourceNode)})
		if serr != nil {
			in.log.Warn("failed evacuation is not settled with the conductor", "err", serr)
		}
	}
	a.endEvacuation(in, op, false)
	if errors.Is(context.Cause(a.ctx), errShutdown) {
		return errShutdown
	}
	in.forgetHere(left)
	return err
}

// evacuates says that the operation is an evacuation to this host.
func evacuates(op *novalet.Operation) bool { return op.Args.Rebuild != nil && op.Args.Rebuild.Recreate }

// endEvacuation writes how it ended.
func (a *Agent) endEvacuation(in *instance, op *novalet.Operation, ok bool) {
	err := a.insist(a.ctx, in.log, "end evacuation", func(ctx context.Context) error {
		return a.conductor.EndEvacuation(ctx, op.Context, in.uuid, op.Args.Rebuild, ok)
	})
	if err != nil && a.ctx.Err() == nil {
		in.log.Warn("end of the evacuation is not recorded", "ended_well", ok, "err", err)
	}
}

func (a *Agent) evacuate(ctx context.Context, in *instance, op *novalet.Operation) error {
	args := op.Args.Rebuild
	if args.SharedStorage {
		return novalet.Faultf(novalet.ErrAbort, "InvalidSharedStorage", "This host does not share the storage of the failed one.")
	}
	if err := a.builds.acquire(ctx); err != nil {
		return err
	}
	defer a.builds.release()
	// Neutron's events reach us only once the row names this host.
	err := a.save(ctx, in, op.Context, rebuildStates, map[string]any{"task_state": novalet.TaskRebuildSpawning, "host": a.host, "node": args.Node})
	if err != nil {
		return fmt.Errorf("save rebuild_spawning: %w", err)
	}
	image := args.ImageRef
	if image == "" {
		image = op.Instance.ImageRef
	}
	in.note(func(r *record) {
		r.Resident, r.FirstBoot, r.Rescue = true, true, nil
		r.Instance.Host, r.Instance.Node, r.Instance.TaskState = a.host, args.Node, novalet.TaskRebuildSpawning
		r.Build = &novalet.BuildArgs{Image: novalet.ImageMeta{ID: image}, Node: args.Node, InjectedFiles: args.InjectedFiles, AdminPassword: args.NewPassword}
		if r.Seed == "" {
			r.Seed = randomSeed()
		}
	})
	a.announce(in)
	img, err := a.images.Prepare(ctx, &novalet.ImageRequest{Context: op.Context, InstanceUUID: in.uuid, ImageID: image,
		Meta: novalet.ImageMeta{ID: image}, MaxBytes: op.Instance.Flavor.RootGB << 30, MemoryMB: op.Instance.Flavor.MemoryMB,
		TrustedCertificates: op.Instance.TrustedCertificates})
	if err != nil {
		return fmt.Errorf("prepare image %s: %w", image, err)
	}
	info, err := a.bindHere(ctx, in, op.Context, img)
	if err != nil {
		return err
	}
	launched := map[string]any{"launched_at": a.now().UTC()}
	spawning := []novalet.TaskState{novalet.TaskRebuildSpawning}
	if op.Instance.VMState == novalet.VMStopped || args.TargetState == "stopped" {
		// It was stopped and stays so: its next start is the first of the new root.
		return a.settleAs(ctx, in, op.Context, spawning, novalet.VMStopped, novalet.PowerShutdown, launched)
	}
	waiters := a.expectPlugged(in.uuid, info)
	defer a.events.drop(waiters)
	if err := a.bring(ctx, in); err != nil {
		return err
	}
	if err := a.awaitPlugged(ctx, in, waiters); err != nil {
		return err
	}
	return a.settleAs(ctx, in, op.Context, spawning, novalet.VMActive, novalet.PowerRunning, launched)
}

// orNull is a column's text, or null.
func orNull(s string) any {
	if s == "" {
		return nil
	}
	return s
}
