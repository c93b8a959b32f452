package neutron

import (
	"fmt"
	"testing"

	"github.com/novalet/novalet"
)

// TestDirectPort: a port of vnic_type direct is bound with the device that it gets, and comes back without.
func TestDirectPort(t *testing.T) {
	const id = "7ed59832-79d2-4d5a-922b-37f4f21d695a"
	f := newFake(t)
	a := newAPI(t, f)
	n := f.networks[netB]
	n["provider:network_type"], n["provider:physical_network"] = "vlan", "physnet1"
	p := f.port(id, netB, projectID)
	p["binding:vnic_type"], p["binding:profile"] = "direct", object{"trusted": "true", "kept": "yes"}
	ask, err := a.PCIRequest(t.Context(), userContext(), instance(), id)
	if err != nil || ask == nil || ask.PortID != id || ask.Count != 1 || len(ask.Spec) != 1 ||
		fmt.Sprint(ask.Spec[0]) != "map[physical_network:physnet1 remote_managed:False trusted:true]" {
		t.Fatalf("asked for: %+v, %v", ask, err)
	}
	d := &novalet.PCIDevice{Address: "0000:03:10.2", VendorID: "8086", ProductID: "1520", Tags: map[string]string{"physical_network": "physnet1"}}
	bound := func() string { return fmt.Sprint(f.ports[id]["binding:profile"]) }
	const with = "map[kept:yes pci_slot:0000:03:10.2 pci_vendor_info:8086:1520 physical_network:physnet1 trusted:true]"
	info, err := a.Allocate(t.Context(), request(novalet.NetworkRequest{PortID: id, Device: d}))
	if err != nil {
		t.Fatal(err)
	}
	if bound() != with {
		t.Errorf("bound with %s", bound())
	}
	if string(info[0].Profile["pci_slot"]) != `"0000:03:10.2"` || info[0].VNICType != "direct" {
		t.Errorf("vif %+v", info[0])
	}
	const without = "map[kept:yes trusted:true]"
	if err := a.Unbind(t.Context(), userContext(), instance(), info); err != nil || bound() != without {
		t.Errorf("unbound with %s, %v", bound(), err)
	}
	_, err = a.Bind(t.Context(), userContext(), instance(), info)
	assertFault(t, err, novalet.ErrAbort, "PortNotUsable")
	info[0].Device = d
	if _, err := a.Bind(t.Context(), userContext(), instance(), info); err != nil || bound() != with {
		t.Errorf("bound again with %s, %v", bound(), err)
	}
	if err := a.Release(t.Context(), userContext(), instance(), &info[0]); err != nil || bound() != without {
		t.Errorf("released with %s, %v", bound(), err)
	}
	p["binding:vnic_type"] = "normal"
	if ask, err := a.PCIRequest(t.Context(), userContext(), instance(), id); err != nil || ask != nil {
		t.Errorf("a normal port asks for %+v, %v", ask, err)
	}
	p["binding:vnic_type"], n["provider:physical_network"] = "direct", nil
	a.Invalidate(netB)
	_, err = a.PCIRequest(t.Context(), userContext(), instance(), id)
	assertFault(t, err, novalet.ErrAbort, "PortNotUsable")
}

// TestSpoofCheck: the card lets a port speak under any address only where its owner has switched port security off.
func TestSpoofCheck(t *testing.T) {
	a := newAPI(t, newFake(t))
	yes, no := true, false
	for security, want := range map[*bool]string{nil: "", &yes: "", &no: "false"} {
		v, err := a.vif(&facts{}, &port{ID: instUUID, NetworkID: netB, MAC: "fa:16:3e:00:00:01", VIFType: "hw_veb", VNICType: "direct", PortSecurity: security}, false)
		if err != nil || string(v.Details[spoofKey]) != want {
			t.Errorf("port security %v: %s, %v", security, v.Details[spoofKey], err)
		}
	}
}
