package neutron

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"regexp"
)

// port is a Neutron port as far as this package reads it.
type port struct {
	ID          string                     `json:"id"`
	NetworkID   string                     `json:"network_id"`
	TenantID    string                     `json:"tenant_id"`
	ProjectID   string                     `json:"project_id"`
	MAC         string                     `json:"mac_address"`
	AdminUp     *bool                      `json:"admin_state_up"`
	Status      string                     `json:"status"`
	DeviceID    string                     `json:"device_id"`
	DeviceOwner string                     `json:"device_owner"`
	FixedIPs    []fixedIP                  `json:"fixed_ips"`
	DNSName     string                     `json:"dns_name"`
	VNICType    string                     `json:"binding:vnic_type"`
	Profile     map[string]json.RawMessage `json:"binding:profile"`
	HostID      string                     `json:"binding:host_id"`
	VIFType     string                     `json:"binding:vif_type"`
	Details     map[string]json.RawMessage `json:"binding:vif_details"`
	// PortSecurity is nil where Neutron has no such extension.
	PortSecurity *bool             `json:"port_security_enabled"`
	Pairs        []json.RawMessage `json:"allowed_address_pairs"`
	// Resources is set when a QoS policy asks for guaranteed bandwidth.
	Resources json.RawMessage `json:"resource_request"`
	// Revision grows with each change; 0 where Neutron does not count.
	Revision int `json:"revision_number"`
}

type fixedIP struct {
	SubnetID string `json:"subnet_id"`
	Address  string `json:"ip_address"`
}

type network struct {
	ID           string   `json:"id"`
	Name         string   `json:"name"`
	TenantID     string   `json:"tenant_id"`
	AdminUp      *bool    `json:"admin_state_up"`
	MTU          int      `json:"mtu"`
	Subnets      []string `json:"subnets"`
	Shared       bool     `json:"shared"`
	External     bool     `json:"router:external"`
	PortSecurity *bool    `json:"port_security_enabled"`
	DNSDomain    string   `json:"dns_domain"`

	Type     *string   `json:"provider:network_type"`
	Physical *string   `json:"provider:physical_network"`
	Segments []segment `json:"segments"`
}

type segment struct {
	Type     *string `json:"provider:network_type"`
	Physical *string `json:"provider:physical_network"`
}

type subnet struct {
	ID          string      `json:"id"`
	NetworkID   string      `json:"network_id"`
	CIDR        string      `json:"cidr"`
	GatewayIP   *string     `json:"gateway_ip"`
	IPVersion   int         `json:"ip_version"`
	EnableDHCP  bool        `json:"enable_dhcp"`
	AddressMode *string     `json:"ipv6_address_mode"`
	RAMode      *string     `json:"ipv6_ra_mode"`
	DNS         []string    `json:"dns_nameservers"`
	HostRoutes  []hostRoute `json:"host_routes"`
}

type hostRoute struct {
	Destination string `json:"destination"`
	Nexthop     string `json:"nexthop"`
}

type floatingIP struct {
	PortID  string `json:"port_id"`
	Address string `json:"floating_ip_address"`
	Fixed   string `json:"fixed_ip_address"`
}

// ipam is what is known of a network's addresses.
type ipam struct {
	subnets []subnet
	dhcp    map[string]string // subnet id to the first DHCP server there
}

func (p *port) project() string {
	if p.TenantID != "" {
		return p.TenantID
	}
	return p.ProjectID
}

var uuidRE = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// check refuses a port whose fields would end up in names and addresses of the host without being what they say.
func (p *port) check() error {
	if !uuidRE.MatchString(p.ID) || !uuidRE.MatchString(p.NetworkID) {
		return fmt.Errorf("port %.40q of network %.40q: no uuid", p.ID, p.NetworkID)
	}
	if hw, err := net.ParseMAC(p.MAC); err != nil || len(hw) != 6 {
		return fmt.Errorf("port %s: %.40q is no MAC address", p.ID, p.MAC)
	}
	for _, ip := range p.FixedIPs {
		if _, err := netip.ParseAddr(ip.Address); err != nil {
			return fmt.Errorf("port %s: %.60q is no address", p.ID, ip.Address)
		}
	}
	return nil
}

// errorType reads the type of a NeutronError body: the exception's class name.
func errorType(body []byte) string {
	var e struct {
		NeutronError struct{ Type string }
	}
	if json.Unmarshal(body, &e) != nil {
		return ""
	}
	return e.NeutronError.Type
}
