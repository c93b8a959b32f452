package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// routeProtocol marks the routes that are set from the host, so that a later change removes these alone.
const routeProtocol netlink.RouteProtocol = 117

// metadataAddr is where the metadata service answers.
var metadataAddr = netip.MustParseAddr("169.254.169.254")

// addressing is what a static interface has to have.
type addressing struct {
	addrs  []netip.Prefix
	routes []route
	v6     bool
}

type route struct {
	dst    netip.Prefix
	via    netip.Addr // zero: on the link
	onlink bool       // via is in none of the subnets
}

// plan reads a VIF's subnets.
func plan(v *novalet.VIF) (*addressing, error) {
	a := &addressing{}
	var nets []netip.Prefix
	for _, s := range v.Network.Subnets {
		n, err := netip.ParsePrefix(s.CIDR)
		if err != nil {
			return nil, fmt.Errorf("subnet %.60q is no network", s.CIDR)
		}
		nets = append(nets, n.Masked())
		for _, ip := range s.IPs {
			addr, err := netip.ParseAddr(ip.Address)
			if err != nil || addr.Is4() != n.Addr().Is4() {
				return nil, fmt.Errorf("address %.60q is not of subnet %s", ip.Address, n)
			}
			a.addrs = append(a.addrs, netip.PrefixFrom(addr, n.Bits()))
			a.v6 = a.v6 || addr.Is6()
		}
	}
	add := func(dst netip.Prefix, via netip.Addr) {
		r := route{dst: dst.Masked(), via: via, onlink: via.IsValid()}
		for _, n := range nets {
			if via.IsValid() && n.Contains(via) {
				r.onlink = false
			}
		}
		if via.IsValid() && via.Is6() && via.IsLinkLocalUnicast() {
			r.onlink = false
		}
		for _, o := range a.routes {
			if o.dst == r.dst {
				return // the first subnet that names a destination has it
			}
		}
		a.routes = append(a.routes, r)
	}
	for _, s := range v.Network.Subnets {
		if len(s.IPs) == 0 {
			continue
		}
		for _, hr := range s.Routes {
			dst, err := netip.ParsePrefix(hr.CIDR)
			if err != nil {
				return nil, fmt.Errorf("route %.60q is no network", hr.CIDR)
			}
			via, err := gateway(hr.Gateway)
			if err != nil {
				return nil, err
			}
			// Neutron writes a route on the link with the unspecified address as its next hop.
			if via.IsUnspecified() {
				via = netip.Addr{}
			}
			if via.IsValid() && via.Is4() != dst.Addr().Is4() {
				return nil, fmt.Errorf("route %s goes by an address of the other family", dst)
			}
			add(dst, via)
		}
	}
	for _, s := range v.Network.Subnets {
		via, err := gateway(s.Gateway)
		if err != nil {
			return nil, err
		}
		if !via.IsValid() || len(s.IPs) == 0 {
			continue
		}
		all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if via.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		add(all, via)
	}
	if ovn(v) && hasIPv4(a.addrs) {
		// OVN answers metadata at a port of the network, not at the router: a DHCP client hears of it by option 121.
		add(netip.PrefixFrom(metadataAddr, 32), netip.Addr{})
	}
	return a, nil
}

func gateway(ip novalet.IP) (netip.Addr, error) {
	if ip.Address == nil || *ip.Address == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(*ip.Address)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("gateway %.60q is no address", *ip.Address)
	}
	return a, nil
}

func hasIPv4(list []netip.Prefix) bool {
	for _, p := range list {
		if p.Addr().Is4() {
			return true
		}
	}
	return false
}

// ovn tells whether OVN bound the port.
func ovn(v *novalet.VIF) bool {
	var drivers map[string]string
	if json.Unmarshal(v.Details["bound_drivers"], &drivers) != nil {
		return false
	}
	for _, d := range drivers {
		if strings.HasPrefix(d, "ovn") {
			return true
		}
	}
	return false
}

// configure sets up what is inside: lo always, name and MTU, and for a static plug everything else. What the guest
// configures itself is left to it.
func (p *Plugger) configure(r *novalet.PlugRequest, ns *os.File) error {
	return p.configureLink(r, ns, func(h *netlink.Handle) (netlink.Link, error) { return innerLink(h, r) })
}

