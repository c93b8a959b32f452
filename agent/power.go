package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"time"

	"github.com/novalet/novalet"
)

// bring makes the instance run from what is recorded of it. On error nothing of it runs.
func (a *Agent) bring(ctx context.Context, in *instance) error {
	if err := a.knowImage(ctx, in); err != nil {
		return err
	}
	inst := in.view()
	set, err := a.claimCPUs(in)
	if err != nil {
		return err
	}
	var build *novalet.BuildArgs
	in.read(func(r *record) { build = r.Build })
	sandbox, err := sandboxSpec(&a.cfg, inst, build, set)
	if err != nil {
		return err
	}
	spec, err := a.specFor(in)
	if err != nil {
		return err
	}
	sandbox.Kind = spec.Kind
	st, err := a.runtime.Create(ctx, sandbox)
	if err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	switch st.State {
	case novalet.ContainerRunning:
	case novalet.ContainerPaused:
		err = a.thaw(ctx, in)
	default:
		err = a.plugCurrent(ctx, in, st.NetNS)
		if err == nil {
			if err = a.runtime.Start(ctx, in.uuid, spec); err != nil {
				err = fmt.Errorf("start container: %w", err)
			}
		}
	}
	if err != nil {
		if !errors.Is(context.Cause(ctx), errShutdown) {
			err = errors.Join(err, a.halt(a.ctx, in, 0))
		}
		return err
	}
	in.set(func(r *record) { r.BootID, r.FirstBoot = a.bootID, false })
	in.setPower(novalet.PowerRunning)
	return nil
}

// knowImage reads the image again for an instance whose record was lost: only its row and its root are left.
func (a *Agent) knowImage(ctx context.Context, in *instance) error {
	var known bool
	in.read(func(r *record) { known = r.Image != nil })
	inst := in.view()
	if known || inst.ImageRef == "" {
		return nil
	}
	img, err := a.images.Prepare(ctx, &novalet.ImageRequest{Context: a.conductor.NewContext(), InstanceUUID: in.uuid, ImageID: inst.ImageRef, Meta: novalet.ImageMeta{ID: inst.ImageRef}})
	if err != nil {
		return fmt.Errorf("prepare image %s: %w", inst.ImageRef, err)
	}
	in.set(func(r *record) { r.Image = img })
	return nil
}

// plugCurrent plugs what the instance has now; an attach waits or sees the sandbox.
func (a *Agent) plugCurrent(ctx context.Context, in *instance, netns string) error {
	ctx, unlock := in.lockNet(ctx)
	defer unlock()
	return a.plugAll(ctx, in, in.view().NetworkInfo, netns, in.static())
}

// halt ends the container and takes its interfaces off the host. The root stays.
func (a *Agent) halt(ctx context.Context, in *instance, timeout time.Duration) error {
	if err := a.end(ctx, in, timeout); err != nil {
		return err
	}
	a.retrieveDevices(ctx, in, in.view().NetworkInfo)
	in.dropNet()
	ctx, unlock := in.lockNet(ctx)
	defer unlock()
	return a.unplugAll(ctx, in.uuid, in.view().NetworkInfo)
}

// rest ends the container and keeps its ports wired until it runs again: Neutron's agents take a second or more to
// wire a port anew, and some of them trip over one that goes and comes between two looks.
func (a *Agent) rest(ctx context.Context, in *instance, timeout time.Duration) error {
	ns := in.takeNet()
	if ns != nil {
		defer ns.Close()
	} else if st, err := a.runtime.Status(ctx, in.uuid); err == nil && st.NetNS != "" {
		// Held open, the namespace outlives the container's end.
		if ns, err = os.Open(st.NetNS); err == nil {
			defer ns.Close()
		}
	}
	if ns == nil {
		return a.halt(ctx, in, timeout)
	}
	if err := a.end(ctx, in, timeout); err != nil {
		return err
	}
	ctx, unlock := in.lockNet(ctx)
	defer unlock()
	info := in.view().NetworkInfo
	for i := range info {
		if err := a.plugger.Park(ctx, in.uuid, &info[i], fmt.Sprintf("/proc/self/fd/%d", ns.Fd())); err != nil {
			in.log.Warn("interfaces are unplugged instead of parked", "err", err)
			return a.unplugAll(ctx, in.uuid, info)
		}
	}
	return nil
}

