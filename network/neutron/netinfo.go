package neutron

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/novalet/novalet"
)

// nameLen is how much of a name Nova keeps for devices and bridges (network_model.NIC_NAME_LEN).
const nameLen = 14

// guardKey and spoofKey are network.GuardKey and network.SpoofKey; this package knows nothing of plugs.
const (
	guardKey = "novalet_guard"
	spoofKey = "novalet_spoof_check"
)

// facts is what network_info needs besides the ports.
type facts struct {
	networks map[string]*network // with provider attributes
	visible  map[string]*network // as the project sees them, where it was asked
	ipam     map[string]*ipam
	floating map[[2]string][]string
}

// gather reads the facts of the networks, from the cache or side by side.
func (a *API) gather(ctx context.Context, admin *caller, networkIDs, floatingPorts []string) (*facts, error) {
	slices.Sort(networkIDs)
	networkIDs = slices.Compact(networkIDs)
	var f facts
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) { f.networks, err = a.details(ctx, admin, networkIDs); return err })
	g.Go(func() (err error) { f.ipam, err = a.addresses(ctx, admin, networkIDs); return err })
	g.Go(func() (err error) { f.floating, err = a.floating(ctx, admin, floatingPorts); return err })
	return &f, g.Wait()
}

// vif builds the network model of one port (nova/network/neutron.py, _build_vif_model).
func (a *API) vif(f *facts, p *port, preserve bool) (novalet.VIF, error) {
	if err := p.check(); err != nil {
		return novalet.VIF{}, err
	}
	v := novalet.VIF{
		ID:               p.ID,
		Address:          p.MAC,
		Type:             p.VIFType,
		Details:          p.Details,
		DevName:          ("tap" + p.ID)[:nameLen],
		Active:           p.Status == "ACTIVE" || p.AdminUp != nil && !*p.AdminUp,
		VNICType:         p.VNICType,
		Profile:          p.Profile,
		PreserveOnDelete: preserve,
		DelegateCreate:   true,
		Meta:             map[string]json.RawMessage{},
	}
	if v.Details == nil {
		v.Details = map[string]json.RawMessage{}
	}
	if v.Profile == nil {
		v.Profile = map[string]json.RawMessage{}
	}
	if v.VNICType == "" {
		v.VNICType = "normal"
	}
	subnets, err := f.subnets(p)
	if err != nil {
		return novalet.VIF{}, err
	}
	v.Network = novalet.VIFNetwork{ID: p.NetworkID, Subnets: subnets, Meta: novalet.NetworkMeta{TenantID: p.project()}}
	n := f.networks[p.NetworkID]
	if n == nil {
		n = f.visible[p.NetworkID]
	}
	if n != nil {
		v.Network.Label = n.Name
		v.Network.Meta.TenantID = n.TenantID
		v.Network.Meta.MTU = n.MTU
		v.Network.Meta.PhysicalNetwork, v.Network.Meta.Tunneled = n.wire()
	}
	switch p.VIFType {
	case "ovs", "agilio_ovs":
		v.Network.Bridge = detail(p.Details, "bridge_name", a.o.OVSBridge)
		v.OVSInterfaceID = &v.ID
	case "macvtap":
		// This mechanism filters nothing. The host keeps the port to its addresses where Neutron's other mechanisms would;
		// a port that may have any others is left alone.
		if (p.PortSecurity == nil || *p.PortSecurity) && len(p.Pairs) == 0 {
			v.Details = maps.Clone(v.Details)
			v.Details[guardKey] = json.RawMessage("true")
		}
	case "hw_veb":
		// What Neutron's agent would set at the card.
		if p.PortSecurity != nil && !*p.PortSecurity {
			v.Details = maps.Clone(v.Details)
			v.Details[spoofKey] = json.RawMessage("false")
		}
	case "bridge":
		v.Network.Bridge = detail(p.Details, "bridge_name", "brq"+p.NetworkID)
		yes := true
		v.Network.Meta.ShouldCreateBridge = &yes
	}
	if len(v.Network.Bridge) > nameLen {
		v.Network.Bridge = v.Network.Bridge[:nameLen]
	}
	return v, nil
}

// wire tells on which physical network the network is, if any, and whether it is tunneled.
func (n *network) wire() (physical *string, tunneled bool) {
	for _, s := range n.Segments {
		if s.Physical != nil && *s.Physical != "" {
			return s.Physical, false
		}
	}
	if n.Type != nil {
		tunneled = slices.Contains([]string{"vxlan", "gre", "geneve"}, *n.Type)
	}
	return n.Physical, tunneled
}

