package natbridge

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The DHCP server (RFC 2131) gives each instance the address that its port has, and nothing to anybody else. There are no
// leases to keep: an address belongs to its port, whatever the client says about it.

const (
	dhcpServerPort = 67
	dhcpClientPort = 68
	// dhcpLease in seconds. The address stays with the port; clients that ask again find the same.
	dhcpLease = 86400
	dhcpMagic = 0x63825363
	// dhcpHeader is the length of the fixed part of a message, options excluded.
	dhcpHeader = 240
)

// Message types (option 53).
const (
	dhcpDiscover = 1
	dhcpOffer    = 2
	dhcpRequest  = 3
	dhcpDecline  = 4
	dhcpAck      = 5
	dhcpNak      = 6
	dhcpRelease  = 7
	dhcpInform   = 8
)

// Options that are read or written.
const (
	optMask      = 1
	optRouter    = 3
	optDNS       = 6
	optHostname  = 12
	optDomain    = 15
	optMTU       = 26
	optBroadcast = 28
	optRequested = 50
	optLease     = 51
	optType      = 53
	optServer    = 54
	optT1        = 58
	optT2        = 59
	optEnd       = 255
)

// dhcpServer answers on the bridge.
type dhcpServer struct {
	b    *Bridge
	conn *net.UDPConn
	done chan struct{}
}

func startDHCP(b *Bridge) (*dhcpServer, error) {
	// Bound to the bridge before it is bound to the port: another DHCP server may serve other interfaces of the host.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = errors.Join(
				unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, b.o.Name),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1))
		})
		return errors.Join(cerr, err)
	}}
	pc, err := lc.ListenPacket(context.Background(), "udp4", fmt.Sprintf(":%d", dhcpServerPort))
	if err != nil {
		return nil, fmt.Errorf("serve DHCP: %w", err)
	}
	s := &dhcpServer{b: b, conn: pc.(*net.UDPConn), done: make(chan struct{})}
	go s.serve()
	return s, nil
}

func (s *dhcpServer) close() {
	_ = s.conn.Close()
	<-s.done
}

func (s *dhcpServer) serve() {
	defer close(s.done)
	buf := make([]byte, 1500)
	for {
		n, _, err := s.conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		m, err := parseDHCP(buf[:n])
		if err != nil {
			continue
		}
		reply, to := s.answer(m)
		if reply == nil {
			continue
		}
		if _, err := s.conn.WriteToUDPAddrPort(reply, netip.AddrPortFrom(to, dhcpClientPort)); err != nil && !errors.Is(err, net.ErrClosed) {
			s.b.log.Debug("answer DHCP", "bridge", s.b.o.Name, "error", err)
		}
	}
}

// dhcpMessage is what is read of a request.
type dhcpMessage struct {
	kind      byte
	xid       [4]byte
	flags     [2]byte
	ciaddr    netip.Addr
	mac       net.HardwareAddr
	requested netip.Addr
	server    netip.Addr
}

var errNoDHCP = errors.New("no DHCP request")

// parseDHCP reads a request of a client. Options may not overrun the message, and the fields into which they may
// overflow (option 52) are not read: requests do not fill them.
func parseDHCP(b []byte) (*dhcpMessage, error) {
	if len(b) < dhcpHeader || b[0] != 1 || b[1] != 1 || b[2] != 6 || binary.BigEndian.Uint32(b[236:]) != dhcpMagic {
		return nil, errNoDHCP
	}
	m := &dhcpMessage{mac: slices.Clone(net.HardwareAddr(b[28:34])), ciaddr: netip.AddrFrom4([4]byte(b[12:16]))}
	copy(m.xid[:], b[4:8])
	copy(m.flags[:], b[10:12])
	for o := b[dhcpHeader:]; len(o) > 0; {
		code := o[0]
		if code == 0 {
			o = o[1:]
			continue
		}
		if code == optEnd {
			break
		}
		if len(o) < 2 || len(o) < 2+int(o[1]) {
			return nil, errNoDHCP
		}
		v := o[2 : 2+int(o[1])]
		o = o[2+int(o[1]):]
		switch {
		case code == optType && len(v) == 1:
			m.kind = v[0]
		case code == optRequested && len(v) == 4:
			m.requested = netip.AddrFrom4([4]byte(v))
		case code == optServer && len(v) == 4:
			m.server = netip.AddrFrom4([4]byte(v))
		}
	}
	if m.kind == 0 {
		return nil, errNoDHCP
	}
	return m, nil
}

