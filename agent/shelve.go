package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/novalet/novalet"
)

// shelvedKeys are what shelving leaves in system_metadata.
var shelvedKeys = []string{"shelved_at", "shelved_image_id", "shelved_host"}

// offloading are the task_states in which an offload may begin.
var offloading = []novalet.TaskState{novalet.TaskShelving, novalet.TaskShelvingOffloading}

// shelveInstance is shelve_instance: the root goes to Glance, and with shelved_offload_time 0 the instance leaves the host.
func (a *Agent) shelveInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	if op.Instance.VMState == novalet.VMShelved {
		return a.offload(ctx, in, op) // a restart interrupted the offload: the root is in Glance
	}
	a.tell(in, op.Context, novalet.ActionExists, novalet.PhaseNone)
	a.tell(in, op.Context, novalet.ActionShelve, novalet.PhaseStart)
	if err := a.halt(ctx, in, a.shutdownTimeout(&op.Instance, op.Args.CleanShutdown)); err != nil {
		return err
	}
	err := a.snapshot(ctx, in, op, &snapshotStates{before: novalet.TaskShelving, capturing: novalet.TaskShelving, uploading: novalet.TaskShelvingUploading, skipFirst: true, whole: true})
	if err != nil {
		return err
	}
	meta := maps.Clone(op.Instance.SystemMetadata)
	if meta == nil {
		meta = map[string]string{}
	}
	meta["shelved_at"] = a.now().UTC().Format("2006-01-02T15:04:05.000000")
	meta["shelved_image_id"] = op.Args.ImageID
	meta["shelved_host"] = a.host
	fields := map[string]any{"vm_state": novalet.VMShelved, "task_state": nil, "power_state": novalet.PowerShutdown, "system_metadata": meta}
	if a.cfg.ShelvedOffloadTime == 0 {
		fields["task_state"] = novalet.TaskShelvingOffloading
	}
	err = a.save(ctx, in, op.Context, []novalet.TaskState{novalet.TaskShelving, novalet.TaskShelvingUploading}, fields)
	if err != nil {
		return fmt.Errorf("save shelved: %w", err)
	}
	in.set(func(r *record) {
		r.Instance.VMState, r.Instance.TaskState, r.Instance.SystemMetadata = novalet.VMShelved, novalet.TaskNone, meta
	})
	a.tell(in, op.Context, novalet.ActionShelve, novalet.PhaseEnd)
	if a.cfg.ShelvedOffloadTime != 0 {
		return nil
	}
	return a.offload(ctx, in, op)
}

// shelveOffload is shelve_offload_instance.
func (a *Agent) shelveOffload(ctx context.Context, in *instance, op *novalet.Operation) error {
	if err := a.halt(ctx, in, a.shutdownTimeout(&op.Instance, op.Args.CleanShutdown)); err != nil {
		return err
	}
	return a.offload(ctx, in, op)
}

// offload takes a shelved instance off the host. Its ports stay its own, bound nowhere.
func (a *Agent) offload(ctx context.Context, in *instance, op *novalet.Operation) error {
	inst := in.view()
	a.tell(in, op.Context, novalet.ActionShelveOffload, novalet.PhaseStart)
	left := &pending{Context: op.Context, Info: inst.NetworkInfo}
	a.retrieveDevices(ctx, in, inst.NetworkInfo)
	if err := a.runtime.Destroy(ctx, in.uuid, novalet.DestroyOptions{}); err != nil {
		return fmt.Errorf("destroy container: %w", err)
	}
	left.Plugs = a.unplugAll(ctx, in.uuid, inst.NetworkInfo) != nil
	left.Image = a.images.Release(ctx, in.uuid) != nil
	if err := a.network.Unbind(ctx, op.Context, inst, inst.NetworkInfo); err != nil {
		in.log.Warn("ports stay bound to this host", "err", err)
	}
	left.Allocation = a.dropAllocation(ctx, in) != nil
	// One save where Nova makes two: a row must not name a host that has forgotten it.
	err := a.save(ctx, in, op.Context, offloading, noHost(map[string]any{
		"vm_state": novalet.VMShelvedOffloaded, "task_state": nil, "power_state": novalet.PowerShutdown}))
	if err != nil {
		return fmt.Errorf("save shelved_offloaded: %w", err)
	}
	in.set(func(r *record) {
		r.Instance.VMState, r.Instance.TaskState, r.Instance.Host, r.Instance.Node = novalet.VMShelvedOffloaded, novalet.TaskNone, "", ""
	})
	a.tell(in, op.Context, novalet.ActionShelveOffload, novalet.PhaseEnd)
	in.forgetHere(left)
	return nil
}

