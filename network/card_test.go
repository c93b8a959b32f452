//go:build !standin

package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
	"github.com/novalet/novalet/network/sriov"
)

// These tests take a card's functions, also from who has them: only where they are told to, and then there has to be one.
// NOVALET_SRIOV_FAR names an interface of this host at the other end of the card's cable.

// useCard returns two functions of a card. Those of one that has none are made, and go with the test.
func useCard(t *testing.T) (*Plugger, [2]*novalet.PCIDevice) {
	t.Helper()
	hosttest.RequireRoot(t)
	if os.Getenv("NOVALET_SRIOV_CARD") != "1" {
		t.Skip("takes the functions of an SR-IOV card: runs with NOVALET_SRIOV_CARD=1 (make test-sriov-vm)")
	}
	p := newPlugger(t, Options{})
	cards, err := filepath.Glob("/sys/class/net/*/device/sriov_totalvfs")
	if err != nil || len(cards) == 0 {
		t.Fatal("no network interface of this host has SR-IOV")
	}
	pf := filepath.Dir(cards[0])
	parent := filepath.Base(filepath.Dir(pf))
	if text := numberOf(t, pf, "sriov_numvfs"); text == 0 {
		// Down, for QEMU's igb loses what functions ask of it as its link comes up, and hears no more of them.
		if link := onHost(t, p, parent); link == nil || p.h.LinkSetDown(link) != nil {
			t.Fatalf("%s does not go down", parent)
		}
		if err := os.WriteFile(filepath.Join(pf, "sriov_numvfs"), []byte("2"), 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.WriteFile(filepath.Join(pf, "sriov_numvfs"), []byte("0"), 0); err != nil {
				t.Error(err)
			}
		})
	}
	specs, err := sriov.ParseSpecs([]string{fmt.Sprintf(`{"devname": %q, "physical_network": "physnet1", "trusted": "true"}`, parent)})
	if err != nil {
		t.Fatal(err)
	}
	var devices [2]*novalet.PCIDevice
	eventually(t, "two functions with interfaces", func() bool {
		_ = exec.Command("udevadm", "settle").Run() // it gives interfaces other names, where there is one
		list, err := sriov.New(specs).PCIDevices()
		if err != nil {
			t.Fatal(err)
		}
		if len(list) < 2 || list[0].Name == "" || list[1].Name == "" {
			return false
		}
		devices = [2]*novalet.PCIDevice{&list[0], &list[1]}
		return true
	})
	up(t, p, parent) // a card that is down answers none of its functions
	eventually(t, "a link of the card", func() bool { return onHost(t, p, parent).Attrs().OperState == netlink.OperUp })
	return p, devices
}

