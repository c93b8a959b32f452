package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// Neutron's macvtap agent knows a port as wired when it finds, among the devices of the host, one whose name begins with
// "macvtap" and which has the port's MAC address (macvtap_neutron_agent.py, get_all_devices); it brings the device up or
// down as the port's admin state says. A device in an instance's namespace it cannot see. So the device on the physical
// interface stays on the host, and two classifiers carry every frame between it and the host's end of the instance's
// pair. The instance has no hand on it either: what it sends can be filtered.

// macvtapName is the name of the device on the physical interface.
func macvtapName(portID string) string { return "macvtap" + portID[:8] }

// macvtapDetails is the part of binding:vif_details that Neutron's macvtap mechanism writes.
type macvtapDetails struct {
	Source   string `json:"macvtap_source"`
	Mode     string `json:"macvtap_mode"`
	Physical string `json:"physical_interface"`
	VLAN     int    `json:"vlan"` // 0: a flat network
}

var macvtapModes = map[string]netlink.MacvlanMode{
	"": netlink.MACVLAN_MODE_BRIDGE, "bridge": netlink.MACVLAN_MODE_BRIDGE, "vepa": netlink.MACVLAN_MODE_VEPA, "private": netlink.MACVLAN_MODE_PRIVATE,
}

// macvtapOf reads and checks the details. The error is for the tenant's eyes.
func macvtapOf(v *novalet.VIF) (*macvtapDetails, error) {
	var d macvtapDetails
	for key, to := range map[string]any{"macvtap_source": &d.Source, "macvtap_mode": &d.Mode, "physical_interface": &d.Physical, "vlan": &d.VLAN} {
		if raw, ok := v.Details[key]; ok && string(raw) != "null" {
			if err := json.Unmarshal(raw, to); err != nil {
				return nil, fmt.Errorf("its %s is not what it should be", key)
			}
		}
	}
	if _, ok := macvtapModes[d.Mode]; !ok {
		return nil, fmt.Errorf("a container cannot use macvtap_mode %.20q", d.Mode)
	}
	if !nameRE.MatchString(d.Source) {
		return nil, errors.New("its macvtap_source is no valid name")
	}
	if d.VLAN < 0 || d.VLAN > 4094 || d.VLAN != 0 && !nameRE.MatchString(d.Physical) {
		return nil, errors.New("its VLAN has no valid number or interface")
	}
	return &d, nil
}

// plugMacvtap makes port -> tap<port> = macvtap<port> -> physical interface.
func (p *Plugger) plugMacvtap(r *novalet.PlugRequest, ns *os.File) error {
	d, err := macvtapOf(r.VIF)
	if err != nil {
		return err
	}
	source, err := p.macvtapSource(r.VIF, d)
	if err != nil {
		return err
	}
	dev, err := p.ensureMacvtap(r, d, source)
	if err != nil {
		return err
	}
	// The paths before either device comes up: until then its frames would reach the host's own stack.
	if err := p.plugPair(r, ns, 0, dev.Attrs().Index); err != nil {
		return err
	}
	if err := p.reguard(r.VIF); err != nil {
		return err
	}
	tap, err := p.link(tapName(r.VIF.ID))
	if err == nil && tap == nil {
		err = fmt.Errorf("device %s vanished", tapName(r.VIF.ID))
	}
	if err != nil {
		return err
	}
	if err := p.redirect(dev, tap.Attrs().Index); err != nil {
		return err
	}
	// A device that was up once may be down because the port's admin state is: its agent would not look again.
	known := dev.Attrs().RawFlags&unix.IFF_ALLMULTI != 0
	if err := p.settle(dev, settings{alias: p.mark(r.InstanceUUID, r.VIF.ID), mtu: mtu(r.VIF), keepDown: known}); err != nil {
		return err
	}
	// For the neighbour discovery of IPv6, and whatever groups the instance joins: the agent does it, in its own time.
	if err := p.h.LinkSetAllmulticastOn(dev); err != nil {
		return fmt.Errorf("set up device %s: %w", dev.Attrs().Name, err)
	}
	return nil
}