// end stops the container.
func (a *Agent) end(ctx context.Context, in *instance, timeout time.Duration) error {
	if err := a.runtime.Stop(ctx, in.uuid, novalet.StopOptions{Timeout: timeout}); err != nil {
		return fmt.Errorf("stop container: %w", err)
	}
	in.setPower(novalet.PowerShutdown)
	a.consoles.closeInstance(in.uuid)
	return nil
}

// shutdownTimeout is how long the guest may take to stop by itself.
func (a *Agent) shutdownTimeout(inst *novalet.Instance, clean bool) time.Duration {
	if !clean {
		return 0
	}
	if s := inst.ImageProperty("os_shutdown_timeout"); s != "" {
		if n, err := strconv.ParseUint(s, 10, 31); err == nil {
			return time.Duration(n) * time.Second
		}
	}
	return a.cfg.ShutdownTimeout
}

// settleAs saves the end of an operation and takes it over into the record.
func (a *Agent) settleAs(ctx context.Context, in *instance, rc novalet.RequestContext, expected []novalet.TaskState, vm novalet.VMState, power novalet.PowerState, more map[string]any) error {
	fields := map[string]any{"vm_state": vm, "task_state": nil, "power_state": power}
	maps.Copy(fields, more)
	if err := a.save(ctx, in, rc, expected, fields); err != nil {
		return fmt.Errorf("save %s: %w", vm, err)
	}
	in.set(func(r *record) {
		r.Instance.VMState, r.Instance.TaskState, r.Instance.PowerState = vm, novalet.TaskNone, power
		if m, ok := more["system_metadata"].(map[string]string); ok {
			r.Instance.SystemMetadata = m
		}
		if t, ok := more["launched_at"].(time.Time); ok {
			r.Instance.LaunchedAt = &t
		}
		if s, ok := more["image_ref"].(string); ok {
			r.Instance.ImageRef = s
		}
	})
	in.setPower(power)
	return nil
}

// startInstance is start_instance.
func (a *Agent) startInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	if err := a.bring(ctx, in); err != nil {
		return err
	}
	more := map[string]any{}
	image := a.dropShelved(in, more)
	if err := a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskPoweringOn}, novalet.VMActive, novalet.PowerRunning, more); err != nil {
		return err
	}
	a.deleteImage(ctx, in, op.Context, image)
	return nil
}

// stopInstance is stop_instance.
func (a *Agent) stopInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	expected := []novalet.TaskState{novalet.TaskPoweringOff}
	st, err := a.runtime.Status(ctx, in.uuid)
	if errors.Is(err, novalet.ErrNotFound) || err == nil && st.State == novalet.ContainerStopped {
		expected = append(expected, novalet.TaskNone)
	}
	if err := a.rest(ctx, in, a.shutdownTimeout(&op.Instance, op.Args.CleanShutdown)); err != nil {
		return err
	}
	return a.settleAs(ctx, in, op.Context, expected, novalet.VMStopped, novalet.PowerShutdown, nil)
}

// rebootInstance is reboot_instance. A soft reboot lets the guest end by itself first.
func (a *Agent) rebootInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	hard := op.Args.RebootType != "SOFT"
	started, vm := novalet.TaskRebootStarted, novalet.VMActive
	if hard {
		started = novalet.TaskRebootStartedHard
	}
	if op.Instance.VMState == novalet.VMRescued {
		vm = novalet.VMRescued
	}
	if err := a.save(ctx, in, op.Context, rebootStates, map[string]any{"task_state": started}); err != nil {
		return fmt.Errorf("save %s: %w", started, err)
	}
	err := a.rest(ctx, in, a.shutdownTimeout(&op.Instance, !hard))
	if err == nil {
		err = a.bring(ctx, in)
	}
	expected := []novalet.TaskState{started}
	if err == nil {
		return a.settleAs(ctx, in, op.Context, expected, vm, novalet.PowerRunning, nil)
	}
	if quiet(ctx, err) {
		return err
	}
	if ferr := a.insist(ctx, in.log, "create fault", func(ctx context.Context) error {
		return a.conductor.CreateFault(ctx, op.Context, in.uuid, err)
	}); ferr != nil {
		in.log.Warn("fault is not recorded", "err", ferr)
	}
	// As in Nova: a guest that runs all the same is not in error.
	power := novalet.PowerShutdown
	st, serr := a.runtime.Status(ctx, in.uuid)
	if serr == nil {
		power = in.powerOf(st.State)
	}
	if power != novalet.PowerRunning {
		vm = novalet.VMError
	}
	return errors.Join(err, a.settleAs(ctx, in, op.Context, expected, vm, power, nil))
}

