package network

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// wire is a packet socket on an instance's interface.
type wire struct {
	t  *testing.T
	fd int
}

func openWire(t *testing.T, ns *os.File) *wire {
	t.Helper()
	w := &wire{t: t, fd: -1}
	all := int(binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}))
	inside(t, ns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
			return err
		}
		return unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: l.Attrs().Index})
	})
	t.Cleanup(func() { _ = unix.Close(w.fd) })
	return w
}

func (w *wire) send(frame []byte) {
	w.t.Helper()
	if err := unix.Send(w.fd, frame, 0); err != nil {
		w.t.Fatalf("send %x: %v", frame, err)
	}
}

// first waits for a frame with one of the texts and returns which it was; "" when none came within the time.
func (w *wire) first(limit time.Duration, texts ...string) string {
	w.t.Helper()
	buf := make([]byte, 2048)
	for end := time.Now().Add(limit); time.Now().Before(end); {
		n, _, err := unix.Recvfrom(w.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			w.t.Fatal(err)
		}
		for _, s := range texts {
			if bytes.Contains(buf[:n], []byte(s)) {
				return s
			}
		}
	}
	return ""
}

const (
	evilMAC, victimMAC, foreignMAC = "fa:16:3e:00:00:0a", "fa:16:3e:00:00:0b", "fa:16:3e:00:00:0c"
	evilIP, victimIP, gatewayIP    = "10.78.0.10", "10.78.0.11", "10.78.0.1"
)

// ether is a frame to the victim.
func ether(src string, kind uint16, payload []byte) []byte {
	to, _ := net.ParseMAC(victimMAC)
	from, _ := net.ParseMAC(src)
	return append(binary.BigEndian.AppendUint16(append(append([]byte{}, to...), from...), kind), payload...)
}

// ip4 is a packet with options (a multiple of four bytes) and a transport header's ports.
func ip4(src string, protocol byte, options []byte, sport, dport uint16) []byte {
	b := make([]byte, 20)
	b[0], b[8], b[9] = byte(0x45+len(options)/4), 64, protocol
	copy(b[12:], netip.MustParseAddr(src).AsSlice())
	copy(b[16:], netip.MustParseAddr(victimIP).AsSlice())
	b = append(b, options...)
	b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, sport), dport)
	return append(b, 0, 8, 0, 0)
}

// seal ends a frame with a text and makes lengths and sum of its IP header right: the bridge may look at them.
func seal(frame []byte, text string) []byte {
	f := append(append([]byte{}, frame...), text...)
	at := 14
	kind := binary.BigEndian.Uint16(f[12:])
	if kind == unix.ETH_P_8021Q {
		at, kind = 18, binary.BigEndian.Uint16(f[16:])
	}
	switch kind {
	case unix.ETH_P_IPV6:
		binary.BigEndian.PutUint16(f[at+4:], uint16(len(f)-at-40))
	case unix.ETH_P_IP:
		binary.BigEndian.PutUint16(f[at+2:], uint16(len(f)-at))
		sum := uint32(0)
		for i := at; i < at+int(f[at]&0xf)*4; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(f[i:]))
		}
		sum = sum>>16 + sum&0xffff
		binary.BigEndian.PutUint16(f[at+10:], ^uint16(sum>>16+sum))
	}
	return f
}

func arp(mac, ip string) []byte {
	hw, _ := net.ParseMAC(mac)
	to, _ := net.ParseMAC(victimMAC)
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, hw...)
	b = append(append(b, netip.MustParseAddr(ip).AsSlice()...), to...)
	return append(b, netip.MustParseAddr(victimIP).AsSlice()...)
}

// attack is a frame, and whether a guard lets it pass.
type attack struct {
	name  string
	frame []byte
	pass  bool
}

// tryAttacks sends frames from one instance to another. With a guard, those come that it lets pass, without all.
func tryAttacks(t *testing.T, a, b *os.File, frames []attack, on bool) {
	t.Helper()
	from, to := openWire(t, a), openWire(t, b)
	// An interface that has just been set up drops what is sent until the kernel has got to it.
	for end := time.Now().Add(time.Minute); ; {
		from.send(seal(ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, unix.IPPROTO_TCP, nil, 1000, 80)), "the first one"))
		if to.first(time.Second, "the first one") != "" {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no frame comes through")
		}
	}
	for i, f := range frames {
		// Frames keep their order: once the mark that was sent behind one is there, the one comes no more.
		tag, mark := fmt.Sprintf("frame %d of the attack", i), fmt.Sprintf("the mark behind %d.", i)
		from.send(seal(f.frame, tag))
		from.send(seal(ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, unix.IPPROTO_TCP, nil, 1000, 80)), mark))
		got := to.first(30*time.Second, tag, mark)
		if got == "" {
			t.Fatalf("%s: the mark behind it never came", f.name)
		}
		if passed := got == tag; passed != (f.pass || !on) {
			t.Errorf("%s: passed is %v", f.name, passed)
		}
		if got == tag && to.first(30*time.Second, mark) == "" {
			t.Fatalf("%s: the mark behind it never came", f.name)
		}
	}
}

