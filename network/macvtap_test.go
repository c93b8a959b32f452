package network

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// macvtapVIF is a port as Neutron's macvtap mechanism binds it on a flat network.
func macvtapVIF(id, mac, addr string) *novalet.VIF {
	v := vif(id, mac, addr)
	v.Type, v.Network.Bridge = "macvtap", ""
	v.Details = map[string]json.RawMessage{"port_filter": json.RawMessage("false"), "macvtap_source": json.RawMessage(`"phys0"`),
		"physical_interface": json.RawMessage(`"phys0"`), "macvtap_mode": json.RawMessage(`"bridge"`)}
	return v
}

// physical makes the interface phys0 of the host. What returns is the namespace at the other end of its cable, which has
// the gateway's address.
func physical(t *testing.T, p *Plugger, mtu int) *os.File {
	t.Helper()
	far := newNS(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "phys0", mtu
	v := netlink.NewVeth(attrs)
	v.PeerName, v.PeerMTU, v.PeerNamespace = "far0", uint32(mtu), netlink.NsFd(far.Fd())
	if err := p.h.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	up(t, p, "phys0")
	inside(t, far, func() error {
		l, err := netlink.LinkByName("far0")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(gatewayIP + "/22"))}); err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	})
	return far
}

func up(t *testing.T, p *Plugger, name string) {
	t.Helper()
	l, err := p.h.LinkByName(name)
	if err == nil {
		err = p.h.LinkSetUp(l)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestMacvtapPlug(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	far := physical(t, p, 1500)
	a, b := newNS(t), newNS(t)
	va, vb := macvtapVIF(portA, evilMAC, evilIP), macvtapVIF(portB, victimMAC, victimIP)
	ra := &novalet.PlugRequest{InstanceUUID: instA, VIF: va, NetNS: nsPath(a), Static: true}
	rb := &novalet.PlugRequest{InstanceUUID: instB, VIF: vb, NetNS: nsPath(b), Static: true}
	for _, r := range []*novalet.PlugRequest{ra, rb, ra} {
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	reach := func(when string) {
		t.Helper()
		for _, to := range []string{gatewayIP, victimIP} {
			if err := ping(a, to); err != nil {
				t.Errorf("%s, to %s: %v", when, to, err)
			}
		}
		if err := ping(far, evilIP); err != nil {
			t.Errorf("%s, from outside: %v", when, err)
		}
	}
	reach("plugged")

	// What Neutron's agent looks for: a name, and the port's MAC address.
	dev, err := p.h.LinkByName("macvtapaaaaaaaa")
	if err != nil {
		t.Fatal(err)
	}
	if at := dev.Attrs(); at.HardwareAddr.String() != evilMAC || at.Flags&net.FlagUp == 0 || at.RawFlags&unix.IFF_ALLMULTI == 0 || at.MTU != 1450 || at.Alias != alias(instA, portA) {
		t.Errorf("the device for the agent: %+v", at)
	}
	// What the agent does to a port whose admin state is down, and only once.
	if err := p.h.LinkSetDown(dev); err != nil {
		t.Fatal(err)
	}
	if err := p.Plug(t.Context(), ra); err != nil {
		t.Fatal(err)
	}
	inside(t, a, func() error {
		if exec.Command("ping", "-c", "1", "-W", "1", victimIP).Run() == nil {
			t.Error("something passed through a port that is down")
		}
		return nil
	})

	// A reboot of the agent of either kind, or somebody's hand, is mended by the next plug.
	for _, name := range []string{"macvtapaaaaaaaa", "tapaaaaaaaa-69"} {
		l, err := p.h.LinkByName(name)
		if err == nil {
			err = p.h.LinkDel(l)
		}
		if err == nil {
			err = p.Plug(t.Context(), ra)
		}
		if err != nil {
			t.Fatal(err)
		}
		reach(name + " made anew")
	}

	// A stopped instance's device stays for the agent to see.
	if dev, err = p.h.LinkByName("macvtapaaaaaaaa"); err != nil {
		t.Fatal(err)
	}
	if err := p.Park(t.Context(), instA, va, ra.NetNS); err != nil {
		t.Fatal(err)
	}
	a = newNS(t)
	ra.NetNS = nsPath(a)
	if err := p.Plug(t.Context(), ra); err != nil {
		t.Fatal(err)
	}
	if now, err := p.h.LinkByName("macvtapaaaaaaaa"); err != nil || now.Attrs().Index != dev.Attrs().Index {
		t.Errorf("after a stop the device is another: %v, %v", now, err)
	}
	reach("after a stop")

	// The flavor's limits: what goes out leaves by the device on the wire.
	ra.ExtraSpecs = map[string]string{"quota:vif_inbound_average": "1000", "quota:vif_outbound_average": "2000"}
	if err := p.Plug(t.Context(), ra); err != nil {
		t.Fatal(err)
	}
	for name, rate := range map[string]uint64{"tapaaaaaaaa-69": 1000 * 1000, "macvtapaaaaaaaa": 2000 * 1000} {
		l, err := p.h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		qdiscs, err := p.h.QdiscList(l)
		if err != nil || !slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { tbf, ok := q.(*netlink.Tbf); return ok && tbf.Rate == rate }) {
			t.Errorf("qdiscs of %s: %v, %v", name, qdiscs, err)
		}
	}
	reach("with limits")

	if err := p.Unplug(t.Context(), instB, vb); err != nil {
		t.Fatal(err)
	}
	if removed, err := p.Sweep(t.Context(), nil); err != nil || !slices.Equal(removed, []string{"macvtapaaaaaaaa", "tapaaaaaaaa-69"}) {
		t.Errorf("swept %v, %v", removed, err)
	}
	eventually(t, "only the physical interface is left", func() bool { return slices.Equal(hostLinks(t, p), []string{"phys0"}) })
}

// received is how many packets of IPv4 the host's own stack was given: InReceives of /proc/net/snmp.
func received(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/thread-self/net/snmp")
	if err != nil {
		t.Fatal(err)
	}
	var names, values []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); f[0] == "Ip:" {
			names, values = values, f
		}
	}
	return values[slices.Index(names, "InReceives")]
}

