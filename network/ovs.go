package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/network/ovsdb"
)

// markKey is the external_ids key that marks a port of the switch as ours; its value is the alias of the device.
const markKey = "novalet"

// hybrid: the port is filtered by iptables on a bridge between it and the switch.
func hybrid(v *novalet.VIF) bool {
	var yes bool
	return v.Type == "ovs" && json.Unmarshal(v.Details["ovs_hybrid_plug"], &yes) == nil && yes
}

// userspace says whether the switch reads the port through a packet socket. The binding says so under ML2/OVS; under OVN
// the key is missing and the bridge is asked. The bridge itself belongs to the switch's agent: it is neither made nor
// changed here.
func (p *Plugger) userspace(ctx context.Context, v *novalet.VIF) (bool, error) {
	br, err := p.ovs.Bridge(ctx, v.Network.Bridge)
	if errors.Is(err, ovsdb.ErrNoBridge) {
		f := novalet.Faultf(novalet.ErrReschedule, "PortBindingFailed", "The network switch of the host is not ready for port %s.", v.ID)
		f.Details, f.Err = map[string]any{"port_id": v.ID}, err
		return false, f
	}
	if err != nil {
		return false, err
	}
	return br.Datapath == "netdev", nil
}

// externalIDs is how the L2 agent, or OVN, finds the port.
func (p *Plugger) externalIDs(r *novalet.PlugRequest) map[string]string {
	return map[string]string{
		"iface-id":     r.VIF.ID,
		"iface-status": "active",
		"attached-mac": r.VIF.Address,
		"vm-uuid":      r.InstanceUUID,
		markKey:        p.mark(r.InstanceUUID, r.VIF.ID),
	}
}

// owned is the condition under which a port of the switch may be removed.
func owned(instanceUUID, portID string) func(map[string]string) bool {
	return func(ids map[string]string) bool { return mine(ids[markKey], instanceUUID, portID) }
}

// trunkPrefix begins the name of the bridge that Neutron's Open vSwitch agent wants for the parent port of a trunk
// (TRUNK_BR_PREFIX). It alone is made here: the agent waits for it to appear, and wires the trunk then.
const trunkPrefix = "tbr-"

func trunkBridge(v *novalet.VIF) bool {
	return v.Type == "ovs" && strings.HasPrefix(v.Network.Bridge, trunkPrefix)
}

func (p *Plugger) ensureTrunk(ctx context.Context, r *novalet.PlugRequest) error {
	var datapath string
	_ = json.Unmarshal(r.VIF.Details["datapath_type"], &datapath)
	return p.ovs.AddBridge(ctx, ovsdb.Bridge{Name: r.VIF.Network.Bridge, Datapath: datapath},
		map[string]string{markKey: p.mark(r.InstanceUUID, r.VIF.ID)})
}

// plugOVS puts the host's end into the switch.
func (p *Plugger) plugOVS(ctx context.Context, r *novalet.PlugRequest, ns *os.File) error {
	if trunkBridge(r.VIF) {
		if err := p.ensureTrunk(ctx, r); err != nil {
			return err
		}
	}
	netdev, err := p.userspace(ctx, r.VIF)
	if err != nil {
		return err
	}
	if err := p.plugPair(r, ns, 0, 0); err != nil {
		return err
	}
	if netdev {
		if err := p.isolate(tapName(r.VIF.ID)); err != nil {
			return err
		}
	}
	if netdev && !p.o.DatapathOffload {
		// Through the packet socket a frame arrives with its checksum unfinished: ping works and TCP does not. It has to
		// be switched off where the frame is made.
		if err := inNetNS(ns, func() error { return noTxChecksum(r) }); err != nil {
			return err
		}
	}
	return p.ovs.AddPort(ctx, ovsdb.Port{Bridge: r.VIF.Network.Bridge, Name: tapName(r.VIF.ID), ExternalIDs: p.externalIDs(r)})
}

// plugHybrid makes port -> tap -> bridge qbr -> qvb = qvo -> switch. Neutron's agent filters on the tap by iptables, so
// the bridge has to be there also when the kernel could do without.
func (p *Plugger) plugHybrid(ctx context.Context, r *novalet.PlugRequest, ns *os.File) error {
	netdev, err := p.userspace(ctx, r.VIF)
	if err != nil {
		return err
	}
	id, mark := r.VIF.ID, p.mark(r.InstanceUUID, r.VIF.ID)
	bridge, err := p.ensureBridge(qbrName(id), mtu(r.VIF), bridgeOptions{alias: mark, hub: true})
	if err != nil {
		return err
	}
	// A bridge hands frames for its own MAC, or for all, to the host: nobody on this one has business there.
	if err := p.isolate(qbrName(id)); err != nil {
		return err
	}
	if err := p.ensurePatch(qvbName(id), qvoName(id), mtu(r.VIF)); err != nil {
		return err
	}
	for name, s := range map[string]settings{
		qvbName(id): {alias: mark, master: bridge, mtu: mtu(r.VIF), promisc: true},
		qvoName(id): {alias: mark, mtu: mtu(r.VIF), promisc: true},
	} {
		link, err := p.link(name)
		if err == nil && link == nil {
			err = fmt.Errorf("device %s vanished", name)
		}
		if err == nil {
			err = p.settle(link, s)
		}
		if err != nil {
			return err
		}
	}
	if netdev {
		if err := p.isolate(qvoName(id)); err != nil {
			return err
		}
	}
	if netdev && !p.o.DatapathOffload {
		// The host owns qvb, so it is the better place than the guest's own end.
		if err := setTxChecksum(p.eth, qvbName(id), false); err != nil {
			return err
		}
	}
	if err := p.plugPair(r, ns, bridge, 0); err != nil {
		return err
	}
	return p.ovs.AddPort(ctx, ovsdb.Port{Bridge: r.VIF.Network.Bridge, Name: qvoName(id), ExternalIDs: p.externalIDs(r)})
}

// ensurePatch makes the pair of devices between bridge and switch.
func (p *Plugger) ensurePatch(name, peer string, mtu int) error {
	link, err := p.link(name)
	if err != nil {
		return err
	}
	other, err := p.link(peer)
	if err != nil {
		return err
	}
	if link != nil && other != nil && link.Attrs().ParentIndex == other.Attrs().Index {
		return nil
	}
	for _, l := range []netlink.Link{link, other} {
		if l != nil {
			if err := p.discard(l); err != nil {
				return err
			}
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.NumTxQueues, attrs.NumRxQueues = name, mtu, 1, 1
	v := netlink.NewVeth(attrs)
	v.PeerName, v.PeerMTU, v.PeerNumTxQueues, v.PeerNumRxQueues = peer, uint32(mtu), 1, 1
	if err := p.h.LinkAdd(v); err != nil {
		return fmt.Errorf("create device %s: %w", name, err)
	}
	return nil
}

// AwaitUnbound blocks until OVN's controller takes its mark off a port that it had wired (ovn-installed, ovn-controller(8)): the
// port was deleted, or bound elsewhere. Any other port is an error at once.
func (p *Plugger) AwaitUnbound(ctx context.Context, _ string, vif *novalet.VIF) error {
	if vif.Type != "ovs" || hybrid(vif) || onFunction(vif) {
		return novalet.ErrUnsupported
	}
	return p.ovs.AwaitWithout(ctx, tapName(vif.ID), "ovn-installed")
}
