// Package natbridge serves novalet.NetworkAPI without Neutron, for the embedded controller: one Linux bridge with an
// address pool, masqueraded to the outside, with published ports and a DHCP server that answers the instances it
// knows.
//
// It keeps the ports in one file of its state directory. Its firewall rules stand in chains of its own, to which one
// rule of each built-in chain leads, so it lives beside another firewall and leaves without a trace. It starts one
// goroutine, the DHCP server; Close ends it.
package natbridge

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/statefile"
)

// PublishKey is the server metadata key that publishes ports of an instance on the host: a list, separated by commas or
// spaces, of [address:]hostport:port[/tcp|udp].
const PublishKey = "novalet_publish"

// Options of a bridge.
type Options struct {
	// StateDir holds ports.json. Required; it must exist.
	StateDir string
	// Name of the bridge; default novalet0.
	Name string
	// Subnet of the pool, whose first address is the host's; default the first of 10.88.0.0/24, 10.89.0.0/24, … that
	// the host has no route to.
	Subnet netip.Prefix
	// MTU of the bridge in bytes; default 1500.
	MTU int
	// Domain that instances search; default novalet.internal.
	Domain string
	// DNS servers for the instances; default those of the host that they can reach.
	DNS []netip.Addr
	// IPTables is the command to use; default iptables, whichever of nft and legacy it is.
	IPTables string
	// Logger; default slog.Default.
	Logger *slog.Logger
}

// Bridge implements novalet.NetworkAPI.
type Bridge struct {
	o    Options
	log  *slog.Logger
	h    *netlink.Handle
	fw   *firewall
	dhcp *dhcpServer
	host netip.Addr // the host's own address on the bridge

	mu     sync.Mutex
	st     state
	closed bool
}

var _ novalet.NetworkAPI = (*Bridge)(nil)

// state is what ports.json holds.
type state struct {
	Version int          `json:"version"`
	Subnet  netip.Prefix `json:"subnet"`
	// Forwarding is what net.ipv4.ip_forward was before, if it had to be changed.
	Forwarding string     `json:"forwarding,omitempty"`
	Last       netip.Addr `json:"last"` // given away last: the next one is looked for behind it
	Ports      []*port    `json:"ports"`
}

type port struct {
	ID       string     `json:"id"`
	Instance string     `json:"instance"`
	MAC      string     `json:"mac"`
	Addr     netip.Addr `json:"addr"`
	Hostname string     `json:"hostname,omitempty"`
	Tag      string     `json:"tag,omitempty"`
	Publish  []publish  `json:"publish,omitempty"`
}

// New makes the bridge with its address, the rules and the DHCP server, or takes over what is there from before.
func New(o Options) (*Bridge, error) {
	if o.Name == "" {
		o.Name = "novalet0"
	}
	if !regexp.MustCompile(`^[a-z][a-z0-9_-]{0,11}$`).MatchString(o.Name) {
		return nil, fmt.Errorf("make bridge %.20q: a name is 1 to 12 small letters, digits, - and _", o.Name)
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	if o.Domain == "" {
		o.Domain = "novalet.internal"
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	b := &Bridge{o: o, log: o.Logger}
	if err := b.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("make bridge %s: %w", o.Name, err), b.shut())
	}
	return b, nil
}

func (b *Bridge) open() (err error) {
	if b.h, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	if err := statefile.Read(b.statePath(), &b.st); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if b.st.Version > 1 {
		return fmt.Errorf("ports.json is of version %d, which this novalet does not know", b.st.Version)
	}
	b.st.Version = 1
	if err := b.chooseSubnet(); err != nil {
		return err
	}
	b.host = b.st.Subnet.Addr().Next()
	if b.fw, err = newFirewall(b.o.Name, b.st.Subnet, b.o.IPTables); err != nil {
		return err
	}
	if err := b.forward(); err != nil {
		return err
	}
	if err := b.save(); err != nil {
		return err
	}
	if err := b.link(); err != nil {
		return err
	}
	if err := b.fw.install(b.st.Ports); err != nil {
		return err
	}
	b.dhcp, err = startDHCP(b)
	return err
}

func (b *Bridge) statePath() string { return filepath.Join(b.o.StateDir, "ports.json") }

func (b *Bridge) save() error { return statefile.Write(b.statePath(), &b.st) }

// chooseSubnet keeps the one that instances have addresses of, takes the one asked for, or looks for a free one.
func (b *Bridge) chooseSubnet() error {
	routes, err := b.h.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	ours := 0
	if l, err := b.h.LinkByName(b.o.Name); err == nil {
		ours = l.Attrs().Index
	}
	clash := func(p netip.Prefix) bool {
		return slices.ContainsFunc(routes, func(r netlink.Route) bool {
			if r.Dst == nil || r.LinkIndex == ours {
				return false
			}
			a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
			ones, _ := r.Dst.Mask.Size()
			return ok && ones > 0 && netip.PrefixFrom(a, ones).Overlaps(p)
		})
	}
	want := b.o.Subnet
	switch {
	case len(b.st.Ports) > 0:
		if want.IsValid() && want.Masked() != b.st.Subnet {
			return fmt.Errorf("instances still have addresses of %s, so it cannot become %s", b.st.Subnet, want)
		}
		want = b.st.Subnet
	case !want.IsValid() && b.st.Subnet.IsValid() && !clash(b.st.Subnet):
		want = b.st.Subnet
	}
	if want.IsValid() {
		if want = want.Masked(); !want.Addr().Is4() || want.Bits() < 8 || want.Bits() > 29 {
			return fmt.Errorf("subnet %s: an IPv4 network of 8 to 29 bits is needed", want)
		}
		if clash(want) {
			return fmt.Errorf("subnet %s: the host has a route into it already", want)
		}
		b.st.Subnet = want
		return nil
	}
	for n := byte(88); n < 188; n++ {
		if p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, n, 0, 0}), 24); !clash(p) {
			b.st.Subnet = p
			return nil
		}
	}
	return errors.New("the host has routes into every network that was tried (10.88.0.0/24 to 10.187.0.0/24): name a subnet")
}

