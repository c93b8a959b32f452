package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/novalet/novalet"
)

// portFinder is what a NetworkAPI that can look for an instance's ports ahead of time has beside the contract.
type portFinder interface {
	// Remember looks at the ports of an instance whose boot has ended.
	Remember(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance) error
	// Deallocation looks for the ports where they are not known, and returns what frees them. unsure: Deallocate is still to
	// be called, but nobody has to wait for it.
	Deallocation(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, info novalet.NetworkInfo) (free func(context.Context) (unsure bool, err error), err error)
}

// freePortsTime is how long a delete waits for Neutron before it goes on without; what is left is tried again later.
const freePortsTime = 20 * time.Second

// What a delete of a server with ports does beside Neutron begins a little later: Neutron takes longer than all of it, and where
// it shares two processors with nova-api, which is answering the user just then, and with the conductor, it is what waits
// (an eighth of its time, by the trace of switches).
const (
	containerAside = 25 * time.Millisecond
	eventAside     = 2 * containerAside
)

// terminate is terminate_instance. It stands at the head of the queue: what ran was ended by Submit. It is no error if
// the instance is already gone, here or in Nova.
//
// The host's side of the interfaces is cut before the ports are freed, so that an address given to somebody else is never
// used by two, and unplugged after: of a port that Neutron still has, it would note first that it is down, and tell Nova,
// just while it is to delete it. The ports and the container go side by side. Then the row goes, beside the unplugging of what
// is cut already, and after it, as in Nova, what nobody reads who waits for the delete: what it took in Placement, its last
// state, the rows of its interfaces, ports that nobody here has heard of. Beside the ports, what Placement has to do would take
// from Neutron the processor and the data base that the two may share.
func (a *Agent) terminate(ctx context.Context, in *instance, op *novalet.Operation) error {
	t := newTiming(a.now())
	inst := in.view()
	in.mu.Lock()
	info, console, rescued := in.rec.Instance.NetworkInfo, in.rec.Console, in.rec.Rescue != nil
	in.rec.Instance.TaskState = novalet.TaskDeleting
	in.mu.Unlock()
	a.events.forget(in.uuid)
	a.consoles.closeInstance(in.uuid)

	// An attach or a refresh under way must not bring back what is freed here.
	in.setDeleting(true)
	defer in.setDeleting(false)
	in.netMu.Lock()
	defer in.netMu.Unlock()
	in.read(func(r *record) { info = r.Instance.NetworkInfo })

	left := &pending{Context: op.Context, Info: in.portsToFree(info)}
	a.tell(in, op.Context, novalet.ActionDelete, novalet.PhaseStart)
	a.tell(in, op.Context, novalet.ActionShutdown, novalet.PhaseStart)
	a.retrieveDevices(ctx, in, info)
	var destroyErr error
	var wg, beside sync.WaitGroup // the row does not wait for beside
	wg.Go(func() {
		if len(left.Info) > 0 {
			select {
			case <-time.After(containerAside):
			case <-ctx.Done():
			}
		}
		gone := t.start("container")
		destroyErr = a.runtime.Destroy(ctx, in.uuid, novalet.DestroyOptions{})
		gone()
		if destroyErr != nil {
			return
		}
		err := a.images.Release(ctx, in.uuid)
		if rescued {
			err = errors.Join(err, a.images.Release(ctx, rescueLease(in.uuid)))
		}
		if err != nil {
			in.log.Warn("image is not released", "err", err)
			left.Image = true
		}
	})
	var freed func() (unsure bool)
	wg.Go(func() {
		freed = a.dropInterfaces(ctx, in, t, op.Context, inst, info, left)
		beside.Go(func() {
			defer t.start("unplug")()
			if err := a.unplugAll(ctx, in.uuid, info); err != nil {
				in.log.Warn("interfaces stay plugged", "err", err)
				left.Plugs = true
			}
		})
	})
	wg.Wait()
	defer beside.Wait()
	defer freed()
	if errors.Is(context.Cause(ctx), errShutdown) {
		return errShutdown
	}
	if destroyErr != nil {
		return a.terminateFailed(ctx, in, op, fmt.Errorf("destroy container: %w", destroyErr))
	}
	a.tell(in, op.Context, novalet.ActionShutdown, novalet.PhaseEnd)
	done := t.start("row")
	err := a.destroyRow(ctx, in, op.Context)
	done()
	if err == nil {
		wg.Go(func() { left.Allocation = a.dropAllocation(ctx, in) != nil })
		wg.Go(func() { a.dropBeside(ctx, in, op.Context, console) })
		wg.Go(func() {
			if !freed() {
				return
			}
			lookCtx, cancel := context.WithTimeout(ctx, freePortsTime)
			defer cancel()
			if err := a.network.Deallocate(lookCtx, op.Context, inst, left.Info); err != nil {
				in.log.Warn("ports are not looked for yet", "err", err)
				left.Ports = true
			}
		})
		err = a.saveDeleted(ctx, in, op.Context)
	}
	wg.Wait()
	beside.Wait()
	if errors.Is(context.Cause(ctx), errShutdown) {
		return errShutdown
	}
	if err != nil {
		return a.terminateFailed(ctx, in, op, err)
	}
	a.tell(in, op.Context, novalet.ActionDelete, novalet.PhaseEnd, func(n *novalet.Notification) {
		now := a.now().UTC()
		n.Instance.DeletedAt, n.Instance.NetworkInfo = &now, nil
		n.Instance.VMState, n.Instance.TaskState, n.Instance.PowerState = novalet.VMDeleted, novalet.TaskNone, novalet.PowerNoState
	})
	in.forgetHere(left)
	in.log.Info("instance deleted", "request_id", op.Context.RequestID, "took", t.total(), "steps", t)
	return nil
}

