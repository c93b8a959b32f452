package network

import (
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/novalet/novalet"
)

// TestPark: the host's end of a port stays the same device while its instance stops and starts in another namespace,
// whose interface is set up like the first one's.
func TestPark(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	v := vif(portA, "fa:16:3e:00:00:0a", "10.78.0.5")
	first := newNS(t)
	req := &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(first), Index: 0, Static: true}
	if err := p.Plug(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	want := state(t, first)
	outer, err := netlink.LinkByName(tapName(portA))
	if err != nil {
		t.Fatal(err)
	}
	// The guest may call the interface what it likes.
	inside(t, first, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetDown(l); err != nil {
			return err
		}
		return netlink.LinkSetName(l, "wan")
	})
	for range 2 { // repeated, it changes nothing
		if err := p.Park(t.Context(), instA, v, nsPath(first)); err != nil {
			t.Fatal(err)
		}
	}
	first.Close()
	second := newNS(t)
	req.NetNS = nsPath(second)
	if err := p.Plug(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if got := state(t, second); got != want {
		t.Errorf("inside the second namespace:\n%s\nwant\n%s", got, want)
	}
	now, err := netlink.LinkByName(tapName(portA))
	if err != nil {
		t.Fatal(err)
	}
	if now.Attrs().Index != outer.Attrs().Index {
		t.Error("the host's end was made anew")
	}
	if l, err := netlink.LinkByName(parkedName(portA)); err == nil {
		t.Errorf("%s is still on the host", l.Attrs().Name)
	}
}

// TestParkWithoutInner: a guest that deleted its interface gets a new one at the next start.
func TestParkWithoutInner(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	v := vif(portA, "fa:16:3e:00:00:0a", "10.78.0.5")
	ns := newNS(t)
	req := &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(ns), Index: 0, Static: true}
	if err := p.Plug(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	inside(t, ns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	if err := p.Park(t.Context(), instA, v, nsPath(ns)); err != nil {
		t.Fatal(err)
	}
	if l, err := netlink.LinkByName(tapName(portA)); err == nil {
		t.Errorf("%s is left", l.Attrs().Name)
	}
	if err := p.Plug(t.Context(), req); err != nil {
		t.Fatal(err)
	}
}

// TestUnplugParked: the port of a stopped instance goes with both its ends.
func TestUnplugParked(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	v := vif(portA, "fa:16:3e:00:00:0a", "10.78.0.5")
	ns := newNS(t)
	if err := p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(ns), Index: 0}); err != nil {
		t.Fatal(err)
	}
	if err := p.Park(t.Context(), instA, v, nsPath(ns)); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName(parkedName(portA)); err != nil {
		t.Fatalf("nothing is parked: %v", err)
	}
	if err := p.Unplug(t.Context(), instA, v); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both ends are gone", func() bool {
		_, a := netlink.LinkByName(tapName(portA))
		_, b := netlink.LinkByName(parkedName(portA))
		return a != nil && b != nil
	})
}

// TestSweepLeavesOtherAgentsAlone: two agents of one host do not remove each other's ports.
func TestSweepLeavesOtherAgentsAlone(t *testing.T) {
	hostNS(t)
	one, two := newPlugger(t, Options{}), newPlugger(t, Options{Owner: "demo"})
	for i, p := range []*Plugger{one, two} {
		v := vif([]string{portA, portB}[i], "fa:16:3e:00:00:0a", "10.78.0.5")
		if err := p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(newNS(t)), Index: 0}); err != nil {
			t.Fatal(err)
		}
	}
	removed, err := two.Sweep(t.Context(), nil)
	if err != nil || len(removed) != 1 || removed[0] != tapName(portB) {
		t.Fatalf("the second agent swept %v, %v", removed, err)
	}
	if _, err := netlink.LinkByName(tapName(portA)); err != nil {
		t.Errorf("the first agent's port is gone: %v", err)
	}
	if removed, err = one.Sweep(t.Context(), nil); err != nil || len(removed) != 1 || removed[0] != tapName(portA) {
		t.Errorf("the first agent swept %v, %v", removed, err)
	}
}