// answer makes the reply and says where it goes; nil is silence.
func (s *dhcpServer) answer(m *dhcpMessage) ([]byte, netip.Addr) {
	p, ok := s.b.byMAC(m.mac.String())
	if !ok {
		return nil, netip.Addr{}
	}
	// A client without an address gets its answer by broadcast: it cannot answer ARP yet.
	to := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	if !m.ciaddr.IsUnspecified() && m.ciaddr == p.Addr {
		to = m.ciaddr
	}
	if m.server.IsValid() && m.server != s.b.host {
		return nil, netip.Addr{} // it chose another server
	}
	switch m.kind {
	case dhcpDiscover:
		return s.reply(m, dhcpOffer, p, true), to
	case dhcpRequest:
		want := m.requested
		if !want.IsValid() {
			want = m.ciaddr
		}
		if want != p.Addr {
			return s.reply(m, dhcpNak, p, false), netip.AddrFrom4([4]byte{255, 255, 255, 255})
		}
		return s.reply(m, dhcpAck, p, true), to
	case dhcpInform:
		return s.reply(m, dhcpAck, p, false), to
	case dhcpDecline:
		s.b.log.Warn("an instance reports that its address is used by another", "instance", p.Instance, "address", p.Addr)
	}
	return nil, netip.Addr{}
}

func (s *dhcpServer) reply(m *dhcpMessage, kind byte, p port, lease bool) []byte {
	b := make([]byte, dhcpHeader, 512)
	b[0], b[1], b[2] = 2, 1, 6
	copy(b[4:8], m.xid[:])
	copy(b[10:12], m.flags[:])
	if kind == dhcpAck {
		c := m.ciaddr.As4()
		copy(b[12:16], c[:])
	}
	host := s.b.host.As4()
	if lease {
		y := p.Addr.As4()
		copy(b[16:20], y[:])
		copy(b[20:24], host[:])
	}
	copy(b[28:34], m.mac)
	binary.BigEndian.PutUint32(b[236:], dhcpMagic)
	opt := func(code byte, v ...byte) {
		if len(v) > 0 && len(v) < 256 {
			b = append(append(b, code, byte(len(v))), v...)
		}
	}
	opt(optType, kind)
	opt(optServer, host[:]...)
	if kind == dhcpNak {
		return append(b, optEnd)
	}
	if lease {
		opt(optLease, u32(dhcpLease)...)
		opt(optT1, u32(dhcpLease/2)...)
		opt(optT2, u32(dhcpLease*7/8)...)
	}
	subnet := s.b.st.Subnet
	mask := net.CIDRMask(subnet.Bits(), 32)
	opt(optMask, mask...)
	last := subnet.Masked().Addr().As4()
	for i := range last {
		last[i] |= ^mask[i]
	}
	opt(optBroadcast, last[:]...)
	opt(optRouter, host[:]...)
	var dns []byte
	for _, d := range s.b.nameServers() {
		if d.Is4() {
			a := d.As4()
			dns = append(dns, a[:]...)
		}
	}
	opt(optDNS, dns...)
	opt(optDomain, []byte(s.b.o.Domain)...)
	if h := p.Hostname; h != "" && !strings.ContainsAny(h, " \t\n\x00") {
		opt(optHostname, []byte(h)...)
	}
	opt(optMTU, byte(s.b.o.MTU>>8), byte(s.b.o.MTU))
	return append(b, optEnd)
}

func u32(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
