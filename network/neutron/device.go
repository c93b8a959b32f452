package neutron

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/novalet/novalet"
)

// vnicDirect is the vnic_type of a port that is a network function of the host, to be had as a whole.
const vnicDirect = "direct"

// deviceProfile is a port's binding:profile with the device it gets (nova/network/neutron.py, _get_pci_device_profile).
// The card's serial number, and with it what only off-path backends read, is left out as Nova leaves it out of cards that
// have none to tell.
func deviceProfile(profile map[string]json.RawMessage, d *novalet.PCIDevice) map[string]any {
	out := map[string]any{}
	for k, v := range profile {
		out[k] = v
	}
	out["pci_vendor_info"] = d.VendorID + ":" + d.ProductID
	out["pci_slot"] = d.Address
	out["physical_network"] = nil
	if n, ok := d.Tags["physical_network"]; ok {
		out["physical_network"] = n
	}
	return out
}

// withoutDevice is a profile without what binding put there.
func withoutDevice(profile map[string]json.RawMessage) map[string]json.RawMessage {
	kept := maps.Clone(profile)
	if kept == nil {
		kept = map[string]json.RawMessage{}
	}
	for _, k := range deviceKeys {
		delete(kept, k)
	}
	return kept
}

func deviceIn(info novalet.NetworkInfo, portID string) *novalet.PCIDevice {
	i := slices.IndexFunc(info, func(v novalet.VIF) bool { return v.ID == portID })
	if i < 0 {
		return nil
	}
	return info[i].Device
}

// PCIRequest says which device a port needs, as nova-api would for a new server (create_resource_requests); nil when it needs
// none. ErrAbort (PortNotFound) when there is no such port.
func (a *API) PCIRequest(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, portID string) (*novalet.PCIRequest, error) {
	ctx = withRequest(ctx, rc)
	if !uuidRE.MatchString(portID) {
		return nil, portNotFound(portID, nil)
	}
	admin, err := a.admin(ctx)
	if err != nil {
		return nil, fmt.Errorf("read port %s: %w", portID, err)
	}
	var body struct{ Port *port }
	if err := admin.get(ctx, "ports/"+portID, nil, &body); err != nil {
		return nil, err
	}
	p := body.Port
	if p == nil || p.ID != portID {
		return nil, portNotFound(portID, nil)
	}
	if p.VNICType != vnicDirect {
		return nil, nil
	}
	nets, err := a.details(ctx, admin, []string{p.NetworkID})
	if err != nil {
		return nil, err
	}
	n := nets[p.NetworkID]
	if n == nil {
		return nil, networkNotFound(p.NetworkID, nil)
	}
	physical, _ := n.wire()
	if physical == nil || *physical == "" {
		return nil, fault("PortNotUsable", map[string]any{"port_id": portID, "instance": inst.UUID}, nil,
			"Port %s has vnic_type direct, but its network is on no physical one.", portID)
	}
	spec := map[string]string{"physical_network": *physical, "remote_managed": "False"}
	var trusted any
	if json.Unmarshal(p.Profile["trusted"], &trusted) == nil && trusted != nil {
		spec["trusted"] = fmt.Sprint(trusted)
	}
	// Nova makes an id up; the port's serves as well, and a second try finds it.
	return &novalet.PCIRequest{ID: portID, PortID: portID, Count: 1, Spec: []map[string]string{spec}}, nil
}