// forgetHere makes the record one of an instance that is not here, with what is left to undo.
func (in *instance) forgetHere(left *pending) {
	in.set(func(r *record) {
		r.Resident, r.Allocated, r.Failed, r.CPUSet, r.Build, r.Image, r.Rescue = false, false, nil, "", nil, nil, nil
		r.Instance.NetworkInfo = nil
		if left == nil || !left.Plugs {
			r.PCI = nil
		}
		if r.Pending = left; left.empty() {
			r.Pending = nil
		}
	})
}

// bindingWatcher is what a VIFPlugger has beside the contract that can see when Neutron's side lets go of a port.
type bindingWatcher interface {
	// AwaitUnbound blocks until then. An error says that it cannot be seen.
	AwaitUnbound(ctx context.Context, instanceUUID string, vif *novalet.VIF) error
}

// dropInterfaces cuts the host's side of the interfaces and frees the ports, with a bound on the time that a delete waits for
// Neutron. It returns when Neutron has answered, or, where that can be seen before, when all of the ports have been taken
// from this host by it: it does so when what its database has of them has gone, and what it does then is nobody's concern
// who waits for the delete. freed waits for the answer, has it noted whether ports are left, and tells whether there may
// be some that the agent did not know of; it may be called repeatedly.
func (a *Agent) dropInterfaces(ctx context.Context, in *instance, t *timing, rc novalet.RequestContext, inst *novalet.Instance, info novalet.NetworkInfo, left *pending) (freed func() (unsure bool)) {
	portsCtx, cancel := context.WithTimeout(ctx, freePortsTime)
	free := func(ctx context.Context) (bool, error) { return false, a.network.Deallocate(ctx, rc, inst, left.Info) }
	var finding sync.WaitGroup
	var err error
	if f, ok := a.network.(portFinder); ok {
		finding.Go(func() {
			defer t.start("find_ports")()
			free, err = f.Deallocation(portsCtx, rc, inst, left.Info)
		})
	}
	unbound := a.unbound(portsCtx, in.uuid, info)
	if cerr := a.cutAll(ctx, in.uuid, info); cerr != nil {
		in.log.Warn("interfaces are not cut", "err", cerr)
		_ = a.unplugAll(ctx, in.uuid, info) // tried again later
		unbound = nil                       // it would be our own doing
	}
	finding.Wait()
	answered := make(chan struct{})
	var unsure bool
	go func() {
		defer close(answered)
		defer cancel()
		if err == nil {
			done := t.start("free_ports")
			unsure, err = free(portsCtx)
			done()
		}
		if err != nil && a.ctx.Err() == nil {
			in.log.Warn("ports are not freed yet", "err", err)
		}
	}()
	select {
	case <-answered:
	case <-unbound:
	}
	// Once, since ports that are looked for later may be left too.
	return sync.OnceValue(func() bool {
		<-answered
		left.Ports = err != nil
		return unsure
	})
}

// unbound gives a channel that is closed when Neutron's side has let go of all the interfaces, nil where that is not seen.
func (a *Agent) unbound(ctx context.Context, uuid string, info novalet.NetworkInfo) <-chan struct{} {
	if a.watcher == nil || len(info) == 0 {
		return nil
	}
	done := make(chan struct{})
	group, gctx := errgroup.WithContext(ctx)
	for i := range info {
		group.Go(func() error { return a.watcher.AwaitUnbound(gctx, uuid, &info[i]) })
	}
	go func() {
		if group.Wait() == nil {
			close(done)
		}
	}()
	return done
}

// dropBeside deletes what else the database has of the instance.
func (a *Agent) dropBeside(ctx context.Context, in *instance, rc novalet.RequestContext, console bool) {
	drop := func(what string, f func(ctx context.Context) error) {
		err := a.insist(ctx, in.log, "delete "+what, f)
		if err != nil && ctx.Err() == nil && !errors.Is(err, novalet.ErrInstanceGone) {
			in.log.Warn(what+" stay", "err", err)
		}
	}
	if len(in.view().NetworkInfo) > 0 {
		drop("interface rows", func(ctx context.Context) error { return a.conductor.DeleteVIFs(ctx, rc, in.uuid) })
	}
	if console {
		drop("console tokens", func(ctx context.Context) error { return a.conductor.CleanConsoleTokens(ctx, rc, in.uuid) })
	}
}