func TestMacvtapRefused(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	ns := newNS(t)
	v := macvtapVIF(portA, evilMAC, evilIP)
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(ns)}
	elsewhere := func(why string) {
		t.Helper()
		if err := p.Plug(t.Context(), r); !errors.Is(err, novalet.ErrReschedule) {
			t.Errorf("%s: error %v, want another host", why, err)
		}
	}
	elsewhere("no interface")
	physical(t, p, 1400)
	elsewhere("an interface with too small an mtu")
	l, err := p.h.LinkByName("phys0")
	if err == nil {
		err = p.h.LinkSetMTU(l, 1500)
	}
	if err == nil {
		err = p.h.LinkSetDown(l)
	}
	if err != nil {
		t.Fatal(err)
	}
	elsewhere("an interface that is down")
	if links := hostLinks(t, p); !slices.Equal(links, []string{"phys0"}) {
		t.Errorf("left behind: %v", links)
	}

	// A device of somebody else's keeps its name.
	up(t, p, "phys0")
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex = "macvtapaaaaaaaa", l.Attrs().Index
	if err := p.h.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
		t.Fatal(err)
	}
	if err := p.Plug(t.Context(), r); err == nil {
		t.Error("another's device was taken")
	}
	if err := p.Unplug(t.Context(), instA, v); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another's device stays", func() bool { return slices.Equal(hostLinks(t, p), []string{"macvtapaaaaaaaa", "phys0"}) })
}

// ip6 is a packet with a payload behind the next header.
func ip6(src netip.Addr, next byte, payload ...byte) []byte {
	b := append([]byte{0x60, 0, 0, 0, 0, 0, next, 255}, src.AsSlice()...)
	return append(append(b, netip.MustParseAddr("ff02::1").AsSlice()...), payload...)
}

// icmp6 is a message with a target.
func icmp6(kind byte, target netip.Addr) []byte {
	return append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...)
}

