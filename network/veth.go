package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// plugPair makes tap<port> with its peer in the namespace, or mends the one that is there, and puts it into the bridge
// (0: none), or sends what comes in at it out of another device (onward; 0: none).
func (p *Plugger) plugPair(r *novalet.PlugRequest, ns *os.File, bridge, onward int) error {
	name := tapName(r.VIF.ID)
	link, err := p.link(name)
	if err != nil {
		return err
	}
	if link != nil {
		same, err := peerIn(link, ns)
		if err == nil && !same {
			same, err = p.unpark(link, r, ns)
		}
		if err != nil {
			return err
		}
		if !same {
			// Left over from a namespace that has ended, or from another try: the name has to be free.
			// (An empty alias is one of ours that a crash kept from getting it.)
			if a := link.Attrs().Alias; link.Type() != "veth" || a != "" && !strings.HasPrefix(a, aliasPrefix) {
				return fmt.Errorf("device %s exists and is not ours", name)
			}
			if err := p.discard(link); err != nil {
				return err
			}
			link = nil
		}
	}
	if link == nil {
		if link, err = p.makePair(name, r, ns); err != nil {
			return err
		}
	}
	if guarded(r.VIF) {
		if err := p.guard(link, r.VIF); err != nil {
			return err
		}
	}
	if onward != 0 {
		if err := p.redirect(link, onward); err != nil {
			return err
		}
	}
	return p.settle(link, settings{alias: p.mark(r.InstanceUUID, r.VIF.ID), master: bridge, mtu: mtu(r.VIF)})
}

// makePair creates the two devices in one message. With more than one queue the kernel would wait for a grace period
// for each end.
func (p *Plugger) makePair(name string, r *novalet.PlugRequest, ns *os.File) (netlink.Link, error) {
	mac, err := net.ParseMAC(r.VIF.Address)
	if err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.NumTxQueues, attrs.NumRxQueues = name, mtu(r.VIF), 1, 1
	v := netlink.NewVeth(attrs)
	v.PeerName, v.PeerMTU, v.PeerHardwareAddr = InnerName(r.Index), uint32(mtu(r.VIF)), mac
	v.PeerNumTxQueues, v.PeerNumRxQueues = 1, 1
	v.PeerNamespace = netlink.NsFd(ns.Fd())
	err = p.h.LinkAdd(v)
	if errors.Is(err, unix.EEXIST) {
		// The host's name was free, so it is the inner one that is taken: by a plug whose outer end is gone in name
		// only, or by a device of the guest's own making.
		if err = clearInner(ns, InnerName(r.Index)); err == nil {
			err = p.h.LinkAdd(v)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("create device %s: %w", name, err)
	}
	// A new device has what was asked for and nothing else: only its index is to be learned.
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(p.eth, unix.SIOCGIFINDEX, ifr)
	}
	if err != nil {
		return nil, fmt.Errorf("look up device %s: %w", name, err)
	}
	v.Index = int(ifr.Uint32())
	return v, nil
}

// peerIn says whether the other end of a veth is in the namespace.
func peerIn(link netlink.Link, ns *os.File) (bool, error) {
	if link.Type() != "veth" || link.Attrs().ParentIndex == 0 {
		return false, nil
	}
	found := false
	err := inNetNS(ns, func() error {
		peer, err := netlink.LinkByIndex(link.Attrs().ParentIndex)
		if err != nil {
			return ignoreNoLink(err)
		}
		found = peer.Type() == "veth" && peer.Attrs().ParentIndex == link.Attrs().Index
		return nil
	})
	return found, err
}

// clearInner renames a device away that sits on the name of an interface about to come.
func clearInner(ns *os.File, name string) error {
	return inNetNS(ns, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return ignoreNoLink(err)
		}
		if err := netlink.LinkSetDown(link); err != nil {
			return fmt.Errorf("take down %s inside: %w", name, err)
		}
		if err := netlink.LinkSetName(link, fmt.Sprintf("old%d", link.Attrs().Index)); err != nil {
			return fmt.Errorf("rename %s inside: %w", name, err)
		}
		return nil
	})
}

func ignoreNoLink(err error) error {
	var none netlink.LinkNotFoundError
	if errors.As(err, &none) {
		return nil
	}
	return err
}

// addrGenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h: no link-local address by itself.
const addrGenNone = 1

// settings of a device on the host's side.
type settings struct {
	alias  string
	master int // 0: none
	mtu    int
	// promisc: a device between two bridges takes frames for any address.
	promisc bool
	// keepDown: somebody else has a say in whether the device is up.
	keepDown bool
}

// settle gives a device its settings, as far as it has others, and brings it up. IPv6 stays without an address on it:
// the neighbour discovery of each new port would be flooded to all the others.
func (p *Plugger) settle(link netlink.Link, s settings) error {
	a := link.Attrs()
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	req.Sockets = p.sock
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(a.Index)
	if s.promisc && a.Promisc == 0 {
		msg.Flags, msg.Change = unix.IFF_PROMISC, unix.IFF_PROMISC
	}
	req.AddData(msg)
	if a.Alias != s.alias {
		req.AddData(nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(s.alias)))
	}
	if a.MTU != s.mtu {
		req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(s.mtu))))
	}
	if a.MasterIndex != s.master && a.MasterIndex != 0 && s.master != 0 {
		// A bridge port cannot be handed over in one step on all kernels.
		if err := p.h.LinkSetNoMaster(link); err != nil {
			return fmt.Errorf("take %s out of its bridge: %w", a.Name, err)
		}
	}
	if a.MasterIndex != s.master && s.master != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(s.master))))
	}
	mode := nl.NewRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{addrGenNone})
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET6, mode.Serialize())
	withV6 := *req
	withV6.Data = append(append([]nl.NetlinkRequestData{}, req.Data...), spec)
	_, err := withV6.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EINVAL) {
		_, err = req.Execute(unix.NETLINK_ROUTE, 0) // a kernel without IPv6
	}
	if errors.Is(err, unix.EXFULL) {
		f := novalet.Faultf(novalet.ErrReschedule, "VirtualInterfaceCreateException",
			"The network bridge of the host is full: a Linux bridge takes 1023 ports.")
		f.Err = err
		return f
	}
	if err != nil {
		return fmt.Errorf("set up device %s: %w", a.Name, err)
	}
	if a.Flags&net.FlagUp == 0 && !s.keepDown {
		if err := p.h.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up device %s: %w", a.Name, err)
		}
	}
	return nil
}

// discard frees the device's name at once and the device later. Down first: nothing more passes, also where the guest
// still holds the other end.
func (p *Plugger) discard(link netlink.Link) error {
	name := link.Attrs().Name
	err := p.h.LinkSetDown(link)
	if err == nil {
		err = p.h.LinkSetAlias(link, goneAlias)
	}
	if err == nil {
		err = p.h.LinkSetName(link, fmt.Sprintf("nvx%x", link.Attrs().Index))
	}
	if err != nil {
		if gone(err) {
			return nil // its other end was freed with its namespace meanwhile
		}
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	p.reap.add(link)
	return nil
}

// gone: the device the request was about does not exist any more.
func gone(err error) bool {
	var none netlink.LinkNotFoundError
	return errors.Is(err, unix.ENODEV) || errors.As(err, &none) || err != nil && strings.Contains(err.Error(), "no such device")
}