// unshelveInstance is unshelve_instance of an offloaded instance: a boot from the shelved image with the ports it has.
func (a *Agent) unshelveInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	err := a.unshelve(ctx, in, op)
	if err == nil || errors.Is(context.Cause(ctx), errShutdown) || errors.Is(context.Cause(ctx), errDeleted) {
		return err
	}
	inst := in.view()
	left := &pending{Context: op.Context, Info: inst.NetworkInfo}
	a.retrieveDevices(a.ctx, in, inst.NetworkInfo)
	left.Container = a.runtime.Destroy(a.ctx, in.uuid, novalet.DestroyOptions{}) != nil
	left.Plugs = a.unplugAll(a.ctx, in.uuid, inst.NetworkInfo) != nil
	left.Image = a.images.Release(a.ctx, in.uuid) != nil
	if errors.Is(err, novalet.ErrTaskState) || errors.Is(err, novalet.ErrInstanceGone) {
		in.forgetHere(left)
		return err
	}
	if uerr := a.network.Unbind(a.ctx, op.Context, inst, inst.NetworkInfo); uerr != nil {
		in.log.Warn("ports stay bound to this host", "err", uerr)
	}
	left.Allocation = a.dropAllocation(a.ctx, in) != nil
	if serr := a.save(a.ctx, in, op.Context, unshelving, noHost(map[string]any{"task_state": nil})); serr != nil {
		in.log.Warn("failed unshelve is not settled with the conductor", "err", serr)
	}
	in.forgetHere(left)
	return err
}

// unshelving are the task_states of a row that is being unshelved.
var unshelving = []novalet.TaskState{novalet.TaskUnshelving, novalet.TaskSpawning, novalet.TaskNone}

func (a *Agent) unshelve(ctx context.Context, in *instance, op *novalet.Operation) error {
	args := op.Args.Build
	if args == nil {
		return fmt.Errorf("unshelve instance %s: the message has no image: %w", in.uuid, novalet.ErrInvalidState)
	}
	if err := a.builds.acquire(ctx); err != nil {
		return err
	}
	defer a.builds.release()
	image := args.Image.ID
	if image == "" {
		image = op.Instance.SystemMetadata["shelved_image_id"]
	}
	if image == "" {
		image = op.Instance.ImageRef
	}
	err := a.save(ctx, in, op.Context, unshelving, map[string]any{"task_state": novalet.TaskSpawning, "host": a.host, "node": args.Node, "launched_on": a.host})
	if err != nil {
		return fmt.Errorf("save spawning: %w", err)
	}
	in.note(func(r *record) {
		r.Resident = true
		r.Instance.Host, r.Instance.Node, r.Instance.TaskState = a.host, args.Node, novalet.TaskSpawning
		r.Build = &novalet.BuildArgs{Image: novalet.ImageMeta{ID: image}, Node: args.Node}
		if r.Seed == "" {
			r.Seed = randomSeed()
		}
	})
	a.announce(in)
	// No bounds of the flavor: the image's layers and what the instance wrote over them may come to more than its disk.
	trusted, err := a.trustedCertificates(ctx, in)
	if err != nil {
		return err
	}
	img, err := a.images.Prepare(ctx, &novalet.ImageRequest{Context: op.Context, InstanceUUID: in.uuid, ImageID: image, Meta: args.Image,
		TrustedCertificates: trusted})
	if err != nil {
		return fmt.Errorf("prepare image %s: %w", image, err)
	}
	info, err := a.bindHere(ctx, in, op.Context, img)
	if err != nil {
		return err
	}
	waiters := a.expectPlugged(in.uuid, info)
	defer a.events.drop(waiters)
	if err := a.bring(ctx, in); err != nil {
		return err
	}
	if err := a.awaitPlugged(ctx, in, waiters); err != nil {
		return err
	}
	more := map[string]any{"launched_at": a.now().UTC()}
	shelved := a.dropShelved(in, more)
	if err := a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskSpawning}, novalet.VMActive, novalet.PowerRunning, more); err != nil {
		return err
	}
	a.deleteImage(ctx, in, op.Context, shelved)
	return nil
}

