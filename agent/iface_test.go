package agent

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// addresses lists what Nova shows and what the host has set inside.
func (l *lab) addresses(uuid string) (shown []string, inside []string) {
	for _, v := range l.world.Row(uuid).Info {
		for _, s := range v.Network.Subnets {
			for _, ip := range s.IPs {
				shown = append(shown, ip.Address)
			}
		}
	}
	for _, p := range l.world.Plugs(uuid) {
		inside = append(inside, strings.Fields(strings.ReplaceAll(p.Address, ",", " "))...)
	}
	return shown, inside
}

func TestFixedIPs(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	first, _ := l.addresses(uuid)
	add := l.cast(uuid, novalet.MethodAddFixedIP, novalet.TaskNone, novalet.OperationArgs{NetworkID: "net"})
	eventually(t, "the address was added", func() bool { return l.idle(uuid) && l.h.Faults.Calls("NetworkAPI.AddAddress") == 1 })
	two, inside := l.addresses(uuid)
	if len(two) != 2 || two[0] != first[0] || !slices.Equal(two, inside) {
		t.Fatalf("Nova shows %v, the guest has %v; want %v and one more", two, inside, first)
	}
	l.cast(uuid, novalet.MethodRemoveFixedIP, novalet.TaskNone, novalet.OperationArgs{Address: two[1]})
	eventually(t, "the address was removed", func() bool {
		shown, inside := l.addresses(uuid)
		return l.idle(uuid) && slices.Equal(shown, first) && slices.Equal(inside, first)
	})
	if got := l.says(uuid); !slices.Equal(got[2:], []string{"create_ip start", "create_ip end", "delete_ip start", "delete_ip end"}) {
		t.Errorf("told %q", got)
	}
	// Delivered again, the first cast does nothing.
	l.submit(add)
	if n := l.h.Faults.Calls("NetworkAPI.AddAddress"); n != 1 {
		t.Errorf("%d addresses were asked for", n)
	}
	l.cast(uuid, novalet.MethodAddFixedIP, novalet.TaskNone, novalet.OperationArgs{NetworkID: "another"})
	eventually(t, "a network without a port is refused", func() bool { return len(l.world.Row(uuid).Faults) == 1 && l.idle(uuid) })
	if r := l.world.Row(uuid); r.VMState != novalet.VMActive {
		t.Errorf("the instance is %s", r.VMState)
	}
}

// A machine sets its addresses itself, but the host's side of its plug follows the port all the same.
func TestFixedIPOfAMachine(t *testing.T) {
	l := newLab(t)
	uuid := l.boot(func(op *novalet.Operation) { op.Args.Build.Image.ID = diskImage })
	before := l.h.Faults.Calls("VIFPlugger.Configure")
	l.cast(uuid, novalet.MethodAddFixedIP, novalet.TaskNone, novalet.OperationArgs{NetworkID: "net"})
	eventually(t, "the plug was configured", func() bool { return l.idle(uuid) && l.h.Faults.Calls("VIFPlugger.Configure") > before })
	if shown, inside := l.addresses(uuid); len(shown) != 2 || len(inside) != 0 {
		t.Errorf("Nova shows %v, the host set %v inside", shown, inside)
	}
}

// A crash after Neutron gave the address does not make it two.
func TestFixedIPOnce(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	dead := l.killAt("NetworkAPI.AddAddress", fake.After, 1)
	l.cast(uuid, novalet.MethodAddFixedIP, novalet.TaskNone, novalet.OperationArgs{NetworkID: "net"})
	dead()
	l.open()
	eventually(t, "Nova shows both addresses", func() bool {
		shown, _ := l.addresses(uuid)
		return len(shown) == 2
	})
	l.awaitAfterCrash(uuid, novalet.VMActive)
	if p := l.world.Ports(uuid); len(p) != 1 || len(p[0].More) != 1 {
		t.Errorf("ports %+v", p)
	}
}

