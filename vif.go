package novalet

import (
	"context"
	"encoding/json"
)

// NetworkInfo is Nova's network_info: the VIFs of an instance in request order. It marshals to the very JSON
// that InstanceInfoCache.network_info holds: readers there index every key, so none is left out
// (nova/network/model.py).
type NetworkInfo []VIF

// VIF is one network interface of an instance, as Nova's network model has it.
type VIF struct {
	ID             string                     `json:"id"`      // Neutron port
	Address        string                     `json:"address"` // MAC
	Network        VIFNetwork                 `json:"network"`
	Type           string                     `json:"type"` // binding:vif_type: ovs, bridge, tap, binding_failed, …
	Details        map[string]json.RawMessage `json:"details"`
	DevName        string                     `json:"devname"` // ("tap"+id)[:14]
	OVSInterfaceID *string                    `json:"ovs_interfaceid"`
	QBHParams      json.RawMessage            `json:"qbh_params"` // always null here; the key must exist
	QBGParams      json.RawMessage            `json:"qbg_params"`
	// Active: the port is ACTIVE, or its admin state is down: nothing to wait for.
	Active   bool                       `json:"active"`
	VNICType string                     `json:"vnic_type"`
	Profile  map[string]json.RawMessage `json:"profile"`
	// PreserveOnDelete: the port existed before the instance; it is unbound, not deleted.
	PreserveOnDelete bool                       `json:"preserve_on_delete"`
	DelegateCreate   bool                       `json:"delegate_create"`
	Meta             map[string]json.RawMessage `json:"meta"`
	// Device is the device of the host that the instance was given for this port, where its binding needs one. It is the
	// agent's own knowledge: what Neutron says in the profile is told by others.
	Device *PCIDevice `json:"-"`
}

// VIFNetwork is the network a VIF is on.
type VIFNetwork struct {
	ID      string      `json:"id"`
	Bridge  string      `json:"bridge"`
	Label   string      `json:"label"`
	Subnets []Subnet    `json:"subnets"`
	Meta    NetworkMeta `json:"meta"`
}

// NetworkMeta carries the MTU among other things.
type NetworkMeta struct {
	Injected        bool    `json:"injected"`
	TenantID        string  `json:"tenant_id"`
	MTU             int     `json:"mtu"` // bytes
	PhysicalNetwork *string `json:"physical_network"`
	Tunneled        bool    `json:"tunneled"`
	// ShouldCreateBridge is set for vif_type bridge.
	ShouldCreateBridge *bool `json:"should_create_bridge,omitempty"`
}

// Subnet is an address range with the instance's addresses in it.
type Subnet struct {
	CIDR    string     `json:"cidr"`
	DNS     []IP       `json:"dns"`
	Gateway IP         `json:"gateway"`
	IPs     []FixedIP  `json:"ips"`
	Routes  []Route    `json:"routes"`
	Version int        `json:"version"` // 4 or 6
	Meta    SubnetMeta `json:"meta"`
}

// SubnetMeta says how addresses are given.
type SubnetMeta struct {
	DHCPServer      string `json:"dhcp_server,omitempty"`
	EnableDHCP      *bool  `json:"enable_dhcp,omitempty"`
	IPv6AddressMode string `json:"ipv6_address_mode,omitempty"`
	IPv6RAMode      string `json:"ipv6_ra_mode,omitempty"`
}

// IP is an address of some role ("dns", "gateway"); Address nil and Version nil stand for none.
type IP struct {
	Address *string  `json:"address"`
	Type    string   `json:"type"`
	Version *int     `json:"version"`
	Meta    struct{} `json:"meta"`
}

// FixedIP is an address of the port, with the floating addresses that lead to it.
type FixedIP struct {
	Address     string    `json:"address"`
	Type        string    `json:"type"` // "fixed" or "floating"
	Version     int       `json:"version"`
	Meta        struct{}  `json:"meta"`
	FloatingIPs []FixedIP `json:"floating_ips,omitempty"`
}

// MarshalJSON implements json.Marshaler: a fixed address has its floating_ips also when there are none, a floating one
// has no such key.
func (f FixedIP) MarshalJSON() ([]byte, error) {
	type plain FixedIP
	if f.Type != "fixed" {
		f.FloatingIPs = nil
		return json.Marshal(plain(f))
	}
	if f.FloatingIPs == nil {
		f.FloatingIPs = []FixedIP{}
	}
	return json.Marshal(struct {
		plain
		FloatingIPs []FixedIP `json:"floating_ips"`
	}{plain(f), f.FloatingIPs})
}

// Route is a host route of a subnet.
type Route struct {
	CIDR      string          `json:"cidr"`
	Gateway   IP              `json:"gateway"`
	Interface json.RawMessage `json:"interface"`
	Meta      struct{}        `json:"meta"`
}

// NetworkRequest is one element of a boot request's networks (nova.objects.NetworkRequest).
type NetworkRequest struct {
	NetworkID string `json:"network_id,omitempty"` // also "auto" and "none"
	Address   string `json:"address,omitempty"`    // fixed IP asked for
	PortID    string `json:"port_id,omitempty"`
	Tag       string `json:"tag,omitempty"`
	// Device was claimed for this port.
	Device *PCIDevice `json:"-"`
}

