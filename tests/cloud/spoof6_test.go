package cloud_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/security/rules"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/ports"
)

// framer is a machine whose root sends and hears any frame it likes (tests/cloud/frames).
func framer(t testing.TB, u *user) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "frames")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "./frames")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build frames: %v: %s", err, out)
	}
	data, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	root := append(busyboxRoot(t), member{name: "sbin/", mode: 0o755}, member{name: "sbin/init", link: "/bin/busybox", mode: 0o777},
		member{name: "bin/frames", mode: 0o755, data: data},
		member{name: "etc/inittab", mode: 0o644, data: []byte("::sysinit:/bin/ip link set eth0 up\n::sysinit:/bin/echo the link is up\n::respawn:/bin/sleep 1000\n")})
	return upload(t, u, imageSpec{name: "novalet-test-framer", container: "bare", disk: "raw"}, bytes.NewReader(gzipped(t, makeTar(t, root))))
}

// node is one end of a conversation in IPv6.
type node struct {
	id, port         string
	mac              net.HardwareAddr
	global, linkOnly netip.Addr
}

func nodeOf(t testing.TB, u *user, id string) node {
	t.Helper()
	ip, port := addressOf(t, u, id, gophercloud.IPv6)
	p, err := ports.Get(t.Context(), u.network, port).Extract()
	if err != nil {
		t.Fatal(err)
	}
	n := node{id: id, port: port, global: netip.MustParseAddr(ip)}
	if n.mac, err = net.ParseMAC(p.MACAddress); err != nil {
		t.Fatal(err)
	}
	m := n.mac
	n.linkOnly = netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
	return n
}