// forwardPath decides whether the host passes packets on at all.
const forwardPath = "/proc/sys/net/ipv4/ip_forward"

func (b *Bridge) forward() error {
	now, err := os.ReadFile(forwardPath)
	if err != nil {
		return fmt.Errorf("read ip_forward: %w", err)
	}
	if v := strings.TrimSpace(string(now)); v != "1" {
		b.st.Forwarding = v
		if err := os.WriteFile(forwardPath, []byte("1"), 0o644); err != nil {
			return fmt.Errorf("switch on ip_forward: %w", err)
		}
	}
	return nil
}

// link makes the bridge and gives it the host's address.
func (b *Bridge) link() error {
	l, err := b.h.LinkByName(b.o.Name)
	var none netlink.LinkNotFoundError
	if errors.As(err, &none) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = b.o.Name, b.o.MTU
		// A fixed MAC: else the bridge takes the lowest of its ports', and the instances' ARP entries go stale.
		attrs.HardwareAddr = hardwareAddr()
		if err := b.h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("create the bridge: %w", err)
		}
		l, err = b.h.LinkByName(b.o.Name)
	}
	if err != nil {
		return fmt.Errorf("look up the bridge: %w", err)
	}
	if l.Type() != "bridge" {
		return fmt.Errorf("a device %s of type %s is in the way", b.o.Name, l.Type())
	}
	have, err := b.h.AddrList(l, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	want := &net.IPNet{IP: b.host.AsSlice(), Mask: net.CIDRMask(b.st.Subnet.Bits(), 32)}
	for _, a := range have {
		if a.IPNet.String() != want.String() {
			if err := b.h.AddrDel(l, &a); err != nil {
				return fmt.Errorf("remove address %s: %w", a.IPNet, err)
			}
		}
	}
	if err := b.h.AddrReplace(l, &netlink.Addr{IPNet: want}); err != nil {
		return fmt.Errorf("set address %s: %w", want, err)
	}
	if err := b.h.LinkSetUp(l); err != nil {
		return fmt.Errorf("bring up the bridge: %w", err)
	}
	return nil
}

func hardwareAddr() net.HardwareAddr {
	mac := net.HardwareAddr{0xfa, 0x16, 0x3e, 0, 0, 0}
	_, _ = rand.Read(mac[3:]) // never fails (crypto/rand)
	return mac
}

// Close ends the DHCP server and leaves bridge, rules and ports to the instances. It may be repeated.
func (b *Bridge) Close() error {
	b.mu.Lock()
	done := b.closed
	b.closed = true
	b.mu.Unlock()
	if done {
		return nil
	}
	return b.shut()
}

func (b *Bridge) shut() error {
	if b.dhcp != nil {
		b.dhcp.close()
	}
	if b.h != nil {
		b.h.Close()
	}
	return nil
}

// Remove takes everything away: rules, bridge, state, and the forwarding if it was off before. Then it closes. Instances
// still plugged lose their network.
func (b *Bridge) Remove() error {
	b.dhcp.close()
	errs := []error{b.fw.remove()}
	if l, err := b.h.LinkByName(b.o.Name); err == nil {
		if err := b.h.LinkDel(l); err != nil {
			errs = append(errs, fmt.Errorf("delete bridge %s: %w", b.o.Name, err))
		}
	}
	b.mu.Lock()
	was := b.st.Forwarding
	b.st = state{Version: 1, Subnet: b.st.Subnet}
	b.mu.Unlock()
	if was != "" {
		if err := os.WriteFile(forwardPath, []byte(was), 0o644); err != nil {
			errs = append(errs, fmt.Errorf("restore ip_forward: %w", err))
		}
	}
	errs = append(errs, statefile.Remove(b.statePath(), true), b.Close())
	return errors.Join(errs...)
}

// NetworkID is the id under which the bridge's network is known: the same for each run of one host.
func (b *Bridge) NetworkID() string { return networkID }

const networkID = "0a580000-6e6f-4761-8c65-740000000000"

// Gateway is the host's address on the bridge, Subnet its network.
func (b *Bridge) Gateway() netip.Addr { return b.host }

// Subnet is the network of the pool.
func (b *Bridge) Subnet() netip.Prefix { return b.st.Subnet }

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
	return novalet.VIF{
		ID: p.ID, Address: p.MAC, Type: "bridge", VNICType: "normal", DevName: ("tap" + p.ID)[:14], Active: true, DelegateCreate: true,
		Details: empty(), Profile: empty(), Meta: empty(),
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