func numberOf(t *testing.T, dir, name string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// heldTo is what the kernel tells of a function at its card.
func heldTo(t *testing.T, d *novalet.PCIDevice) string {
	t.Helper()
	out, err := exec.Command("ip", "-d", "link", "show", "dev", d.ParentName).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, line := range strings.Split(string(out), "\n") {
		if line = strings.Join(strings.Fields(line), " "); strings.HasPrefix(line, fmt.Sprintf("vf %d ", d.VF)) {
			return line
		}
	}
	t.Fatalf("%s tells nothing of function %d: %s", d.ParentName, d.VF, out)
	return ""
}

func expectHeld(t *testing.T, d *novalet.PCIDevice, want ...string) {
	t.Helper()
	line := heldTo(t, d)
	for _, w := range want {
		if !strings.Contains(line, w) {
			t.Errorf("at the card: %q, want %q", line, w)
		}
	}
	if strings.Contains(line, "vlan") && !strings.Contains(strings.Join(want, " "), "vlan") {
		t.Errorf("at the card: %q, want no VLAN", line)
	}
}

// guestsName says whether an interface has a second name that a guest gave it here; udev has some of its own.
func guestsName(a *netlink.LinkAttrs) bool { return slices.Contains(a.AltNames, "minetoo") }

// expectBack says that a function is on the host as it was before.
func expectBack(t *testing.T, p *Plugger, d *novalet.PCIDevice) {
	t.Helper()
	expectHeld(t, d, noMAC, "spoof checking on", "trust off")
	l := onHost(t, p, d.Name)
	if l == nil {
		t.Fatalf("%s is not back: %v", d.Name, hostLinks(t, p))
	}
	if a := l.Attrs(); p.pci.address(l) != d.Address || a.Flags&net.FlagUp != 0 || a.MTU != 1500 || a.Alias != "" || guestsName(a) || a.RawFlags&(unix.IFF_PROMISC|unix.IFF_ALLMULTI|unix.IFF_NOARP) != 0 {
		t.Errorf("back on the host: %s, %+v", p.pci.address(l), a)
	}
}

// cardVIF is a port that has a function of the card.
func cardVIF(d *novalet.PCIDevice, n, vlan int) *novalet.VIF {
	v := vif([]string{portA, portB}[n], []string{evilMAC, victimMAC}[n], []string{evilIP, victimIP}[n])
	v.Type, v.VNICType, v.Device, v.Network.Bridge = "hw_veb", "direct", d, ""
	v.Details = map[string]json.RawMessage{"vlan": json.RawMessage(strconv.Quote(strconv.Itoa(vlan)))}
	return v
}

// reach pings until an answer comes: a card takes its time until it has a link.
func reach(t *testing.T, from *os.File, addr string) {
	t.Helper()
	for end := time.Now().Add(hosttest.Patience(30 * time.Second)); ; {
		err := ping(from, addr)
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("ping %s: %v", addr, err)
		}
	}
}

// noReach is asked where reach was answered before, or is after.
func noReach(t *testing.T, from *os.File, addr string) {
	t.Helper()
	inside(t, from, func() error {
		if exec.Command("ping", "-c", "3", "-W", "1", addr).Run() == nil {
			t.Errorf("%s answers", addr)
		}
		return nil
	})
}