// TestMacvtapGuard sends frames past the guard of a port on a physical interface, and the same ones from a port without.
func TestMacvtapGuard(t *testing.T) {
	const udp, tcp = unix.IPPROTO_UDP, unix.IPPROTO_TCP
	own, other, none := netip.MustParseAddr("2001:db8::a"), netip.MustParseAddr("2001:db8::1"), netip.IPv6Unspecified()
	local := netip.MustParseAddr("fe80::f816:3eff:fe00:a")
	v6 := func(src netip.Addr, next byte, payload ...byte) []byte {
		return ether(evilMAC, unix.ETH_P_IPV6, ip6(src, next, payload...))
	}
	ports := func(sport, dport uint16) []byte {
		return append(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, sport), dport), 0, 8, 0, 0)
	}
	behind := func(next byte, payload []byte) []byte { return append([]byte{next, 0, 0, 0, 0, 0, 0, 0}, payload...) }
	frames := []attack{
		{"TCP as itself", ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, tcp, nil, 1000, 80)), true},
		{"ARP as itself", ether(evilMAC, unix.ETH_P_ARP, arp(evilMAC, evilIP)), true},
		{"a foreign address", ether(evilMAC, unix.ETH_P_IP, ip4(gatewayIP, tcp, nil, 1000, 80)), false},
		{"the gateway by ARP", ether(evilMAC, unix.ETH_P_ARP, arp(evilMAC, gatewayIP)), false},
		{"an answer of a DHCP server", ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, udp, nil, 67, 68)), false},
		{"UDP over IPv6", v6(own, udp, ports(1, 53)...), true},
		{"UDP over IPv6 from the link", v6(local, udp, ports(1, 53)...), true},
		{"TCP over IPv6", v6(own, tcp, make([]byte, 20)...), true},
		{"a neighbour's solicitation", v6(own, 58, icmp6(135, other)...), true},
		{"an own advertisement", v6(own, 58, icmp6(136, own)...), true},
		{"an own advertisement from the link", v6(local, 58, icmp6(136, local)...), true},
		{"is my address free", v6(none, 58, icmp6(135, own)...), true},
		{"who is a router", v6(none, 58, icmp6(133, none)...), true},
		{"a report of groups", v6(local, 0, append([]byte{58, 0, 5, 2, 0, 0, 1, 0}, icmp6(143, none)...)...), true},
		{"a fragment", v6(own, 44, behind(udp, ports(1, 53))...), true},
		{"a later fragment", v6(own, 44, append([]byte{58, 0, 0, 8, 0, 0, 0, 0}, icmp6(134, none)...)...), true},
		{"a DHCPv6 client", v6(local, udp, ports(546, 547)...), true},
		{"a foreign IPv6 address", v6(other, udp, ports(1, 53)...), false},
		{"an address that ends otherwise", v6(netip.MustParseAddr("2001:db8::b"), udp, ports(1, 53)...), false},
		{"an address that begins otherwise", v6(netip.MustParseAddr("2001:db9::a"), udp, ports(1, 53)...), false},
		{"no IPv6 address", v6(none, udp, ports(1, 53)...), false},
		{"a router's advertisement", v6(local, 58, icmp6(134, none)...), false},
		{"a redirect", v6(local, 58, icmp6(137, other)...), false},
		{"another's advertisement", v6(own, 58, icmp6(136, other)...), false},
		{"is another's address free", v6(none, 58, icmp6(135, other)...), false},
		{"a DHCPv6 server", v6(local, udp, ports(547, 546)...), false},
		{"a router behind options", v6(local, 60, behind(58, icmp6(134, none))...), false},
		{"a router behind a route", v6(local, 43, behind(58, icmp6(134, none))...), false},
		{"a router behind an option for all", v6(local, 0, behind(58, icmp6(134, none))...), false},
		{"a router in a fragment", v6(local, 44, behind(58, icmp6(134, none))...), false},
		{"a DHCPv6 server in a fragment", v6(local, 44, behind(udp, ports(547, 546))...), false},
		{"a tagged frame", ether(evilMAC, unix.ETH_P_8021Q, append([]byte{0, 7, 8, 0}, ip4(evilIP, tcp, nil, 1000, 80)...)), false},
	}
	for _, on := range []bool{true, false} {
		t.Run(fmt.Sprintf("guard %v", on), func(t *testing.T) {
			hostNS(t)
			p := newPlugger(t, Options{})
			physical(t, p, 1500)
			a, b := newNS(t), newNS(t)
			evil, victim := macvtapVIF(portA, evilMAC, evilIP), macvtapVIF(portB, victimMAC, victimIP)
			evil.Details[GuardKey] = json.RawMessage("true")
			ra := &novalet.PlugRequest{InstanceUUID: instA, VIF: evil, NetNS: nsPath(a), Static: true}
			for _, r := range []*novalet.PlugRequest{ra, {InstanceUUID: instB, VIF: victim, NetNS: nsPath(b), Static: true}} {
				if err := p.Plug(t.Context(), r); err != nil {
					t.Fatal(err)
				}
			}
			// The port gets another address, or loses its guard, while the instance configures itself.
			ra.Static = false
			evil.Network.Subnets = append(evil.Network.Subnets, novalet.Subnet{CIDR: "2001:db8::/64", Version: 6,
				IPs: []novalet.FixedIP{{Address: own.String(), Type: "fixed", Version: 6}}})
			if !on {
				delete(evil.Details, GuardKey)
			}
			if err := p.Configure(t.Context(), ra); err != nil {
				t.Fatal(err)
			}
			tryAttacks(t, a, b, frames, on)

			// A frame that ends before its ports, and one whose header ends behind it, take no way around the guard into the
			// host's own stack.
			from, to := openWire(t, a), openWire(t, b)
			short := seal(ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, udp, nil, 0, 0)[:20]), "")
			options := ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, udp, nil, 0, 0))
			options[14] = 0x4f
			for _, f := range [][]byte{short, options} {
				copy(f, "\xff\xff\xff\xff\xff\xff") // for all: the host's end included
				from.send(f)
			}
			from.send(seal(ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, tcp, nil, 1000, 80)), "the last one"))
			if to.first(30*time.Second, "the last one") == "" {
				t.Fatal("the mark behind them never came")
			}
			if n := received(t); n != "0" {
				t.Errorf("the host's stack was given %s packets", n)
			}
		})
	}
}

