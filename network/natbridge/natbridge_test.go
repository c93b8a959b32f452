package natbridge

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
)

func TestParsePublish(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "",
		"8080:80":                          "8080:80/tcp",
		"8080:80, 53:53/udp 192.0.2.1:1:2": "8080:80/tcp 53:53/udp 192.0.2.1:1:2/tcp",
		"0.0.0.0:8080:80":                  "8080:80/tcp",
		"53:53/udp,53:53/tcp":              "53:53/udp 53:53/tcp",
		"192.0.2.1:80:80,192.0.2.2:80:80":  "192.0.2.1:80:80/tcp 192.0.2.2:80:80/tcp",
	} {
		list, err := parsePublish(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
		}
		var got []string
		for _, p := range list {
			got = append(got, p.String())
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%q: %q, want %q", text, g, want)
		}
	}
	for _, text := range []string{"80", "a:80", "80:b", "0:80", "80:65536", "80:80/sctp", "::1:80:80", "127.0.0.1:80:80", "80:80:80:80",
		"80:80,80:81", "80:80,192.0.2.1:80:81", "-j:ACCEPT", "80:80/tcp/udp"} {
		_, err := parsePublish(text)
		if !errors.Is(err, novalet.ErrAbort) || !strings.Contains(novalet.FaultText(err), PublishKey) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// pool is a bridge with nothing of the host behind it.
func pool(t *testing.T, subnet string) *Bridge {
	b := &Bridge{o: Options{StateDir: t.TempDir(), Name: "novalet0", MTU: 1500, Domain: "d", DNS: []netip.Addr{netip.MustParseAddr("9.9.9.9")}}}
	b.st = state{Version: 1, Subnet: netip.MustParsePrefix(subnet)}
	b.host = b.st.Subnet.Addr().Next()
	b.fw = &firewall{ipt: noFirewall{}, bridge: "novalet0", subnet: b.st.Subnet}
	return b
}

type noFirewall struct{}

func (noFirewall) AppendUnique(string, string, ...string) error      { return nil }
func (noFirewall) InsertUnique(string, string, int, ...string) error { return nil }
func (noFirewall) DeleteIfExists(string, string, ...string) error    { return nil }
func (noFirewall) ClearChain(string, string) error                   { return nil }
func (noFirewall) ChainExists(string, string) (bool, error)          { return false, nil }
func (noFirewall) ClearAndDeleteChain(string, string) error          { return nil }

func allocate(b *Bridge, uuid string, nets ...novalet.NetworkRequest) (novalet.NetworkInfo, error) {
	return b.Allocate(context.Background(), &novalet.AllocateRequest{Instance: &novalet.Instance{UUID: uuid, Hostname: "h"}, Networks: nets})
}

func addr(info novalet.NetworkInfo) string { return info[0].Network.Subnets[0].IPs[0].Address }

func TestPool(t *testing.T) {
	b := pool(t, "10.88.0.0/29") // .1 is the host's, .2 to .6 are to give
	var got []string
	for i := range 5 {
		info, err := allocate(b, string(rune('a'+i)))
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, addr(info))
	}
	if d := cmp.Diff([]string{"10.88.0.2", "10.88.0.3", "10.88.0.4", "10.88.0.5", "10.88.0.6"}, got); d != "" {
		t.Error(d)
	}
	_, err := allocate(b, "f")
	var f *novalet.Fault
	if !errors.As(err, &f) || f.Class != "NoMoreFixedIps" {
		t.Errorf("full: %v", err)
	}
	if err := b.Deallocate(t.Context(), novalet.RequestContext{}, &novalet.Instance{UUID: "b"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := allocate(b, "g", novalet.NetworkRequest{Address: "10.88.0.4"}); !errors.As(err, &f) || f.Class != "FixedIpAlreadyInUse" {
		t.Errorf("taken: %v", err)
	}
	for _, a := range []string{"10.88.0.0", "10.88.0.1", "10.88.0.7", "10.88.1.2", "x"} {
		if _, err := allocate(b, "g", novalet.NetworkRequest{Address: a}); !errors.As(err, &f) || f.Class != "InvalidInput" {
			t.Errorf("%s: %v", a, err)
		}
	}
	info, err := allocate(b, "g", novalet.NetworkRequest{Address: "10.88.0.3"})
	if err != nil || addr(info) != "10.88.0.3" {
		t.Errorf("chosen: %v, %v", info, err)
	}
	for req, class := range map[novalet.NetworkRequest]string{{PortID: "x"}: "PortNotFound", {NetworkID: "x"}: "NetworkNotFound"} {
		if _, err := allocate(b, "h", req); !errors.As(err, &f) || f.Class != class {
			t.Errorf("%+v: %v", req, err)
		}
	}
	if info, err := allocate(b, "h", novalet.NetworkRequest{NetworkID: "none"}); err != nil || len(info) != 0 {
		t.Errorf("none: %v, %v", info, err)
	}
	// A request of which the second part fails takes nothing.
	if err := b.Deallocate(t.Context(), novalet.RequestContext{}, &novalet.Instance{UUID: "g"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := allocate(b, "i", novalet.NetworkRequest{}, novalet.NetworkRequest{}); err == nil || len(b.st.Ports) != 4 {
		t.Errorf("two of one: %v, %d ports", err, len(b.st.Ports))
	}
}

func TestAddressRestsBeforeItIsGivenAgain(t *testing.T) {
	b := pool(t, "10.88.0.0/28")
	for _, want := range []string{"10.88.0.2", "10.88.0.3", "10.88.0.4"} {
		info, err := allocate(b, "a")
		if err != nil || addr(info) != want {
			t.Errorf("%v, %v; want %s", info, err, want)
		}
		if err := b.Deallocate(t.Context(), novalet.RequestContext{}, &novalet.Instance{UUID: "a"}, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPortsAreTheInstances(t *testing.T) {
	b := pool(t, "10.88.0.0/24")
	info, err := allocate(b, "a", novalet.NetworkRequest{}, novalet.NetworkRequest{NetworkID: networkID})
	if err != nil || len(info) != 2 {
		t.Fatalf("%v, %v", info, err)
	}
	ctx, rc := t.Context(), novalet.RequestContext{}
	if err := b.Release(ctx, rc, &novalet.Instance{UUID: "other"}, &info[0]); err != nil {
		t.Fatal(err)
	}
	if got, _ := b.Refresh(ctx, rc, &novalet.Instance{UUID: "a"}, nil); cmp.Diff(info, got) != "" {
		t.Errorf("refreshed: %s", cmp.Diff(info, got))
	}
	if err := b.Release(ctx, rc, &novalet.Instance{UUID: "a"}, &info[0]); err != nil {
		t.Fatal(err)
	}
	if ok, err := b.PortActive(ctx, info[1].ID); !ok || err != nil {
		t.Errorf("active: %v, %v", ok, err)
	}
	if _, err := b.PortActive(ctx, info[0].ID); !errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("released: %v", err)
	}
}

func TestPublishedOnce(t *testing.T) {
	b := pool(t, "10.88.0.0/24")
	try := func(uuid, pub string) error {
		_, err := b.Allocate(t.Context(), &novalet.AllocateRequest{Instance: &novalet.Instance{UUID: uuid, Metadata: map[string]string{PublishKey: pub}}})
		return err
	}
	if err := try("a", "8080:80"); err != nil {
		t.Fatal(err)
	}
	if err := try("b", "192.0.2.1:8080:90"); !errors.Is(err, novalet.ErrAbort) || len(b.st.Ports) != 1 {
		t.Errorf("taken: %v, %d ports", err, len(b.st.Ports))
	}
	if err := try("b", "8080:80/udp"); err != nil {
		t.Error(err)
	}
}

// message makes a DHCP request.
func message(kind byte, mac string, opts ...[]byte) []byte {
	b := make([]byte, dhcpHeader)
	b[0], b[1], b[2] = 1, 1, 6
	copy(b[4:], "xid!")
	copy(b[28:], mac)
	copy(b[236:], []byte{0x63, 0x82, 0x53, 0x63})
	b = append(b, optType, 1, kind)
	for _, o := range opts {
		b = append(b, o...)
	}
	return append(b, optEnd)
}

// options reads those of an answer.
func options(b []byte) map[byte][]byte {
	m := map[byte][]byte{}
	for o := b[dhcpHeader:]; len(o) > 1 && o[0] != optEnd; o = o[2+int(o[1]):] {
		m[o[0]] = o[2 : 2+int(o[1])]
	}
	return m
}

func TestDHCPAnswers(t *testing.T) {
	b := pool(t, "10.88.0.0/24")
	if _, err := allocate(b, "a"); err != nil {
		t.Fatal(err)
	}
	b.st.Ports[0].MAC = "fa:16:3e:00:00:01"
	s := &dhcpServer{b: b}
	const mac = "\xfa\x16\x3e\x00\x00\x01"
	ask := func(m []byte) (kind byte, reply []byte, to string) {
		t.Helper()
		p, err := parseDHCP(m)
		if err != nil {
			t.Fatal(err)
		}
		r, a := s.answer(p)
		if r == nil {
			return 0, nil, ""
		}
		return options(r)[optType][0], r, a.String()
	}
	kind, r, to := ask(message(dhcpDiscover, mac))
	if kind != dhcpOffer || to != "255.255.255.255" || string(r[4:8]) != "xid!" || string(r[16:20]) != "\x0a\x58\x00\x02" {
		t.Errorf("discover: type %d to %s: % x", kind, to, r)
	}
	want := map[byte][]byte{optType: {dhcpOffer}, optServer: {10, 88, 0, 1}, optLease: {0, 1, 0x51, 0x80}, optT1: {0, 0, 0xa8, 0xc0}, optT2: {0, 1, 0x27, 0x50},
		optMask: {255, 255, 255, 0}, optBroadcast: {10, 88, 0, 255}, optRouter: {10, 88, 0, 1}, optDNS: {9, 9, 9, 9}, optDomain: []byte("d"),
		optHostname: []byte("h"), optMTU: {5, 0xdc}}
	if d := cmp.Diff(want, options(r)); d != "" {
		t.Errorf("options: %s", d)
	}
	requested := func(a ...byte) []byte { return append([]byte{optRequested, 4}, a...) }
	if kind, _, _ = ask(message(dhcpRequest, mac, requested(10, 88, 0, 2))); kind != dhcpAck {
		t.Errorf("request: %d", kind)
	}
	if kind, r, _ = ask(message(dhcpRequest, mac, requested(10, 88, 0, 3))); kind != dhcpNak || string(r[16:20]) != "\x00\x00\x00\x00" {
		t.Errorf("request of another address: %d", kind)
	}
	if kind, _, _ = ask(message(dhcpRequest, mac, requested(10, 88, 0, 2), []byte{optServer, 4, 10, 0, 0, 9})); kind != 0 {
		t.Errorf("request to another server: %d", kind)
	}
	renew := message(dhcpRequest, mac)
	copy(renew[12:], []byte{10, 88, 0, 2})
	if kind, _, to = ask(renew); kind != dhcpAck || to != "10.88.0.2" {
		t.Errorf("renewal: %d to %s", kind, to)
	}
	inform := message(dhcpInform, mac)
	copy(inform[12:], []byte{10, 88, 0, 2})
	if kind, r, _ = ask(inform); kind != dhcpAck || options(r)[optLease] != nil {
		t.Errorf("inform: %d", kind)
	}
	b.log = slog.New(slog.DiscardHandler)
	for name, m := range map[string][]byte{
		"unknown client": message(dhcpDiscover, "\xfa\x16\x3e\x00\x00\x02"), "release": message(dhcpRelease, mac), "decline": message(dhcpDecline, mac),
	} {
		if kind, _, _ = ask(m); kind != 0 {
			t.Errorf("%s: answered with %d", name, kind)
		}
	}
}

func FuzzParseDHCP(f *testing.F) {
	f.Add(message(dhcpDiscover, "\xfa\x16\x3e\x00\x00\x01"))
	f.Add(message(dhcpRequest, "\xfa\x16\x3e\x00\x00\x01", []byte{optRequested, 4, 10, 88, 0, 2, 0, 0, 12, 200}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := parseDHCP(b); err == nil && (m.kind == 0 || len(m.mac) != 6) {
			t.Errorf("%+v", m)
		}
	})
}

func FuzzParsePublish(f *testing.F) {
	f.Add("8080:80,192.0.2.1:53:53/udp")
	f.Fuzz(func(t *testing.T, s string) {
		list, err := parsePublish(s)
		if err != nil {
			return
		}
		var again []string
		for _, p := range list {
			if p.Port == 0 || p.HostPort == 0 || p.Proto != "tcp" && p.Proto != "udp" {
				t.Fatalf("%q: %+v", s, p)
			}
			again = append(again, p.String())
		}
		back, err := parsePublish(strings.Join(again, ","))
		if err != nil || len(back) != len(list) {
			t.Errorf("%q became %q: %v", s, again, err)
		}
	})
}
