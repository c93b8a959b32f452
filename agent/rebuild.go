package agent

import (
	"context"
	"fmt"

	"github.com/novalet/novalet"
)

// rebuildInstance is rebuild_instance: a fresh root from an image, the same ports, addresses and limits. The image is
// fetched before anything is destroyed, so that a wrong one costs nothing but the fault.
func (a *Agent) rebuildInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	args := op.Args.Rebuild
	switch {
	case args == nil:
		return fmt.Errorf("rebuild instance %s: the message has no rebuild arguments: %w", in.uuid, novalet.ErrInvalidState)
	case args.PreserveEphemeral:
		return novalet.Faultf(novalet.ErrUnsupported, "PreserveEphemeralNotSupported", "The current driver does not support preserving ephemeral partitions.")
	}
	if args.Recreate {
		return a.evacuateHere(ctx, in, op)
	}
	if err := a.builds.acquire(ctx); err != nil {
		return err
	}
	defer a.builds.release()
	if err := a.save(ctx, in, op.Context, rebuildStates, map[string]any{"task_state": novalet.TaskRebuildSpawning}); err != nil {
		return fmt.Errorf("save rebuild_spawning: %w", err)
	}
	image := args.ImageRef
	if image == "" {
		image = op.Instance.ImageRef
	}
	request := &novalet.ImageRequest{Context: op.Context, InstanceUUID: in.uuid, ImageID: image,
		Meta: novalet.ImageMeta{ID: image}, MaxBytes: op.Instance.Flavor.RootGB << 30, MemoryMB: op.Instance.Flavor.MemoryMB,
		TrustedCertificates: op.Instance.TrustedCertificates}
	img, err := a.images.Prepare(ctx, request)
	if err != nil {
		return fmt.Errorf("prepare image %s: %w", image, err)
	}
	a.retrieveDevices(ctx, in, in.view().NetworkInfo)
	if err := a.runtime.Destroy(ctx, in.uuid, novalet.DestroyOptions{}); err != nil {
		return fmt.Errorf("destroy container: %w", err)
	}
	a.consoles.closeInstance(in.uuid)
	// The lease of the old image goes, that of the new one is taken again: it is here, so that takes no time.
	if err := a.images.Release(ctx, in.uuid); err != nil {
		in.log.Warn("old image is not released", "err", err)
	}
	if img, err = a.images.Prepare(ctx, request); err != nil {
		return fmt.Errorf("prepare image %s: %w", image, err)
	}
	in.note(func(r *record) {
		build := novalet.BuildArgs{}
		if r.Build != nil {
			build = *r.Build
		}
		// The properties of the new image are in system_metadata by now; the old request's must not shine through.
		build.Image = novalet.ImageMeta{ID: image}
		build.InjectedFiles, build.AdminPassword = args.InjectedFiles, args.NewPassword
		r.Build, r.Image, r.Rescue, r.FirstBoot = &build, img, nil, true
	})
	spawning := []novalet.TaskState{novalet.TaskRebuildSpawning}
	launched := map[string]any{"launched_at": a.now().UTC()}
	if op.Instance.VMState == novalet.VMStopped || args.TargetState == "stopped" {
		// It was stopped and stays so: its next start is the first of the new root.
		if err := a.unplugAll(ctx, in.uuid, in.view().NetworkInfo); err != nil {
			return err
		}
		return a.settleAs(ctx, in, op.Context, spawning, novalet.VMStopped, novalet.PowerShutdown, launched)
	}
	if err := a.bring(ctx, in); err != nil {
		return err
	}
	return a.settleAs(ctx, in, op.Context, spawning, novalet.VMActive, novalet.PowerRunning, launched)
}
