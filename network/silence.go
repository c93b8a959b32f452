package network

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// The network stack of a guest is the host's kernel: with all its processes frozen it goes on answering ping and ARP and
// acknowledging what TCP brings. Who pauses a server expects none of it. Two classifiers on the inner end, where Neutron's
// agents have none of theirs, drop every frame on its way in and out; addresses, routes and the link stay as they are.

const silenceName = "novalet_silence"

// silenceHandle keeps our classifier apart from one of the guest's at the same priority, before which it stands: the
// kernel asks the newest first.
const silenceHandle = 0x6e6f7661

var silenceHooks = []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS}

// Silence implements novalet.VIFPlugger.
func (p *Plugger) Silence(_ context.Context, instanceUUID string, vif *novalet.VIF, netns string, on bool) error {
	if err := p.Check(vif); err != nil {
		return err
	}
	defer p.locks.lock(vif.ID)()
	if onFunction(vif) {
		if vif.Device == nil {
			return nil
		}
		if err := p.silenceFunction(vif.Device, netns, on); err != nil {
			return fmt.Errorf("silence vif %s: %w", vif.ID, err)
		}
		return nil
	}
	if err := p.silence(instanceUUID, vif.ID, netns, on); err != nil {
		return fmt.Errorf("silence vif %s: %w", vif.ID, err)
	}
	return nil
}

func (p *Plugger) silence(instanceUUID, portID, netns string, on bool) error {
	outer, err := p.link(tapName(portID))
	if err != nil || outer == nil || !mine(outer.Attrs().Alias, instanceUUID, portID) {
		return err
	}
	return p.silenceIn(netns, on, func() (netlink.Link, error) {
		inner, err := netlink.LinkByIndex(outer.Attrs().ParentIndex)
		if err != nil {
			return nil, ignoreNoLink(err)
		}
		if inner.Type() != "veth" || inner.Attrs().ParentIndex != outer.Attrs().Index {
			return nil, nil
		}
		return inner, nil
	})
}

// silenceIn drops every frame of the interface that find names in the namespace, or none any more; nil is none.
func (p *Plugger) silenceIn(netns string, on bool, find func() (netlink.Link, error)) error {
	var fd int
	var err error
	if on {
		if fd, err = p.drop.load(); err != nil {
			return err
		}
	}
	ns, err := openNetNS(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	return inNetNS(ns, func() error {
		link, err := find()
		if err != nil || link == nil {
			return err
		}
		if on {
			return dropAll(link, fd)
		}
		return dropNothing(link)
	})
}

// clsact is where classifiers of both directions are at home.
func clsact(link netlink.Link) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
}

func dropAll(link netlink.Link, fd int) error {
	if err := netlink.QdiscAdd(clsact(link)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact: %w", err)
	}
	for _, hook := range silenceHooks {
		err := netlink.FilterReplace(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: link.Attrs().Index, Parent: hook, Handle: silenceHandle, Protocol: unix.ETH_P_ALL, Priority: 1},
			Fd:          fd, Name: silenceName, DirectAction: true,
		})
		if err != nil {
			return fmt.Errorf("add classifier: %w", err)
		}
	}
	return nil
}

// dropNothing takes the classifiers away, and their home unless others live there.
func dropNothing(link netlink.Link) error {
	left := 0
	for _, hook := range silenceHooks {
		have, err := netlink.FilterList(link, hook)
		if err != nil {
			return fmt.Errorf("list classifiers: %w", err)
		}
		for _, f := range have {
			if b, ok := f.(*netlink.BpfFilter); !ok || b.Name != silenceName {
				left++
			} else if err := netlink.FilterDel(f); err != nil {
				return fmt.Errorf("remove classifier: %w", err)
			}
		}
	}
	if left > 0 {
		return nil
	}
	if err := netlink.QdiscDel(clsact(link)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove clsact: %w", err)
	}
	return nil
}
