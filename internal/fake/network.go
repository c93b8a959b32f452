package fake

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/novalet/novalet"
)

// Port is a Neutron port.
type Port struct {
	ID, Network, Device, Host string
	Preexisting               bool
	Active                    bool
	Address                   string
	More                      []string // further addresses
}

type networkState struct {
	nmu   sync.Mutex
	nhost string
	ports map[string]*Port
	// remembered are the instances whose ports were looked at.
	remembered map[string]bool
	nextID     int
	// AutoActive makes a port active as soon as it is plugged.
	autoActive bool
	onActive   func(port *Port)
}

func newNetworkState(host string) *networkState {
	return &networkState{nhost: host, ports: map[string]*Port{}, remembered: map[string]bool{}, autoActive: true}
}

// SetAutoActive says whether plugging makes a port active (the default).
func (s *networkState) SetAutoActive(on bool) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	s.autoActive = on
}

// OnActive is called, without a lock, when a port becomes active: Neutron's event.
func (s *networkState) OnActive(f func(*Port)) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	s.onActive = f
}

// AddPort makes a port that no instance has yet.
func (s *networkState) AddPort(id string) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	s.nextID++
	s.ports[id] = &Port{ID: id, Network: "net", Preexisting: true, Address: fmt.Sprintf("10.0.0.%d", s.nextID%250+2)}
}

// Activate makes a port active, as an L2 agent does.
func (s *networkState) Activate(id string) {
	s.nmu.Lock()
	p := s.ports[id]
	var f func(*Port)
	if p != nil && !p.Active {
		p.Active = true
		f = s.onActive
	}
	s.nmu.Unlock()
	if f != nil {
		c := *p
		f(&c)
	}
}

// SetAddress changes a port's address, as a port update does.
func (s *networkState) SetAddress(id, address string) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	s.ports[id].Address = address
}

// SetPort changes a port in place.
func (s *networkState) SetPort(id string, f func(*Port)) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	f(s.ports[id])
}

// VIF is how Nova's info cache shows a port.
func VIF(p *Port) novalet.VIF { return p.vif() }

// DropPort deletes a port behind the agent's back.
func (s *networkState) DropPort(id string) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	delete(s.ports, id)
}

// Ports lists an instance's ports; "" lists those of none.
func (s *networkState) Ports(device string) []Port {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	var out []Port
	for _, id := range slices.Sorted(maps.Keys(s.ports)) {
		if s.ports[id].Device == device {
			out = append(out, *s.ports[id])
		}
	}
	return out
}

func (p *Port) vif() novalet.VIF {
	four := 4
	gw := "10.0.0.1"
	id := p.ID
	ips := []novalet.FixedIP{{Address: p.Address, Type: "fixed", Version: 4}}
	for _, a := range p.More {
		ips = append(ips, novalet.FixedIP{Address: a, Type: "fixed", Version: 4})
	}
	return novalet.VIF{
		ID: p.ID, Address: "fa:16:3e:00:00:01", Type: "bridge", VNICType: "normal",
		DevName: ("tap" + id)[:min(14, 3+len(id))], Active: p.Active, PreserveOnDelete: p.Preexisting,
		Network: novalet.VIFNetwork{ID: p.Network, Bridge: "brq", Label: "private", Meta: novalet.NetworkMeta{MTU: 1450},
			Subnets: []novalet.Subnet{{CIDR: "10.0.0.0/24", Version: 4,
				Gateway: novalet.IP{Address: &gw, Type: "gateway", Version: &four},
				IPs:     ips,
				Meta:    novalet.SubnetMeta{DHCPServer: "10.0.0.2"}}}},
	}
}

// Network is a fake novalet.NetworkAPI.
type Network struct {
	*networkState
	f *Faults
}

var _ novalet.NetworkAPI = (*Network)(nil)

// Allocate implements novalet.NetworkAPI. A request for "none" gives no port.
func (n *Network) Allocate(ctx context.Context, r *novalet.AllocateRequest) (novalet.NetworkInfo, error) {
	if err := n.f.enter(ctx, "NetworkAPI.Allocate"); err != nil {
		return nil, err
	}
	n.nmu.Lock()
	var info novalet.NetworkInfo
	for _, req := range r.Networks {
		var p *Port
		switch {
		case req.NetworkID == "none":
			continue
		case req.PortID != "":
			p = n.ports[req.PortID]
			if p == nil || p.Device != "" && p.Device != r.Instance.UUID {
				n.nmu.Unlock()
				return nil, novalet.Faultf(novalet.ErrAbort, "PortInUse", "Port %s is in use or does not exist.", req.PortID)
			}
		default:
			n.nextID++
			p = &Port{ID: fmt.Sprintf("%08x-0000-4000-8000-000000000000", n.nextID), Network: req.NetworkID,
				Address: fmt.Sprintf("10.0.%d.%d", n.nextID/250%250, n.nextID%250+2)}
			n.ports[p.ID] = p
		}
		p.Device, p.Host, p.Active = r.Instance.UUID, n.nhost, false
		info = append(info, p.vif())
	}
	n.nmu.Unlock()
	return info, n.f.leave(ctx, "NetworkAPI.Allocate")
}