// destroyRow marks the row deleted.
func (a *Agent) destroyRow(ctx context.Context, in *instance, rc novalet.RequestContext) error {
	err := a.insist(ctx, in.log, "destroy instance", func(ctx context.Context) error {
		return a.conductor.DestroyInstance(ctx, rc, in.uuid)
	})
	if err != nil && !errors.Is(err, novalet.ErrInstanceGone) {
		return fmt.Errorf("destroy row: %w", err)
	}
	return nil
}

// saveDeleted writes the last state of a row that is deleted.
func (a *Agent) saveDeleted(ctx context.Context, in *instance, rc novalet.RequestContext) error {
	last := &novalet.InstanceUpdate{UUID: in.uuid, Deleted: true, Fields: map[string]any{
		"vm_state": novalet.VMDeleted, "task_state": nil, "power_state": novalet.PowerNoState, "terminated_at": a.now().UTC(),
	}}
	err := a.insist(ctx, in.log, "save deleted", func(ctx context.Context) error { return a.conductor.SaveInstance(ctx, rc, last) })
	if err != nil && !errors.Is(err, novalet.ErrInstanceGone) {
		return fmt.Errorf("save deleted: %w", err)
	}
	in.set(func(r *record) {
		r.Instance.VMState, r.Instance.TaskState, r.Instance.PowerState = novalet.VMDeleted, novalet.TaskNone, novalet.PowerNoState
	})
	in.setPower(novalet.PowerNoState)
	return nil
}

// terminateFailed puts the instance into ERROR; the user may delete it again.
func (a *Agent) terminateFailed(ctx context.Context, in *instance, op *novalet.Operation, err error) error {
	fault := novalet.Faultf(novalet.ErrBusy, "", "The server could not be deleted: the host could not end it. Delete it again, or ask the operator.")
	fault.Err = err
	if ferr := a.insist(ctx, in.log, "create fault", func(ctx context.Context) error {
		return a.conductor.CreateFault(ctx, op.Context, in.uuid, fault)
	}); ferr != nil {
		in.log.Warn("fault is not recorded", "err", ferr)
	}
	serr := a.save(ctx, in, op.Context, nil, map[string]any{"vm_state": novalet.VMError, "task_state": nil})
	if errors.Is(context.Cause(ctx), errShutdown) {
		return errShutdown
	}
	if serr != nil {
		in.log.Warn("instance is not put into error", "err", serr)
	}
	in.set(func(r *record) {
		r.Resident = true // still here
		r.Instance.VMState, r.Instance.TaskState = novalet.VMError, novalet.TaskNone
	})
	return fault
}

// undoPending tries again what an earlier operation could not undo.
func (a *Agent) undoPending(ctx context.Context, in *instance) error {
	var p *pending
	var resident bool
	in.read(func(r *record) {
		resident = r.Resident
		if r.Pending != nil {
			c := *r.Pending
			p = &c
		}
	})
	if p.empty() {
		return nil
	}
	inst := in.view()
	if p.Ports || p.Allocation {
		// The instance may have found another host meanwhile; its ports and its allocation are that host's then.
		rows, err := a.conductor.Instances(ctx, []string{in.uuid})
		if err != nil {
			return fmt.Errorf("read instance: %w", err)
		}
		for i := range rows {
			if r := &rows[i]; !r.Deleted && (r.Host != "" || r.VMState == novalet.VMBuilding) {
				p.Ports, p.Allocation = false, false
			}
		}
	}
	var errs []error
	try := func(flag *bool, what string, f func() error) {
		if !*flag {
			return
		}
		if err := f(); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", what, err))
			return
		}
		*flag = false
	}
	if !resident {
		try(&p.Container, "container", func() error { return a.runtime.Destroy(ctx, in.uuid, novalet.DestroyOptions{}) })
		try(&p.Plugs, "plugs", func() error { return a.unplugAll(ctx, in.uuid, p.Info) })
		try(&p.Image, "image", func() error {
			return errors.Join(a.images.Release(ctx, in.uuid), a.images.Release(ctx, rescueLease(in.uuid)))
		})
	} else {
		p.Container, p.Plugs, p.Image = false, false, false
	}
	try(&p.Ports, "ports", func() error { return a.network.Deallocate(ctx, p.Context, inst, p.Info) })
	try(&p.Allocation, "allocation", func() error { return a.placement.DeleteAllocation(ctx, in.uuid) })
	in.note(func(r *record) {
		if r.Pending = p; p.empty() {
			r.Pending = nil
		}
		if !resident && !p.Plugs {
			r.PCI = nil
		}
	})
	return errors.Join(errs...)
}
