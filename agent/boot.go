package agent

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/cleanup"
)

// boot is one build under way. It is a straight line:
//
//	save {building, spawning, host} -> ports -------> plug --> wired --.
//	image prepared ----------------------------------------------------+-> start -> save {active}
//	sandbox created --------------------------------'                  |
//
// Only the two saves, the ports, the image and the wiring are on the critical path; events, interface rows, block
// device rows and the info cache are written beside it. Each step registers its undo before it acts. A boot that is
// run again after a crash finds what the first run did: every step may be repeated.
type boot struct {
	a    *Agent
	in   *instance
	op   *novalet.Operation
	args *novalet.BuildArgs
	inst *novalet.Instance // as the build found it; never changed
	undo cleanup.Stack
	time *timing

	image *novalet.Image
	kind  novalet.Kind // "" until known
	info  novalet.NetworkInfo
	// saved: the row names this host; claimed: the instance counts here.
	saved bool
}

// build is build_and_run_instance.
func (a *Agent) build(ctx context.Context, in *instance, op *novalet.Operation) error {
	args := op.Args.Build
	if args == nil {
		return fmt.Errorf("build instance %s: the message has no build arguments: %w", in.uuid, novalet.ErrInvalidState)
	}
	b := &boot{a: a, in: in, op: op, args: args, time: newTiming(a.now())}
	in.read(func(r *record) {
		if r.Allocated {
			b.info = r.Instance.NetworkInfo
		}
	})
	var failed *failure
	in.read(func(r *record) { failed = r.Failed })
	if failed != nil {
		// A failure that a crash interrupted is brought to its end, not turned into a second try.
		b.registerUndo()
		return b.fail(ctx, failed, errors.New(failed.Cause))
	}
	in.set(func(r *record) {
		kept := *args
		r.Build = &kept
		r.FirstBoot = true
		r.Resident = true
		if r.Seed == "" {
			r.Seed = randomSeed()
		}
	})
	b.inst = in.view()
	a.tell(in, op.Context, novalet.ActionCreate, novalet.PhaseStart, withImage(args.Image.ID, args.Image.Name), func(n *novalet.Notification) {
		// nova-compute tells it before it takes the instance over.
		n.Instance.TaskState, n.Instance.Host, n.Instance.Node = novalet.TaskNone, "", ""
	})
	err := a.builds.acquire(ctx)
	if err == nil {
		err = b.run(ctx)
		a.builds.release()
	}
	if err == nil {
		a.timings.put(in.uuid, b.time)
		a.tell(in, op.Context, novalet.ActionCreate, novalet.PhaseEnd)
		in.log.Info("instance booted", "request_id", op.Context.RequestID, "kind", b.kind, "image", args.Image.ID, "took", b.time.total(), "steps", b.time)
		b.rememberPorts()
		return nil
	}
	if errors.Is(context.Cause(ctx), errShutdown) {
		b.undo.Drop()
		return errShutdown
	}
	a.tell(in, op.Context, novalet.ActionCreate, novalet.PhaseError, withError(err))
	return b.fail(ctx, b.classify(ctx, err), err)
}

// run takes the steps. On error nothing is undone yet.
func (b *boot) run(ctx context.Context) error {
	b.registerUndo()
	if err := b.possible(); err != nil {
		return err
	}
	if err := b.claim(); err != nil {
		return err
	}
	imageReady := make(chan struct{})
	sandboxReady := make(chan struct{})
	var status *novalet.ContainerStatus
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer close(imageReady)
		defer b.time.start("image")()
		var img *novalet.Image
		err := patiently(gctx, func(ctx context.Context) (err error) {
			img, err = b.a.images.Prepare(ctx, b.imageRequest())
			return err
		})
		if err != nil {
			return fmt.Errorf("prepare image %s: %w", b.args.Image.ID, err)
		}
		b.image, b.kind = img, kindOf(img)
		return nil
	})
	group.Go(func() error {
		defer close(sandboxReady)
		defer b.time.start("sandbox")()
		s, err := sandboxSpec(&b.a.cfg, b.inst, b.args, b.cpuSet())
		if err != nil {
			return err
		}
		if status, err = b.a.runtime.Create(gctx, s); err != nil {
			return fmt.Errorf("create sandbox: %w", err)
		}
		return nil
	})
	beside, bctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		done := b.time.start("save_building")
		err := b.saveBuilding(gctx)
		done()
		if err != nil {
			return err
		}
		if err := b.allocate(gctx); err != nil {
			return err
		}
		if err := b.advance(gctx, novalet.TaskBlockDeviceMapping, novalet.TaskNetworking); err != nil {
			return err
		}
		b.writeBeside(bctx, beside)
		for i := range b.info {
			if err := b.a.plugger.Check(&b.info[i]); err != nil {
				return fmt.Errorf("check vif %s: %w", b.info[i].ID, err)
			}
		}
		select {
		case <-sandboxReady:
		case <-gctx.Done():
			return context.Cause(gctx)
		}
		if status == nil {
			return nil // the sandbox's own error ends the group
		}
		return b.plugAndWait(gctx, status.NetNS, imageReady)
	})
	if err := group.Wait(); err != nil {
		// What runs beside must not write over what the failure writes.
		_ = beside.Wait()
		return err
	}
	spec, err := b.containerSpec()
	if err == nil {
		err = b.advance(ctx, novalet.TaskSpawning, novalet.TaskBlockDeviceMapping)
	}
	if err != nil {
		_ = beside.Wait()
		return err
	}
	done := b.time.start("start")
	err = b.a.runtime.Start(ctx, b.in.uuid, spec)
	done()
	if err != nil {
		_ = beside.Wait()
		return fmt.Errorf("start container: %w", err)
	}
	// The first answer that says ACTIVE must have the addresses.
	if err := beside.Wait(); err != nil {
		return err
	}
	done = b.time.start("save_active")
	err = b.saveActive(ctx, spec)
	done()
	return err
}