// freeze stops the guest where it is, and its network, for which the kernel would go on speaking.
func (a *Agent) freeze(ctx context.Context, in *instance) error {
	if err := a.runtime.Freeze(ctx, in.uuid); err != nil {
		return fmt.Errorf("freeze container: %w", err)
	}
	a.silence(ctx, in, true)
	return nil
}

// thaw lets the guest go on. What comes in first waits for it in its sockets.
func (a *Agent) thaw(ctx context.Context, in *instance) error {
	a.silence(ctx, in, false)
	if err := a.runtime.Thaw(ctx, in.uuid); err != nil {
		return fmt.Errorf("thaw container: %w", err)
	}
	return nil
}

// silence fails nothing: where the host cannot do it the guest is paused all the same, and the log says so.
func (a *Agent) silence(ctx context.Context, in *instance, on bool) {
	ctx, unlock := in.lockNet(ctx)
	defer unlock()
	info := in.view().NetworkInfo
	if len(info) == 0 {
		return
	}
	st, err := a.runtime.Status(ctx, in.uuid)
	for i := range info {
		if err == nil && st.NetNS != "" {
			err = a.plugger.Silence(ctx, in.uuid, &info[i], st.NetNS, on)
		}
	}
	if err != nil && ctx.Err() == nil {
		in.log.Warn("interfaces do not follow the guest's pause", "silent", on, "err", err)
	}
}

// pauseInstance is pause_instance.
func (a *Agent) pauseInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	if err := a.freeze(ctx, in); err != nil {
		return err
	}
	return a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskPausing}, novalet.VMPaused, novalet.PowerPaused, nil)
}

// unpauseInstance is unpause_instance.
func (a *Agent) unpauseInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	if err := a.thaw(ctx, in); err != nil {
		return err
	}
	return a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskUnpausing}, novalet.VMActive, novalet.PowerRunning, nil)
}

// suspendInstance is suspend_instance: the processes stop where they are and their memory stays.
func (a *Agent) suspendInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	if err := a.freeze(ctx, in); err != nil {
		return err
	}
	meta := maps.Clone(op.Instance.SystemMetadata)
	if meta == nil {
		meta = map[string]string{}
	}
	meta["old_vm_state"] = string(op.Instance.VMState)
	return a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskSuspending}, novalet.VMSuspended, novalet.PowerSuspended,
		map[string]any{"system_metadata": meta})
}

// resumeInstance is resume_instance. After a boot of the host there is nothing frozen any more; the instance starts.
func (a *Agent) resumeInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	if err := a.bring(ctx, in); err != nil {
		return err
	}
	vm := novalet.VMActive
	meta := maps.Clone(op.Instance.SystemMetadata)
	if old := meta["old_vm_state"]; old != "" {
		vm = novalet.VMState(old)
	}
	delete(meta, "old_vm_state")
	more := map[string]any{}
	if meta != nil {
		more["system_metadata"] = meta
	}
	return a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskResuming}, vm, novalet.PowerRunning, more)
}

// softDelete is soft_delete_instance.
func (a *Agent) softDelete(ctx context.Context, in *instance, op *novalet.Operation) error {
	if err := a.halt(ctx, in, 0); err != nil {
		return err
	}
	return a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskSoftDeleting}, novalet.VMSoftDeleted, novalet.PowerShutdown, nil)
}

// restoreInstance is restore_instance.
func (a *Agent) restoreInstance(ctx context.Context, in *instance, op *novalet.Operation) error {
	if err := a.bring(ctx, in); err != nil {
		return err
	}
	return a.settleAs(ctx, in, op.Context, []novalet.TaskState{novalet.TaskRestoring}, novalet.VMActive, novalet.PowerRunning, nil)
}

// triggerCrashDump is trigger_crash_dump: a container has no kernel of its own to dump.
func (a *Agent) triggerCrashDump(context.Context, *instance, *novalet.Operation) error {
	return novalet.Faultf(novalet.ErrUnsupported, "TriggerCrashDumpNotSupported", "Triggering crash dump is not supported: a container has no kernel of its own.")
}
