package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
	"github.com/novalet/novalet/internal/thread"
)

// hostNS moves the test into a network namespace of its own, which plays the host. The thread is not given back.
func hostNS(t *testing.T) {
	t.Helper()
	hosttest.RequireRoot(t)
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

// newNS makes a namespace that plays an instance. It ends with the test.
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

func nsPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func newPlugger(t *testing.T, o Options) *Plugger {
	t.Helper()
	p, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// eventually waits for something that the kernel does in its own time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s: not within 30 s", what)
}

const (
	instA = "11111111-d062-498e-bf9e-b1bba14ab194"
	instB = "22222222-d062-498e-bf9e-b1bba14ab194"
	portA = "aaaaaaaa-69de-4955-aaf9-201e78582de8"
	portB = "bbbbbbbb-69de-4955-aaf9-201e78582de8"
)

func text(s string) *string { return &s }

// vif is a port with one IPv4 subnet.
func vif(id, mac, addr string) *novalet.VIF {
	four := 4
	return &novalet.VIF{ID: id, Address: mac, Type: "bridge", VNICType: "normal", Network: novalet.VIFNetwork{
		ID: "20607cf5-81e0-463c-8e39-a87f98401f3c", Bridge: "brq20607cf5-81", Meta: novalet.NetworkMeta{MTU: 1450},
		Subnets: []novalet.Subnet{{CIDR: "10.78.0.0/22", Version: 4,
			Gateway: novalet.IP{Address: text("10.78.0.1"), Type: "gateway", Version: &four},
			IPs:     []novalet.FixedIP{{Address: addr, Type: "fixed", Version: 4}}}}}}
}

func inside(t *testing.T, ns *os.File, fn func() error) {
	t.Helper()
	if err := inNetNS(ns, fn); err != nil {
		t.Fatal(err)
	}
}

// state is what an instance sees, as text.
func state(t *testing.T, ns *os.File) string {
	t.Helper()
	var b strings.Builder
	inside(t, ns, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			a := l.Attrs()
			up := "down"
			if a.Flags&net.FlagUp != 0 {
				up = "up"
			}
			fmt.Fprintf(&b, "%s %s %s mtu %d\n", a.Name, a.HardwareAddr, up, a.MTU)
			addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			for _, ad := range addrs {
				if a.Name != "lo" && ad.Scope == unix.RT_SCOPE_UNIVERSE {
					fmt.Fprintf(&b, "  %s\n", ad.IPNet)
				}
			}
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return err
		}
		var lines []string
		for _, r := range routes {
			dst := "default"
			if n, ok := prefixOf(r.Dst); ok && n.Bits() > 0 {
				dst = n.String()
			}
			lines = append(lines, fmt.Sprintf("  %s via %v metric %d\n", dst, r.Gw, r.Priority))
		}
		slices.Sort(lines)
		b.WriteString(strings.Join(lines, ""))
		return nil
	})
	return b.String()
}

// hostLinks are the names of the host's devices but lo.
func hostLinks(t *testing.T, p *Plugger) []string {
	t.Helper()
	links, err := p.h.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range links {
		if l.Attrs().Name != "lo" && l.Attrs().Name != "ifb0" && l.Attrs().Name != "ifb1" {
			out = append(out, l.Attrs().Name)
		}
	}
	slices.Sort(out)
	return out
}