// AllocateRequest asks for the ports of an instance.
type AllocateRequest struct {
	Context        RequestContext
	Instance       *Instance
	Networks       []NetworkRequest // nil or empty: the project's only network, if there is one
	SecurityGroups []string         // names or ids
	// Attach: the request adds an interface to a running instance.
	Attach bool
}

// NetworkAPI makes, binds and frees ports. Served by network/neutron, or by the embedded controller.
type NetworkAPI interface {
	// Allocate creates or takes over the ports and binds them to this host. It must come after instance.host was
	// saved. On error everything it made is undone. Errors: ErrAbort with the Nova class (PortInUse, NoMoreFixedIps,
	// PortBindingFailed, …), ErrTryAgain.
	Allocate(ctx context.Context, r *AllocateRequest) (NetworkInfo, error)
	// Deallocate deletes the instance's ports and unbinds those with PreserveOnDelete. It asks Neutron for what
	// the instance has, so that ports missing from the given info go too. Nil when nothing is left.
	Deallocate(ctx context.Context, rc RequestContext, inst *Instance, info NetworkInfo) error
	// Release frees one port as Deallocate does for all.
	Release(ctx context.Context, rc RequestContext, inst *Instance, vif *VIF) error
	// Unbind takes the host from the ports and leaves them to the instance (shelve offload).
	Unbind(ctx context.Context, rc RequestContext, inst *Instance, info NetworkInfo) error
	// Bind binds the instance's ports to this host and returns what they became.
	Bind(ctx context.Context, rc RequestContext, inst *Instance, info NetworkInfo) (NetworkInfo, error)
	// Refresh rebuilds the network info from Neutron, keeping order and preserve_on_delete of what is cached.
	Refresh(ctx context.Context, rc RequestContext, inst *Instance, cached NetworkInfo) (NetworkInfo, error)
	// AddAddress gives a port that the instance has on the network one more address, of its first subnet that has one.
	// ErrNotFound (NetworkNotFoundForInstance) when it has no port there. It is not safe to repeat: each call adds one.
	AddAddress(ctx context.Context, rc RequestContext, inst *Instance, networkID string) error
	// RemoveAddress takes an address from the port that has it. ErrNotFound (FixedIpNotFoundForInstance) when none has.
	RemoveAddress(ctx context.Context, rc RequestContext, inst *Instance, address string) error
	// PortActive says whether the port is wired (status ACTIVE). ErrNotFound when it is gone.
	PortActive(ctx context.Context, portID string) (bool, error)
}

// PlugRequest plugs one VIF into an instance's network namespace.
type PlugRequest struct {
	InstanceUUID string
	VIF          *VIF
	// NetNS is a path that opens the instance's network namespace, owned by the instance's user namespace.
	NetNS string
	// Index numbers the interface inside: eth<Index>.
	Index int
	// Static: set addresses, routes and the link up from the host (application kind). Otherwise the guest
	// configures itself and only name, MAC and MTU are set.
	Static bool
	// ExtraSpecs are the flavor's, for quota:vif_* limits.
	ExtraSpecs map[string]string
}

// VIFPlugger joins VIFs to the host's network. Served by network. Every method may be repeated and repairs what it
// finds half done; none waits for Neutron.
type VIFPlugger interface {
	// Check says by ErrAbort (PortBindingFailed, …) that this VIF cannot be plugged on this host, before anything is done.
	Check(vif *VIF) error
	// Plug makes the host side of the VIF and puts its inner end into the namespace.
	Plug(ctx context.Context, r *PlugRequest) error
	// Configure makes a plug follow its port's addresses after they changed: those inside, and the routes, of a Static one,
	// and on the host what keeps an instance from speaking under others.
	Configure(ctx context.Context, r *PlugRequest) error
	// Cut lets nothing pass the host side any more, which stays where it is: Neutron's agents do not see it go. What comes
	// next is Unplug, or Plug, which mends it. Nil when nothing is there.
	Cut(ctx context.Context, instanceUUID string, vif *VIF) error
	// Unplug removes the host side. Nil when nothing is there. It does not wait for the kernel to free the device.
	Unplug(ctx context.Context, instanceUUID string, vif *VIF) error
	// Park keeps the host side of a VIF wired while the instance does not run: the inner end leaves the namespace, which
	// may end then. The next Plug takes it over. Neutron's agents do not see the port go and come. It is the same as
	// Unplug when the guest got rid of the inner end. netns must still exist.
	Park(ctx context.Context, instanceUUID string, vif *VIF, netns string) error
	// Silence lets no frame of a VIF in or out of the instance while on, and leaves addresses, routes and the link as they
	// are: the kernel would go on speaking for a frozen guest. What the next Plug makes anew is not silent. netns must
	// exist. Nil when nothing is there.
	Silence(ctx context.Context, instanceUUID string, vif *VIF, netns string, on bool) error
	// Sweep removes plugs of ours whose instance is not among keep (by uuid), and returns what it removed.
	Sweep(ctx context.Context, keep map[string]bool) ([]string, error)
	// Stats returns rx and tx counters by VIF id, seen from the instance.
	Stats(ctx context.Context, instanceUUID string, info NetworkInfo) (map[string]InterfaceStats, error)
}

// InterfaceStats are the counters of one VIF since it was plugged, seen from the instance.
type InterfaceStats struct {
	RxBytes, RxPackets, RxErrors, RxDrop uint64
	TxBytes, TxPackets, TxErrors, TxDrop uint64
}
