package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/novalet/novalet"
)

// rescueLease is the name under which the rescue image is leased, beside the instance's own.
func rescueLease(uuid string) string { return uuid + "-rescue" }

// rescueInstance is rescue_instance: another image runs with the instance's limits, addresses and name, and shows the
// instance's own root at /mnt.
func (a *Agent) rescueInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	image := op.Args.ImageID
	if image == "" {
		image = op.Instance.ImageProperty("base_image_ref")
	}
	if image == "" {
		image = op.Instance.ImageRef
	}
	notRescuable := func(err error) error {
		if quiet(ctx, err) {
			return err
		}
		reason := novalet.FaultText(err)
		if reason == "" {
			reason = "the rescue image could not be started"
		}
		f := novalet.Faultf(novalet.ErrAbort, "InstanceNotRescuable", "Instance %s cannot be rescued: %s", in.uuid, reason)
		f.Details = map[string]any{"instance_id": in.uuid, "reason": reason}
		f.Err = err
		return f
	}
	if image == "" {
		return notRescuable(novalet.Faultf(novalet.ErrAbort, "", "it has no image; name one"))
	}
	trusted, err := a.trustedCertificates(ctx, in)
	if err != nil {
		return notRescuable(err)
	}
	img, err := a.images.Prepare(ctx, &novalet.ImageRequest{Context: op.Context, InstanceUUID: rescueLease(in.uuid), ImageID: image,
		Meta: novalet.ImageMeta{ID: image}, TrustedCertificates: trusted})
	if err != nil {
		return notRescuable(fmt.Errorf("prepare rescue image: %w", err))
	}
	if err := a.halt(ctx, in, a.shutdownTimeout(&op.Instance, op.Args.CleanShutdown)); err != nil {
		return notRescuable(err)
	}
	in.note(func(r *record) { r.Rescue = &rescueState{Image: img, Password: op.Args.Password} })
	if err := a.bring(ctx, in); err != nil {
		if errors.Is(context.Cause(ctx), errShutdown) {
			return err
		}
		in.set(func(r *record) { r.Rescue = nil })
		return notRescuable(errors.Join(err, a.images.Release(a.ctx, rescueLease(in.uuid))))
	}
	return a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskRescuing}, novalet.VMRescued, novalet.PowerRunning,
		map[string]any{"launched_at": a.now().UTC()})
}

// unrescueInstance is unrescue_instance.
func (a *Agent) unrescueInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	if err := a.halt(ctx, in, 0); err != nil {
		return err
	}
	in.note(func(r *record) { r.Rescue = nil })
	if err := a.images.Release(ctx, rescueLease(in.uuid)); err != nil {
		in.log.Warn("rescue image is not released", "err", err)
	}
	if err := a.bring(ctx, in); err != nil {
		return err
	}
	return a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskUnrescuing}, novalet.VMActive, novalet.PowerRunning, nil)
}