// TestCard: a function moves into the instance and does what its port says, at the card as well; and comes back as it was.
func TestCard(t *testing.T) {
	p, devices := useCard(t)
	d := devices[0]
	for _, d := range devices {
		link, err := p.h.LinkByName(d.Name)
		if err != nil {
			t.Fatal(err)
		}
		pf, err := filepath.EvalSymlinks("/sys/class/net/" + d.Name + "/device/physfn")
		if err != nil {
			t.Fatal(err)
		}
		if got := p.pci.address(link); got != d.Address || filepath.Base(pf) != d.Parent {
			t.Errorf("%s is %s, of %s: %+v", d.Name, got, pf, d)
		}
		have, err := p.pci.settings(d.ParentName, d.VF)
		have.MAC = "" // its driver's choice, or udev's
		if err != nil || have != (vfSettings{Spoof: true}) {
			t.Errorf("settings of %s at first: %+v, %v", d.Name, have, err)
		}
		expectHeld(t, d, "spoof checking on", "trust off")
	}
	if link, err := p.h.LinkByName("lo"); err != nil || p.pci.address(link) != "" {
		t.Errorf("lo is %q, %v", p.pci.address(link), err)
	}
	if _, err := p.pci.settings(d.ParentName, 250); !errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("settings of a function that is not there: %v", err)
	}

	// The function chooses the address that the port has: the card has it then, but by no word of the host's.
	hw, _ := net.ParseMAC(evilMAC)
	if err := netlink.LinkSetHardwareAddr(onHost(t, p, d.Name), hw); err != nil {
		t.Logf("the function has no choice of address: %v", err)
	}
	ns := newNS(t)
	v := cardVIF(d, 0, 42)
	r := &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(ns), Static: true}
	plug := func() {
		t.Helper()
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	plug()
	expectHeld(t, d, evilMAC, "vlan 42", "spoof checking on", "trust off")
	if seen := state(t, ns); !strings.Contains(seen, "eth0 "+evilMAC+" up mtu 1450\n  10.78.0.10/22\n") {
		t.Errorf("inside: %s", seen)
	}
	// In the instance it counts still, without a name on the host.
	if l := onHost(t, p, d.Name); l != nil {
		t.Errorf("%s is on the host still", d.Name)
	}
	specs, _ := sriov.ParseSpecs([]string{fmt.Sprintf(`{"address": %q}`, d.Address)})
	if list, err := sriov.New(specs).PCIDevices(); err != nil || len(list) != 1 || list[0].Name != "" || list[0].VF != d.VF {
		t.Errorf("devices with one in an instance: %+v, %v", list, err)
	}

	// The guest: another name, more names, an alias, an MTU. Another address too where its driver lets it, which does not move the
	// card; igb does not let it.
	inside(t, ns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		err = netlink.LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 0, 0, 9})
		if driver, _ := os.Readlink("/sys/bus/pci/devices/" + d.Parent + "/driver"); err == nil && filepath.Base(driver) == "igb" {
			t.Error("the guest has another address")
		}
		return errors.Join(netlink.LinkSetDown(l), netlink.LinkSetName(l, "mine"), netlink.LinkSetAlias(l, "mine"),
			netlink.LinkAddAltName(l, d.ParentName), netlink.LinkAddAltName(l, "minetoo"), netlink.LinkSetMTU(l, 1000))
	})
	expectHeld(t, d, evilMAC, "vlan 42", "spoof checking on", "trust off")
	plug()
	if seen := state(t, ns); !strings.Contains(seen, "mine "+evilMAC+" up mtu 1450\n  10.78.0.10/22\n") {
		t.Errorf("inside, after the second plug: %s", seen)
	}

	// No port security, and trusted.
	v.Details[SpoofKey], v.Profile = json.RawMessage("false"), map[string]json.RawMessage{"trusted": json.RawMessage(`"true"`)}
	v.Details["vlan"] = json.RawMessage("0")
	plug()
	expectHeld(t, d, evilMAC, "spoof checking off", "trust on")

	// Parked it is held to the port still. Another instance gets it by another address.
	if err := p.Park(t.Context(), instA, v, nsPath(ns)); err != nil {
		t.Fatal(err)
	}
	l := onHost(t, p, d.Name)
	if l == nil || l.Attrs().Flags&net.FlagUp != 0 || l.Attrs().Alias != "" || guestsName(l.Attrs()) {
		t.Errorf("parked: %+v", l)
	}
	expectHeld(t, d, evilMAC, "spoof checking off", "trust on")
	plug()
	for range 2 {
		if err := p.Park(t.Context(), instA, v, nsPath(ns)); err != nil {
			t.Fatal(err)
		}
		if err := p.Unplug(t.Context(), instA, v); err != nil {
			t.Fatal(err)
		}
		expectBack(t, p, d)
	}
	v = cardVIF(d, 1, 0)
	r = &novalet.PlugRequest{InstanceUUID: instB, VIF: v, NetNS: nsPath(newNS(t)), Static: true}
	plug()
	expectHeld(t, d, victimMAC, "spoof checking on", "trust off")
	if err := p.Park(t.Context(), instB, v, r.NetNS); err != nil {
		t.Fatal(err)
	}
	if err := p.Unplug(t.Context(), instB, v); err != nil {
		t.Fatal(err)
	}
	expectBack(t, p, d)
}

