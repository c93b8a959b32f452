package natbridge

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
	"github.com/novalet/novalet/internal/thread"
	"github.com/novalet/novalet/network"
)

// newNS makes a network namespace that ends with the test.
func newNS(t *testing.T) *os.File {
	t.Helper()
	var f *os.File
	err := thread.Run(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			f, err = os.Open("/proc/thread-self/ns/net")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func in(ns *os.File, fn func() error) error {
	return thread.Run(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

// lab is a host (the test's own thread) between instances on a bridge and one machine outside.
type lab struct {
	t       *testing.T
	outside *os.File
	p       *network.Plugger
}

const outsideAddr, hostAddr = "192.0.2.2", "192.0.2.1"

func newLab(t *testing.T) *lab {
	t.Helper()
	hosttest.RequireRoot(t)
	runtime.LockOSThread() // for good: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, outside: newNS(t)}
	l.do("ip", "link", "set", "lo", "up")
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "up0"
	v := netlink.NewVeth(attrs)
	v.PeerName, v.PeerNamespace = "up0", netlink.NsFd(l.outside.Fd())
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	l.do("ip", "addr", "add", hostAddr+"/24", "dev", "up0")
	l.do("ip", "link", "set", "up0", "up")
	l.must(in(l.outside, func() error {
		for _, c := range []string{"ip link set lo up", "ip addr add " + outsideAddr + "/24 dev up0", "ip link set up0 up",
			"ip route add 10.0.0.0/8 via " + hostAddr} {
			if out, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", c, err, out)
			}
		}
		return nil
	}))
	p, err := network.New(network.Options{})
	l.must(err)
	t.Cleanup(func() { p.Close() })
	l.p = p
	return l
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) do(name string, args ...string) string {
	l.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		l.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// rules is the firewall as text, without counters and dates.
func (l *lab) rules(iptables string) string {
	var b strings.Builder
	for _, table := range []string{"filter", "nat"} {
		for _, line := range strings.Split(l.do(iptables+"-save", "-t", table), "\n") {
			if line != "" && line[0] != '#' {
				b.WriteString(regexp.MustCompile(` \[\d+:\d+\]`).ReplaceAllString(line, "") + "\n")
			}
		}
	}
	return b.String()
}

// instance boots one on the bridge.
func (l *lab) instance(b *Bridge, uuid, pub string, static bool) (*os.File, novalet.NetworkInfo) {
	l.t.Helper()
	inst := &novalet.Instance{UUID: uuid, Hostname: "web1", Metadata: map[string]string{PublishKey: pub}}
	info, err := b.Allocate(l.t.Context(), &novalet.AllocateRequest{Instance: inst})
	l.must(err)
	ns := newNS(l.t)
	l.must(l.p.Plug(l.t.Context(), &novalet.PlugRequest{InstanceUUID: uuid, VIF: &info[0], NetNS: fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), Static: static}))
	return ns, info
}

// serveName answers each connection with a name.
func (l *lab) serveName(ns *os.File, addr, name string) {
	l.t.Helper()
	var ln net.Listener
	l.must(in(ns, func() (err error) { ln, err = net.Listen("tcp", addr); return err }))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s for %s", name, c.RemoteAddr().(*net.TCPAddr).IP)
			c.Close()
		}
	}()
	l.t.Cleanup(func() { ln.Close(); <-done })
}

// ask reads what answers at an address, seen from a namespace (nil: the host).
func (l *lab) ask(ns *os.File, addr string, patience time.Duration) (string, error) {
	var c net.Conn
	dial := func() (err error) { c, err = net.DialTimeout("tcp", addr, patience); return err }
	var err error
	if ns == nil {
		err = dial()
	} else {
		err = in(ns, dial)
	}
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

const (
	instA = "11111111-d062-498e-bf9e-b1bba14ab194"
	instB = "22222222-d062-498e-bf9e-b1bba14ab194"
)

func TestBridgeWithBothKindsOfIptables(t *testing.T) {
	for _, iptables := range []string{"iptables-nft", "iptables-legacy"} {
		t.Run(iptables, func(t *testing.T) { testBridge(t, iptables) })
	}
}

func testBridge(t *testing.T, iptables string) {
	l := newLab(t)
	if out, err := exec.Command(iptables, "-t", "nat", "-L").CombinedOutput(); err != nil {
		t.Skipf("%s does not work on this host: %s", iptables, out)
	}
	// Another firewall: it forwards nothing by itself, and has a rule of its own in front.
	l.do(iptables, "-P", "FORWARD", "DROP")
	l.do(iptables, "-P", "INPUT", "DROP")
	l.do(iptables, "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
	l.do(iptables, "-A", "FORWARD", "-s", "203.0.113.0/24", "-j", "ACCEPT")
	l.do(iptables, "-t", "nat", "-A", "POSTROUTING", "-s", "203.0.113.0/24", "-j", "MASQUERADE")
	before := l.rules(iptables)
	l.must(os.WriteFile(forwardPath, []byte("0"), 0o644))

	o := Options{StateDir: t.TempDir(), DNS: []netip.Addr{netip.MustParseAddr("9.9.9.9")}, IPTables: iptables}
	b, err := New(o)
	l.must(err)
	a, infoA := l.instance(b, instA, "8080:80", true)
	other, _ := l.instance(b, instB, "", true)
	addrA := infoA[0].Network.Subnets[0].IPs[0].Address
	l.serveName(a, ":80", "a")
	l.serveName(a, ":81", "unpublished")
	l.serveName(l.outside, ":90", "outside")

	check := func(when string) {
		t.Helper()
		for _, c := range []struct {
			what string
			from *os.File
			addr string
			want string
		}{
			{"out through NAT", a, outsideAddr + ":90", "outside for " + hostAddr},
			{"published port from outside", l.outside, hostAddr + ":8080", "a for " + outsideAddr},
			{"published port from the neighbour", other, hostAddr + ":8080", "a for " + b.Gateway().String()},
			{"published port from the host", nil, hostAddr + ":8080", "a for "},
			{"the instance from the host", nil, addrA + ":81", "unpublished for "},
			{"the instance from the neighbour", other, addrA + ":81", "unpublished for "},
		} {
			got, err := l.ask(c.from, c.addr, 30*time.Second)
			if err != nil || !strings.HasPrefix(got, c.want) {
				t.Errorf("%s: %s: %q, %v; want %q", when, c.what, got, err, c.want)
			}
		}
	}
	check("first")
	// The outside has a route to the instance and still may not go there, also where the host forwards all else.
	for _, policy := range []string{"DROP", "ACCEPT"} {
		l.do(iptables, "-P", "FORWARD", policy)
		if got, err := l.ask(l.outside, addrA+":81", 500*time.Millisecond); err == nil {
			t.Errorf("policy %s: an unpublished port answers to the outside: %q", policy, got)
		}
	}
	l.do(iptables, "-P", "FORWARD", "DROP")
	with := l.rules(iptables)
	l.must(b.Close())
	l.must(b.Close())
	b, err = New(o)
	l.must(err)
	if again := l.rules(iptables); again != with {
		t.Errorf("rules after the restart:\n%s\nbefore:\n%s", again, with)
	}
	check("after a restart")

	inst := &novalet.Instance{UUID: instA}
	l.must(b.Deallocate(t.Context(), novalet.RequestContext{}, inst, nil))
	if r := l.rules(iptables); strings.Contains(r, "8080") {
		t.Errorf("rules of the deleted port:\n%s", r)
	}
	l.must(b.Remove())
	if after := l.rules(iptables); withoutPolicies(after) != withoutPolicies(before) {
		t.Errorf("rules after the removal:\n%s\nbefore:\n%s", after, before)
	}
	if _, err := netlink.LinkByName("novalet0"); err == nil {
		t.Error("the bridge is still there")
	}
	if f, _ := os.ReadFile(forwardPath); strings.TrimSpace(string(f)) != "0" {
		t.Errorf("ip_forward is %q", f)
	}
	if e, _ := os.ReadDir(o.StateDir); len(e) != 0 {
		t.Errorf("left in the state directory: %v", e)
	}
}

// withoutPolicies leaves the built-in chains out that a table has once it was used.
func withoutPolicies(s string) string {
	var out []string
	for _, line := range strings.Split(s, "\n") {
		if strings.HasPrefix(line, "-A") || strings.Contains(line, "NOVALET") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

func TestSubnetIsChosenBesideTheHostsRoutes(t *testing.T) {
	l := newLab(t)
	l.do("ip", "route", "add", "10.88.0.0/23", "dev", "up0")
	l.do("ip", "route", "add", "10.89.0.5/32", "dev", "up0")
	o := Options{StateDir: t.TempDir()}
	b, err := New(o)
	l.must(err)
	if got := b.Subnet().String(); got != "10.90.0.0/24" {
		t.Errorf("subnet %s", got)
	}
	l.must(b.Remove())
	o.Subnet = netip.MustParsePrefix("10.88.1.0/24")
	if _, err := New(o); err == nil || !strings.Contains(err.Error(), "10.88.1.0/24") {
		t.Errorf("a subnet that clashes: %v", err)
	}
	if _, err := netlink.LinkByName("novalet0"); err == nil {
		t.Error("a bridge was made all the same")
	}
	l.do("ip", "link", "add", "novalet0", "type", "veth", "peer", "name", "x0")
	if _, err := New(Options{StateDir: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "in the way") {
		t.Errorf("a device in the way: %v", err)
	}
}

func TestMachineGetsItsAddressByDHCP(t *testing.T) {
	l := newLab(t)
	b, err := New(Options{StateDir: t.TempDir(), DNS: []netip.Addr{netip.MustParseAddr("9.9.9.9")}})
	l.must(err)
	defer b.Remove()
	ns, info := l.instance(b, instA, "", false)
	mac, err := net.ParseMAC(info[0].Address)
	l.must(err)
	var pc net.PacketConn
	l.must(in(ns, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) {
				if err = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "eth0"); err == nil {
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
				}
			})
			if err == nil {
				err = cerr
			}
			return err
		}}
		pc, err = lc.ListenPacket(context.Background(), "udp4", ":68")
		return err
	}))
	defer pc.Close()
	want := netip.MustParseAddr(info[0].Network.Subnets[0].IPs[0].Address)
	buf := make([]byte, 1500)
	ask := func(m []byte) (kind byte, given netip.Addr) {
		t.Helper()
		// The first ones may be lost: the port of the bridge takes a moment to pass frames on.
		for range 60 {
			if _, err := pc.WriteTo(m, &net.UDPAddr{IP: net.IPv4bcast, Port: 67}); err != nil {
				t.Fatal(err)
			}
			_ = pc.SetReadDeadline(time.Now().Add(time.Second))
			n, _, err := pc.ReadFrom(buf)
			if err == nil && n > dhcpHeader {
				return options(buf[:n])[optType][0], netip.AddrFrom4([4]byte(buf[16:20]))
			}
		}
		t.Fatal("no answer within a minute")
		return 0, netip.Addr{}
	}
	if kind, given := ask(message(dhcpDiscover, string(mac))); kind != dhcpOffer || given != want {
		t.Errorf("type %d, address %s; want an offer of %s", kind, given, want)
	}
	a := want.As4()
	if kind, given := ask(message(dhcpRequest, string(mac), append([]byte{optRequested, 4}, a[:]...))); kind != dhcpAck || given != want {
		t.Errorf("type %d, address %s; want %s acknowledged", kind, given, want)
	}
}

