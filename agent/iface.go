package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/novalet/novalet"
)

// AttachInterface implements novalet.Compute. It holds the list of interfaces, not the instance's queue.
func (a *Agent) AttachInterface(ctx context.Context, r *novalet.InterfaceRequest) (*novalet.VIF, error) {
	in, err := a.lookup(r.Instance.UUID)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(a.ctx, func() { cancel(errShutdown) })()
	ctx, unlock := in.lockNet(ctx)
	defer unlock()
	a.tell(in, r.Context, novalet.ActionInterfaceAttach, novalet.PhaseStart)
	vif, err := a.attach(ctx, in, r)
	if err != nil {
		a.tell(in, r.Context, novalet.ActionInterfaceAttach, novalet.PhaseError, withError(err))
		return nil, err
	}
	a.tell(in, r.Context, novalet.ActionInterfaceAttach, novalet.PhaseEnd)
	return vif, nil
}

// attach makes one more port and plugs it. The caller holds the list of interfaces.
func (a *Agent) attach(ctx context.Context, in *instance, r *novalet.InterfaceRequest) (*novalet.VIF, error) {
	inst := in.view()
	if err := a.claimForPort(ctx, in, r.Context, r.Network.PortID); err != nil {
		return nil, err
	}
	added, err := a.network.Allocate(ctx, &novalet.AllocateRequest{Context: r.Context, Instance: inst,
		Networks: in.withDevices([]novalet.NetworkRequest{r.Network}), Attach: true})
	if err != nil {
		a.dropClaim(in, r.Network.PortID)
		return nil, fmt.Errorf("allocate port: %w", err)
	}
	if len(added) != 1 {
		return nil, novalet.Faultf(novalet.ErrAbort, "InterfaceAttachFailedNoNetwork", "No specific network was requested and none are available for project '%s'.", inst.ProjectID)
	}
	vif := &added[0]
	info := append(slices.Clone(inst.NetworkInfo), *vif)
	if err := a.plugNew(ctx, in, info, vif); err != nil {
		after := context.WithoutCancel(ctx)
		a.retrieveDevices(after, in, added)
		uerr := a.plugger.Unplug(after, in.uuid, vif)
		if uerr == nil {
			a.dropClaim(in, vif.ID)
		}
		err = errors.Join(err, uerr, a.network.Release(after, r.Context, inst, vif))
		f := novalet.Faultf(novalet.ErrAbort, "InterfaceAttachFailed", "Failed to attach network adapter device to %s", in.uuid)
		f.Details = map[string]any{"instance_uuid": in.uuid}
		f.Err = err
		return nil, f
	}
	err = a.insist(ctx, in.log, "create vif", func(ctx context.Context) error {
		return a.conductor.CreateVIF(ctx, r.Context, in.uuid, vif, r.Network.Tag)
	})
	if err != nil {
		in.log.Warn("interface row is not recorded", "vif", vif.ID, "err", err)
	}
	if err := a.putNetworkInfo(ctx, in, r.Context, info); err != nil {
		return nil, err
	}
	if r.Network.Tag != "" {
		in.setTag(vif.ID, r.Network.Tag)
		// On the instance's goroutine: saves of one row must not run side by side.
		in.post(func(ctx context.Context) { a.saveTags(ctx, in, r.Context) })
	}
	return vif, nil
}

// plugNew plugs one more interface; an instance that does not run gets it at its next start.
func (a *Agent) plugNew(ctx context.Context, in *instance, info novalet.NetworkInfo, vif *novalet.VIF) error {
	if err := a.plugger.Check(vif); err != nil {
		return fmt.Errorf("check vif %s: %w", vif.ID, err)
	}
	st, err := a.runtime.Status(ctx, in.uuid)
	if err != nil {
		return fmt.Errorf("read container: %w", err)
	}
	requests := in.plugRequests(info, st.NetNS, in.static())
	if st.NetNS == "" {
		return nil
	}
	if err := a.plugger.Plug(ctx, &requests[len(requests)-1]); err != nil {
		return fmt.Errorf("plug vif %s: %w", vif.ID, err)
	}
	if vm := in.view().VMState; st.State == novalet.ContainerPaused && (vm == novalet.VMPaused || vm == novalet.VMSuspended) {
		if err := a.plugger.Silence(ctx, in.uuid, vif, st.NetNS, true); err != nil {
			in.log.Warn("the new interface speaks for a guest that is paused", "vif", vif.ID, "err", err)
		}
	}
	return nil
}

