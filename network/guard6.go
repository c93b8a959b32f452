package network

import (
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// linkLocal is the address that an interface gives itself from its MAC address (RFC 4291, appendix A). Neutron's own
// filters let a port speak from it as well.
func linkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}

// Message types of ICMPv6 (RFC 4861, RFC 2710, RFC 3810).
const (
	routerSolicitation     = 133
	routerAdvertisement    = 134
	neighbourSolicitation  = 135
	neighbourAdvertisement = 136
	redirectMessage        = 137
	listenerReport         = 131
	listenerDone           = 132
	listenerReport2        = 143
)

// Next headers behind which others are.
const (
	nextHopByHop   = 0
	nextRouting    = 43
	nextFragment   = 44
	nextOptions    = 60
	dhcpServerPort = 547
)

// ipv6 appends what decides on a frame of IPv6: it comes from one of the addresses, or from none to ask for a router or
// whether an address is free; it advertises no router and nobody else's address; it is no DHCP server's. Headers that
// could hide such a thing are dropped. All loads are within the lengths checked before.
func (a *assembler) ipv6(own []netip.Addr) {
	const r0, r6, r7 = 0, 6, 7
	const src, next, header, target = 14 + 8, 14 + 6, 14 + 40, 14 + 40 + 8
	load := func(op byte, at int32) { a.add(op, 0, 0, at) }
	longer := func(n uint32) {
		a.add(opLoadW, r7|r6<<4, skbLen, 0)
		a.jump(opJumpLt, r7, n, "drop")
	}
	address := func(at int32, addr netip.Addr, to string) {
		b, other := addr.As16(), a.fresh()
		for i := int32(0); i < 16; i += 4 {
			load(opAbsW, at+i)
			a.jump(opJumpNeW, r0, binary.BigEndian.Uint32(b[i:]), other)
		}
		a.jump(opJump, 0, 0, to)
		a.label(other)
	}
	// switches jumps by a byte of the frame, and on to otherwise.
	switches := func(at int32, otherwise string, cases map[uint32]string) {
		load(opAbsB, at)
		for value, to := range cases {
			a.jump(opJumpEq, r0, value, to)
		}
		a.jump(opJump, 0, 0, otherwise)
	}

	a.label("ipv6")
	longer(header + 8)
	for _, addr := range own {
		address(src, addr, "own6")
	}
	address(src, netip.IPv6Unspecified(), "nobody6")
	a.jump(opJump, 0, 0, "drop")

	a.label("nobody6")
	switches(next, "drop", map[uint32]string{unix.IPPROTO_ICMPV6: "ask6", nextHopByHop: "groups6"})
	a.label("ask6")
	switches(header, "drop", map[uint32]string{routerSolicitation: "pass", neighbourSolicitation: "target6"})

	a.label("own6")
	switches(next, "pass", map[uint32]string{unix.IPPROTO_UDP: "udp6", unix.IPPROTO_ICMPV6: "icmp6", nextHopByHop: "groups6",
		nextFragment: "fragment6", nextRouting: "drop", nextOptions: "drop"})
	a.label("udp6")
	load(opAbsH, header)
	a.jump(opJumpEq, r0, dhcpServerPort, "drop")
	a.jump(opJump, 0, 0, "pass")
	a.label("icmp6")
	switches(header, "pass", map[uint32]string{routerAdvertisement: "drop", redirectMessage: "drop", neighbourAdvertisement: "target6"})
	a.label("target6")
	longer(target + 16)
	for _, addr := range own {
		address(target, addr, "pass")
	}
	a.jump(opJump, 0, 0, "drop")

	// Joining and leaving groups goes behind one option of eight bytes.
	a.label("groups6")
	longer(header + 16)
	load(opAbsH, header)
	a.jump(opJumpNe, r0, unix.IPPROTO_ICMPV6<<8, "drop")
	switches(header+8, "drop", map[uint32]string{listenerReport: "pass", listenerDone: "pass", listenerReport2: "pass"})

	// The first fragment says what it is; the others are nothing without it.
	a.label("fragment6")
	longer(header + 16)
	load(opAbsH, header+2)
	a.add(opAndImm, r0, 0, 0xfff8)
	a.jump(opJumpNe, r0, 0, "pass")
	switches(header, "drop", map[uint32]string{unix.IPPROTO_TCP: "pass", unix.IPPROTO_UDP: "fragmentUDP6", unix.IPPROTO_ICMPV6: "fragmentICMP6"})
	a.label("fragmentUDP6")
	load(opAbsH, header+8)
	a.jump(opJumpEq, r0, dhcpServerPort, "drop")
	a.jump(opJump, 0, 0, "pass")
	a.label("fragmentICMP6")
	switches(header+8, "pass", map[uint32]string{routerSolicitation: "drop", routerAdvertisement: "drop", neighbourSolicitation: "drop",
		neighbourAdvertisement: "drop", redirectMessage: "drop"})
}
