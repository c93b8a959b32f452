package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// fakeCard has functions that are pairs of virtual Ethernet devices: the end that stays on the host is the wire.
type fakeCard struct {
	h *netlink.Handle

	mu   sync.Mutex
	far  map[string]int // device address → index of the end on the host
	has  map[int]vfSettings
	sets []string // every change, in order
	fail error
}

func (c *fakeCard) address(link netlink.Link) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for address, index := range c.far {
		if link.Type() == "veth" && link.Attrs().ParentIndex == index {
			return address
		}
	}
	return ""
}

func (c *fakeCard) settings(_ string, vf int) (vfSettings, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, ok := c.has[vf]
	if !ok {
		return s, novalet.ErrNotFound
	}
	return s, nil
}

func (c *fakeCard) set(parent string, vf int, have, want vfSettings) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fail != nil {
		return c.fail
	}
	if have != want {
		c.sets = append(c.sets, fmt.Sprintf("%s %d %s vlan %d spoof %t trust %t", parent, vf, want.MAC, want.VLAN, want.Spoof, want.Trust))
	}
	c.has[vf] = want
	return nil
}

func (c *fakeCard) changes() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := strings.Join(c.sets, "\n")
	c.sets = nil
	return s
}

// withCard gives the plugger a card with two functions on a bridge, and a third party on that.
func withCard(t *testing.T, p *Plugger) (*fakeCard, [2]*novalet.PCIDevice, *os.File) {
	t.Helper()
	c := &fakeCard{h: p.h, far: map[string]int{}, has: map[int]vfSettings{}}
	p.pci, p.returnTime = c, 200*time.Millisecond
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "wire"
	if err := p.h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Fatal(err)
	}
	wire, err := p.h.LinkByName("wire")
	if err != nil {
		t.Fatal(err)
	}
	up(t, p, "wire")
	var devices [2]*novalet.PCIDevice
	for i := range devices {
		d := &novalet.PCIDevice{Address: fmt.Sprintf("0000:03:10.%d", i), Name: fmt.Sprintf("ens1v%d", i), Parent: "0000:03:00.0", ParentName: "ens1", VF: i}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprintf("far%d", i)
		attrs.MasterIndex = wire.Attrs().Index
		v := netlink.NewVeth(attrs)
		v.PeerName = d.Name
		if err := p.h.LinkAdd(v); err != nil {
			t.Fatal(err)
		}
		up(t, p, attrs.Name)
		far, err := p.h.LinkByName(attrs.Name)
		if err != nil {
			t.Fatal(err)
		}
		c.far[d.Address], c.has[i], devices[i] = far.Attrs().Index, vfSettings{MAC: noMAC, Spoof: true}, d
	}
	other := newNS(t)
	o := vif(portB, "fa:16:3e:00:00:0b", "10.78.0.11")
	o.Network.Bridge = "wire"
	if err := p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instB, VIF: o, NetNS: nsPath(other), Static: true}); err != nil {
		t.Fatal(err)
	}
	return c, devices, other
}

// functionVIF is a port that has a function of the card.
func functionVIF(d *novalet.PCIDevice) *novalet.VIF {
	v := vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10")
	v.Type, v.VNICType, v.Device, v.Network.Bridge = "hw_veb", "direct", d, ""
	v.Details = map[string]json.RawMessage{"vlan": json.RawMessage(`"42"`)}
	return v
}

