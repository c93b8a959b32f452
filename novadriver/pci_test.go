package novadriver

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

// The rows of devices and the pools of the compute node are what the host says, and are saved only when that changes.
func TestDeviceRows(t *testing.T) {
	b := newBench(t, "zed", func(o *Options) { o.UpdateInterval = time.Hour })
	d := b.build()
	d.setNode(&node{uuid: "7a7b2c1e-0000-4000-8000-0000000000f1"})
	device := func(address string) novalet.PCIDevice {
		return novalet.PCIDevice{Address: address, VendorID: "8086", ProductID: "1520", Parent: "0000:03:00.0", ParentName: "ens1",
			Tags: map[string]string{"physical_network": "physnet1"}}
	}
	one, two := device("0000:03:10.0"), device("0000:03:10.2")
	update := func(devices []novalet.PCIDevice, claims ...novalet.PCIClaim) (saved int) {
		t.Helper()
		b.agent.set(func() {
			b.agent.resources.PCI, b.agent.resources.PCIDevices, b.agent.resources.PCIClaims = true, devices, claims
		})
		b.conductor.Forget()
		for range 2 {
			if err := d.tracker.update(b.ctx()); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range b.conductor.Requests() {
			if r.Object == "PciDevice" {
				saved++
			}
		}
		return saved
	}
	rows := func() (out []string) {
		for _, r := range b.conductor.Find("PciDevice", "vendor_id", "8086") {
			out = append(out, strings.TrimSpace(r.Str("address")+" "+r.Str("status")+" "+r.Str("instance_uuid")+" "+r.Str("request_id")))
		}
		slices.Sort(out)
		return out
	}
	pools := func() string {
		l, err := ovo.Decode(b.conductor.Find("ComputeNode", "host", "host1")[0]["pci_device_pools"])
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, p := range l.Objects() {
			tags, err := json.Marshal(p.StringMap("tags"))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, p.String("vendor_id")+":"+p.String("product_id")+" "+string(p.Raw("numa_node"))+" "+string(p.Raw("count"))+" "+string(tags))
		}
		return strings.Join(out, "\n")
	}
	check := func(what string, saved, wantSaved int, wantRows []string, wantPools string) {
		t.Helper()
		if saved != wantSaved {
			t.Errorf("%s: %d rows were saved, want %d", what, saved, wantSaved)
		}
		if diff := cmp.Diff(wantRows, rows()); diff != "" {
			t.Errorf("%s: rows: %s", what, diff)
		}
		if diff := cmp.Diff(wantPools, pools()); diff != "" {
			t.Errorf("%s: pools: %s", what, diff)
		}
	}
	const tags = ` {"dev_type":"type-VF","parent_ifname":"ens1","physical_network":"physnet1","remote_managed":"false"}`
	both := []novalet.PCIDevice{one, two}
	check("found", update(both), 2, []string{"0000:03:10.0 available", "0000:03:10.2 available"}, "8086:1520 null 2"+tags)
	claim := novalet.PCIClaim{Device: one, InstanceUUID: instUUID, RequestID: "r1", PortID: "p1"}
	check("claimed", update(both, claim), 1, []string{"0000:03:10.0 claimed " + instUUID + " r1", "0000:03:10.2 available"}, "8086:1520 null 1"+tags)
	claim.Allocated = true
	check("allocated", update(both, claim), 1, []string{"0000:03:10.0 allocated " + instUUID + " r1", "0000:03:10.2 available"}, "8086:1520 null 1"+tags)
	// Another process reads the rows, and finds nothing to change.
	d.tracker.devices = nil
	check("after a restart", update(both, claim), 0, []string{"0000:03:10.0 allocated " + instUUID + " r1", "0000:03:10.2 available"}, "8086:1520 null 1"+tags)
	// Off the list: the one that is in use stays.
	check("taken off the list", update(nil, claim), 1, []string{"0000:03:10.0 allocated " + instUUID + " r1"}, "")
	check("given back", update(both), 2, []string{"0000:03:10.0 available", "0000:03:10.2 available"}, "8086:1520 null 2"+tags)
}

// What a port and what a flavor asks for is read from the instance.
func TestPCIRequests(t *testing.T) {
	o, err := ovo.Decode(json.RawMessage(`{"nova_object.name": "InstancePCIRequests", "nova_object.namespace": "nova", "nova_object.version": "1.1",
		"nova_object.data": {"instance_uuid": "x", "requests": [{"nova_object.name": "InstancePCIRequest", "nova_object.namespace": "nova",
		"nova_object.version": "1.4", "nova_object.data": {"count": 1, "alias_name": null, "request_id": "r1", "requester_id": "P1",
		"spec": [{"physical_network": "physnet1", "remote_managed": "False", "x": null}]}}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	want := []novalet.PCIRequest{{ID: "r1", PortID: "p1", Count: 1, Spec: []map[string]string{{"physical_network": "physnet1", "remote_managed": "False", "x": ""}}}}
	if diff := cmp.Diff(want, pciRequestsOf(o)); diff != "" {
		t.Error(diff)
	}
	if got := pciRequestsOf(nil); got != nil {
		t.Errorf("of none: %v", got)
	}
}
