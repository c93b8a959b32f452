package network

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// GuardKey is the key of the details of a VIF of type bridge or macvtap that asks for the host's own guard against
// spoofing, where nothing else filters (most of Neutron's mechanisms do it by themselves). Its value is true.
//
// What the guard lets an instance send, from the port's MAC address alone: ARP with its own MAC and IPv4 addresses, IPv4
// from these addresses but not from a DHCP server's port, and a DHCP client's requests. On type macvtap, the like of
// IPv6 (see ipv6); on type bridge IPv6 is dropped, so a VIF that asks for it must be on a network of IPv4 alone. All else
// is dropped.
const GuardKey = "novalet_guard"

const guardName = "novalet_guard"

func guarded(v *novalet.VIF) bool {
	var yes bool
	return (v.Type == "bridge" || v.Type == "macvtap") && json.Unmarshal(v.Details[GuardKey], &yes) == nil && yes
}

// reguard makes a guard follow the port, whose addresses change, and which may be opened.
func (p *Plugger) reguard(v *novalet.VIF) error {
	link, err := p.link(tapName(v.ID))
	if err != nil || link == nil {
		return err
	}
	if guarded(v) {
		return p.guard(link, v)
	}
	if v.Type != "macvtap" {
		return nil
	}
	have, err := p.h.FilterList(link, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return fmt.Errorf("list classifiers of %s: %w", link.Attrs().Name, err)
	}
	for _, f := range have {
		if b, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(b.Name, guardName) {
			if err := p.h.FilterDel(f); err != nil {
				return fmt.Errorf("remove classifier of %s: %w", link.Attrs().Name, err)
			}
		}
	}
	return nil
}

// guard puts the filter in the way of what the instance sends, before the device is up. A kernel that cannot do it is
// told of once.
func (p *Plugger) guard(link netlink.Link, v *novalet.VIF) error {
	prog, err := guardProgram(v)
	if err != nil {
		return err
	}
	fd, err := loadClassifier(prog)
	if err == nil {
		defer unix.Close(fd)
		err = p.classify(link, fd, guardName)
	}
	if err != nil {
		p.guardOnce.Do(func() {
			p.log.Warn("instances can speak under others' addresses: the kernel takes no classifier", "error", err)
		})
	}
	return nil
}

// Opcodes of eBPF (linux/bpf.h, linux/bpf_common.h). The absolute and indirect loads read the frame in network order into
// R0, with the context in R6; beyond its end they end the program with 0, which passes the frame, on macvtap to the
// host's own stack: so the lengths are checked before.
const (
	opMovImm  = 0xb7 // dst = imm
	opMovReg  = 0xbf // dst = src
	opAddImm  = 0x07
	opAndImm  = 0x57
	opShlImm  = 0x67
	opLoadW   = 0x61 // dst = *(u32 *)(src + off)
	opAbsW    = 0x20 // R0 = frame[imm:imm+4]
	opAbsH    = 0x28
	opAbsB    = 0x30
	opIndH    = 0x48 // R0 = frame[src+imm:+2]
	opJump    = 0x05
	opJumpEq  = 0x15
	opJumpNe  = 0x55
	opJumpLt  = 0xa5
	opJumpLtR = 0xad // of two registers
	opJumpEqW = 0x16 // of the lower 32 bits
	opJumpNeW = 0x56
	opCall    = 0x85
	opExit    = 0x95
)

// assembler collects instructions whose jumps go to labels.
type assembler struct {
	prog   []insn
	jumps  map[int]string
	labels map[string]int
}

func (a *assembler) add(op, regs byte, off int16, imm int32) {
	a.prog = append(a.prog, insn{op, regs, off, imm})
}

func (a *assembler) jump(op, reg byte, imm uint32, to string) {
	a.jumps[len(a.prog)] = to
	a.add(op, reg, 0, int32(imm))
}

// fresh is a label that nobody else uses.
func (a *assembler) fresh() string { return fmt.Sprintf("#%d", len(a.prog)) }

func (a *assembler) label(name string) { a.labels[name] = len(a.prog) }

func (a *assembler) link() []insn {
	for at, to := range a.jumps {
		a.prog[at].off = int16(a.labels[to] - at - 1)
	}
	return a.prog
}

// Offsets in struct __sk_buff (linux/bpf.h).
const (
	skbLen         = 0
	skbVLANPresent = 20
)