func ping(ns *os.File, addr string) error {
	return inNetNS(ns, func() error {
		out, err := exec.Command("ping", "-c", "1", "-w", "20", addr).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

func TestBridgePlug(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	a, b := newNS(t), newNS(t)
	va, vb := vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10"), vif(portB, "fa:16:3e:00:00:0b", "10.78.0.11")
	ra := &novalet.PlugRequest{InstanceUUID: instA, VIF: va, NetNS: nsPath(a), Static: true}
	rb := &novalet.PlugRequest{InstanceUUID: instB, VIF: vb, NetNS: nsPath(b), Static: true}
	for _, r := range []*novalet.PlugRequest{ra, rb} {
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	want := "lo  up mtu 65536\neth0 fa:16:3e:00:00:0a up mtu 1450\n  10.78.0.10/22\n  default via 10.78.0.1 metric 0\n"
	if got := state(t, a); got != want {
		t.Errorf("inside:\n%s\nwant:\n%s", got, want)
	}
	if err := ping(a, "10.78.0.11"); err != nil {
		t.Errorf("from one instance to the other: %v", err)
	}
	tap, err := p.h.LinkByName("tapaaaaaaaa-69")
	if err != nil {
		t.Fatal(err)
	}
	if n := tap.Attrs().NumTxQueues; n != 1 {
		t.Errorf("%d transmit queues", n)
	}
	addrs, _ := p.h.AddrList(tap, netlink.FAMILY_ALL)
	br, _ := p.h.LinkByName("brq20607cf5-81")
	more, _ := p.h.AddrList(br, netlink.FAMILY_ALL)
	if len(addrs)+len(more) != 0 {
		t.Errorf("the host has addresses on the tenant's network: %v %v", addrs, more)
	}

	// Again: the same devices, whatever was wrong with them mended.
	if err := p.h.LinkSetDown(tap); err != nil {
		t.Fatal(err)
	}
	if err := p.h.LinkSetNoMaster(tap); err != nil {
		t.Fatal(err)
	}
	if err := p.Plug(t.Context(), ra); err != nil {
		t.Fatal(err)
	}
	again, err := p.h.LinkByName("tapaaaaaaaa-69")
	if err != nil || again.Attrs().Index != tap.Attrs().Index || again.Attrs().MasterIndex != br.Attrs().Index {
		t.Errorf("plugged again: %+v, %v", again, err)
	}
	if err := ping(a, "10.78.0.11"); err != nil {
		t.Errorf("after mending: %v", err)
	}

	stats, err := p.Stats(t.Context(), instA, novalet.NetworkInfo{*va, *vb})
	if err != nil || stats[portA].TxBytes == 0 || stats[portA].RxBytes == 0 || len(stats) != 1 {
		t.Errorf("stats %v, %v", stats, err)
	}

	// Another instance's uuid does not take it away.
	if err := p.Unplug(t.Context(), instB, va); err != nil {
		t.Fatal(err)
	}
	if err := ping(a, "10.78.0.11"); err != nil {
		t.Errorf("after a foreign unplug: %v", err)
	}
	for range 2 {
		if err := p.Unplug(t.Context(), instA, va); err != nil {
			t.Fatal(err)
		}
	}
	if l, _ := p.link("tapaaaaaaaa-69"); l != nil {
		t.Error("the name is still taken after the unplug")
	}
	eventually(t, "the device is freed", func() bool { return !strings.Contains(state(t, a), "eth0") })

	// The same port again at once, before the old device is freed, and into another namespace.
	if err := p.Unplug(t.Context(), instB, vb); err != nil {
		t.Fatal(err)
	}
	if err := p.Plug(t.Context(), rb); err != nil {
		t.Fatal(err)
	}
	rb.NetNS = nsPath(a)
	if err := p.Plug(t.Context(), rb); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(state(t, a), "eth0 fa:16:3e:00:00:0b up") {
		t.Errorf("not in the new namespace:\n%s", state(t, a))
	}
	p.Close()
	q := newPlugger(t, Options{})
	if got := hostLinks(t, q); !slices.Equal(got, []string{"brq20607cf5-81", "tapbbbbbbbb-69"}) {
		t.Errorf("devices after the close: %v", got)
	}
}

func TestNamespaceEndsBeforeUnplug(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	ns := newNS(t)
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10"), NetNS: nsPath(ns), Static: true}
	if err := p.Plug(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	ns.Close()
	if err := p.Unplug(t.Context(), instA, r.VIF); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing is left", func() bool { return slices.Equal(hostLinks(t, p), []string{"brq20607cf5-81"}) })
	next := newNS(t)
	r.NetNS = nsPath(next)
	if err := p.Plug(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(state(t, next), "10.78.0.10/22") {
		t.Errorf("inside:\n%s", state(t, next))
	}
}

func TestGuestConfiguresItself(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	ns := newNS(t)
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10"), NetNS: nsPath(ns), Index: 2}
	if err := p.Plug(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	want := "lo  up mtu 65536\neth2 fa:16:3e:00:00:0a down mtu 1450\n"
	if got := state(t, ns); got != want {
		t.Errorf("inside:\n%s\nwant:\n%s", got, want)
	}
	// The guest has renamed and configured it: a repeated plug leaves that alone.
	inside(t, ns, func() error {
		l, err := netlink.LinkByName("eth2")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetName(l, "ens3"); err != nil {
			return err
		}
		return netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("10.78.0.10/22"))})
	})
	if err := p.Plug(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if got := state(t, ns); !strings.Contains(got, "ens3") || !strings.Contains(got, "10.78.0.10/22") || strings.Contains(got, "eth2") {
		t.Errorf("after the guest's changes:\n%s", got)
	}
}

func TestConfigureFollowsThePort(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	ns := newNS(t)
	v := vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10")
	six := 6
	v.Network.Subnets = append(v.Network.Subnets, novalet.Subnet{CIDR: "fd00:78::/64", Version: 6,
		Gateway: novalet.IP{Address: text("fd00:78::1"), Version: &six},
		IPs:     []novalet.FixedIP{{Address: "fd00:78::10", Version: 6}}})
	v.Network.Subnets[0].Routes = []novalet.Route{
		{CIDR: "192.168.5.0/24", Gateway: novalet.IP{Address: text("10.78.0.254")}},
		{CIDR: "169.254.169.254/32", Gateway: novalet.IP{Address: text("10.78.0.2")}},
	}
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(ns), Index: 1, Static: true}
	if err := p.Plug(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	want := "lo  up mtu 65536\neth1 fa:16:3e:00:00:0a up mtu 1450\n  10.78.0.10/22\n  fd00:78::10/64\n" +
		"  169.254.169.254/32 via 10.78.0.2 metric 101\n  192.168.5.0/24 via 10.78.0.254 metric 101\n" +
		"  default via 10.78.0.1 metric 101\n  default via fd00:78::1 metric 101\n"
	if got := state(t, ns); got != want {
		t.Errorf("inside:\n%s\nwant:\n%s", got, want)
	}
	v.Network.Subnets[0].IPs = []novalet.FixedIP{{Address: "10.78.0.20"}, {Address: "10.78.0.21"}}
	v.Network.Subnets[0].Routes = nil
	v.Network.Subnets = v.Network.Subnets[:1]
	v.Network.Subnets[0].Gateway = novalet.IP{Address: text("172.16.0.1")} // on no subnet of the port's
	if err := p.Configure(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	want = "lo  up mtu 65536\neth1 fa:16:3e:00:00:0a up mtu 1450\n  10.78.0.20/22\n  10.78.0.21/22\n  default via 172.16.0.1 metric 101\n"
	if got := state(t, ns); got != want {
		t.Errorf("after the change:\n%s\nwant:\n%s", got, want)
	}
	if err := p.Configure(t.Context(), r); err != nil {
		t.Errorf("repeated: %v", err)
	}
}

func TestSweepTouchesOurOwnOnly(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	ns := newNS(t)
	for i, inst := range []string{instA, instB} {
		v := vif([]string{portA, portB}[i], fmt.Sprintf("fa:16:3e:00:00:%02x", i), fmt.Sprintf("10.78.0.%d", 10+i))
		r := &novalet.PlugRequest{InstanceUUID: inst, VIF: v, NetNS: nsPath(ns), Index: i, Static: true}
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	// Devices of others, one with a name like ours.
	for _, name := range []string{"tapcccccccc-69", "vnet0"} {
		if err := p.h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	orphans, err := p.Orphans(t.Context(), map[string]bool{instB: true})
	if err != nil || !slices.Equal(orphans, []string{"tapaaaaaaaa-69"}) {
		t.Errorf("orphans %v, %v", orphans, err)
	}
	removed, err := p.Sweep(t.Context(), map[string]bool{instB: true})
	if err != nil || !slices.Equal(removed, []string{"tapaaaaaaaa-69"}) {
		t.Errorf("removed %v, %v", removed, err)
	}
	want := []string{"brq20607cf5-81", "tapbbbbbbbb-69", "tapcccccccc-69", "vnet0"}
	eventually(t, "ours is gone", func() bool { return slices.Equal(hostLinks(t, p), want) })
	if removed, err = p.Sweep(t.Context(), map[string]bool{instB: true}); err != nil || len(removed) != 0 {
		t.Errorf("again: removed %v, %v", removed, err)
	}
	// A plug must not take over a foreign device either.
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: vif("cccccccc-69de-4955-aaf9-201e78582de8", "fa:16:3e:00:00:0c", "10.78.0.12"), NetNS: nsPath(ns), Index: 3}
	if err := p.Plug(t.Context(), r); err == nil || !strings.Contains(err.Error(), "not ours") {
		t.Errorf("plug over a foreign device: %v", err)
	}
}

// TestNothingPassesAfterTheUnplug: also while the device still waits to be freed and the guest holds its end.
func TestNothingPassesAfterTheUnplug(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	p.reap.delay = time.Hour
	a, b := newNS(t), newNS(t)
	va, vb := vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10"), vif(portB, "fa:16:3e:00:00:0b", "10.78.0.11")
	for _, r := range []*novalet.PlugRequest{{InstanceUUID: instA, VIF: va, NetNS: nsPath(a), Static: true}, {InstanceUUID: instB, VIF: vb, NetNS: nsPath(b), Static: true}} {
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if err := ping(a, "10.78.0.11"); err != nil {
		t.Fatal(err)
	}
	if err := p.Unplug(t.Context(), instA, va); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(state(t, a), "eth0") {
		t.Fatal("the device is freed already: nothing is shown")
	}
	if err := inNetNS(a, func() error { return exec.Command("ping", "-c", "1", "-W", "1", "10.78.0.11").Run() }); err == nil {
		t.Error("the instance still reaches its neighbour")
	}
}

// TestReaperFreesOnlyWhatWasDiscarded: the number of a device may be another's by the time.
func TestReaperFreesOnlyWhatWasDiscarded(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	if err := p.h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "other0"}}); err != nil {
		t.Fatal(err)
	}
	l, err := p.h.LinkByName("other0")
	if err != nil {
		t.Fatal(err)
	}
	p.reap.free(l)
	if got := hostLinks(t, p); !slices.Equal(got, []string{"other0"}) {
		t.Errorf("devices %v", got)
	}
}

// TestSweepFreesWhatACrashLeft: a device that was discarded and never deleted.
func TestSweepFreesWhatACrashLeft(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	l := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "nvx7"}}
	if err := p.h.LinkAdd(l); err != nil {
		t.Fatal(err)
	}
	if err := p.h.LinkSetAlias(l, goneAlias); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is freed", func() bool { return len(hostLinks(t, p)) == 0 })
}

func TestFullBridgeSendsTheBuildElsewhere(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	bridge, err := p.ensureBridge("brq20607cf5-81", 1450, bridgeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	full := false
	for i := 0; i < 600 && !full; i++ {
		name, peer := fmt.Sprintf("d%da", i), fmt.Sprintf("d%db", i)
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.NumTxQueues, attrs.NumRxQueues = name, 1, 1
		v := netlink.NewVeth(attrs)
		v.PeerName, v.PeerNumTxQueues, v.PeerNumRxQueues = peer, 1, 1
		if err := p.h.LinkAdd(v); err != nil {
			t.Fatal(err)
		}
		for _, n := range []string{name, peer} {
			l, err := p.h.LinkByName(n)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.h.LinkSetMasterByIndex(l, bridge); errors.Is(err, unix.EXFULL) {
				full = true
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	if !full {
		t.Skip("a bridge of this kernel takes more than 1200 ports")
	}
	ns := newNS(t)
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10"), NetNS: nsPath(ns), Static: true}
	err = p.Plug(t.Context(), r)
	if !errors.Is(err, novalet.ErrReschedule) || !strings.Contains(novalet.FaultText(err), "full") {
		t.Errorf("error %v", err)
	}
}

func TestLimitsOfTheFlavor(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	ns := newNS(t)
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10"), NetNS: nsPath(ns), Static: true,
		ExtraSpecs: map[string]string{"quota:vif_inbound_average": "1000", "quota:vif_outbound_average": "2000"}}
	for range 2 {
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	l, err := p.h.LinkByName("tapaaaaaaaa-69")
	if err != nil {
		t.Fatal(err)
	}
	qdiscs, err := p.h.QdiscList(l)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, q := range qdiscs {
		if tbf, ok := q.(*netlink.Tbf); ok {
			found = tbf.Rate == 1000*1000
		}
	}
	if !found {
		t.Errorf("qdiscs %v", qdiscs)
	}
	ifb, err := p.h.LinkByName("ifbaaaaaaaa-69")
	if err != nil {
		t.Fatal(err)
	}
	if qdiscs, err = p.h.QdiscList(ifb); err != nil || len(qdiscs) != 1 {
		t.Fatalf("qdiscs of the detour: %v, %v", qdiscs, err)
	}
	if tbf, ok := qdiscs[0].(*netlink.Tbf); !ok || tbf.Rate != 2000*1000 {
		t.Errorf("qdisc of the detour: %v", qdiscs[0])
	}
	// It takes the detour, and gets through.
	b := newNS(t)
	rb := &novalet.PlugRequest{InstanceUUID: instB, VIF: vif(portB, "fa:16:3e:00:00:0b", "10.78.0.11"), NetNS: nsPath(b), Static: true}
	if err := p.Plug(t.Context(), rb); err != nil {
		t.Fatal(err)
	}
	if err := ping(ns, "10.78.0.11"); err != nil {
		t.Errorf("with limits: %v", err)
	}
	if ifb, err = p.h.LinkByName("ifbaaaaaaaa-69"); err != nil || ifb.Attrs().Statistics.TxPackets == 0 {
		t.Errorf("nothing took the detour: %v, %v", ifb, err)
	}
	r.ExtraSpecs["quota:vif_inbound_average"] = "fast"
	if err := p.Plug(t.Context(), r); !errors.Is(err, novalet.ErrAbort) || !strings.Contains(novalet.FaultText(err), "quota:vif_inbound_average") {
		t.Errorf("error %v", err)
	}
	if err := p.Unplug(t.Context(), instA, r.VIF); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the detour is freed", func() bool { return slices.Equal(hostLinks(t, p), []string{"brq20607cf5-81", "tapbbbbbbbb-69"}) })
}

func TestOpenNetNSTakesNothingElse(t *testing.T) {
	hosttest.RequireRoot(t)
	for _, path := range []string{"/etc/hostname", "/proc/self/ns/mnt", "/nowhere"} {
		if f, err := openNetNS(path); err == nil {
			f.Close()
			t.Errorf("%s was taken for a network namespace", path)
		}
	}
}
