package novadriver

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

// Nova keeps a row for each device that instances may have, and for the scheduler's PciPassthroughFilter the free ones
// summed up by kind, in the compute node (nova/pci/manager.py, stats.py). The host is the authority on both: each update
// makes them what the agent's records say.

// pciRequestsOf reads an InstancePCIRequests object; nil has none.
func pciRequestsOf(o *ovo.Object) []novalet.PCIRequest {
	var out []novalet.PCIRequest
	for _, r := range o.List("requests") {
		q := novalet.PCIRequest{ID: r.String("request_id"), PortID: strings.ToLower(r.String("requester_id")), Alias: r.String("alias_name"), Count: r.Int("count")}
		var specs []map[string]any
		_ = json.Unmarshal(r.Raw("spec"), &specs)
		for _, s := range specs {
			spec := map[string]string{}
			for k, v := range s {
				// A null asks for a device without the property, which "" compares as.
				if v == nil {
					v = ""
				}
				spec[k] = fmt.Sprint(v)
			}
			q.Spec = append(q.Spec, spec)
		}
		out = append(out, q)
	}
	return out
}

// hasPools says whether the node in Nova has pools, such as those of a configuration before.
func (t *tracker) hasPools() bool {
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	if t.d.node == nil {
		return false
	}
	l, err := ovo.Decode(t.d.node.saved["pci_device_pools"])
	return err == nil && l != nil && len(l.Objects()) > 0
}

// pools sums up the devices that nobody has (nova/pci/stats.py): by vendor, product, NUMA node and tags.
func (t *tracker) pools(res novalet.HostResources) *ovo.Object {
	rel := t.d.release.get()
	taken := map[string]bool{}
	for _, c := range res.PCIClaims {
		taken[c.Device.Address] = true
	}
	count := map[string]int{}
	kinds := map[string]map[string]any{}
	for i := range res.PCIDevices {
		d := &res.PCIDevices[i]
		if taken[d.Address] {
			continue
		}
		tags := d.Properties()
		for _, k := range []string{"vendor_id", "product_id", "numa_node"} {
			delete(tags, k)
		}
		kind := map[string]any{"vendor_id": d.VendorID, "product_id": d.ProductID, "numa_node": d.NUMANode, "tags": tags}
		key, err := json.Marshal(kind)
		if err != nil {
			continue // of texts and a number, so it cannot be
		}
		count[string(key)]++
		kinds[string(key)] = kind
	}
	list := []*ovo.Object{}
	for _, key := range slices.Sorted(maps.Keys(kinds)) {
		kinds[key]["count"] = count[key]
		list = append(list, rel.Minimal("PciDevicePool", kinds[key]))
	}
	return rel.Minimal("PciDevicePoolList", map[string]any{"objects": list})
}

// deviceRow is what Nova's row of a device says.
func deviceRow(d *novalet.PCIDevice, c *novalet.PCIClaim) map[string]any {
	capabilities, err := json.Marshal(map[string]any{"sriov": map[string]any{"pf_mac_address": d.ParentMAC, "vf_num": d.VF}})
	if err != nil {
		capabilities = []byte("{}")
	}
	row := map[string]any{
		"vendor_id": d.VendorID, "product_id": d.ProductID, "dev_type": "type-VF", "numa_node": d.NUMANode, "parent_addr": d.Parent,
		"dev_id":     "pci_" + strings.NewReplacer(":", "_", ".", "_").Replace(d.Address),
		"label":      "label_" + d.VendorID + "_" + d.ProductID,
		"extra_info": map[string]string{"parent_ifname": d.ParentName, "capabilities": string(capabilities)},
		"status":     "available", "instance_uuid": nil, "request_id": nil,
	}
	if c != nil {
		row["status"], row["instance_uuid"], row["request_id"] = "claimed", c.InstanceUUID, c.RequestID
		if c.Allocated {
			row["status"] = "allocated"
		}
	}
	return row
}

