package natbridge

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/network"
)

// Allocate implements novalet.NetworkAPI: one port for each network asked for, or one when none is. The only network is
// NetworkID, which also "auto" and "" mean.
func (b *Bridge) Allocate(_ context.Context, r *novalet.AllocateRequest) (novalet.NetworkInfo, error) {
	reqs := r.Networks
	switch {
	case len(reqs) == 0:
		reqs = []novalet.NetworkRequest{{}}
	case len(reqs) == 1 && reqs[0].NetworkID == "none":
		return novalet.NetworkInfo{}, nil
	}
	pubs, err := parsePublish(r.Instance.Metadata[PublishKey])
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	before := len(b.st.Ports)
	info := novalet.NetworkInfo{}
	undo := func() { b.st.Ports = b.st.Ports[:before] }
	for i, req := range reqs {
		p, err := b.newPort(r.Instance, req)
		if err != nil {
			undo()
			return nil, err
		}
		if i == 0 && !r.Attach {
			if err := b.publishable(pubs); err != nil {
				undo()
				return nil, err
			}
			p.Publish = pubs
		}
		b.st.Ports = append(b.st.Ports, p)
		info = append(info, b.vif(p))
	}
	if err := b.save(); err != nil {
		undo()
		return nil, fmt.Errorf("allocate network of %s: %w", r.Instance.UUID, err)
	}
	if len(pubs) > 0 && !r.Attach {
		if err := b.fw.publish(b.st.Ports[before]); err != nil {
			err = errors.Join(err, b.fw.unpublish(b.st.Ports[before]))
			undo()
			return nil, errors.Join(fmt.Errorf("publish ports of %s: %w", r.Instance.UUID, err), b.save())
		}
	}
	return info, nil
}

// newPort finds an address. The caller holds mu.
func (b *Bridge) newPort(inst *novalet.Instance, req novalet.NetworkRequest) (*port, error) {
	fault := func(class string, details map[string]any, format string, args ...any) error {
		f := novalet.Faultf(novalet.ErrAbort, class, format, args...)
		f.Details = details
		return f
	}
	if req.PortID != "" {
		return nil, fault("PortNotFound", map[string]any{"port_id": req.PortID}, "Port id %.40s could not be found.", req.PortID)
	}
	if n := req.NetworkID; n != "" && n != "auto" && n != networkID {
		return nil, fault("NetworkNotFound", map[string]any{"network_id": n}, "Network %.40s could not be found.", n)
	}
	p := &port{ID: newUUID(), Instance: inst.UUID, MAC: hardwareAddr().String(), Hostname: inst.Hostname, Tag: req.Tag}
	if req.Address != "" {
		a, err := netip.ParseAddr(req.Address)
		if err != nil || !b.assignable(a) {
			text := fmt.Sprintf("%.40s is no address of network %s", req.Address, b.st.Subnet)
			return nil, fault("InvalidInput", map[string]any{"reason": text}, "Invalid input received: %s", text)
		}
		if b.taken(a) {
			return nil, fault("FixedIpAlreadyInUse", map[string]any{"address": req.Address, "instance_uuid": inst.UUID},
				"Fixed IP address %s is already in use.", a)
		}
		p.Addr = a
		return p, nil
	}
	// From behind the last one, so that an address rests before it is given away again.
	start := b.st.Last
	if !b.assignable(start) {
		start = b.host
	}
	for a := start.Next(); ; a = a.Next() {
		if !b.st.Subnet.Contains(a) {
			a = b.host
		}
		if b.assignable(a) && !b.taken(a) {
			p.Addr, b.st.Last = a, a
			return p, nil
		}
		if a == start {
			return nil, fault("NoMoreFixedIps", map[string]any{"net": networkID}, "No fixed IP addresses available for network: %s", networkID)
		}
	}
}

// assignable: the address is one for instances.
func (b *Bridge) assignable(a netip.Addr) bool {
	return b.st.Subnet.Contains(a) && a != b.st.Subnet.Addr() && a != b.host && b.st.Subnet.Contains(a.Next())
}

func (b *Bridge) taken(a netip.Addr) bool {
	return slices.ContainsFunc(b.st.Ports, func(p *port) bool { return p.Addr == a })
}

