package network

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// parkedName is the name on the host of the inner end of a port whose instance does not run.
func parkedName(portID string) string { return "nvp" + portID[:11] }

// Park implements novalet.VIFPlugger. The inner end is taken out of the guest's namespace before that ends, which would
// free both. What the guest did to it (addresses, qdiscs) the kernel drops on the way.
func (p *Plugger) Park(ctx context.Context, instanceUUID string, vif *novalet.VIF, netns string) error {
	if err := p.Check(vif); err != nil {
		return err
	}
	defer p.locks.lock(vif.ID)()
	if onFunction(vif) {
		if vif.Device == nil {
			return nil
		}
		if err := p.retrieveFunction(vif.Device, netns); err != nil {
			return fmt.Errorf("park vif %s: %w", vif.ID, err)
		}
		return nil
	}
	parked, err := p.park(instanceUUID, vif.ID, netns)
	if err == nil && !parked {
		err = p.unplug(ctx, instanceUUID, vif.ID, vif.Type == "ovs")
	}
	if err != nil {
		return fmt.Errorf("park vif %s: %w", vif.ID, err)
	}
	return nil
}

// park reports whether the port has its two ends on the host now. It has not when the guest got rid of the inner one.
func (p *Plugger) park(instanceUUID, portID, netns string) (bool, error) {
	link, err := p.link(tapName(portID))
	if err != nil || link == nil {
		return false, err
	}
	if !mine(link.Attrs().Alias, instanceUUID, portID) {
		return false, nil
	}
	if peer, err := p.parked(link, portID); err != nil || peer != nil {
		return peer != nil, err
	}
	ns, err := openNetNS(netns)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return false, fmt.Errorf("open the host's network namespace: %w", err)
	}
	defer home.Close()
	moved := false
	err = inNetNS(ns, func() error {
		peer, err := netlink.LinkByIndex(link.Attrs().ParentIndex)
		if err != nil {
			return ignoreNoLink(err)
		}
		if peer.Type() != "veth" || peer.Attrs().ParentIndex != link.Attrs().Index {
			return nil
		}
		if err := moveLink(peer, home, parkedName(portID), nil, 0); err != nil {
			return err
		}
		moved = true
		return nil
	})
	return moved, err
}

// parked returns the inner end of a port that waits on the host, or nil.
func (p *Plugger) parked(outer netlink.Link, portID string) (netlink.Link, error) {
	peer, err := p.link(parkedName(portID))
	if err != nil || peer == nil {
		return nil, err
	}
	if peer.Type() != "veth" || peer.Attrs().ParentIndex != outer.Attrs().Index || outer.Attrs().ParentIndex != peer.Attrs().Index {
		return nil, nil
	}
	return peer, nil
}

// unpark gives the inner end of a port to a namespace. It returns false when there is none that waits.
func (p *Plugger) unpark(outer netlink.Link, r *novalet.PlugRequest, ns *os.File) (bool, error) {
	if a := outer.Attrs().Alias; outer.Type() != "veth" || !strings.HasPrefix(a, aliasPrefix) {
		return false, nil
	}
	peer, err := p.parked(outer, r.VIF.ID)
	if err != nil || peer == nil {
		return false, err
	}
	mac, err := net.ParseMAC(r.VIF.Address)
	if err != nil {
		return false, err
	}
	if err := clearInner(ns, InnerName(r.Index)); err != nil {
		return false, err
	}
	return true, moveLink(peer, ns, InnerName(r.Index), mac, mtu(r.VIF))
}

// moveLink takes a device down and moves it into a namespace under a name of its own there, in one message: the two
// namespaces may use each other's names. It acts in the namespace of the calling thread.
func moveLink(link netlink.Link, to *os.File, name string, mac net.HardwareAddr, mtu int) error {
	if err := netlink.LinkSetDown(link); err != nil {
		return fmt.Errorf("take down %s: %w", link.Attrs().Name, err)
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(link.Attrs().Index)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(to.Fd()))))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	if mac != nil {
		req.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, []byte(mac)))
	}
	if mtu != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu))))
	}
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("move %s to another network namespace: %w", link.Attrs().Name, err)
	}
	return nil
}