// saveDevices makes Nova's rows of the devices what the host says.
func (t *tracker) saveDevices(ctx context.Context, res novalet.HostResources) error {
	if !res.PCI && len(t.devices) == 0 {
		return nil
	}
	t.d.mu.Lock()
	node := t.d.node.id
	t.d.mu.Unlock()
	if t.devices == nil {
		if err := t.readDevices(ctx, node); err != nil {
			return err
		}
	}
	claims := map[string]*novalet.PCIClaim{}
	want := map[string]map[string]any{}
	for i := range res.PCIDevices {
		want[res.PCIDevices[i].Address] = nil
	}
	for i := range res.PCIClaims {
		c := &res.PCIClaims[i]
		claims[c.Device.Address] = c
		// Also when the operator has taken the device off the list, or the card is gone: an instance has it still.
		want[c.Device.Address] = deviceRow(&c.Device, c)
	}
	for i := range res.PCIDevices {
		d := &res.PCIDevices[i]
		want[d.Address] = deviceRow(d, claims[d.Address])
	}
	var errs []error
	for _, address := range slices.Sorted(maps.Keys(want)) {
		errs = append(errs, t.saveDevice(ctx, node, address, want[address]))
	}
	for _, address := range slices.Sorted(maps.Keys(t.devices)) {
		if _, ok := want[address]; !ok {
			errs = append(errs, t.removeDevice(ctx, node, address))
		}
	}
	return errors.Join(errs...)
}

func (t *tracker) readDevices(ctx context.Context, node int64) error {
	raw, err := t.d.rpc.class(ctx, t.d.adminContext(), "PciDeviceList", "get_by_compute_node", []any{node}, nil)
	if err != nil {
		return fmt.Errorf("list the devices of this host: %w", err)
	}
	l, err := ovo.Decode(raw)
	if err != nil {
		return fmt.Errorf("list the devices of this host: %w", err)
	}
	t.devices = map[string]*ovo.Object{}
	for _, o := range l.Objects() {
		t.devices[o.String("address")] = o
	}
	return nil
}

// saveDevice writes what has changed of a row, or makes it. PciDevice.save finds the row by node and address, and makes it
// where there is none.
func (t *tracker) saveDevice(ctx context.Context, node int64, address string, row map[string]any) error {
	rel := t.d.release.get()
	o := rel.Minimal("PciDevice", row)
	old := t.devices[address]
	if old == nil {
		o.Set("uuid", newUUID())
		o.Set("compute_node_id", node)
		o.Set("address", address)
	} else {
		o.Changes = slices.DeleteFunc(o.Changes, func(f string) bool { return same(old.Raw(f), o.Raw(f), "") })
		if len(o.Changes) == 0 {
			return nil
		}
		o.Key("compute_node_id", node).Key("address", address).Key("uuid", old.String("uuid"))
		o = o.ForSave("compute_node_id", "address", "uuid", "status")
	}
	if _, err := t.d.rpc.object(ctx, t.d.adminContext(), o, "save", nil, nil); err != nil {
		return fmt.Errorf("save device %s: %w", address, err)
	}
	kept := rel.Minimal("PciDevice", row)
	kept.Set("uuid", cmp.Or(o.String("uuid"), old.String("uuid")))
	t.devices[address] = kept
	return nil
}

// removeDevice deletes the row of a device that is no more, or that may not be used any more.
func (t *tracker) removeDevice(ctx context.Context, node int64, address string) error {
	old := t.devices[address]
	o := t.d.release.get().Minimal("PciDevice", map[string]any{"status": "removed", "instance_uuid": nil, "request_id": nil})
	o.Key("compute_node_id", node).Key("address", address).Key("uuid", old.String("uuid"))
	_, err := t.d.rpc.object(ctx, t.d.adminContext(), o, "save", nil, nil)
	if err != nil && !isClass(err, "PciDeviceNotFound") {
		return fmt.Errorf("remove device %s: %w", address, err)
	}
	delete(t.devices, address)
	return nil
}