// detail reads a text of vif_details.
func detail(details map[string]json.RawMessage, key, otherwise string) string {
	var s string
	if json.Unmarshal(details[key], &s) == nil && s != "" {
		return s
	}
	return otherwise
}

// subnets are those in which the port has addresses, each with these.
func (f *facts) subnets(p *port) ([]novalet.Subnet, error) {
	out := []novalet.Subnet{}
	if len(p.FixedIPs) == 0 {
		return out, nil
	}
	i := f.ipam[p.NetworkID]
	if i == nil {
		return nil, fmt.Errorf("read subnets of network %s: none", p.NetworkID)
	}
	for _, s := range i.subnets {
		if !slices.ContainsFunc(p.FixedIPs, func(ip fixedIP) bool { return ip.SubnetID == s.ID }) {
			continue
		}
		prefix, err := netip.ParsePrefix(s.CIDR)
		if err != nil {
			return nil, fmt.Errorf("subnet %s: %.60q is no network", s.ID, s.CIDR)
		}
		sub := novalet.Subnet{
			CIDR:    s.CIDR,
			DNS:     []novalet.IP{},
			Gateway: novalet.IP{Type: "gateway"},
			IPs:     []novalet.FixedIP{},
			Routes:  []novalet.Route{},
			Version: version(prefix.Addr()),
			Meta:    novalet.SubnetMeta{DHCPServer: i.dhcp[s.ID], EnableDHCP: &s.EnableDHCP},
		}
		if s.AddressMode != nil {
			sub.Meta.IPv6AddressMode = *s.AddressMode
		}
		if s.RAMode != nil {
			sub.Meta.IPv6RAMode = *s.RAMode
		}
		if s.GatewayIP != nil && *s.GatewayIP != "" {
			if sub.Gateway, err = address(*s.GatewayIP, "gateway"); err != nil {
				return nil, fmt.Errorf("subnet %s: %w", s.ID, err)
			}
			// A network whose DHCP is served elsewhere: the metadata service wants some address here.
			if s.EnableDHCP && sub.Meta.DHCPServer == "" {
				sub.Meta.DHCPServer = *s.GatewayIP
			}
		}
		for _, d := range s.DNS {
			ip, err := address(d, "dns")
			if err != nil {
				return nil, fmt.Errorf("subnet %s: %w", s.ID, err)
			}
			sub.DNS = append(sub.DNS, ip)
		}
		for _, r := range s.HostRoutes {
			via, err := address(r.Nexthop, "gateway")
			if err != nil {
				return nil, fmt.Errorf("subnet %s: %w", s.ID, err)
			}
			if _, err := netip.ParsePrefix(r.Destination); err != nil {
				return nil, fmt.Errorf("subnet %s: %.60q is no network", s.ID, r.Destination)
			}
			sub.Routes = append(sub.Routes, novalet.Route{CIDR: r.Destination, Gateway: via, Interface: json.RawMessage("null")})
		}
		for _, ip := range p.FixedIPs {
			if ip.SubnetID != s.ID {
				continue
			}
			a, err := netip.ParseAddr(ip.Address)
			if err != nil {
				return nil, fmt.Errorf("port %s: %.60q is no address", p.ID, ip.Address)
			}
			fixed := novalet.FixedIP{Address: ip.Address, Type: "fixed", Version: version(a), FloatingIPs: []novalet.FixedIP{}}
			for _, fl := range f.floating[[2]string{p.ID, ip.Address}] {
				fa, err := netip.ParseAddr(fl)
				if err != nil {
					return nil, fmt.Errorf("port %s: %.60q is no address", p.ID, fl)
				}
				fixed.FloatingIPs = append(fixed.FloatingIPs, novalet.FixedIP{Address: fl, Type: "floating", Version: version(fa)})
			}
			sub.IPs = append(sub.IPs, fixed)
		}
		out = append(out, sub)
	}
	return out, nil
}

func version(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}

func address(text, role string) (novalet.IP, error) {
	a, err := netip.ParseAddr(text)
	if err != nil {
		return novalet.IP{}, fmt.Errorf("%.60q is no address", text)
	}
	v := version(a)
	return novalet.IP{Address: &text, Type: role, Version: &v}, nil
}