// farSides are two hosts at the other end of the cable, if it has one: the gateway, without VLAN and in VLAN 42.
func farSides(t *testing.T, p *Plugger) (plain, tagged *os.File) {
	t.Helper()
	name := os.Getenv("NOVALET_SRIOV_FAR")
	if name == "" {
		t.Log("NOVALET_SRIOV_FAR names no interface at the other end of the cable: only the card itself is looked at")
		return nil, nil
	}
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	plain, tagged = newNS(t), newNS(t)
	if err := moveLink(onHost(t, p, name), plain, "eth0", nil, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer home.Close()
		inside(t, plain, func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return moveLink(l, home, name, nil, 0)
		})
	})
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "vlan42"
	address := func(name string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(l), netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(gatewayIP + "/22"))}))
	}
	inside(t, plain, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		attrs.ParentIndex = l.Attrs().Index
		v := &netlink.Vlan{LinkAttrs: attrs, VlanId: 42}
		return errors.Join(address("eth0"), netlink.LinkAdd(v), netlink.LinkSetNsFd(v, int(tagged.Fd())))
	})
	inside(t, tagged, func() error { return address("vlan42") })
	return plain, tagged
}

// TestCardTraffic: instances reach each other in their VLAN and not across, what is silent is, and no guest speaks as another.
func TestCardTraffic(t *testing.T) {
	p, devices := useCard(t)
	plain, tagged := farSides(t, p)
	ns := [2]*os.File{newNS(t), newNS(t)}
	var v [2]*novalet.VIF
	plug := func(n, vlan int) {
		t.Helper()
		v[n] = cardVIF(devices[n], n, vlan)
		r := &novalet.PlugRequest{InstanceUUID: []string{instA, instB}[n], VIF: v[n], NetNS: nsPath(ns[n]), Static: true}
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	plug(0, 0)
	plug(1, 0)
	reach(t, ns[0], victimIP)
	reach(t, ns[1], evilIP)
	if plain != nil {
		reach(t, ns[0], gatewayIP)
		reach(t, plain, victimIP)
		noReach(t, tagged, victimIP)
	}

	for range 2 {
		if err := p.Silence(t.Context(), instA, v[0], nsPath(ns[0]), true); err != nil {
			t.Fatal(err)
		}
	}
	noReach(t, ns[1], evilIP)
	if err := p.Silence(t.Context(), instA, v[0], nsPath(ns[0]), false); err != nil {
		t.Fatal(err)
	}
	reach(t, ns[1], evilIP)

	spoof(t, devices[0], ns)

	plug(1, 42)
	noReach(t, ns[0], victimIP)
	if plain != nil {
		reach(t, tagged, victimIP)
		reach(t, ns[1], gatewayIP)
		noReach(t, plain, victimIP)
	}
	plug(0, 42)
	reach(t, ns[0], victimIP)
	for n := range ns {
		inst := []string{instA, instB}[n]
		if err := errors.Join(p.Park(t.Context(), inst, v[n], nsPath(ns[n])), p.Unplug(t.Context(), inst, v[n])); err != nil {
			t.Fatal(err)
		}
		expectBack(t, p, devices[n])
	}
}

// spoof sends a frame under another's address past the card.
func spoof(t *testing.T, d *novalet.PCIDevice, ns [2]*os.File) {
	t.Helper()
	from, to := openWire(t, ns[0]), openWire(t, ns[1])
	send := func(mac, text string) {
		from.send(seal(ether(mac, unix.ETH_P_IP, ip4(evilIP, unix.IPPROTO_TCP, nil, 1000, 80)), text))
	}
	send(foreignMAC, "under another's address")
	send(evilMAC, "under its own address")
	got := to.first(hosttest.Patience(30*time.Second), "under another's address", "under its own address")
	// QEMU's igb has the switch, but does not look at it.
	vendor, err := os.ReadFile("/sys/bus/pci/devices/" + d.Parent + "/subsystem_vendor")
	if err != nil {
		t.Fatal(err)
	}
	switch {
	case got == "":
		t.Error("nothing came through the card")
	case got == "under another's address" && strings.TrimSpace(string(vendor)) == "0x1af4":
		t.Log("an emulated card lets frames under another's address pass")
	case got == "under another's address":
		t.Error("the card lets frames under another's address pass")
	}
}