// registerUndo lists what a failed boot takes back; each step is safe on nothing.
func (b *boot) registerUndo() {
	a, in := b.a, b.in
	b.undo.Add("ports", func(ctx context.Context) error {
		if !b.saved && len(b.info) == 0 {
			return nil // nothing was asked of Neutron
		}
		return a.network.Deallocate(ctx, b.op.Context, b.inst, in.portsToFree(b.info))
	})
	b.undo.Add("image", func(ctx context.Context) error { return a.images.Release(ctx, in.uuid) })
	b.undo.Add("plugs", func(ctx context.Context) error { return a.unplugAll(ctx, in.uuid, b.info) })
	b.undo.Add("container", func(ctx context.Context) error {
		a.retrieveDevices(ctx, in, b.info)
		return a.runtime.Destroy(ctx, in.uuid, novalet.DestroyOptions{})
	})
	if b.inst == nil {
		b.inst, b.saved = in.view(), true
	}
}

// possible refuses what no host of this kind can do.
func (b *boot) possible() error {
	for i := range b.args.BlockDevices {
		if d := &b.args.BlockDevices[i]; d.DestinationType == "volume" {
			return novalet.Faultf(novalet.ErrAbort, "InvalidVolume", "Volumes cannot be attached to container servers. Create the server from an image, without volumes.")
		}
	}
	if b.args.Image.ID == "" {
		return novalet.Faultf(novalet.ErrAbort, "ImageUnacceptable", "The server has no image. Create it from an image.")
	}
	return nil
}

// claim takes host CPUs when the flavor asks for its own, and devices. Everything else Placement has counted.
func (b *boot) claim() error {
	if _, err := b.a.claimCPUs(b.in); err != nil {
		return err
	}
	return b.a.claimPCI(b.in, b.inst.PCIRequests)
}

func (b *boot) cpuSet() string {
	var set string
	b.in.read(func(r *record) { set = r.CPUSet })
	return set
}

func (b *boot) imageRequest() *novalet.ImageRequest {
	return &novalet.ImageRequest{Context: b.op.Context, InstanceUUID: b.in.uuid, ImageID: b.args.Image.ID,
		Meta: b.args.Image, MaxBytes: b.inst.Flavor.RootGB << 30, MemoryMB: b.inst.Flavor.MemoryMB,
		TrustedCertificates: b.inst.TrustedCertificates}
}

// saveBuilding claims the row. Neutron's events reach us only once the row names this host, so nothing is bound before.
func (b *boot) saveBuilding(ctx context.Context) error {
	b.saved = true // also when the answer gets lost
	task := novalet.TaskSpawning
	if b.a.cfg.IntermediateStates {
		task = novalet.TaskNetworking
	}
	fields := map[string]any{
		"vm_state": novalet.VMBuilding, "task_state": task,
		"host": b.a.host, "node": b.args.Node, "launched_on": b.a.host,
	}
	// A repeated boot finds its own saves.
	expected := []novalet.TaskState{novalet.TaskScheduling, novalet.TaskNone}
	if b.inst.Host == b.a.host {
		expected = append(expected, novalet.TaskSpawning, novalet.TaskNetworking, novalet.TaskBlockDeviceMapping)
	}
	if err := b.a.save(ctx, b.in, b.op.Context, expected, fields); err != nil {
		if errors.Is(err, novalet.ErrTaskState) || errors.Is(err, novalet.ErrInstanceGone) {
			b.saved = b.inst.Host == b.a.host
		}
		return fmt.Errorf("save building: %w", err)
	}
	b.in.set(func(r *record) {
		i := &r.Instance
		i.VMState, i.TaskState, i.Host, i.Node = novalet.VMBuilding, task, b.a.host, b.args.Node
	})
	b.a.announce(b.in)
	return nil
}