func newUUID() string {
	u := make([]byte, 16)
	_, _ = rand.Read(u) // never fails (crypto/rand)
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// vif is the network model of a port. There is nothing to wait for, so it is active.
func (b *Bridge) vif(p *port) novalet.VIF {
	four, yes := 4, true
	gw := b.host.String()
	s := novalet.Subnet{
		CIDR: b.st.Subnet.String(), Version: four, DNS: []novalet.IP{}, Routes: []novalet.Route{},
		Gateway: novalet.IP{Address: &gw, Type: "gateway", Version: &four},
		IPs:     []novalet.FixedIP{{Address: p.Addr.String(), Type: "fixed", Version: four}},
		Meta:    novalet.SubnetMeta{DHCPServer: gw, EnableDHCP: &yes},
	}
	for _, d := range b.nameServers() {
		text, version := d.String(), 4
		if d.Is6() {
			version = 6
		}
		s.DNS = append(s.DNS, novalet.IP{Address: &text, Type: "dns", Version: &version})
	}
	empty := func() map[string]json.RawMessage { return map[string]json.RawMessage{} }
	details := empty()
	details[network.GuardKey] = json.RawMessage("true") // nobody else filters here
	return novalet.VIF{
		ID: p.ID, Address: p.MAC, Type: "bridge", VNICType: "normal", DevName: ("tap" + p.ID)[:14], Active: true, DelegateCreate: true,
		Details: details, Profile: empty(), Meta: empty(),
		Network: novalet.VIFNetwork{ID: networkID, Bridge: b.o.Name, Label: b.o.Name, Subnets: []novalet.Subnet{s},
			Meta: novalet.NetworkMeta{MTU: b.o.MTU, ShouldCreateBridge: &yes}},
	}
}

// Deallocate implements novalet.NetworkAPI.
func (b *Bridge) Deallocate(_ context.Context, _ novalet.RequestContext, inst *novalet.Instance, _ novalet.NetworkInfo) error {
	return b.free(func(p *port) bool { return p.Instance == inst.UUID })
}

// AddAddress implements novalet.NetworkAPI: a port of this bridge has one address.
func (b *Bridge) AddAddress(context.Context, novalet.RequestContext, *novalet.Instance, string) error {
	return oneAddress()
}

// RemoveAddress implements novalet.NetworkAPI.
func (b *Bridge) RemoveAddress(context.Context, novalet.RequestContext, *novalet.Instance, string) error {
	return oneAddress()
}

func oneAddress() error {
	return novalet.Faultf(novalet.ErrUnsupported, "NotImplementedError", "A server has exactly one address on this network.")
}

// Release implements novalet.NetworkAPI.
func (b *Bridge) Release(_ context.Context, _ novalet.RequestContext, inst *novalet.Instance, vif *novalet.VIF) error {
	return b.free(func(p *port) bool { return p.Instance == inst.UUID && p.ID == vif.ID })
}

func (b *Bridge) free(which func(*port) bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var kept, gone []*port
	for _, p := range b.st.Ports {
		if which(p) {
			gone = append(gone, p)
		} else {
			kept = append(kept, p)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	// The rules first: a port that is forgotten with its rules in place would publish whoever gets its address next.
	for _, p := range gone {
		if err := b.fw.unpublish(p); err != nil {
			return fmt.Errorf("free port %s: %w", p.ID, err)
		}
	}
	old := b.st.Ports
	b.st.Ports = kept
	if err := b.save(); err != nil {
		b.st.Ports = old
		return fmt.Errorf("free ports: %w", err)
	}
	return nil
}

// Unbind implements novalet.NetworkAPI: a port here is bound to nothing but this host.
func (b *Bridge) Unbind(context.Context, novalet.RequestContext, *novalet.Instance, novalet.NetworkInfo) error {
	return nil
}

// Bind implements novalet.NetworkAPI.
func (b *Bridge) Bind(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, info novalet.NetworkInfo) (novalet.NetworkInfo, error) {
	return b.Refresh(ctx, rc, inst, info)
}

// Refresh implements novalet.NetworkAPI.
func (b *Bridge) Refresh(_ context.Context, _ novalet.RequestContext, inst *novalet.Instance, _ novalet.NetworkInfo) (novalet.NetworkInfo, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	info := novalet.NetworkInfo{}
	for _, p := range b.st.Ports {
		if p.Instance == inst.UUID {
			info = append(info, b.vif(p))
		}
	}
	return info, nil
}

// PortActive implements novalet.NetworkAPI.
func (b *Bridge) PortActive(_ context.Context, portID string) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if slices.ContainsFunc(b.st.Ports, func(p *port) bool { return p.ID == portID }) {
		return true, nil
	}
	return false, fmt.Errorf("%w: port %.40q", novalet.ErrNotFound, portID)
}

// byMAC finds a port for the DHCP server.
func (b *Bridge) byMAC(mac string) (port, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.st.Ports {
		if p.MAC == mac {
			return *p, true
		}
	}
	return port{}, false
}

// nameServers for the instances: the host's, without those that only the host itself reaches.
func (b *Bridge) nameServers() []netip.Addr {
	if b.o.DNS != nil {
		return b.o.DNS
	}
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		if list := readServers(path); len(list) > 0 {
			return list
		}
	}
	return nil
}

func readServers(path string) []netip.Addr {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var out []netip.Addr
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil && a.Is4() && !a.IsLoopback() && !a.IsUnspecified() && len(out) < 3 {
			out = append(out, a)
		}
	}
	return out
}
