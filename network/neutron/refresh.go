package neutron

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/novalet/novalet"
)

// Refresh implements novalet.NetworkAPI. Ports that are gone are left out; ports that came since stand at the end.
func (a *API) Refresh(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, cached novalet.NetworkInfo) (novalet.NetworkInfo, error) {
	ctx = withRequest(ctx, rc)
	admin, err := a.admin(ctx)
	if err != nil {
		return nil, fmt.Errorf("refresh network of %s: %w", inst.UUID, err)
	}
	ports, err := a.instancePorts(ctx, admin, inst)
	if err != nil {
		return nil, fmt.Errorf("refresh network of %s: %w", inst.UUID, err)
	}
	info, err := a.info(ctx, admin, order(ports, cached), cached)
	if err != nil {
		return nil, fmt.Errorf("refresh network of %s: %w", inst.UUID, err)
	}
	if ext, err := a.extensions(ctx, admin); err == nil && ext[revisionIfMatch] {
		a.known.set(inst.UUID, ports)
	}
	return info, nil
}

// order sorts the ports as the cached info has them. A port that is not in it counts only once it is plugged into a
// server: one whose creation is under way is not part of it yet.
func order(ports []*port, cached novalet.NetworkInfo) []*port {
	at := map[string]int{}
	for i, v := range cached {
		at[v.ID] = i
	}
	var out []*port
	for _, p := range ports {
		if _, known := at[p.ID]; known || strings.HasPrefix(p.DeviceOwner, "compute:") {
			out = append(out, p)
		}
	}
	slices.SortStableFunc(out, func(p, q *port) int {
		i, iok := at[p.ID]
		j, jok := at[q.ID]
		switch {
		case iok && jok:
			return i - j
		case iok:
			return -1
		case jok:
			return 1
		}
		return strings.Compare(p.ID, q.ID)
	})
	return out
}

func (a *API) info(ctx context.Context, admin *caller, ports []*port, cached novalet.NetworkInfo) (novalet.NetworkInfo, error) {
	info := make(novalet.NetworkInfo, 0, len(ports))
	if len(ports) == 0 {
		return info, nil
	}
	var networkIDs, portIDs []string
	for _, p := range ports {
		networkIDs = append(networkIDs, p.NetworkID)
		portIDs = append(portIDs, p.ID)
	}
	f, err := a.gather(ctx, admin, networkIDs, portIDs)
	if err != nil {
		return nil, err
	}
	if err := a.freshen(ctx, admin, f, ports); err != nil {
		return nil, err
	}
	for _, p := range ports {
		preserve := slices.ContainsFunc(cached, func(v novalet.VIF) bool { return v.ID == p.ID && v.PreserveOnDelete })
		v, err := a.vif(f, p, preserve)
		if err != nil {
			return nil, err
		}
		info = append(info, v)
	}
	return info, nil
}

// Bind implements novalet.NetworkAPI.
func (a *API) Bind(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, info novalet.NetworkInfo) (novalet.NetworkInfo, error) {
	ctx = withRequest(ctx, rc)
	admin, err := a.admin(ctx)
	if err != nil {
		return nil, fmt.Errorf("bind network of %s: %w", inst.UUID, err)
	}
	ports, err := a.instancePorts(ctx, admin, inst)
	if err != nil {
		return nil, fmt.Errorf("bind network of %s: %w", inst.UUID, err)
	}
	ports = order(ports, info)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxParallel)
	for i, p := range ports {
		g.Go(func() error {
			m := map[string]any{"device_id": inst.UUID, "device_owner": deviceOwner(inst), "binding:host_id": a.o.Host}
			if _, moving := p.Profile["migrating_to"]; moving {
				// What the source of a move left behind (nova/network/neutron.py, _update_port_binding_for_instance).
				delete(p.Profile, "migrating_to")
				m["binding:profile"] = p.Profile
			}
			if p.VNICType == vnicDirect {
				d := deviceIn(info, p.ID)
				if d == nil {
					return fault("PortNotUsable", map[string]any{"port_id": p.ID, "instance": inst.UUID}, nil,
						"Port %s has vnic_type direct, and the host has set aside no network function for it.", p.ID)
				}
				m["binding:profile"] = deviceProfile(p.Profile, d)
			}
			var out struct{ Port *port }
			if err := admin.put(gctx, "ports/"+p.ID, map[string]any{"port": m}, &out); err != nil {
				return portFault(err, inst, p.NetworkID, novalet.NetworkRequest{PortID: p.ID})
			}
			if out.Port == nil || out.Port.ID != p.ID {
				return fmt.Errorf("%w: update port %s: the answer holds no port", novalet.ErrTryAgain, p.ID)
			}
			ports[i] = out.Port
			return bound(out.Port)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("bind network of %s: %w", inst.UUID, err)
	}
	out, err := a.info(ctx, admin, ports, info)
	if err != nil {
		return nil, fmt.Errorf("bind network of %s: %w", inst.UUID, err)
	}
	return out, nil
}

// PortActive implements novalet.NetworkAPI.
func (a *API) PortActive(ctx context.Context, portID string) (bool, error) {
	if !uuidRE.MatchString(portID) {
		return false, fmt.Errorf("read port %.40q: no uuid", portID)
	}
	admin, err := a.admin(ctx)
	if err != nil {
		return false, fmt.Errorf("read port %s: %w", portID, err)
	}
	var body struct{ Port *port }
	if err := admin.get(ctx, "ports/"+portID, url.Values{"fields": {"status", "admin_state_up"}}, &body); err != nil {
		return false, err
	}
	if body.Port == nil {
		return false, errors.Join(novalet.ErrTryAgain, fmt.Errorf("read port %s: the answer holds no port", portID))
	}
	return body.Port.Status == "ACTIVE" || body.Port.AdminUp != nil && !*body.Port.AdminUp, nil
}