// The tags of devices reach the guest's metadata, of the config drive and of nova-api's service.
func TestDeviceTags(t *testing.T) {
	l := newLab(t)
	uuid := l.boot(func(op *novalet.Operation) {
		op.Instance.ConfigDrive = "True"
		op.Args.Build.RequestedNetworks = []novalet.NetworkRequest{{NetworkID: "net"}, {NetworkID: "net", Tag: "backup"}}
		op.Args.Build.BlockDevices[0].Tag = "root"
	})
	mac := l.world.Row(uuid).Info[1].Address
	want := []novalet.TaggedDevice{{MAC: mac, Tag: "backup"}, {Path: "/dev/vda", Tag: "root"}}
	if got := l.world.Row(uuid).Devices; !slices.Equal(got, want) {
		t.Errorf("recorded %v, want %v", got, want)
	}
	drive := func() string {
		_, spec := l.world.Specs(uuid)
		for _, tree := range spec.Trees {
			for _, f := range tree.Files {
				if f.Path == "openstack/latest/meta_data.json" {
					return string(f.Data)
				}
			}
		}
		return ""
	}
	if d := drive(); !strings.Contains(d, `"tags":["backup"]`) || !strings.Contains(d, `"tags":["root"]`) {
		t.Errorf("config drive tells %s", d)
	}
	vif, err := l.agent.AttachInterface(context.Background(), &novalet.InterfaceRequest{Instance: novalet.Instance{UUID: uuid},
		Network: novalet.NetworkRequest{NetworkID: "net", Tag: "late"}})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new tag is recorded", func() bool {
		return slices.Contains(l.world.Row(uuid).Devices, novalet.TaggedDevice{MAC: vif.Address, Tag: "late"}) && l.idle(uuid)
	})
	l.crash()
	l.open() // tags survive a restart, and the next start of the guest shows the new one
	l.cast(uuid, novalet.MethodReboot, novalet.TaskRebootingHard, novalet.OperationArgs{RebootType: "HARD"})
	l.await(uuid, novalet.VMActive)
	if d := drive(); !strings.Contains(d, `"tags":["late"]`) {
		t.Errorf("config drive tells %s", d)
	}
	l.cast(uuid, novalet.MethodDetachIface, novalet.TaskNone, novalet.OperationArgs{PortID: vif.ID})
	eventually(t, "the tag is gone", func() bool {
		return l.idle(uuid) && !slices.ContainsFunc(l.world.Row(uuid).Devices, func(d novalet.TaggedDevice) bool { return d.Tag == "late" })
	})
}

// Tags are known again on the host that an instance comes to.
func TestDeviceTagsMove(t *testing.T) {
	l := newLab(t)
	uuid := l.boot(func(op *novalet.Operation) {
		op.Instance.ConfigDrive = "True"
		op.Args.Build.RequestedNetworks = []novalet.NetworkRequest{{NetworkID: "net", Tag: "front"}}
	})
	l.cast(uuid, novalet.MethodShelve, novalet.TaskShelving, novalet.OperationArgs{ImageID: "shelf"})
	l.await(uuid, novalet.VMShelvedOffloaded)
	eventually(t, "the record is gone", func() bool { _, err := l.agent.lookup(uuid); return err != nil })
	l.world.Allocate(uuid)
	l.cast(uuid, novalet.MethodUnshelve, novalet.TaskUnshelving, novalet.OperationArgs{Build: &novalet.BuildArgs{Image: novalet.ImageMeta{ID: appImage}, Node: testHost}})
	l.await(uuid, novalet.VMActive)
	_, spec := l.world.Specs(uuid)
	found := false
	for _, tree := range spec.Trees {
		for _, f := range tree.Files {
			found = found || f.Path == "openstack/latest/meta_data.json" && strings.Contains(string(f.Data), `"tags":["front"]`)
		}
	}
	if !found {
		t.Error("the config drive does not tell the tag")
	}
	if _, err := l.agent.AttachInterface(context.Background(), &novalet.InterfaceRequest{Instance: novalet.Instance{UUID: uuid},
		Network: novalet.NetworkRequest{NetworkID: "net", Tag: "late"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both tags are recorded", func() bool { return len(l.world.Row(uuid).Devices) == 2 })
}
