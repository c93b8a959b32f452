package neutron

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/novalet/novalet"
)

// maxParallel bounds the requests that one operation has under way.
const maxParallel = 8

// Deallocate implements novalet.NetworkAPI.
func (a *API) Deallocate(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, info novalet.NetworkInfo) error {
	ctx = withRequest(ctx, rc)
	admin, err := a.admin(ctx)
	if err != nil {
		return fmt.Errorf("deallocate network of %s: %w", inst.UUID, err)
	}
	ports, err := a.instancePorts(ctx, admin, inst)
	if err != nil {
		return fmt.Errorf("deallocate network of %s: %w", inst.UUID, err)
	}
	return a.free(ctx, rc, admin, inst, ports, info)
}

// Deallocation is the first half of Deallocate, which changes nothing: it finds the ports of the instance that info tells
// of. The function it returns frees them; unsure is true when the instance may have ports that neither info nor this API
// knows of: then Deallocate has still to be called, but nothing that uses the known ones has to wait for it. So the
// ports can be looked for while the host's side of them is still being taken down, and need not be looked for at all
// before those are deleted that are known to the last change.
func (a *API) Deallocation(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, info novalet.NetworkInfo) (free func(context.Context) (unsure bool, err error), err error) {
	ctx = withRequest(ctx, rc)
	admin, err := a.admin(ctx)
	if err != nil {
		return nil, fmt.Errorf("deallocate network of %s: %w", inst.UUID, err)
	}
	if revisions, ok := a.known.take(inst.UUID, info); ok {
		return func(ctx context.Context) (bool, error) {
			ctx = withRequest(ctx, rc)
			if deleteUnchanged(ctx, admin, revisions) == nil {
				return true, nil
			}
			return false, a.Deallocate(ctx, rc, inst, info)
		}, nil
	}
	ports, err := a.instancePorts(ctx, admin, inst)
	if err != nil {
		return nil, fmt.Errorf("deallocate network of %s: %w", inst.UUID, err)
	}
	return func(ctx context.Context) (bool, error) {
		return false, a.free(withRequest(ctx, rc), rc, admin, inst, ports, info)
	}, nil
}

// free deletes the ports, and unbinds those that info says were there before the instance.
func (a *API) free(ctx context.Context, rc novalet.RequestContext, admin *caller, inst *novalet.Instance, ports []*port, info novalet.NetworkInfo) error {
	preserve := map[string]bool{}
	for _, v := range info {
		if v.PreserveOnDelete {
			preserve[v.ID] = true
		}
	}
	a.known.forget(inst.UUID)
	var drop []string
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxParallel)
	for _, p := range ports {
		if !preserve[p.ID] {
			drop = append(drop, p.ID)
			continue
		}
		g.Go(func() error { return a.unbind(gctx, admin, a.userOrNil(ctx, rc), p.ID, p.NetworkID, p.Profile) })
	}
	if err := errors.Join(deletePorts(ctx, admin, drop), g.Wait()); err != nil {
		return fmt.Errorf("deallocate network of %s: %w", inst.UUID, err)
	}
	return nil
}

// userOrNil is for requests that are better made as the user and may be made without.
func (a *API) userOrNil(ctx context.Context, rc novalet.RequestContext) *caller {
	user, err := a.asUser(ctx, rc)
	if err != nil {
		return nil
	}
	return user
}

// Release implements novalet.NetworkAPI.
func (a *API) Release(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, vif *novalet.VIF) error {
	ctx = withRequest(ctx, rc)
	if !uuidRE.MatchString(vif.ID) {
		return fmt.Errorf("release port %.40q: no uuid", vif.ID)
	}
	admin, err := a.admin(ctx)
	if err != nil {
		return fmt.Errorf("release port %s: %w", vif.ID, err)
	}
	var body struct{ Port *port }
	err = admin.get(ctx, "ports/"+vif.ID, nil, &body)
	if errors.Is(err, novalet.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	p := body.Port
	// A port that serves another device by now, or nobody, is no longer ours to free.
	if p == nil || p.ID != vif.ID || p.DeviceID != inst.UUID {
		return nil
	}
	if vif.PreserveOnDelete {
		return a.unbind(ctx, admin, a.userOrNil(ctx, rc), p.ID, p.NetworkID, p.Profile)
	}
	return admin.remove(ctx, "ports/"+p.ID)
}

// Unbind implements novalet.NetworkAPI.
func (a *API) Unbind(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, _ novalet.NetworkInfo) error {
	ctx = withRequest(ctx, rc)
	admin, err := a.admin(ctx)
	if err != nil {
		return fmt.Errorf("unbind network of %s: %w", inst.UUID, err)
	}
	ports, err := a.instancePorts(ctx, admin, inst)
	if err != nil {
		return fmt.Errorf("unbind network of %s: %w", inst.UUID, err)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxParallel)
	for _, p := range ports {
		// Another host has taken the port over already: its binding is not ours to break.
		if p.HostID != a.o.Host {
			continue
		}
		g.Go(func() error {
			m := map[string]any{"binding:host_id": nil}
			if p.VNICType == vnicDirect {
				m["binding:profile"] = withoutDevice(p.Profile)
			}
			err := admin.put(gctx, "ports/"+p.ID, map[string]any{"port": m}, nil)
			if errors.Is(err, novalet.ErrNotFound) {
				return nil
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("unbind network of %s: %w", inst.UUID, err)
	}
	return nil
}

// deviceKeys are the parts of binding:profile that describe the device the port was bound to
// (nova/network/neutron.py, _unbind_ports).
var deviceKeys = []string{"pci_vendor_info", "pci_slot", "allocation", "arq_uuid", "physical_network", "card_serial_number",
	"vf_num", "pf_mac_address", "device_mac_address", "migrating_to"}

// unbind gives a port back to its owner as it came.
func (a *API) unbind(ctx context.Context, admin, user *caller, portID, networkID string, profile map[string]json.RawMessage) error {
	m := map[string]any{"device_id": "", "device_owner": "", "binding:host_id": nil, "binding:profile": withoutDevice(profile)}
	ext, err := a.extensions(ctx, admin)
	if err != nil {
		return err
	}
	var domain string
	if hasDNS(ext) {
		nets, err := a.details(ctx, admin, []string{networkID})
		if err != nil {
			return err
		}
		if n := nets[networkID]; n != nil {
			domain = n.DNSDomain
		}
		if domain == "" {
			m["dns_name"] = ""
		}
	}
	err = admin.put(ctx, "ports/"+portID, map[string]any{"port": m}, nil)
	if err == nil && domain != "" {
		// The record is in the user's zone. A token that has expired cannot clear it; the administrator's clears the
		// name at least.
		noName := map[string]any{"port": map[string]any{"dns_name": ""}}
		if user == nil || user.put(ctx, "ports/"+portID, noName, nil) != nil {
			err = admin.put(ctx, "ports/"+portID, noName, nil)
		}
	}
	if errors.Is(err, novalet.ErrNotFound) {
		return nil
	}
	return err
}

// deletePorts deletes side by side; what is gone already is success.
func deletePorts(ctx context.Context, admin *caller, ids []string) error {
	errs := make([]error, len(ids))
	var g errgroup.Group
	g.SetLimit(maxParallel)
	for i, id := range ids {
		g.Go(func() error {
			errs[i] = admin.remove(ctx, "ports/"+id)
			return nil
		})
	}
	_ = g.Wait()
	return errors.Join(errs...)
}