// macvtapSource finds the device below, and makes that of a VLAN: Neutron's agent deletes it with the network, and
// leaves making it to the compute service. The physical interface itself belongs to the operator.
func (p *Plugger) macvtapSource(v *novalet.VIF, d *macvtapDetails) (netlink.Link, error) {
	notReady := func(format string, args ...any) error {
		f := novalet.Faultf(novalet.ErrReschedule, "PortBindingFailed", "Port %s cannot be plugged on this host: %s.", v.ID, fmt.Sprintf(format, args...))
		f.Details = map[string]any{"port_id": v.ID}
		return f
	}
	source, err := p.link(d.Source)
	if err != nil {
		return nil, err
	}
	if source == nil && d.VLAN != 0 {
		physical, err := p.link(d.Physical)
		if err != nil {
			return nil, err
		}
		if physical == nil {
			return nil, notReady("it has no interface %s", d.Physical)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex = d.Source, physical.Attrs().Index
		// Two ports of the network may come at once.
		if err := p.h.LinkAdd(&netlink.Vlan{LinkAttrs: attrs, VlanId: d.VLAN, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q}); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("create VLAN device %s: %w", d.Source, err)
		}
		if source, err = p.link(d.Source); err != nil {
			return nil, err
		}
		if source != nil {
			if err := p.h.LinkSetUp(source); err != nil {
				return nil, fmt.Errorf("bring up VLAN device %s: %w", d.Source, err)
			}
			if source, err = p.link(d.Source); err != nil {
				return nil, err
			}
		}
	}
	if source == nil {
		return nil, notReady("it has no interface %s", d.Source)
	}
	if vlan, ok := source.(*netlink.Vlan); d.VLAN != 0 && (!ok || vlan.VlanId != d.VLAN) {
		return nil, notReady("interface %s is not VLAN %d", d.Source, d.VLAN)
	}
	if source.Attrs().Flags&net.FlagUp == 0 {
		return nil, notReady("interface %s is down", d.Source)
	}
	if have := source.Attrs().MTU; have < mtu(v) {
		return nil, notReady("its network has mtu %d, interface %s %d", mtu(v), d.Source, have)
	}
	return source, nil
}

// ensureMacvtap makes the device on the physical interface, or returns the one that is there. It is a macvlan: a macvtap
// has a character device for a virtual machine's queue besides, which nobody would read.
func (p *Plugger) ensureMacvtap(r *novalet.PlugRequest, d *macvtapDetails, source netlink.Link) (netlink.Link, error) {
	mac, err := net.ParseMAC(r.VIF.Address)
	if err != nil {
		return nil, err
	}
	name := macvtapName(r.VIF.ID)
	link, err := p.link(name)
	if err != nil {
		return nil, err
	}
	if link != nil {
		a := link.Attrs()
		dev, ok := link.(*netlink.Macvlan)
		same := ok && a.ParentIndex == source.Attrs().Index && a.HardwareAddr.String() == mac.String() && dev.Mode == macvtapModes[d.Mode]
		if same && (a.Alias == "" || mine(a.Alias, "", r.VIF.ID)) {
			return link, nil
		}
		if !strings.HasPrefix(a.Alias, aliasPrefix) {
			return nil, fmt.Errorf("device %s exists and is not ours", name)
		}
		if err := p.discard(link); err != nil {
			return nil, err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr, attrs.ParentIndex = name, mtu(r.VIF), mac, source.Attrs().Index
	if err := p.h.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: macvtapModes[d.Mode]}); err != nil {
		return nil, fmt.Errorf("create device %s on %s: %w", name, source.Attrs().Name, err)
	}
	// Unlike a pair it goes with no namespace, so it gets its mark at once.
	if link, err = p.link(name); err == nil && link != nil {
		err = p.h.LinkSetAlias(link, p.mark(r.InstanceUUID, r.VIF.ID))
	}
	if err != nil {
		return nil, fmt.Errorf("mark device %s: %w", name, err)
	}
	if link, err = p.link(name); err == nil && link == nil {
		err = fmt.Errorf("device %s vanished", name)
	}
	return link, err
}

// redirectName is the name of the classifier that carries frames on.
const redirectName = "novalet_redirect"

// redirect sends whatever comes in at a device out of another one, past the host's own network stack. Without it there
// is no way to the wire, so a kernel that cannot do it is an error.
func (p *Plugger) redirect(from netlink.Link, to int) error {
	const helperRedirect = 23 // bpf_redirect(ifindex, flags) of linux/bpf.h
	fd, err := loadClassifier([]insn{
		{op: opMovImm, regs: 1, imm: int32(to)}, {op: opMovImm, regs: 2}, {op: opCall, imm: helperRedirect}, {op: opExit}})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return p.classifyAt(from, fd, redirectName, 2)
}
