package cloud_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/attachinterfaces"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/portsbinding"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/ports"
)

// directPort makes a port of vnic_type direct.
func directPort(t *testing.T, u *user) *ports.Port {
	t.Helper()
	p, err := ports.Create(t.Context(), u.network, portsbinding.CreateOptsExt{
		CreateOptsBuilder: ports.CreateOpts{NetworkID: networkID(t, u, "private"), Name: "novalet-direct"}, VNICType: "direct"}).Extract()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ports.Delete(context.Background(), u.network, p.ID).ExtractErr() })
	return p
}

// deviceRows is what Nova's database says of the host's devices: address, status, instance.
func deviceRows(t *testing.T) string {
	t.Helper()
	out, err := sh(t.Context(), "mariadb", "-S", filepath.Join(state(t), "mysql/mysqld.sock"), "-u", "root", "-N", "-B", "nova",
		"-e", "SELECT address, status, IFNULL(instance_uuid, '-') FROM pci_devices WHERE deleted = 0 ORDER BY address; SELECT pci_stats FROM compute_nodes WHERE deleted = 0 AND host = '"+computeHost()+"'")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// wantRows waits for the rows and for so many free devices in the pool.
func wantRows(t *testing.T, free int, rows ...string) {
	t.Helper()
	eventually(t, long, fmt.Sprintf("Nova counts %d free devices, %q", free, rows), func() error {
		got := deviceRows(t)
		for _, r := range rows {
			if !strings.Contains(got, strings.ReplaceAll(r, " ", "\t")) {
				return fmt.Errorf("rows: %s", got)
			}
		}
		if pool := fmt.Sprintf(`"count": %d`, free); free > 0 && !strings.Contains(got, pool) || free == 0 && strings.Contains(got, `"count"`) {
			return fmt.Errorf("pool: %s", got)
		}
		return nil
	})
}

// cardOf is what the card holds a function to.
func cardOf(t *testing.T, slot string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(state(t), "sysfs/bus/pci/devices", slot, "settings"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// slotOf is the device that Neutron's record of a port names.
func slotOf(t *testing.T, id string) string {
	t.Helper()
	var p portsbinding.PortsBindingExt
	if err := ports.Get(t.Context(), as(t, "admin").network, id).ExtractInto(&p); err != nil {
		t.Fatal(err)
	}
	if len(p.Profile) == 0 {
		return ""
	}
	if p.VIFType != "hw_veb" || p.Profile["pci_vendor_info"] != "8086:1520" || p.Profile["physical_network"] != "lan1" {
		t.Errorf("port %s: %s, %v", id, p.VIFType, p.Profile)
	}
	return fmt.Sprint(p.Profile["pci_slot"])
}

// TestDirectPort: a port of vnic_type direct gives a server a function of a card for itself, from Neutron's binding to the
// frames on the wire; it stays through stop and start and through an agent that is killed; with all taken the next server
// finds no host; attached and detached; and all of it goes back.
func TestDirectPort(t *testing.T) {
	u := as(t, "demo")
	if _, err := os.Stat(filepath.Join(state(t), "sysfs")); err != nil {
		t.Skip("needs a cloud with WITH_SRIOV=1 NET=macvtap, and a program built with the tag standin")
	}
	const first, second = "0000:03:10.0", "0000:03:10.1"
	wantRows(t, 2, first+" available -", second+" available -")
	image := appImage.id(t, u)
	p := directPort(t, u)
	ip := p.FixedIPs[0].IPAddress
	s := boot(t, u, bootOpts{name: "direct", image: image, networks: []servers.Network{{Port: p.ID}}})
	slot := slotOf(t, p.ID)
	other := second
	if slot == second {
		other = first
	}
	wantRows(t, 1, slot+" allocated "+s.ID, other+" available -")
	works := func(when string) {
		t.Helper()
		if out := inside(t, s.ID, "/bin/ip", "addr", "show", "eth0"); !strings.Contains(out, p.MACAddress) || !strings.Contains(out, ip+"/") {
			t.Errorf("%s: inside: %s", when, out)
		}
		ping(t, besideNS(t, u), ip)
		var card struct {
			MAC   string
			Spoof bool
		}
		if err := json.Unmarshal([]byte(cardOf(t, slot)), &card); err != nil || card.MAC != p.MACAddress || !card.Spoof {
			t.Errorf("%s: the card: %s, %v", when, cardOf(t, slot), err)
		}
	}
	works("after the boot")
	must(t, servers.Stop(t.Context(), u.compute, s.ID).ExtractErr())
	waitStatus(t, u, s.ID, "SHUTOFF")
	wantRows(t, 1, slot+" allocated "+s.ID)
	must(t, servers.Start(t.Context(), u.compute, s.ID).ExtractErr())
	waitStatus(t, u, s.ID, "ACTIVE")
	works("after stop and start")
	was := initPID(t, s.ID)
	kill9(t, nil)
	works("after SIGKILL of the agent")
	devstack(t, "compute.sh", "restart", "novalet")
	answersAgain(t)
	works("after a restart of the agent")
	if now := initPID(t, s.ID); now != was {
		t.Errorf("init was %s, is %s", was, now)
	}
	wantRows(t, 1, slot+" allocated "+s.ID, other+" available -")

	// One more on the running server, and then it is given to another.
	more := directPort(t, u)
	if _, err := attachinterfaces.Create(t.Context(), u.compute, s.ID, attachinterfaces.CreateOpts{PortID: more.ID}).Extract(); err != nil {
		t.Fatal(err)
	}
	wantRows(t, 0, other+" allocated "+s.ID)
	if out := inside(t, s.ID, "/bin/ip", "addr", "show", "eth1"); !strings.Contains(out, more.MACAddress) {
		t.Errorf("attached: %s", out)
	}
	third := directPort(t, u)
	full := create(t, u, bootOpts{name: "direct-full", image: image, networks: []servers.Network{{Port: third.ID}}})
	if got := waitStatus(t, u, full.ID, "ERROR"); !strings.Contains(got.Fault.Message, "No valid host") {
		t.Errorf("with all in use: %q", got.Fault.Message)
	}
	must(t, attachinterfaces.Delete(t.Context(), u.compute, s.ID, more.ID).ExtractErr())
	wantRows(t, 1, other+" available -", slot+" allocated "+s.ID)
	eventually(t, long, "the detached port has no device", func() error {
		if got := slotOf(t, more.ID); got != "" {
			return fmt.Errorf("it has %s", got)
		}
		return nil
	})
	if got := cardOf(t, other); !strings.Contains(got, "00:00:00:00:00:00") {
		t.Errorf("the card, after the detach: %s", got)
	}
	works("after attach and detach")
	next := boot(t, u, bootOpts{name: "direct-next", image: image, networks: []servers.Network{{Port: more.ID}}})
	wantRows(t, 0, slot+" allocated "+s.ID, other+" allocated "+next.ID)
	remove(t, u, next.ID)
	remove(t, u, s.ID)
	wantRows(t, 2, first+" available -", second+" available -")
	eventually(t, long, "the interfaces are on the host by their names", func() error {
		_, err := sh(context.Background(), "sh", "-c", "ip link show cloud-vf0 && ip link show cloud-vf1")
		return err
	})
	for _, id := range []string{p.ID, more.ID} {
		if got := slotOf(t, id); got != "" {
			t.Errorf("port %s still names device %s", id, got)
		}
	}
	if err := ports.Get(t.Context(), u.network, p.ID).Err; gophercloud.ResponseCodeIs(err, 404) {
		t.Error("the port was the user's, and is gone")
	}
}