// TestMacvtapVLAN: the device of the VLAN is made with the first port, and left to Neutron's agent, which deletes it with
// the network.
func TestMacvtapVLAN(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	far := physical(t, p, 1500)
	tagged := netip.MustParsePrefix("10.78.4.1/22")
	err := inNetNS(far, func() error {
		l, err := netlink.LinkByName("far0")
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex = "far0.7", l.Attrs().Index
		v := &netlink.Vlan{LinkAttrs: attrs, VlanId: 7}
		if err := netlink.LinkAdd(v); err != nil {
			return err
		}
		if err := netlink.AddrAdd(v, &netlink.Addr{IPNet: ipNet(tagged)}); err != nil {
			return err
		}
		return netlink.LinkSetUp(v)
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("the kernel has no VLAN devices (8021q)")
	}
	if err != nil {
		t.Fatal(err)
	}
	port := func(id, mac, addr string) *novalet.VIF {
		v := macvtapVIF(id, mac, addr)
		v.Network.Subnets[0].CIDR, v.Network.Subnets[0].Gateway.Address = "10.78.4.0/22", text(tagged.Addr().String())
		v.Details["macvtap_source"], v.Details["vlan"] = json.RawMessage(`"phys0.7"`), json.RawMessage("7")
		return v
	}
	a, b := newNS(t), newNS(t)
	for _, r := range []*novalet.PlugRequest{
		{InstanceUUID: instA, VIF: port(portA, evilMAC, "10.78.4.10"), NetNS: nsPath(a), Static: true},
		{InstanceUUID: instB, VIF: port(portB, victimMAC, "10.78.4.11"), NetNS: nsPath(b), Static: true}} {
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	for _, to := range []string{tagged.Addr().String(), "10.78.4.11"} {
		if err := ping(a, to); err != nil {
			t.Errorf("to %s: %v", to, err)
		}
	}
	other := port(portA, evilMAC, "10.78.4.10")
	other.Details["vlan"] = json.RawMessage("8")
	err = p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instA, VIF: other, NetNS: nsPath(a), Static: true})
	if !errors.Is(err, novalet.ErrReschedule) {
		t.Errorf("on the device of another VLAN: %v", err)
	}
	if _, err := p.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the device of the VLAN is left", func() bool { return slices.Equal(hostLinks(t, p), []string{"phys0", "phys0.7"}) })
}
