package configdrive

import (
	"fmt"
	"net/netip"

	"github.com/novalet/novalet"
)

type link struct {
	ID      string `json:"id"`
	VIFID   string `json:"vif_id"`
	Type    string `json:"type"`
	MTU     *int   `json:"mtu"`
	Address string `json:"ethernet_mac_address"`
}

type route struct {
	Network string `json:"network"`
	Netmask string `json:"netmask"`
	Gateway string `json:"gateway"`
}

type service struct {
	Type    string `json:"type"`
	Address string `json:"address"`
}

type network struct {
	ID        string    `json:"id"`
	Type      string    `json:"type"`
	Link      string    `json:"link"`
	Address   string    `json:"ip_address,omitempty"`
	Netmask   string    `json:"netmask,omitempty"`
	Routes    []route   `json:"routes,omitempty"`
	NetworkID string    `json:"network_id"`
	Services  []service `json:"services,omitempty"`
}

type document struct {
	Links    []link    `json:"links"`
	Networks []network `json:"networks"`
	Services []service `json:"services"`
}

// shownTypes are the vif types that guests may see; the others are "phy" to them.
var shownTypes = map[string]bool{
	"bridge": true, "ovs": true, "tap": true, "vhostuser": true, "hw_veb": true, "hostdev_physical": true, "binding_failed": true,
}

// networkData describes the interfaces: one link each, and the first IPv4 and the first IPv6 subnet on it.
func networkData(info novalet.NetworkInfo) *document {
	d := &document{Links: []link{}, Networks: []network{}, Services: []service{}}
	seen := map[string]bool{}
	for i := range info {
		v := &info[i]
		l := link{ID: v.DevName, VIFID: v.ID, Type: "phy", MTU: linkMTU(v), Address: v.Address}
		if l.ID == "" {
			l.ID = fmt.Sprintf("interface%d", i)
		}
		if shownTypes[v.Type] {
			l.Type = v.Type
		}
		d.Links = append(d.Links, l)
		for _, version := range []int{4, 6} {
			s := firstSubnet(v, version)
			if s == nil {
				continue
			}
			d.Networks = append(d.Networks, subnetData(s, v, version, len(d.Networks), l.ID))
			for _, svc := range services(s) {
				if !seen[svc.Address] {
					seen[svc.Address] = true
					d.Services = append(d.Services, svc)
				}
			}
		}
	}
	return d
}

// linkMTU is null where DHCP tells it.
func linkMTU(v *novalet.VIF) *int {
	for _, s := range v.Network.Subnets {
		if s.Meta.DHCPServer != "" {
			return nil
		}
	}
	if v.Network.Meta.MTU == 0 {
		return nil
	}
	mtu := v.Network.Meta.MTU
	return &mtu
}

func firstSubnet(v *novalet.VIF, version int) *novalet.Subnet {
	for i := range v.Network.Subnets {
		if s := &v.Network.Subnets[i]; s.Version == version && len(s.IPs) > 0 {
			return s
		}
	}
	return nil
}

func subnetData(s *novalet.Subnet, v *novalet.VIF, version, n int, linkID string) network {
	out := network{ID: fmt.Sprintf("network%d", n), Link: linkID, NetworkID: v.Network.ID}
	if s.Meta.DHCPServer != "" {
		out.Type = fmt.Sprintf("ipv%d_dhcp", version)
		return out
	}
	out.Type = fmt.Sprintf("ipv%d", version)
	if version == 6 && s.Meta.IPv6AddressMode != "" {
		out.Type += "_" + s.Meta.IPv6AddressMode
	}
	out.Address = s.IPs[0].Address
	out.Netmask = netmask(s.CIDR)
	any4, any6 := "0.0.0.0", "::"
	if s.Gateway.Address != nil {
		dest := any4
		if version == 6 {
			dest = any6
		}
		out.Routes = append(out.Routes, route{dest, dest, *s.Gateway.Address})
	}
	for _, r := range s.Routes {
		p, err := netip.ParsePrefix(r.CIDR)
		if err != nil || r.Gateway.Address == nil {
			continue
		}
		out.Routes = append(out.Routes, route{p.Addr().String(), netmask(r.CIDR), *r.Gateway.Address})
	}
	out.Services = services(s)
	return out
}

func services(s *novalet.Subnet) []service {
	var out []service
	for _, d := range s.DNS {
		if d.Address != nil {
			out = append(out, service{"dns", *d.Address})
		}
	}
	return out
}

// netmask writes the mask of a prefix as an address, as Nova does for both versions.
func netmask(cidr string) string {
	p, err := netip.ParsePrefix(cidr)
	if err != nil {
		return ""
	}
	b := p.Addr().AsSlice()
	for i := range b {
		switch left := p.Bits() - 8*i; {
		case left >= 8:
			b[i] = 0xff
		case left <= 0:
			b[i] = 0
		default:
			b[i] = 0xff << (8 - left)
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a.String()
}