// dropShelved puts the system_metadata without the shelved keys among the fields to save, and returns the id of the shelved
// image, "" when the instance was not shelved.
func (a *Agent) dropShelved(in *instance, fields map[string]any) string {
	old := in.view().SystemMetadata
	image := old["shelved_image_id"]
	if image == "" {
		return ""
	}
	meta := maps.Clone(old)
	for _, k := range shelvedKeys {
		delete(meta, k)
	}
	fields["system_metadata"] = meta
	return image
}

// deleteImage deletes a snapshot that has served its purpose. Its loss is no failure of the operation.
func (a *Agent) deleteImage(ctx context.Context, in *instance, rc novalet.RequestContext, imageID string) {
	if imageID == "" {
		return
	}
	if err := a.images.DeleteImage(ctx, rc, imageID); err != nil && !errors.Is(err, novalet.ErrNotFound) {
		in.log.Warn("snapshot stays", "image", imageID, "err", err)
	}
}

// offloadShelved offloads what was shelved longer ago than shelved_offload_time.
func (a *Agent) offloadShelved(ctx context.Context) error {
	rows, err := a.conductor.InstancesByHost(ctx)
	if err != nil {
		return fmt.Errorf("list instances of this host: %w", err)
	}
	for i := range rows {
		row := &rows[i]
		at, perr := time.Parse("2006-01-02T15:04:05", row.SystemMetadata["shelved_at"][:min(19, len(row.SystemMetadata["shelved_at"]))])
		if row.VMState != novalet.VMShelved || row.TaskState != novalet.TaskNone || perr != nil || a.now().Sub(at) < a.cfg.ShelvedOffloadTime {
			continue
		}
		in, err := a.lookup(row.UUID)
		if err != nil {
			continue
		}
		in.post(func(ctx context.Context) {
			rc := a.conductor.NewContext()
			if err := a.save(ctx, in, rc, []novalet.TaskState{novalet.TaskNone}, map[string]any{"task_state": novalet.TaskShelvingOffloading}); err != nil {
				in.log.Info("shelved instance is not offloaded", "err", err)
				return
			}
			a.ownOperation(ctx, in, novalet.MethodShelveOffload, novalet.OperationArgs{})
		})
	}
	return nil
}

// bindHere takes over the image and the ports of an instance that comes to this host, and tells Nova how they are bound.
func (a *Agent) bindHere(ctx context.Context, in *instance, rc novalet.RequestContext, img *novalet.Image) (novalet.NetworkInfo, error) {
	inst := in.view()
	a.knowTags(ctx, in, rc)
	for i := range inst.NetworkInfo {
		if inst.NetworkInfo[i].VNICType == "direct" {
			if err := a.claimForPort(ctx, in, rc, inst.NetworkInfo[i].ID); err != nil {
				return nil, err
			}
		}
	}
	info, err := a.network.Bind(ctx, rc, inst, in.devicesOf(inst.NetworkInfo))
	if err != nil {
		return nil, fmt.Errorf("bind ports: %w", err)
	}
	in.note(func(r *record) { r.Image, r.Instance.NetworkInfo = img, info })
	if len(info) == 0 {
		return info, nil
	}
	err = a.insist(ctx, in.log, "save network info", func(ctx context.Context) error {
		return a.conductor.SaveNetworkInfo(ctx, rc, in.uuid, info)
	})
	if err != nil {
		return nil, fmt.Errorf("save network info: %w", err)
	}
	return info, nil
}
