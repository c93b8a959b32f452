package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/novalet/novalet"
)

// snapshotStates are those that a snapshot leads through, by the method that asked for it.
type snapshotStates struct {
	before               novalet.TaskState
	capturing, uploading novalet.TaskState
	skipFirst            bool // capturing is what the API set
	whole                bool // the image must not depend on others
}

// snapshotInstance is snapshot_instance.
func (a *Agent) snapshotInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	err := a.snapshot(ctx, in, op, &snapshotStates{before: novalet.TaskSnapshotPending, capturing: novalet.TaskSnapshot, uploading: novalet.TaskImageUploading})
	if err != nil {
		return err
	}
	return a.snapshotDone(ctx, in, op)
}

// backupInstance is backup_instance: a snapshot, then older backups of the same type beyond the rotation are deleted.
func (a *Agent) backupInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	err := a.snapshot(ctx, in, op, &snapshotStates{before: novalet.TaskBackup, capturing: novalet.TaskBackup, uploading: novalet.TaskImageUploading, skipFirst: true})
	if err != nil {
		return err
	}
	if err := a.images.RotateBackups(ctx, op.Context, in.uuid, op.Args.BackupType, op.Args.Rotation); err != nil {
		in.log.Warn("old backups stay", "err", err)
	}
	return a.snapshotDone(ctx, in, op)
}

func (a *Agent) snapshotDone(ctx context.Context, in *instance, op *novalet.Operation) error {
	err := a.save(ctx, in, op.Context, []novalet.TaskState{novalet.TaskImageUploading}, map[string]any{"task_state": nil})
	if err != nil {
		return fmt.Errorf("save end of snapshot: %w", err)
	}
	in.set(func(r *record) { r.Instance.TaskState = novalet.TaskNone })
	return nil
}

// snapshot uploads the root. On error the image, which nova-api made before, is deleted.
func (a *Agent) snapshot(ctx context.Context, in *instance, op *novalet.Operation, s *snapshotStates) error {
	if !s.skipFirst {
		err := a.save(ctx, in, op.Context, []novalet.TaskState{s.before, s.capturing, s.uploading}, map[string]any{"task_state": s.capturing})
		if err != nil {
			a.deleteImage(a.ctx, in, op.Context, op.Args.ImageID)
			return fmt.Errorf("save %s: %w", s.capturing, err)
		}
	}
	err := a.upload(ctx, in, op, s)
	if err != nil && !errors.Is(context.Cause(ctx), errShutdown) {
		a.deleteImage(a.ctx, in, op.Context, op.Args.ImageID)
	}
	return err
}

func (a *Agent) upload(ctx context.Context, in *instance, op *novalet.Operation, s *snapshotStates) error {
	if err := a.snapshots.acquire(ctx); err != nil {
		return err
	}
	defer a.snapshots.release()
	root, err := a.runtime.Root(ctx, in.uuid)
	if err != nil {
		return fmt.Errorf("find root: %w", err)
	}
	var base *novalet.Image
	in.read(func(r *record) { base = r.Image })
	err = a.images.Snapshot(ctx, &novalet.SnapshotRequest{
		Context: op.Context, InstanceUUID: in.uuid, ImageID: op.Args.ImageID, Base: base, Root: *root, Whole: s.whole,
		Freeze: func(ctx context.Context) (func(), error) { return a.freezeFor(ctx, in) },
		Captured: func(ctx context.Context) error {
			return a.save(ctx, in, op.Context, []novalet.TaskState{s.capturing, s.uploading}, map[string]any{"task_state": s.uploading})
		},
	})
	if err != nil {
		return fmt.Errorf("upload snapshot: %w", err)
	}
	return nil
}

// freezeFor stops a running guest for the moment of a copy. One that is paused or down needs nothing.
func (a *Agent) freezeFor(ctx context.Context, in *instance) (func(), error) {
	st, err := a.runtime.Status(ctx, in.uuid)
	if err != nil {
		return nil, fmt.Errorf("read container: %w", err)
	}
	switch vm := in.view().VMState; {
	case st.State == novalet.ContainerRunning:
	case st.State == novalet.ContainerPaused && vm != novalet.VMPaused && vm != novalet.VMSuspended:
		// Frozen by a snapshot that a restart interrupted.
	default:
		return func() {}, nil
	}
	if err := a.runtime.Freeze(ctx, in.uuid); err != nil {
		return nil, fmt.Errorf("freeze container: %w", err)
	}
	return func() {
		// Whatever ended the copy, the guest goes on.
		if err := a.runtime.Thaw(context.WithoutCancel(ctx), in.uuid); err != nil && !errors.Is(err, novalet.ErrNotFound) {
			in.log.Error("guest is not thawed after a snapshot", "err", err)
		}
	}, nil
}