// guardProgram is the filter of a VIF.
func guardProgram(v *novalet.VIF) ([]insn, error) {
	mac, err := net.ParseMAC(v.Address)
	if err != nil {
		return nil, err
	}
	var own []uint32
	own6 := []netip.Addr{linkLocal(mac)}
	for _, s := range v.Network.Subnets {
		for _, ip := range s.IPs {
			addr, err := netip.ParseAddr(ip.Address)
			if err != nil {
				return nil, fmt.Errorf("address %.60q is none", ip.Address)
			}
			if addr.Is4() {
				b := addr.As4()
				own = append(own, binary.BigEndian.Uint32(b[:]))
			} else {
				own6 = append(own6, addr)
			}
		}
	}
	const r0, r6, r7, r8, r9 = 0, 6, 7, 8, 9
	a := &assembler{jumps: map[int]string{}, labels: map[string]int{}}
	macHigh, macLow := binary.BigEndian.Uint32(mac), uint32(binary.BigEndian.Uint16(mac[4:]))
	load := func(op byte, at int32) { a.add(op, 0, 0, at) }
	// fromMAC drops what has another MAC address there.
	fromMAC := func(at int32) {
		load(opAbsW, at)
		a.jump(opJumpNeW, r0, macHigh, "drop")
		load(opAbsH, at+4)
		a.jump(opJumpNe, r0, macLow, "drop")
	}
	// transport loads a port of a UDP header behind an IPv4 header of any length, if the frame is that long.
	transport := func(at int32) {
		load(opAbsB, 14)
		a.add(opAndImm, r0, 0, 0xf)
		a.add(opShlImm, r0, 0, 2)
		a.add(opMovReg, r7|r0<<4, 0, 0)
		a.add(opMovReg, r8|r0<<4, 0, 0)
		a.add(opAddImm, r8, 0, 14+4)
		a.add(opLoadW, r9|r6<<4, skbLen, 0)
		a.jump(opJumpLtR, r9|r8<<4, 0, "drop")
		a.add(opIndH, r7<<4, 0, 14+at)
	}

	a.add(opMovReg, r6|1<<4, 0, 0)
	a.add(opLoadW, r7|r6<<4, skbVLANPresent, 0)
	a.jump(opJumpNe, r7, 0, "drop") // a tag that is beside the frame
	a.add(opLoadW, r7|r6<<4, skbLen, 0)
	a.jump(opJumpLt, r7, 34, "drop")
	fromMAC(6)
	load(opAbsH, 12)
	a.jump(opJumpEq, r0, unix.ETH_P_ARP, "arp")
	if v.Type == "macvtap" {
		a.jump(opJumpEq, r0, unix.ETH_P_IPV6, "ipv6")
	}
	a.jump(opJumpNe, r0, unix.ETH_P_IP, "drop")

	load(opAbsW, 26)
	for _, addr := range own {
		a.jump(opJumpEqW, r0, addr, "own")
	}
	a.jump(opJumpNeW, r0, 0, "drop")
	// Without an address it may ask a DHCP server for one.
	load(opAbsB, 23)
	a.jump(opJumpNe, r0, unix.IPPROTO_UDP, "drop")
	load(opAbsH, 20)
	a.add(opAndImm, r0, 0, 0x1fff)
	a.jump(opJumpNe, r0, 0, "drop") // a later fragment
	transport(0)
	a.jump(opJumpNe, r0, 68, "drop")
	transport(2)
	a.jump(opJumpEq, r0, 67, "pass")
	a.jump(opJump, 0, 0, "drop")

	a.label("own")
	load(opAbsB, 23)
	a.jump(opJumpNe, r0, unix.IPPROTO_UDP, "pass")
	load(opAbsH, 20)
	a.add(opAndImm, r0, 0, 0x1fff)
	a.jump(opJumpNe, r0, 0, "pass") // a later fragment has no ports; without the first it is nothing
	transport(0)
	a.jump(opJumpEq, r0, 67, "drop")
	a.jump(opJump, 0, 0, "pass")

	a.label("arp")
	a.add(opLoadW, r7|r6<<4, skbLen, 0)
	a.jump(opJumpLt, r7, 42, "drop")
	load(opAbsW, 14)
	a.jump(opJumpNeW, r0, 1<<16|unix.ETH_P_IP, "drop") // IPv4 over Ethernet
	load(opAbsH, 18)
	a.jump(opJumpNe, r0, 6<<8|4, "drop")
	fromMAC(22)
	load(opAbsW, 28)
	for _, addr := range own {
		a.jump(opJumpEqW, r0, addr, "pass")
	}
	a.jump(opJumpEqW, r0, 0, "pass") // a probe: does anybody have this address?

	a.jump(opJump, 0, 0, "drop")

	if v.Type == "macvtap" {
		a.ipv6(own6)
	}

	a.label("drop")
	a.add(opMovImm, r0, 0, tcActShot)
	a.add(opExit, 0, 0, 0)
	a.label("pass")
	a.add(opMovImm, r0, 0, tcActUnspec)
	a.add(opExit, 0, 0, 0)
	return a.link(), nil
}
