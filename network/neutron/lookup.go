package neutron

import (
	"context"
	"errors"
	"net/url"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/novalet/novalet"
)

// extensions returns the aliases of what this Neutron can do.
func (a *API) extensions(ctx context.Context, admin *caller) (map[string]bool, error) {
	got, err := a.exts.get(ctx, []string{""}, func(ctx context.Context, _ []string) (map[string]map[string]bool, error) {
		var body struct {
			Extensions []struct {
				Alias string `json:"alias"`
			} `json:"extensions"`
		}
		if err := admin.get(ctx, "extensions", nil, &body); err != nil {
			return nil, err
		}
		set := map[string]bool{}
		for _, e := range body.Extensions {
			set[e.Alias] = true
		}
		return map[string]map[string]bool{"": set}, nil
	})
	return got[""], err
}

// hasDNS: ports carry a dns_name.
func hasDNS(ext map[string]bool) bool {
	return ext["dns-integration"] || ext["dns-integration-domain-keywords"] || ext["dns-domain-ports"]
}

// projectNetworks returns those of the networks that the requester sees. Without a usable token it shows the
// project's own and shared ones, and with trusted (nova-api has asked with the token already) all.
func (a *API) projectNetworks(ctx context.Context, user, admin *caller, project string, ids []string, trusted bool) (map[string]*network, error) {
	if len(ids) == 0 {
		return map[string]*network{}, nil
	}
	keys := make([]string, len(ids))
	for i, id := range ids {
		keys[i] = project + "/" + id
	}
	got, err := a.visible.get(ctx, keys, func(ctx context.Context, missing []string) (map[string]*network, error) {
		q := url.Values{}
		for _, k := range missing {
			q.Add("id", k[len(project)+1:])
		}
		var body struct{ Networks []*network }
		by := user
		if by != nil {
			err := by.get(ctx, "networks", q, &body)
			if err != nil && !forbidden(err) {
				return nil, err
			}
			if err != nil {
				by = nil // the token has expired since
			}
		}
		if by == nil {
			if err := admin.get(ctx, "networks", q, &body); err != nil {
				return nil, err
			}
		}
		m := map[string]*network{}
		for _, n := range body.Networks {
			if by != nil || trusted || n.Shared || n.TenantID == project {
				m[project+"/"+n.ID] = n
			}
		}
		return m, nil
	})
	if err != nil {
		return nil, err
	}
	out := make(map[string]*network, len(got))
	for k, n := range got {
		out[k[len(project)+1:]] = n
	}
	return out, nil
}

// onlyNetworks lists what a request without networks may mean: the project's own and the shared ones.
func (a *API) onlyNetworks(ctx context.Context, user, admin *caller, project string, auto bool) ([]*network, error) {
	by := user
	if by == nil {
		by = admin
	}
	list := func(q url.Values) ([]*network, error) {
		var body struct{ Networks []*network }
		err := by.get(ctx, "networks", q, &body)
		if by.user && forbidden(err) {
			err = admin.get(ctx, "networks", q, &body)
		}
		return body.Networks, err
	}
	own := url.Values{"tenant_id": {project}, "shared": {"false"}}
	if auto {
		own.Set("admin_state_up", "true")
	}
	nets, err := list(own)
	if err != nil {
		return nil, err
	}
	shared, err := list(url.Values{"shared": {"true"}})
	if err != nil {
		return nil, err
	}
	for _, n := range shared {
		if !slices.ContainsFunc(nets, func(m *network) bool { return m.ID == n.ID }) {
			nets = append(nets, n)
		}
	}
	return nets, nil
}

// details returns the networks as the agent's own user sees them: with the provider attributes, if it may.
func (a *API) details(ctx context.Context, admin *caller, ids []string) (map[string]*network, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	return a.networks.get(ctx, ids, func(ctx context.Context, missing []string) (map[string]*network, error) {
		var body struct{ Networks []*network }
		if err := admin.get(ctx, "networks", url.Values{"id": missing}, &body); err != nil {
			return nil, err
		}
		m := map[string]*network{}
		for _, n := range body.Networks {
			m[n.ID] = n
		}
		return m, nil
	})
}

// addresses returns the subnets of the networks and their DHCP servers.
func (a *API) addresses(ctx context.Context, admin *caller, ids []string) (map[string]*ipam, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	return a.ipam.get(ctx, ids, func(ctx context.Context, missing []string) (map[string]*ipam, error) {
		var subnets struct{ Subnets []subnet }
		var ports struct{ Ports []port }
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error {
			return admin.get(ctx, "subnets", url.Values{"network_id": missing}, &subnets)
		})
		g.Go(func() error {
			return admin.get(ctx, "ports", url.Values{"network_id": missing, "device_owner": {"network:dhcp"},
				"fields": {"network_id", "fixed_ips"}}, &ports)
		})
		if err := g.Wait(); err != nil {
			return nil, err
		}
		m := map[string]*ipam{}
		for _, id := range missing {
			m[id] = &ipam{dhcp: map[string]string{}}
		}
		for _, s := range subnets.Subnets {
			if i := m[s.NetworkID]; i != nil {
				i.subnets = append(i.subnets, s)
			}
		}
		for _, p := range ports.Ports {
			for _, ip := range p.FixedIPs {
				if i := m[p.NetworkID]; i != nil && i.dhcp[ip.SubnetID] == "" {
					i.dhcp[ip.SubnetID] = ip.Address
				}
			}
		}
		return m, nil
	})
}

// floating returns the floating addresses of the ports, by port and fixed address.
func (a *API) floating(ctx context.Context, admin *caller, portIDs []string) (map[[2]string][]string, error) {
	if len(portIDs) == 0 {
		return nil, nil
	}
	ext, err := a.extensions(ctx, admin)
	if err != nil {
		return nil, err
	}
	if !ext["router"] {
		return nil, nil
	}
	var body struct{ FloatingIPs []floatingIP }
	err = admin.get(ctx, "floatingips", url.Values{"port_id": portIDs}, &body)
	if errors.Is(err, novalet.ErrNotFound) {
		return nil, nil // no L3 plugin
	}
	if err != nil {
		return nil, err
	}
	m := map[[2]string][]string{}
	for _, f := range body.FloatingIPs {
		k := [2]string{f.PortID, f.Fixed}
		m[k] = append(m[k], f.Address)
	}
	return m, nil
}

// instancePorts lists the ports of the instance in its own project: a port of another project that merely names the
// instance as its device is none of ours.
func (a *API) instancePorts(ctx context.Context, admin *caller, inst *novalet.Instance) ([]*port, error) {
	if inst.UUID == "" || inst.ProjectID == "" {
		return nil, errors.New("list ports: the instance has no uuid or project")
	}
	var body struct{ Ports []*port }
	if err := admin.get(ctx, "ports", url.Values{"tenant_id": {inst.ProjectID}, "device_id": {inst.UUID}}, &body); err != nil {
		return nil, err
	}
	out := body.Ports[:0]
	for _, p := range body.Ports {
		// The filter is Neutron's; believing it blindly would delete whatever a broken proxy returns.
		if p.DeviceID == inst.UUID && p.project() == inst.ProjectID {
			if err := p.check(); err != nil {
				return nil, err
			}
			out = append(out, p)
		}
	}
	return out, nil
}
