package network

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/network/ovsdb"
)

// datapath is the one that the tests' bridges have: the userspace one, which needs no kernel module, or that of
// NOVALET_OVS_DATAPATH ("system" is the kernel's).
var datapath = cmp.Or(os.Getenv("NOVALET_OVS_DATAPATH"), "netdev")

// openvswitch is a switch of the test's own, in the test's namespace.
type openvswitch struct {
	t      *testing.T
	dir    string
	remote string
}

func startOVS(t *testing.T) *openvswitch {
	t.Helper()
	const schema = "/usr/share/openvswitch/vswitch.ovsschema"
	for _, path := range []string{"/usr/sbin/ovsdb-server", "/usr/sbin/ovs-vswitchd", "/usr/bin/ovs-vsctl", schema, "/dev/net/tun"} {
		if _, err := os.Stat(path); err != nil {
			t.Skipf("needs %s (package openvswitch-switch)", path)
		}
	}
	dir, err := os.MkdirTemp("", "nvovs") // short: the path of a socket is bounded
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	o := &openvswitch{t: t, dir: dir, remote: "unix:" + filepath.Join(dir, "db.sock")}
	o.run("ovsdb-tool", "create", filepath.Join(dir, "conf.db"), schema)
	o.start("/usr/sbin/ovsdb-server", filepath.Join(dir, "conf.db"), "--remote=punix:"+filepath.Join(dir, "db.sock"), "--unixctl="+filepath.Join(dir, "db.ctl"))
	eventually(t, "the database is up", func() bool {
		_, err := os.Stat(filepath.Join(dir, "db.sock"))
		return err == nil
	})
	o.vsctl("--no-wait", "init")
	o.start("/usr/sbin/ovs-vswitchd", o.remote, "--unixctl="+filepath.Join(dir, "sw.ctl"))
	o.vsctl("add-br", "br-int", "--", "set", "Bridge", "br-int", "datapath_type="+datapath)
	return o
}

func (o *openvswitch) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "OVS_RUNDIR="+o.dir, "OVS_LOGDIR="+o.dir)
	return cmd
}

func (o *openvswitch) run(name string, args ...string) string {
	o.t.Helper()
	// A slow machine makes the tools warn, beside what they were asked for.
	var warnings strings.Builder
	cmd := o.command(name, args...)
	cmd.Stderr = &warnings
	out, err := cmd.Output()
	if err != nil {
		o.t.Fatalf("%s %v: %v: %s%s", name, args, err, out, warnings.String())
	}
	return strings.TrimSpace(string(out))
}

func (o *openvswitch) start(name string, args ...string) {
	o.t.Helper()
	cmd := o.command(name, args...)
	if err := cmd.Start(); err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
}

func (o *openvswitch) vsctl(args ...string) string {
	o.t.Helper()
	return o.run("ovs-vsctl", append([]string{"--db=" + o.remote, "--timeout=30"}, args...)...)
}

// ports are those of br-int.
func (o *openvswitch) ports() []string {
	o.t.Helper()
	list := strings.Fields(o.vsctl("list-ports", "br-int"))
	slices.Sort(list)
	return list
}

// transfer sends bytes over TCP from one namespace to an address in another.
func transfer(from, to *os.File, addr string) error {
	var l net.Listener
	if err := inNetNS(to, func() (err error) { l, err = net.Listen("tcp", addr+":0"); return err }); err != nil {
		return err
	}
	defer l.Close()
	const size = 256 << 10
	got := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- err
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		n, err := io.Copy(io.Discard, c)
		if err == nil && n != size {
			err = fmt.Errorf("%d bytes came", n)
		}
		got <- err
	}()
	var c net.Conn
	if err := inNetNS(from, func() (err error) { c, err = net.DialTimeout("tcp", l.Addr().String(), 30*time.Second); return err }); err != nil {
		return err
	}
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	_, err := c.Write(make([]byte, size))
	c.Close()
	return errors.Join(err, <-got)
}

func ovsVIF(id, mac, addr string, hybrid bool) *novalet.VIF {
	v := vif(id, mac, addr)
	v.Type, v.Network.Bridge = "ovs", "br-int"
	if hybrid {
		v.Details = map[string]json.RawMessage{"ovs_hybrid_plug": json.RawMessage("true")}
	}
	return v
}

// txChecksum reads whether a device leaves checksums to whom it sends to: "on" or "off".
func txChecksum(device string) (string, error) {
	out, err := exec.Command("ethtool", "-k", device).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("ethtool: %w: %s", err, out)
	}
	_, after, _ := strings.Cut(string(out), "\ntx-checksumming: ")
	state, _, _ := strings.Cut(after, "\n")
	return state, nil
}