// configureLink does so for the interface that find finds in the namespace.
func (p *Plugger) configureLink(r *novalet.PlugRequest, ns *os.File, find func(*netlink.Handle) (netlink.Link, error)) error {
	var a *addressing
	if r.Static {
		var err error
		if a, err = plan(r.VIF); err != nil {
			return err
		}
	}
	return inNetNS(ns, func() error {
		// One socket for all requests: without a handle the library opens one for each.
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink inside: %w", err)
		}
		defer h.Close()
		// The first device of every namespace is lo (LOOPBACK_IFINDEX in include/net/flow.h).
		if err := h.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1}}); err != nil {
			return fmt.Errorf("bring up lo inside: %w", err)
		}
		link, err := find(h)
		if err != nil {
			return err
		}
		if link.Attrs().MTU != mtu(r.VIF) {
			if err := h.LinkSetMTU(link, mtu(r.VIF)); err != nil {
				return fmt.Errorf("set mtu inside: %w", err)
			}
		}
		if !r.Static {
			return nil
		}
		return a.apply(h, link, r.Index)
	})
}

// apply makes the link have these addresses and routes, in the current namespace.
func (a *addressing) apply(h *netlink.Handle, link netlink.Link, index int) error {
	name := link.Attrs().Name
	up := link.Attrs().Flags&net.FlagUp != 0
	if !a.v6 && !up {
		// Without IPv6 on the network there is nobody to discover.
		if err := h.LinkSetIP6AddrGenMode(link, addrGenNone); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return fmt.Errorf("set up IPv6 of %s: %w", name, err)
		}
	}
	if !up {
		if err := h.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up %s inside: %w", name, err)
		}
	}
	want := map[netip.Prefix]bool{}
	for _, n := range a.addrs {
		want[n] = true
	}
	have, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", name, err)
	}
	// What has to go goes first: with the first address of a subnet the kernel drops the others of it as well.
	for _, old := range have {
		n, ok := prefixOf(old.IPNet)
		if !ok || want[n] || old.Scope != unix.RT_SCOPE_UNIVERSE || old.Flags&unix.IFA_F_PERMANENT == 0 {
			continue
		}
		if err := h.AddrDel(link, &old); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s from %s: %w", n, name, err)
		}
	}
	for _, n := range a.addrs {
		addr := &netlink.Addr{IPNet: ipNet(n)}
		if n.Addr().Is6() {
			// Neutron has given the address to nobody else: no waiting for duplicates.
			addr.Flags = unix.IFA_F_NODAD
		} else {
			addr.Broadcast = broadcast(n)
		}
		if err := h.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("set address %s on %s: %w", n, name, err)
		}
	}
	return a.applyRoutes(h, link, index)
}

func (a *addressing) applyRoutes(h *netlink.Handle, link netlink.Link, index int) error {
	name := link.Attrs().Name
	// Each interface has routes of its own weight, so that several may bring a default route; the first one's wins.
	metric := 0
	if index > 0 {
		metric = 100 + index
	}
	want := map[string]bool{}
	for _, r := range a.routes {
		nr := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(r.dst), Protocol: routeProtocol, Priority: metric}
		switch {
		case r.via.IsValid():
			nr.Gw = r.via.AsSlice()
			if r.onlink {
				nr.Flags = int(netlink.FLAG_ONLINK)
			}
		case r.dst.Addr().Is4():
			nr.Scope = netlink.SCOPE_LINK
		}
		if err := h.RouteReplace(nr); err != nil {
			return fmt.Errorf("set route %s on %s: %w", r.dst, name, err)
		}
		want[r.dst.String()] = true
	}
	have, err := h.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{LinkIndex: link.Attrs().Index, Protocol: routeProtocol},
		netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return fmt.Errorf("list routes of %s: %w", name, err)
	}
	for _, old := range have {
		key := ""
		if n, ok := prefixOf(old.Dst); ok {
			key = n.String()
		} else if old.Family == netlink.FAMILY_V6 {
			key = "::/0"
		} else {
			key = "0.0.0.0/0"
		}
		if want[key] {
			continue
		}
		if err := h.RouteDel(&old); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route %s from %s: %w", key, name, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones), true
}

func broadcast(p netip.Prefix) net.IP {
	if p.Bits() >= 31 {
		return nil
	}
	b := p.Addr().As4()
	mask := net.CIDRMask(p.Bits(), 32)
	for i := range b {
		b[i] |= ^mask[i]
	}
	return net.IP(b[:])
}
