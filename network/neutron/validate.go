package neutron

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"net/url"
	"slices"

	"github.com/novalet/novalet"
)

// wanted is one port of the request, in request order.
type wanted struct {
	req  novalet.NetworkRequest
	port *port    // the pre-existing port, if one was asked for
	net  *network // as the project sees it
}

// noNetworks tells of a request that wants none.
func noNetworks(reqs []novalet.NetworkRequest) bool {
	return len(reqs) == 1 && reqs[0].NetworkID == "none"
}

// requestedPort reads a port and says whether the instance may have it. A port that already names this instance is
// its own, from an earlier try.
func (a *API) requestedPort(ctx context.Context, admin *caller, inst *novalet.Instance, req *novalet.NetworkRequest) (*port, error) {
	id := req.PortID
	if !uuidRE.MatchString(id) {
		return nil, portNotFound(id, nil)
	}
	var body struct{ Port *port }
	if err := admin.get(ctx, "ports/"+id, nil, &body); err != nil {
		if errors.Is(err, novalet.ErrNotFound) {
			return nil, portNotFound(id, err)
		}
		return nil, err
	}
	p := body.Port
	if p == nil || p.ID != id {
		return nil, portNotFound(id, nil)
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	details := map[string]any{"port_id": id, "instance": inst.UUID}
	switch {
	case p.project() != inst.ProjectID:
		return nil, fault("PortNotUsable", details, nil, "Port %s not usable for instance %s.", id, inst.UUID)
	case p.DeviceID != "" && p.DeviceID != inst.UUID:
		return nil, fault("PortInUse", map[string]any{"port_id": id}, nil, "Port %s is still in use.", id)
	case p.DNSName != "" && inst.Hostname != "" && p.DNSName != inst.Hostname:
		details["value"], details["hostname"] = p.DNSName, inst.Hostname
		return nil, fault("PortNotUsableDNS", details, nil,
			"Port %s not usable for instance %s: its dns_name %s is not the instance's hostname %s.", id, inst.UUID, p.DNSName, inst.Hostname)
	case hasResources(p):
		return nil, fault("PortNotUsable", details, nil,
			"Port %s asks for guaranteed bandwidth, which this host cannot give.", id)
	case p.VNICType == vnicDirect && req.Device == nil:
		return nil, fault("PortNotUsable", details, nil,
			"Port %s has vnic_type direct, and the host has set aside no network function for it.", id)
	case p.VNICType != "" && p.VNICType != "normal" && p.VNICType != vnicDirect:
		return nil, fault("PortNotUsable", details, nil,
			"Port %s has vnic_type %s, which this host cannot give to a container.", id, p.VNICType)
	}
	return p, nil
}

func hasResources(p *port) bool {
	s := string(p.Resources)
	return s != "" && s != "null" && s != "{}"
}

// resolve turns the request into ports and networks that the project may use.
func (a *API) resolve(ctx context.Context, user, admin *caller, r *novalet.AllocateRequest) ([]wanted, error) {
	auto := len(r.Networks) == 1 && r.Networks[0].NetworkID == "auto"
	var list []wanted
	var ids []string
	seen := map[string]bool{}
	for _, req := range r.Networks {
		w := wanted{req: req}
		if req.PortID != "" {
			if seen[req.PortID] {
				return nil, fault("PortInUse", map[string]any{"port_id": req.PortID}, nil, "Port %s is asked for twice.", req.PortID)
			}
			seen[req.PortID] = true
			p, err := a.requestedPort(ctx, admin, r.Instance, &req)
			if err != nil {
				return nil, err
			}
			w.port, w.req.NetworkID = p, p.NetworkID
		}
		if w.req.Address != "" {
			if _, err := netip.ParseAddr(w.req.Address); err != nil {
				return nil, fault("InvalidInput", map[string]any{"reason": "fixed IP"}, err, "Invalid input received: %.60q is no IP address.", w.req.Address)
			}
		}
		switch {
		case auto, w.req.NetworkID == "" && len(r.Networks) == 1:
		case !uuidRE.MatchString(w.req.NetworkID):
			return nil, networkNotFound(w.req.NetworkID, nil)
		default:
			ids = append(ids, w.req.NetworkID)
			list = append(list, w)
		}
	}
	if len(ids) == 0 {
		return a.unspecified(ctx, user, admin, r, auto)
	}
	nets, err := a.projectNetworks(ctx, user, admin, r.Instance.ProjectID, slices.Compact(slices.Sorted(slices.Values(ids))), !r.Attach)
	if err != nil {
		return nil, err
	}
	for i := range list {
		w := &list[i]
		if w.net = nets[w.req.NetworkID]; w.net == nil {
			// The project holds the port, so it may use its network though it cannot see it.
			if w.port != nil {
				w.net = &network{ID: w.req.NetworkID, TenantID: w.port.project()}
				continue
			}
			return nil, networkNotFound(w.req.NetworkID, nil)
		}
		if w.port == nil {
			if err := attachable(r, w.net); err != nil {
				return nil, err
			}
		}
	}
	return list, nil
}

// unspecified chooses the network of a request that names none.
func (a *API) unspecified(ctx context.Context, user, admin *caller, r *novalet.AllocateRequest, auto bool) ([]wanted, error) {
	project := r.Instance.ProjectID
	nets, err := a.onlyNetworks(ctx, user, admin, project, auto)
	if err != nil {
		return nil, err
	}
	if len(nets) == 0 && auto {
		n, err := autoNetwork(ctx, user, admin, project)
		if err != nil {
			return nil, err
		}
		nets = append(nets, n)
	}
	switch {
	case len(nets) == 0 && len(r.Networks) == 0 && !r.Attach:
		return nil, nil
	case len(nets) == 0:
		return nil, fault("InterfaceAttachFailedNoNetwork", map[string]any{"project_id": project}, nil,
			"No specific network was requested and none are available for project '%s'.", project)
	case len(nets) > 1:
		return nil, fault("NetworkAmbiguous", nil, nil,
			"More than one possible network found. Specify network ID(s) to select which one(s) to connect to.")
	}
	if err := attachable(r, nets[0]); err != nil {
		return nil, err
	}
	w := wanted{net: nets[0]}
	if len(r.Networks) == 1 {
		w.req = r.Networks[0]
	}
	w.req.NetworkID = nets[0].ID
	return []wanted{w}, nil
}

// autoNetwork lets Neutron make the project a network of its own (extension auto-allocated-topology).
func autoNetwork(ctx context.Context, user, admin *caller, project string) (*network, error) {
	by := user
	if by == nil {
		by = admin
	}
	unable := func(err error) error {
		return fault("UnableToAutoAllocateNetwork", map[string]any{"project_id": project}, err,
			"Unable to automatically allocate a network for project %s", project)
	}
	var body struct {
		Topology struct {
			ID string `json:"id"`
		} `json:"auto_allocated_topology"`
	}
	if err := by.get(ctx, "auto-allocated-topology/"+url.PathEscape(project), nil, &body); err != nil {
		if errors.Is(err, novalet.ErrTryAgain) {
			return nil, err
		}
		return nil, unable(err)
	}
	var nets struct{ Networks []*network }
	if err := by.get(ctx, "networks", url.Values{"id": {body.Topology.ID}}, &nets); err != nil {
		return nil, err
	}
	if len(nets.Networks) != 1 {
		return nil, unable(nil)
	}
	return nets.Networks[0], nil
}

// attachable applies Nova's rule on external networks: only an administrator may put a server on one that is not
// shared (os_compute_api:servers:create:network:attach_external_network).
func attachable(r *novalet.AllocateRequest, n *network) error {
	if !n.External || n.Shared {
		return nil
	}
	var isAdmin bool
	if json.Unmarshal(r.Context.Wire["is_admin"], &isAdmin) == nil && isAdmin {
		return nil
	}
	return fault("ExternalNetworkAttachForbidden", map[string]any{"network_uuid": n.ID}, nil,
		"It is not allowed to create an interface on external network %s", n.ID)
}

// securityGroups turns names and ids into ids. None, or just "default", is left to Neutron, which applies the
// project's default group by itself. The requester asks: a user with the service role alone sees no project's groups.
func (a *API) securityGroups(ctx context.Context, user, admin *caller, project string, names []string) ([]string, error) {
	if len(names) == 0 || len(names) == 1 && names[0] == "default" {
		return nil, nil
	}
	var body struct {
		Groups []struct{ ID, Name string } `json:"security_groups"`
	}
	by := user
	if by == nil {
		by = admin
	}
	query := url.Values{"tenant_id": {project}, "fields": {"id", "name"}}
	err := by.get(ctx, "security-groups", query, &body)
	if by.user && forbidden(err) {
		err = admin.get(ctx, "security-groups", query, &body) // the token has expired since
	}
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, name := range names {
		var byName []string
		byID := ""
		for _, g := range body.Groups {
			if g.Name == name {
				byName = append(byName, g.ID)
			}
			if g.ID == name {
				byID = g.ID
			}
		}
		id := byID
		switch {
		case len(byName) > 1:
			return nil, fault("NoUniqueMatch", nil, nil, "Multiple security groups found matching '%.60s'. Use an ID to be more specific.", name)
		case len(byName) == 1:
			id = byName[0] // a name that looks like another group's id wins, as in Nova
		case byID == "":
			return nil, fault("SecurityGroupNotFound", map[string]any{"security_group_id": name}, nil, "Security group %.60s not found.", name)
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// groupsFit says whether security groups can be applied on the network.
func groupsFit(n *network, groups []string) error {
	secured := n.PortSecurity == nil || *n.PortSecurity
	if secured && len(n.Subnets) > 0 || !secured && len(groups) == 0 {
		return nil
	}
	return fault("SecurityGroupCannotBeApplied", nil, nil,
		"Network requires port_security_enabled and subnet associated in order to apply security groups.")
}