// advance saves the next task_state of a boot where the operator wants to see each.
func (b *boot) advance(ctx context.Context, task, from novalet.TaskState) error {
	if !b.a.cfg.IntermediateStates {
		return nil
	}
	if err := b.a.save(ctx, b.in, b.op.Context, []novalet.TaskState{from, task}, map[string]any{"task_state": task}); err != nil {
		return fmt.Errorf("save %s: %w", task, err)
	}
	b.in.set(func(r *record) { r.Instance.TaskState = task })
	return nil
}

// writeBeside writes what must be there when the instance turns ACTIVE but what no step waits for.
func (b *boot) writeBeside(ctx context.Context, group *errgroup.Group) {
	a, rc, uuid := b.a, b.op.Context, b.in.uuid
	if len(b.info) > 0 {
		group.Go(func() error {
			return a.insist(ctx, b.in.log, "save network info", func(ctx context.Context) error {
				return a.conductor.SaveNetworkInfo(ctx, rc, uuid, b.info)
			})
		})
	}
	for i := range b.info {
		group.Go(func() error {
			// Only the order of interfaces and their tags hang on this row; a second one for the same port is refused.
			err := a.insist(ctx, b.in.log, "create vif", func(ctx context.Context) error {
				return a.conductor.CreateVIF(ctx, rc, uuid, &b.info[i], b.tagOf(i))
			})
			if err != nil && ctx.Err() == nil {
				b.in.log.Warn("interface row is not recorded", "vif", b.info[i].ID, "err", err)
			}
			return nil
		})
	}
	for i := range b.args.BlockDevices {
		d := b.args.BlockDevices[i]
		if d.BootIndex == nil || *d.BootIndex != 0 || d.DeviceName != "" {
			continue
		}
		d.DeviceName = b.rootDevice()
		group.Go(func() error {
			err := a.insist(ctx, b.in.log, "save block device", func(ctx context.Context) error {
				return a.conductor.SaveBlockDevice(ctx, rc, &d)
			})
			if err != nil && ctx.Err() == nil {
				b.in.log.Warn("root device is not recorded", "err", err)
			}
			return nil
		})
	}
}

func (b *boot) rootDevice() string {
	if b.inst.RootDeviceName != "" {
		return b.inst.RootDeviceName
	}
	return "/dev/vda"
}

// containerSpec joins instance and image; from here on the words are OCI's.
func (b *boot) containerSpec() (*novalet.ContainerSpec, error) {
	b.in.set(func(r *record) { r.Image = b.image })
	return b.a.specFor(b.in)
}

// saveActive is the save that makes the instance ACTIVE. Expecting spawning protects against a delete that came meanwhile.
func (b *boot) saveActive(ctx context.Context, spec *novalet.ContainerSpec) error {
	now := b.a.now().UTC()
	fields := map[string]any{
		"vm_state": novalet.VMActive, "task_state": nil, "power_state": novalet.PowerRunning,
		"launched_at": now, "root_device_name": b.rootDevice(),
	}
	if configDriveForced(&b.a.cfg, b.inst) && hasConfigDrive(spec) {
		fields["config_drive"] = "True"
	}
	var tagged []novalet.TaggedDevice
	if b.in.read(func(r *record) { tagged = taggedDevices(r) }); len(tagged) > 0 {
		fields["device_metadata"] = tagged
	}
	v4, v6 := accessIPs(b.a.cfg.DefaultAccessIPNetworkName, b.info)
	if v4 != "" {
		fields["access_ip_v4"] = v4
	}
	if v6 != "" {
		fields["access_ip_v6"] = v6
	}
	if err := b.a.save(ctx, b.in, b.op.Context, []novalet.TaskState{novalet.TaskSpawning}, fields); err != nil {
		return fmt.Errorf("save active: %w", err)
	}
	b.undo.Drop()
	b.in.set(func(r *record) {
		i := &r.Instance
		i.VMState, i.TaskState, i.PowerState, i.LaunchedAt = novalet.VMActive, novalet.TaskNone, novalet.PowerRunning, &now
		i.RootDeviceName = b.rootDevice()
		if fields["config_drive"] != nil {
			i.ConfigDrive = "True"
		}
		r.FirstBoot, r.Allocated, r.BootID = false, false, b.a.bootID
	})
	b.in.setPower(novalet.PowerRunning)
	return nil
}

// accessIPs are the first addresses on the network that default_access_ip_network_name names.
func accessIPs(network string, info novalet.NetworkInfo) (v4, v6 string) {
	if network == "" {
		return "", ""
	}
	for i := range info {
		if info[i].Network.Label != network {
			continue
		}
		for _, s := range info[i].Network.Subnets {
			for _, ip := range s.IPs {
				if ip.Version == 6 && v6 == "" {
					v6 = ip.Address
				} else if ip.Version == 4 && v4 == "" {
					v4 = ip.Address
				}
			}
		}
	}
	return v4, v6
}

func randomSeed() string {
	var b [512]byte
	// crypto/rand.Read never fails: it ends the program instead.
	_, _ = rand.Read(b[:])
	return base64.StdEncoding.EncodeToString(b[:])
}