func onHost(t *testing.T, p *Plugger, name string) netlink.Link {
	t.Helper()
	l, err := p.link(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestFunctionPlug: a function moves into the instance with the port's address, under the next name, with the card held to
// the port's address and VLAN; it works, stays through a second plug whatever the guest has done to it, is silent on request,
// and comes back as it was.
func TestFunctionPlug(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	card, devices, other := withCard(t, p)
	ns := newNS(t)
	v := functionVIF(devices[0])
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(ns), Index: 1, Static: true}
	plug := func() {
		t.Helper()
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	plug()
	if got := card.changes(); got != "ens1 0 fa:16:3e:00:00:0a vlan 42 spoof true trust false" {
		t.Errorf("set at the card: %q", got)
	}
	seen := state(t, ns)
	if !strings.Contains(seen, "eth1 fa:16:3e:00:00:0a up mtu 1450\n  10.78.0.10/22\n") {
		t.Errorf("inside: %s", seen)
	}
	if onHost(t, p, "ens1v0") != nil {
		t.Error("the interface is on the host still")
	}
	if err := ping(other, "10.78.0.10"); err != nil {
		t.Fatal(err)
	}
	// The guest renames it and gives it another address; what is plugged again is the same one, with the address of the port.
	inside(t, ns, func() error {
		l, err := netlink.LinkByName("eth1")
		if err == nil {
			err = errors.Join(netlink.LinkSetDown(l), netlink.LinkSetName(l, "mine"), netlink.LinkSetAlias(l, "mine"), netlink.LinkAddAltName(l, "far1"),
				netlink.LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 0, 0, 9}), netlink.LinkSetMTU(l, 9000))
		}
		return err
	})
	plug()
	if got := card.changes(); got != "" {
		t.Errorf("the second plug changed at the card: %q", got)
	}
	if seen := state(t, ns); !strings.Contains(seen, "mine fa:16:3e:00:00:0a up mtu 1450\n  10.78.0.10/22\n") || strings.Contains(seen, "eth1") {
		t.Errorf("inside, after the second plug: %s", seen)
	}
	for _, on := range []bool{true, false} {
		if err := p.Silence(t.Context(), instA, v, nsPath(ns), on); err != nil {
			t.Skipf("the kernel takes no classifier: %v", err)
		}
		if err := ping(other, "10.78.0.10"); (err == nil) == on {
			t.Errorf("silent %t, ping: %v", on, err)
		}
	}
	v.Network.Subnets[0].IPs[0].Address = "10.78.0.12"
	if err := p.Configure(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if seen := state(t, ns); !strings.Contains(seen, "10.78.0.12/22") || strings.Contains(seen, "10.78.0.10/22") {
		t.Errorf("inside, with another address: %s", seen)
	}
	// Parked it is on the host under its own name, held to the port still; the next plug takes it from there.
	for range 2 {
		if err := p.Park(t.Context(), instA, v, nsPath(ns)); err != nil {
			t.Fatal(err)
		}
	}
	l := onHost(t, p, "ens1v0")
	if l == nil || l.Attrs().Flags&net.FlagUp != 0 || l.Attrs().Alias != "" || len(l.Attrs().AltNames) != 0 {
		t.Fatalf("parked: %+v", l)
	}
	if got := card.changes(); got != "" {
		t.Errorf("parking changed at the card: %q", got)
	}
	ns = newNS(t)
	r.NetNS = nsPath(ns)
	plug()
	// The card has this address already, but may have it from the function itself.
	if got := card.changes(); got != "ens1 0 fa:16:3e:00:00:0a vlan 42 spoof true trust false" {
		t.Errorf("set at the card for another namespace: %q", got)
	}
	if err := ping(other, "10.78.0.12"); err != nil {
		t.Fatal(err)
	}
	if swept, err := p.Sweep(t.Context(), map[string]bool{instB: true}); err != nil || len(swept) != 0 {
		t.Errorf("swept %v, %v", swept, err)
	}
	// In an instance that runs, it is not the host's to take: the namespace has to be named, or to end.
	if err := p.Unplug(t.Context(), instA, v); !errors.Is(err, novalet.ErrBusy) {
		t.Errorf("unplugged from an instance: %v", err)
	}
	if err := p.Park(t.Context(), instA, v, nsPath(ns)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Unplug(t.Context(), instA, v); err != nil {
			t.Fatal(err)
		}
	}
	if got := card.changes(); got != "ens1 0 "+noMAC+" vlan 0 spoof true trust false" {
		t.Errorf("unplugging set at the card: %q", got)
	}
	if l := onHost(t, p, "ens1v0"); l == nil || l.Attrs().MTU != 1500 || l.Attrs().Flags&net.FlagUp != 0 {
		t.Errorf("unplugged: %+v", l)
	}
}

// TestFunctionComesBack: a function that a namespace gives back as it ends is found by its address, whatever its name, also
// by a plug that is there before it.
func TestFunctionComesBack(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	card, devices, _ := withCard(t, p)
	p.returnTime = 30 * time.Second
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	ns, next := newNS(t), newNS(t)
	v := functionVIF(devices[0])
	if err := p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(ns)}); err != nil {
		t.Fatal(err)
	}
	card.changes()
	// As the kernel does it: by a name that is free on the host, since ens1v0 has been given to another.
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "ens1v0"
	if err := p.h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Fatal(err)
	}
	back := make(chan error, 1)
	go func() {
		back <- inNetNS(ns, func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return moveLink(l, home, "dev7", nil, 0)
		})
	}()
	if err := p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(next)}); err != nil {
		t.Fatal(err)
	}
	if err := <-back; err != nil {
		t.Fatal(err)
	}
	if seen := state(t, next); !strings.Contains(seen, "eth0 fa:16:3e:00:00:0a") {
		t.Errorf("inside: %s", seen)
	}
	if err := p.Park(t.Context(), instA, v, nsPath(next)); err != nil {
		t.Fatal(err)
	}
	l := onHost(t, p, "nvf03100")
	if l == nil {
		t.Fatal("with its name taken it got no spare one")
	}
	// What a guest has made of it, where the namespace has ended before.
	if err := errors.Join(p.h.LinkSetAlias(l, "mine"), p.h.LinkAddAltName(l, "minetoo"), p.h.SetPromiscOn(l), p.h.LinkSetAllmulticastOn(l), p.h.LinkSetARPOff(l)); err != nil {
		t.Fatal(err)
	}
	if err := p.Unplug(t.Context(), instA, v); err != nil {
		t.Fatal(err)
	}
	if a := onHost(t, p, "nvf03100").Attrs(); a.Alias != "" || len(a.AltNames) != 0 || a.RawFlags&(unix.IFF_PROMISC|unix.IFF_ALLMULTI|unix.IFF_NOARP) != 0 {
		t.Errorf("unplugged: %+v", a)
	}
	// A card that is gone has nothing to be put back.
	delete(card.has, 0)
	if err := p.Unplug(t.Context(), instA, v); err != nil {
		t.Errorf("unplugged from a card that is gone: %v", err)
	}
}