// TestGuard sends frames past the guard, and the same ones where it is not asked for: there all of them come through, so
// each is an attack that the guard stops.
func TestGuard(t *testing.T) {
	const udp, tcp = unix.IPPROTO_UDP, unix.IPPROTO_TCP
	tagged := append([]byte{0, 7, 8, 0}, ip4(evilIP, tcp, nil, 1000, 80)...)
	advert := append([]byte{0x60, 0, 0, 0, 0, 16, 58, 255}, netip.MustParseAddr("fe80::f816:3eff:fe00:a").AsSlice()...)
	advert = append(append(advert, netip.MustParseAddr("ff02::1").AsSlice()...), 134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0)
	later := ip4(evilIP, udp, nil, 67, 68)
	later[7] = 1 // the offset of a fragment: its data may be anything
	frames := []attack{
		{"TCP as itself", ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, tcp, nil, 1000, 80)), true},
		{"UDP as itself", ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, udp, nil, 1000, 53)), true},
		{"the second address", ether(evilMAC, unix.ETH_P_IP, ip4("10.78.0.20", udp, nil, 1000, 53)), true},
		{"ARP as itself", ether(evilMAC, unix.ETH_P_ARP, arp(evilMAC, evilIP)), true},
		{"a probe by ARP", ether(evilMAC, unix.ETH_P_ARP, arp(evilMAC, "0.0.0.0")), true},
		{"a request of a DHCP client", ether(evilMAC, unix.ETH_P_IP, ip4("0.0.0.0", udp, nil, 68, 67)), true},
		{"a renewal of a DHCP client", ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, udp, nil, 68, 67)), true},
		{"a later fragment", ether(evilMAC, unix.ETH_P_IP, later), true},
		{"a foreign MAC address", ether(foreignMAC, unix.ETH_P_IP, ip4(evilIP, tcp, nil, 1000, 80)), false},
		{"a MAC address that ends otherwise", ether("fa:16:3e:00:01:0a", unix.ETH_P_IP, ip4(evilIP, tcp, nil, 1000, 80)), false},
		{"a foreign address", ether(evilMAC, unix.ETH_P_IP, ip4(gatewayIP, tcp, nil, 1000, 80)), false},
		{"a foreign address behind options", ether(evilMAC, unix.ETH_P_IP, ip4(gatewayIP, udp, []byte{1, 1, 1, 0}, 1000, 53)), false},
		{"no address", ether(evilMAC, unix.ETH_P_IP, ip4("0.0.0.0", udp, nil, 1000, 53)), false},
		{"no address, TCP", ether(evilMAC, unix.ETH_P_IP, ip4("0.0.0.0", tcp, nil, 68, 67)), false},
		{"the gateway by ARP", ether(evilMAC, unix.ETH_P_ARP, arp(evilMAC, gatewayIP)), false},
		{"the victim's own address by ARP", ether(evilMAC, unix.ETH_P_ARP, arp(evilMAC, victimIP)), false},
		{"a foreign MAC address by ARP", ether(evilMAC, unix.ETH_P_ARP, arp(foreignMAC, evilIP)), false},
		{"ARP from a foreign MAC address", ether(foreignMAC, unix.ETH_P_ARP, arp(evilMAC, evilIP)), false},
		{"ARP of another kind", ether(evilMAC, unix.ETH_P_ARP, append([]byte{0, 1, 8, 0, 8}, arp(evilMAC, evilIP)[5:]...)), false},
		{"an answer of a DHCP server", ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, udp, nil, 67, 68)), false},
		{"an answer of a DHCP server behind options", ether(evilMAC, unix.ETH_P_IP, ip4(evilIP, udp, []byte{1, 1, 1, 0, 1, 1, 1, 0}, 67, 68)), false},
		{"an answer of a DHCP server without address", ether(evilMAC, unix.ETH_P_IP, ip4("0.0.0.0", udp, nil, 67, 68)), false},
		{"a router's advertisement", ether(evilMAC, unix.ETH_P_IPV6, advert), false},
		{"a tagged frame", ether(evilMAC, unix.ETH_P_8021Q, tagged), false},
		{"another protocol", ether(evilMAC, 0x88cc, []byte{2, 7, 4}), false},
	}
	for _, on := range []bool{true, false} {
		t.Run(fmt.Sprintf("guard %v", on), func(t *testing.T) {
			hostNS(t)
			p := newPlugger(t, Options{})
			a, b := newNS(t), newNS(t)
			evil, victim := vif(portA, evilMAC, evilIP), vif(portB, victimMAC, victimIP)
			evil.Network.Subnets[0].IPs = append(evil.Network.Subnets[0].IPs, novalet.FixedIP{Address: "10.78.0.20", Type: "fixed", Version: 4})
			if on {
				evil.Details = map[string]json.RawMessage{GuardKey: json.RawMessage("true")}
			}
			specs := map[string]string{"quota:vif_outbound_average": "100000"} // the detour is behind the guard
			for _, r := range []*novalet.PlugRequest{
				{InstanceUUID: instA, VIF: evil, NetNS: nsPath(a), Static: true, ExtraSpecs: specs},
				{InstanceUUID: instB, VIF: victim, NetNS: nsPath(b), Static: true}} {
				for range 2 {
					if err := p.Plug(t.Context(), r); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := ping(a, victimIP); err != nil {
				t.Fatalf("as itself: %v", err)
			}
			tryAttacks(t, a, b, frames, on)
			if l, err := p.h.LinkByName("ifbaaaaaaaa-69"); err != nil || l.Attrs().Statistics.TxPackets == 0 {
				t.Errorf("nothing took the detour: %v, %v", l, err)
			}
		})
	}
}