// TestRealClient lets busybox' DHCP client configure an interface.
func TestRealClient(t *testing.T) {
	l := newLab(t)
	if err := exec.Command("busybox", "udhcpc", "--help").Run(); err != nil {
		t.Skipf("needs busybox with udhcpc: %v", err)
	}
	b, err := New(Options{StateDir: t.TempDir(), DNS: []netip.Addr{netip.MustParseAddr("9.9.9.9")}})
	l.must(err)
	defer b.Remove()
	ns, info := l.instance(b, instA, "", false)
	script := t.TempDir() + "/script"
	l.must(os.WriteFile(script, []byte("#!/bin/sh\n[ \"$1\" = bound ] && echo \"$ip/$mask router $router dns $dns mtu $mtu host $hostname domain $domain lease $lease\"\n"), 0o755))
	var out []byte
	l.must(in(ns, func() error {
		link, err := netlink.LinkByName("eth0")
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		if err == nil {
			out, err = exec.Command("busybox", "udhcpc", "-i", "eth0", "-q", "-n", "-f", "-t", "30", "-T", "1", "-s", script,
				"-O", "mtu", "-O", "hostname", "-O", "domain").CombinedOutput()
		}
		return err
	}))
	want := fmt.Sprintf("%s/24 router %s dns 9.9.9.9 mtu 1500 host web1 domain novalet.internal lease 86400",
		info[0].Network.Subnets[0].IPs[0].Address, b.Gateway())
	if !strings.Contains(string(out), want) {
		t.Errorf("the client says:\n%s\nwant: %s", out, want)
	}
}

