package network

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// bridgeOptions differ between the kinds of bridge.
type bridgeOptions struct {
	alias string
	// hub: forget every address at once, as between a port's filter and the switch nothing has to be learned.
	hub bool
}

// ensureBridge returns the index of the bridge, making it where it is missing. Neutron's agent makes the same one and may
// do so at the same time; whoever comes second takes what is there. An existing bridge is only brought up.
func (p *Plugger) ensureBridge(name string, mtu int, o bridgeOptions) (int, error) {
	link, err := p.link(name)
	if err != nil {
		return 0, err
	}
	if link == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = name, mtu
		no := false
		br := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &no}
		if o.hub {
			zero := uint32(0)
			br.AgeingTime = &zero
		}
		if err := p.h.LinkAdd(br); err != nil && !errors.Is(err, unix.EEXIST) {
			return 0, fmt.Errorf("create bridge %s: %w", name, err)
		}
		if link, err = p.link(name); err != nil || link == nil {
			return 0, fmt.Errorf("create bridge %s: it vanished (%w)", name, err)
		}
		if err := p.tameBridge(link, o); err != nil {
			return 0, err
		}
	}
	if link.Type() != "bridge" {
		return 0, fmt.Errorf("device %s is no bridge", name)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := p.h.LinkSetUp(link); err != nil {
			return 0, fmt.Errorf("bring up bridge %s: %w", name, err)
		}
	}
	return link.Attrs().Index, nil
}

// tameBridge gives a new bridge no forwarding delay and no address of its own: the host is no member of the tenant's
// network.
func (p *Plugger) tameBridge(link netlink.Link, o bridgeOptions) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	req.Sockets = p.sock
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(link.Attrs().Index)
	req.AddData(msg)
	if o.alias != "" {
		req.AddData(nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(o.alias)))
	}
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	data.AddRtAttr(nl.IFLA_BR_FORWARD_DELAY, nl.Uint32Attr(0))
	data.AddRtAttr(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(0))
	req.AddData(info)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	mode := nl.NewRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{addrGenNone})
	spec.AddRtAttr(unix.AF_INET6, mode.Serialize())
	withV6 := *req
	withV6.Data = append(append([]nl.NetlinkRequestData{}, req.Data...), spec)
	_, err := withV6.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		_, err = req.Execute(unix.NETLINK_ROUTE, 0)
	}
	if err != nil {
		return fmt.Errorf("set up bridge %s: %w", link.Attrs().Name, err)
	}
	return nil
}