func testOVS(t *testing.T, hybrid bool, switchPort func(string) string, devices []string) {
	hostNS(t)
	o := startOVS(t)
	p := newPlugger(t, Options{OVSDB: o.remote})
	a, b := newNS(t), newNS(t)
	ra := &novalet.PlugRequest{InstanceUUID: instA, VIF: ovsVIF(portA, "fa:16:3e:00:00:0a", "10.78.0.10", hybrid), NetNS: nsPath(a), Static: true}
	rb := &novalet.PlugRequest{InstanceUUID: instB, VIF: ovsVIF(portB, "fa:16:3e:00:00:0b", "10.78.0.11", hybrid), NetNS: nsPath(b), Static: true}
	for _, c := range []string{"ip link set lo up", "ip addr add 10.200.0.1/32 dev lo"} {
		if out, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", c, err, out)
		}
	}
	before := hostLinks(t, p)
	for range 2 { // the second time mends nothing and breaks nothing
		for _, r := range []*novalet.PlugRequest{ra, rb} {
			if err := p.Plug(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	var names []string
	for _, l := range hostLinks(t, p) {
		if !slices.Contains(before, l) && strings.Contains(l, "aaaaaaaa-69") {
			names = append(names, l)
		}
	}
	if !slices.Equal(names, devices) {
		t.Errorf("devices %v, want %v", names, devices)
	}
	want := []string{switchPort(portA), switchPort(portB)}
	if got := o.ports(); !slices.Equal(got, want) {
		t.Errorf("ports %v, want %v", got, want)
	}
	ids := o.vsctl("--format=json", "--columns=external_ids", "find", "Interface", "name="+switchPort(portA))
	for _, id := range []string{`["iface-id","` + portA + `"]`, `["iface-status","active"]`, `["attached-mac","fa:16:3e:00:00:0a"]`, `["vm-uuid","` + instA + `"]`} {
		if !strings.Contains(strings.ReplaceAll(ids, `\"`, `"`), id) {
			t.Errorf("external ids %s lack %s", ids, id)
		}
	}
	if err := ping(a, "10.78.0.11"); err != nil {
		t.Errorf("ping: %v", err)
	}
	// Ping proves nothing: with the checksums left to the "hardware" it works and this does not.
	if err := transfer(a, b, "10.78.0.11"); err != nil {
		t.Errorf("tcp: %v", err)
	}
	if got := o.vsctl("get", "Bridge", "br-int", "datapath_type"); got != datapath {
		t.Errorf("the bridge was changed: datapath %s", got)
	}
	// The kernel's datapath finishes checksums where it has to: nobody pays for them in software.
	var err error
	offload, device := "", "eth0"
	read := func() (err error) { offload, err = txChecksum(device); return err }
	if hybrid {
		device = qvbName(portA)
		err = read()
	} else {
		err = inNetNS(a, read)
	}
	if want := map[bool]string{true: "off", false: "on"}[datapath == "netdev"]; err != nil || offload != want {
		t.Errorf("checksum offload of %s with the datapath %s: %s, %v", device, datapath, offload, err)
	}

	// The guest addresses the host itself: by the group address, which every stack takes. The ping is answered by nobody, and
	// what the host would have answered with is not even asked.
	host, err := net.ListenPacket("udp4", "10.200.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	if err := inNetNS(a, func() error {
		for _, c := range []string{"ip route add 10.200.0.1 dev eth0", "ip neigh replace 10.200.0.1 dev eth0 lladdr ff:ff:ff:ff:ff:ff nud permanent"} {
			if out, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", c, err, out)
			}
		}
		c, err := net.Dial("udp4", host.LocalAddr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("hello"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	// What was sent before this is with the host by the time it is answered.
	if err := ping(a, "10.78.0.11"); err != nil {
		t.Errorf("ping: %v", err)
	}
	_ = host.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if n, from, err := host.ReadFrom(make([]byte, 100)); err == nil {
		t.Errorf("the instance reached the host: %d bytes from %s", n, from)
	}

	testUnbound(t, o, p, ra.VIF, !hybrid)

	// A port of somebody else in the same switch.
	if err := p.h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "vnet0"}}); err != nil {
		t.Fatal(err)
	}
	o.vsctl("add-port", "br-int", "vnet0", "--", "set", "Interface", "vnet0", "external_ids:vm-uuid="+instA)
	if err := p.Unplug(t.Context(), instA, ra.VIF); err != nil {
		t.Fatal(err)
	}
	if got := o.ports(); !slices.Equal(got, []string{switchPort(portB), "vnet0"}) {
		t.Errorf("ports after the unplug: %v", got)
	}
	if removed, err := p.Sweep(t.Context(), nil); err != nil || !slices.Contains(removed, switchPort(portB)) {
		t.Errorf("swept %v, %v", removed, err)
	}
	if got := o.ports(); !slices.Equal(got, []string{"vnet0"}) {
		t.Errorf("ports after the sweep: %v", got)
	}
	eventually(t, "the devices are freed", func() bool {
		l := hostLinks(t, p)
		l = slices.DeleteFunc(l, func(s string) bool { return s == "vnet0" })
		return slices.Equal(l, before)
	})
}

// testUnbound does with a port of the switch as OVN's controller does.
func testUnbound(t *testing.T, o *openvswitch, p *Plugger, vif *novalet.VIF, seen bool) {
	t.Helper()
	if err := p.AwaitUnbound(t.Context(), instA, vif); err == nil {
		t.Error("a port that OVN never wired was let go of")
	}
	name := tapName(vif.ID)
	if !seen {
		name = qvoName(vif.ID)
	}
	o.vsctl("set", "Interface", name, "external_ids:ovn-installed=true")
	done := make(chan error, 1)
	go func() { done <- p.AwaitUnbound(t.Context(), instA, vif) }()
	if seen {
		select {
		case err := <-done:
			t.Errorf("the port was let go of while it is wired: %v", err)
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
	o.vsctl("remove", "Interface", name, "external_ids", "ovn-installed")
	if err := <-done; (err == nil) != seen {
		t.Errorf("await the unbinding, which is seen here: %v: %v", seen, err)
	}
}

func TestOVSPlug(t *testing.T) { testOVS(t, false, tapName, []string{"tapaaaaaaaa-69"}) }

func TestOVSHybridPlug(t *testing.T) {
	testOVS(t, true, qvoName, []string{"qbraaaaaaaa-69", "qvbaaaaaaaa-69", "qvoaaaaaaaa-69", "tapaaaaaaaa-69"})
}

func TestOVSWithoutItsBridge(t *testing.T) {
	hostNS(t)
	o := startOVS(t)
	p := newPlugger(t, Options{OVSDB: o.remote})
	ns := newNS(t)
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: ovsVIF(portA, "fa:16:3e:00:00:0a", "10.78.0.10", false), NetNS: nsPath(ns), Static: true}
	r.VIF.Network.Bridge = "br-none"
	err := p.Plug(t.Context(), r)
	if !errors.Is(err, novalet.ErrReschedule) || !errors.Is(err, ovsdb.ErrNoBridge) {
		t.Errorf("error %v", err)
	}
	if l, _ := p.link(tapName(portA)); l != nil {
		t.Error("a device was made for nothing")
	}
	p = newPlugger(t, Options{OVSDB: "unix:/nowhere/db.sock"})
	r.VIF.Network.Bridge = "br-int"
	if err := p.Plug(t.Context(), r); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("no switch: %v", err)
	}
	if _, err := p.Sweep(t.Context(), nil); err != nil {
		t.Errorf("sweep on a host without Open vSwitch: %v", err)
	}
}

// TestTrunkParent: the bridge of a trunk is the one that the compute side makes.
func TestTrunkParent(t *testing.T) {
	hostNS(t)
	o := startOVS(t)
	p := newPlugger(t, Options{OVSDB: o.remote})
	ns := newNS(t)
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: ovsVIF(portA, "fa:16:3e:00:00:0a", "10.78.0.10", false), NetNS: nsPath(ns), Static: true}
	r.VIF.Network.Bridge = "tbr-0123456789"
	r.VIF.Details = map[string]json.RawMessage{"datapath_type": json.RawMessage(`"` + datapath + `"`)}
	for range 2 {
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if got := o.vsctl("list-ports", "tbr-0123456789"); got != "tapaaaaaaaa-69" {
		t.Errorf("ports %q", got)
	}
	if got := o.vsctl("get", "Bridge", "tbr-0123456789", "datapath_type"); got != datapath {
		t.Errorf("datapath %s", got)
	}
	if err := p.Unplug(t.Context(), instA, r.VIF); err != nil {
		t.Fatal(err)
	}
	if got := o.vsctl("list-br"); got != "br-int" {
		t.Errorf("bridges after the unplug: %q", got)
	}
	if err := p.Plug(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	o.vsctl("add-br", "tbr-foreign", "--", "set", "Bridge", "tbr-foreign", "datapath_type="+datapath)
	if _, err := p.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if got := o.vsctl("list-br"); got != "br-int\ntbr-foreign" {
		t.Errorf("bridges after the sweep: %q", got)
	}
}