// TestFunctionRefused: nothing moves without a device that the agent has set aside, and none into an instance whose card
// cannot hold it to the port.
func TestFunctionRefused(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	card, devices, _ := withCard(t, p)
	ns := newNS(t)
	v := functionVIF(nil)
	// Neutron's word for it is not enough.
	v.Profile = map[string]json.RawMessage{"pci_slot": json.RawMessage(`"0000:03:10.0"`)}
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(ns)}
	var fault *novalet.Fault
	if err := p.Plug(t.Context(), r); !errors.As(err, &fault) || fault.Class != "PortBindingFailed" {
		t.Errorf("without a device: %v", err)
	}
	if err := p.Unplug(t.Context(), instA, v); err != nil {
		t.Errorf("unplug without a device: %v", err)
	}
	v.Device = devices[0]
	card.fail = errors.New("not supported")
	if err := p.Plug(t.Context(), r); err == nil || !strings.Contains(err.Error(), "not supported") {
		t.Errorf("with a card that checks no addresses: %v", err)
	}
	if onHost(t, p, "ens1v0") == nil {
		t.Error("the function has left the host")
	}
}

// TestFunctionSettings: what a port asks of the card.
func TestFunctionSettings(t *testing.T) {
	trusted := &novalet.PCIDevice{Tags: map[string]string{"trusted": "true"}}
	for _, c := range []struct {
		name             string
		details, profile map[string]json.RawMessage
		device           *novalet.PCIDevice
		want             vfSettings
		bad              bool
	}{
		{name: "flat", details: map[string]json.RawMessage{"vlan": json.RawMessage(`"0"`)}, want: vfSettings{Spoof: true}},
		{name: "number", details: map[string]json.RawMessage{"vlan": json.RawMessage(`7`)}, want: vfSettings{VLAN: 7, Spoof: true}},
		{name: "no vlan", want: vfSettings{Spoof: true}},
		{name: "large", details: map[string]json.RawMessage{"vlan": json.RawMessage(`"4095"`)}, bad: true},
		{name: "text", details: map[string]json.RawMessage{"vlan": json.RawMessage(`"x"`)}, bad: true},
		{name: "no port security", details: map[string]json.RawMessage{SpoofKey: json.RawMessage(`false`)}, want: vfSettings{}},
		{name: "trusted", profile: map[string]json.RawMessage{"trusted": json.RawMessage(`"true"`)}, device: trusted, want: vfSettings{Spoof: true, Trust: true}},
		{name: "trusted, as a truth value", profile: map[string]json.RawMessage{"trusted": json.RawMessage(`true`)}, device: trusted, want: vfSettings{Spoof: true, Trust: true}},
		{name: "not asked", device: trusted, want: vfSettings{Spoof: true}},
		{name: "not granted", profile: map[string]json.RawMessage{"trusted": json.RawMessage(`"true"`)}, device: &novalet.PCIDevice{}, want: vfSettings{Spoof: true}},
	} {
		v := functionVIF(c.device)
		v.Details, v.Profile = c.details, c.profile
		got, err := wantedOf(v)
		c.want.MAC = "fa:16:3e:00:00:0a"
		if c.bad != (err != nil) || !c.bad && got != c.want {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
}