// detachInterface is detach_interface.
func (a *Agent) detachInterface(ctx context.Context, in *instance, op *novalet.Operation) error {
	ctx, unlock := in.lockNet(ctx)
	defer unlock()
	inst := in.view()
	i := slices.IndexFunc(inst.NetworkInfo, func(v novalet.VIF) bool { return v.ID == op.Args.PortID })
	if i < 0 {
		f := novalet.Faultf(novalet.ErrNotFound, "PortNotFound", "Port id %s could not be found.", op.Args.PortID)
		f.Details = map[string]any{"port_id": op.Args.PortID}
		return f
	}
	vif := inst.NetworkInfo[i]
	a.retrieveDevices(ctx, in, inst.NetworkInfo[i:i+1])
	if err := a.plugger.Unplug(ctx, in.uuid, &vif); err != nil {
		return fmt.Errorf("unplug vif %s: %w", vif.ID, err)
	}
	if err := a.network.Release(ctx, op.Context, inst, &vif); err != nil && !errors.Is(err, novalet.ErrNotFound) {
		return fmt.Errorf("release port %s: %w", vif.ID, err)
	}
	err := a.insist(ctx, in.log, "delete vif", func(ctx context.Context) error {
		return a.conductor.DeleteVIF(ctx, op.Context, in.uuid, vif.ID)
	})
	if err != nil && !errors.Is(err, novalet.ErrNotFound) {
		in.log.Warn("interface row stays", "vif", vif.ID, "err", err)
	}
	a.dropClaim(in, vif.ID)
	if err := a.putNetworkInfo(ctx, in, op.Context, slices.Delete(slices.Clone(inst.NetworkInfo), i, i+1)); err != nil {
		return err
	}
	if in.setTag(vif.ID, "") {
		a.saveTags(ctx, in, op.Context)
	}
	return nil
}

// injectNetwork is inject_network_info and reset_network: the interfaces are read again and their addresses set.
func (a *Agent) injectNetwork(ctx context.Context, in *instance, _ *novalet.Operation) error {
	if err := a.refreshNetwork(ctx, in); err != nil {
		return err
	}
	return a.configure(ctx, in, in.view().NetworkInfo)
}

// addFixedIP is add_fixed_ip_to_instance: a port gets one more address of its network, and the guest with it.
func (a *Agent) addFixedIP(ctx context.Context, in *instance, op *novalet.Operation) error {
	in.mu.Lock()
	again := in.replayed
	in.mu.Unlock()
	if again {
		// A crash may have come after the address: Neutron knows, and the message what there was before.
		before := len(addressesOn(op.Instance.NetworkInfo, op.Args.NetworkID))
		if err := a.refreshNetwork(ctx, in); err != nil {
			return err
		}
		if len(addressesOn(in.view().NetworkInfo, op.Args.NetworkID)) > before {
			return nil
		}
	}
	if err := a.network.AddAddress(ctx, op.Context, in.view(), op.Args.NetworkID); err != nil {
		return fmt.Errorf("add an address: %w", err)
	}
	return a.refreshNetwork(ctx, in)
}

// removeFixedIP is remove_fixed_ip_from_instance.
func (a *Agent) removeFixedIP(ctx context.Context, in *instance, op *novalet.Operation) error {
	in.mu.Lock()
	again := in.replayed
	in.mu.Unlock()
	err := a.network.RemoveAddress(ctx, op.Context, in.view(), op.Args.Address)
	if err != nil && !(again && errors.Is(err, novalet.ErrNotFound)) {
		return fmt.Errorf("remove an address: %w", err)
	}
	return a.refreshNetwork(ctx, in)
}

// addressesOn lists the fixed addresses on a network.
func addressesOn(info novalet.NetworkInfo, network string) []string {
	var out []string
	for i := range info {
		for _, s := range info[i].Network.Subnets {
			for _, ip := range s.IPs {
				if info[i].Network.ID == network {
					out = append(out, ip.Address)
				}
			}
		}
	}
	return out
}
