package novalet

import (
	"maps"
	"strconv"
)

// PCIDevice is a network function of this host that the operator lets instances have ([pci] device_spec): a virtual
// function of an SR-IOV interface.
type PCIDevice struct {
	Address   string `json:"address"`    // "0000:03:10.2"
	VendorID  string `json:"vendor_id"`  // four hexadecimal digits
	ProductID string `json:"product_id"` // four hexadecimal digits
	NUMANode  *int   `json:"numa_node,omitempty"`
	// Name is the interface's name on the host, which it gets back. "" while it is in an instance.
	Name string `json:"name,omitempty"`
	// Parent is the address of the physical function, ParentName and ParentMAC those of its interface. VF is the number
	// under which that one knows this function.
	Parent     string `json:"parent"`
	ParentName string `json:"parent_name"`
	ParentMAC  string `json:"parent_mac"`
	VF         int    `json:"vf"`
	// Tags are those of the device_spec that lets it be used: physical_network, trusted and any other.
	Tags map[string]string `json:"tags,omitempty"`
}

// Properties are what requests may ask for of a device: those of Nova's pools (nova/pci/stats.py), tags among them.
func (d *PCIDevice) Properties() map[string]string {
	p := map[string]string{"remote_managed": "false"}
	maps.Copy(p, d.Tags)
	p["vendor_id"], p["product_id"], p["dev_type"] = d.VendorID, d.ProductID, "type-VF"
	if d.NUMANode != nil {
		p["numa_node"] = strconv.Itoa(*d.NUMANode)
	}
	if d.ParentName != "" {
		p["parent_ifname"] = d.ParentName
	}
	return p
}

// PCIRequest asks for devices for an instance (nova.objects.InstancePCIRequest).
type PCIRequest struct {
	ID     string `json:"id"`             // of the request
	PortID string `json:"port_id"`        // Neutron's port that it is for; "" when it is not for one
	Alias  string `json:"alias,omitzero"` // of the flavor that it came from; "" when a port asked
	Count  int64  `json:"count"`
	// Spec lists what each device must have: any one of these.
	Spec []map[string]string `json:"spec,omitempty"`
}

// PCIClaim says which instance has a device.
type PCIClaim struct {
	Device       PCIDevice `json:"device"`
	InstanceUUID string    `json:"-"`
	RequestID    string    `json:"request_id"`
	PortID       string    `json:"port_id"`
	// Allocated: the instance was brought up with it. Until then it is claimed.
	Allocated bool `json:"-"`
}

// PCIDevices finds the devices that instances may have, whoever has them now. Served by network/sriov. It reads /sys.
type PCIDevices interface {
	PCIDevices() ([]PCIDevice, error)
}
