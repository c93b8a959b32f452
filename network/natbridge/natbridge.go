// Package natbridge serves novalet.NetworkAPI without Neutron, for the embedded controller: one Linux bridge with an
// address pool, masqueraded to the outside, with published ports and a DHCP server that answers the instances it
// knows.
//
// It keeps the ports in one file of its state directory. Its firewall rules stand in chains of its own, to which one
// rule of each built-in chain leads, so it lives beside another firewall and leaves without a trace. It starts one
// goroutine, the DHCP server; Close ends it.
package natbridge

import (
	"crypto/rand"
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