// frame6 is an Ethernet frame in hexadecimal with an IPv6 packet of a protocol whose checksum is at that offset.
func frame6(to, from net.HardwareAddr, src, dst netip.Addr, protocol byte, sumAt int, payload []byte) string {
	pseudo := append(append(src.AsSlice(), dst.AsSlice()...), 0, 0, byte(len(payload)>>8), byte(len(payload)), 0, 0, 0, protocol)
	sum := uint32(0)
	all := append(pseudo, payload...)
	for i := 0; i < len(all); i += 2 {
		sum += uint32(all[i]) << 8
		if i+1 < len(all) {
			sum += uint32(all[i+1])
		}
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(payload[sumAt:], ^uint16(sum))
	f := append(append(append([]byte{}, to...), from...), 0x86, 0xdd, 0x60, 0, 0, 0, byte(len(payload)>>8), byte(len(payload)), protocol, 255)
	f = append(append(append(f, src.AsSlice()...), dst.AsSlice()...), payload...)
	return hex.EncodeToString(f)
}

// option is one of neighbour discovery that carries a text and means nothing (RFC 4727).
func option(text string) []byte {
	b := make([]byte, (len(text)+2+7)/8*8)
	b[0], b[1] = 253, byte(len(b)/8)
	copy(b[2:], text)
	return b
}

const icmp6, udp = 58, 17

func echo6(from, to node, src netip.Addr, text string) string {
	return frame6(to.mac, from.mac, src, to.global, icmp6, 2, append([]byte{128, 0, 0, 0, 0, 1, 0, 1}, text...))
}

// unfiltered are attacks that Neutron's mechanisms of the release Zed let through.
var unfiltered = map[string]string{
	"router advertisement ovn":            "OVN 23.03 hands on what routers announce, whichever port it comes from",
	"neighbour advertisement linuxbridge": "Neutron's rules of iptables do not look at what an advertisement is about",
}

// TestSpoofingIPv6: with port security on, an instance cannot speak under another's IPv6 address, cannot announce itself as
// router or as the owner of another's address, and cannot be a DHCPv6 server. With port security off it can: so each of
// the attacks is one.
func TestSpoofingIPv6(t *testing.T) {
	u := as(t, "demo")
	if !netTests() {
		t.Skip("one of `make test-net` (NOVALET_NET_TESTS=1)")
	}
	group := openGroup(t, u)
	allow6(t, u, group)
	image := framer(t, u)
	network, gateway := dualStack(t, u, "slaac")
	on := []servers.Network{{UUID: network}}
	se := create(t, u, bootOpts{name: "framer", image: image, groups: []string{group}, networks: on})
	sv := create(t, u, bootOpts{name: "hearer", image: image, groups: []string{group}, networks: on})
	for _, s := range []*servers.Server{se, sv} {
		waitStatus(t, u, s.ID, "ACTIVE")
		waitLog(t, u, s.ID, "the link is up", long)
	}
	evil, victim := nodeOf(t, u, se.ID), nodeOf(t, u, sv.ID)
	router := netip.MustParseAddr(gateway)

	allNodes, allNodesMAC := netip.MustParseAddr("ff02::1"), net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
	attacks := []struct {
		name string
		make func(tag string) string
	}{
		{"address", func(tag string) string { return echo6(evil, victim, netip.MustParseAddr("fd66::bad"), tag) }},
		{"router advertisement", func(tag string) string {
			b := []byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}
			b = append(b, 3, 4, 64, 0xc0, 0, 0, 14, 16, 0, 0, 14, 16, 0, 0, 0, 0) // fdbb:bad::/64, to make addresses of
			b = append(append(b, netip.MustParseAddr("fdbb:bad::").AsSlice()...), option(tag)...)
			return frame6(allNodesMAC, evil.mac, evil.linkOnly, allNodes, icmp6, 2, b)
		}},
		{"neighbour advertisement", func(tag string) string {
			b := append([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, router.AsSlice()...)
			b = append(append(append(b, 2, 1), evil.mac...), option(tag)...)
			return frame6(victim.mac, evil.mac, evil.global, victim.global, icmp6, 2, b)
		}},
		{"DHCPv6 server", func(tag string) string {
			b := append([]byte{547 >> 8, 547 & 255, 546 >> 8, 546 & 255, 0, byte(8 + 4 + len(tag)), 0, 0, 2, 1, 2, 3}, tag...)
			return frame6(victim.mac, evil.mac, evil.linkOnly, victim.linkOnly, udp, 6, b)
		}},
	}
	// try sends an attack and behind each a mark in the instance's own name, until the neighbour has heard five marks.
	try := func(i int, phase string) (heard bool, err error) {
		tag, mark := fmt.Sprintf("attack %d %s.", i, phase), fmt.Sprintf("mark %d %s.", i, phase)
		sent := make(chan error, 1)
		go func() {
			_, err := novalet("exec", evil.id, "/bin/frames", "send", "40", attacks[i].make(tag), echo6(evil, victim, evil.global, mark))
			sent <- err
		}()
		out, err := novalet("exec", victim.id, "/bin/timeout", "30", "/bin/frames", "hear", mark, tag)
		if e := <-sent; err == nil {
			err = e
		}
		return strings.Contains(out, tag), err
	}
	for i, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			if why := unfiltered[a.name+" "+mechanism(t)]; why != "" {
				t.Skip(why)
			}
			eventually(t, long, "the mark behind each attack comes through", func() error {
				heard, err := try(i, "on")
				if heard {
					t.Fatal("the neighbour hears it")
				}
				return err
			})
		})
	}
	t.Run("without port security", func(t *testing.T) {
		body := map[string]any{"port": map[string]any{"port_security_enabled": false, "security_groups": []string{}}}
		if _, err := u.network.Put(t.Context(), u.network.ServiceURL("ports", evil.port), body, nil, &gophercloud.RequestOpts{OkCodes: []int{200}}); err != nil {
			t.Fatal(err)
		}
		if _, err := rules.Create(t.Context(), u.network, rules.CreateOpts{SecGroupID: group, Direction: rules.DirIngress, EtherType: rules.EtherType6,
			Protocol: rules.ProtocolUDP}).Extract(); err != nil {
			t.Fatal(err)
		}
		for i, a := range attacks {
			eventually(t, long, a.name+" comes through", func() error {
				heard, err := try(i, "off")
				if err == nil && !heard {
					err = fmt.Errorf("the neighbour does not hear it")
				}
				return err
			})
		}
	})
}