// Deallocate implements novalet.NetworkAPI: like the real one it asks for what the instance has, and deletes a port
// unless the given info says that it is to be kept.
func (n *Network) Deallocate(ctx context.Context, _ novalet.RequestContext, inst *novalet.Instance, info novalet.NetworkInfo) error {
	if err := n.f.enter(ctx, "NetworkAPI.Deallocate"); err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, v := range info {
		keep[v.ID] = v.PreserveOnDelete
	}
	n.nmu.Lock()
	for id, p := range n.ports {
		if p.Device != inst.UUID {
			continue
		}
		if keep[id] {
			p.Device, p.Host, p.Active = "", "", false
		} else {
			delete(n.ports, id)
		}
	}
	n.nmu.Unlock()
	return n.f.leave(ctx, "NetworkAPI.Deallocate")
}

// Remember notes that the ports of the instance are known.
func (n *Network) Remember(ctx context.Context, _ novalet.RequestContext, inst *novalet.Instance) error {
	if err := n.f.enter(ctx, "NetworkAPI.Remember"); err != nil {
		return err
	}
	n.nmu.Lock()
	n.remembered[inst.UUID] = true
	n.nmu.Unlock()
	return n.f.leave(ctx, "NetworkAPI.Remember")
}

// Deallocation is Deallocate in two halves: looking for the ports, unless they are known, and freeing them. Where they were
// known, Deallocate is to follow.
func (n *Network) Deallocation(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, info novalet.NetworkInfo) (func(context.Context) (bool, error), error) {
	if err := n.f.enter(ctx, "NetworkAPI.Deallocation"); err != nil {
		return nil, err
	}
	n.nmu.Lock()
	known := n.remembered[inst.UUID] && !slices.ContainsFunc(info, func(v novalet.VIF) bool { return v.PreserveOnDelete })
	delete(n.remembered, inst.UUID)
	n.nmu.Unlock()
	free := func(ctx context.Context) (bool, error) { return known, n.Deallocate(ctx, rc, inst, info) }
	return free, n.f.leave(ctx, "NetworkAPI.Deallocation")
}

// Release implements novalet.NetworkAPI.
func (n *Network) Release(ctx context.Context, _ novalet.RequestContext, _ *novalet.Instance, vif *novalet.VIF) error {
	if err := n.f.enter(ctx, "NetworkAPI.Release"); err != nil {
		return err
	}
	n.nmu.Lock()
	if p := n.ports[vif.ID]; p != nil && vif.PreserveOnDelete {
		p.Device, p.Host, p.Active = "", "", false
	} else {
		delete(n.ports, vif.ID)
	}
	n.nmu.Unlock()
	return n.f.leave(ctx, "NetworkAPI.Release")
}

// Unbind implements novalet.NetworkAPI.
func (n *Network) Unbind(ctx context.Context, _ novalet.RequestContext, _ *novalet.Instance, info novalet.NetworkInfo) error {
	if err := n.f.enter(ctx, "NetworkAPI.Unbind"); err != nil {
		return err
	}
	n.eachOf(info, func(p *Port) { p.Host, p.Active = "", false })
	return n.f.leave(ctx, "NetworkAPI.Unbind")
}

// Bind implements novalet.NetworkAPI.
func (n *Network) Bind(ctx context.Context, _ novalet.RequestContext, _ *novalet.Instance, info novalet.NetworkInfo) (novalet.NetworkInfo, error) {
	if err := n.f.enter(ctx, "NetworkAPI.Bind"); err != nil {
		return nil, err
	}
	var out novalet.NetworkInfo
	n.eachOf(info, func(p *Port) { p.Host = n.nhost; out = append(out, p.vif()) })
	return out, n.f.leave(ctx, "NetworkAPI.Bind")
}

// Refresh implements novalet.NetworkAPI.
func (n *Network) Refresh(ctx context.Context, _ novalet.RequestContext, inst *novalet.Instance, cached novalet.NetworkInfo) (novalet.NetworkInfo, error) {
	if err := n.f.enter(ctx, "NetworkAPI.Refresh"); err != nil {
		return nil, err
	}
	var out novalet.NetworkInfo
	n.eachOf(cached, func(p *Port) {
		if p.Device == inst.UUID {
			out = append(out, p.vif())
		}
	})
	return out, n.f.leave(ctx, "NetworkAPI.Refresh")
}

func (n *Network) eachOf(info novalet.NetworkInfo, f func(*Port)) {
	n.nmu.Lock()
	defer n.nmu.Unlock()
	for _, v := range info {
		if p := n.ports[v.ID]; p != nil {
			f(p)
		}
	}
}

// PortActive implements novalet.NetworkAPI.
func (n *Network) PortActive(ctx context.Context, id string) (bool, error) {
	if err := n.f.enter(ctx, "NetworkAPI.PortActive"); err != nil {
		return false, err
	}
	n.nmu.Lock()
	defer n.nmu.Unlock()
	p, ok := n.ports[id]
	if !ok {
		return false, fmt.Errorf("port %s: %w", id, novalet.ErrNotFound)
	}
	return p.Active, nil
}