// TestInstancesSpeakAsThemselves: what network's own test shows of the guard is in force on this bridge.
func TestInstancesSpeakAsThemselves(t *testing.T) {
	l := newLab(t)
	b, err := New(Options{StateDir: t.TempDir(), DNS: []netip.Addr{netip.MustParseAddr("9.9.9.9")}})
	l.must(err)
	defer b.Remove()
	reach := func(ns *os.File) error {
		return in(ns, func() error {
			out, err := exec.Command("ping", "-n", "-c", "1", "-W", "1", b.Gateway().String()).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	// other gives the interface another MAC address and the route that goes with the old one.
	other := func(ns *os.File, mac string) {
		t.Helper()
		l.must(in(ns, func() error {
			for _, c := range []string{"ip link set eth0 down", "ip link set eth0 address " + mac, "ip link set eth0 up"} {
				if out, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
					return fmt.Errorf("%s: %w: %s", c, err, out)
				}
			}
			return nil
		}))
	}
	honest := func(ns *os.File) {
		t.Helper()
		for range 30 {
			if err = reach(ns); err == nil {
				return
			}
		}
		t.Fatalf("as itself: %v", err)
	}
	for _, guard := range []bool{true, false} {
		inst := &novalet.Instance{UUID: instA, Hostname: "web1"}
		info, err := b.Allocate(t.Context(), &novalet.AllocateRequest{Instance: inst})
		l.must(err)
		if !guard {
			delete(info[0].Details, network.GuardKey)
		}
		ns := newNS(t)
		l.must(l.p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instA, VIF: &info[0], NetNS: fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), Static: true}))
		honest(ns)
		other(ns, "02:00:00:00:be:ef")
		if guard {
			if err := reach(ns); err == nil {
				t.Error("it is heard under a foreign MAC address")
			}
			other(ns, info[0].Address)
		}
		honest(ns)
		l.must(l.p.Unplug(t.Context(), instA, &info[0]))
		l.must(b.Deallocate(t.Context(), novalet.RequestContext{}, inst, nil))
	}
}
