package network

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// limits of a VIF, in bytes per second and bytes.
type limits struct{ rate, burst uint64 }

// vifLimits reads the flavor's quota:vif_{inbound,outbound}_{average,burst}: kilobytes per second, and kilobytes for the
// burst, as libvirt counts them. Inbound is what the instance receives. A peak has no meaning to a token bucket
// of one rate and is not read.
func vifLimits(specs map[string]string, direction string) (*limits, error) {
	read := func(what string) (uint64, error) {
		key := "quota:vif_" + direction + "_" + what
		text, ok := specs[key]
		if !ok {
			return 0, nil
		}
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			f := novalet.Faultf(novalet.ErrAbort, "", "The flavor's %s is no number: %.20q.", key, text)
			f.Err = err
			return 0, f
		}
		return n * 1000, nil
	}
	average, err := read("average")
	if err != nil {
		return nil, err
	}
	burst, err := read("burst")
	if err != nil || average == 0 {
		return nil, err
	}
	if burst == 0 {
		// Enough for a tick of the timer at full rate, and for one large segment.
		burst = max(average/100, 128*1024)
	}
	return &limits{rate: average, burst: burst}, nil
}

// shape applies the limits to the host's end: a token bucket on what goes in, and one on a detour (ifb) for what
// comes out. Both delay rather than drop, which TCP takes better.
func (p *Plugger) shape(r *novalet.PlugRequest) error {
	in, err := vifLimits(r.ExtraSpecs, "inbound")
	if err != nil {
		return err
	}
	out, err := vifLimits(r.ExtraSpecs, "outbound")
	if err != nil || in == nil && out == nil {
		return err
	}
	link, err := p.link(tapName(r.VIF.ID))
	if err != nil || link == nil {
		return err
	}
	if in != nil {
		if err := p.bucket(link, in); err != nil {
			return fmt.Errorf("limit what comes in: %w", err)
		}
	}
	if out == nil {
		return nil
	}
	if r.VIF.Type == "macvtap" {
		// There it leaves by a device of the host's.
		if link, err = p.link(macvtapName(r.VIF.ID)); err == nil && link != nil {
			err = p.bucket(link, out)
		}
		if err != nil {
			return fmt.Errorf("limit what goes out: %w", err)
		}
		return nil
	}
	err = p.detour(link, r, out)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, errUserspace) {
		p.log.Warn("quota:vif_outbound is not enforced", "instance", r.InstanceUUID, "vif", r.VIF.ID, "error", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("limit what goes out: %w", err)
	}
	return nil
}

// bucket limits what a device sends.
func (p *Plugger) bucket(link netlink.Link, l *limits) error {
	return p.h.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       l.rate,
		Buffer:     uint32(netlink.Xmittime(l.rate, uint32(l.burst))),
		Limit:      uint32(l.burst + l.rate/10), // a tenth of a second in the queue, then drop
	})
}

// errUserspace: the switch reads the port before any limit of the kernel's.
var errUserspace = errors.New("the userspace datapath reads the port before the kernel can limit it")

// detour sends what comes from the instance through a device of its own with a bucket.
func (p *Plugger) detour(link netlink.Link, r *novalet.PlugRequest, l *limits) error {
	index := link.Attrs().Index
	parent, priority, err := p.ingressOf(link)
	if err != nil {
		return err
	}
	name := ifbName(r.VIF.ID)
	ifb, err := p.link(name)
	if err != nil {
		return err
	}
	if ifb == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.NumTxQueues, attrs.NumRxQueues = name, 1, 1
		if err := p.h.LinkAdd(&netlink.Ifb{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("create device %s: %w", name, err)
		}
		if ifb, err = p.link(name); err != nil || ifb == nil {
			return fmt.Errorf("create device %s: it vanished (%w)", name, err)
		}
	}
	if err := p.settle(ifb, settings{alias: p.mark(r.InstanceUUID, r.VIF.ID), mtu: ifb.Attrs().MTU}); err != nil {
		return err
	}
	if err := p.bucket(ifb, l); err != nil {
		return err
	}
	have, err := p.h.FilterList(link, parent)
	if err != nil {
		return err
	}
	for _, f := range have {
		if _, ok := f.(*netlink.BpfFilter); ok {
			continue // see guard
		}
		if u, ok := f.(*netlink.U32); ok && len(u.Actions) == 1 {
			if m, ok := u.Actions[0].(*netlink.MirredAction); ok && m.Ifindex == ifb.Attrs().Index {
				return nil
			}
		}
		if err := p.h.FilterDel(f); err != nil {
			return err
		}
	}
	return p.h.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: parent, Priority: priority, Protocol: unix.ETH_P_ALL},
		Sel:         &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Nkeys: 1, Keys: []netlink.TcU32Key{{}}}, // every frame
		Actions:     []netlink.Action{netlink.NewMirredAction(ifb.Attrs().Index)},
	})
}

// ingressOf returns where filters of what comes in at a device go: behind the guard, where there is one.
func (p *Plugger) ingressOf(link netlink.Link) (parent uint32, priority uint16, err error) {
	qdiscs, err := p.h.QdiscList(link)
	if err != nil {
		return 0, 0, err
	}
	for _, q := range qdiscs {
		if q.Type() != "clsact" {
			continue
		}
		filters, err := p.h.FilterList(link, netlink.HANDLE_MIN_INGRESS)
		if err != nil {
			return 0, 0, err
		}
		for _, f := range filters {
			if b, ok := f.(*netlink.BpfFilter); ok && b.Name == dropName {
				return 0, 0, errUserspace // see isolate
			}
		}
		return netlink.HANDLE_MIN_INGRESS, 2, nil
	}
	ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
	if err := p.h.QdiscAdd(ingress); err != nil && !errors.Is(err, unix.EEXIST) {
		return 0, 0, err
	}
	return ingress.Handle, 1, nil
}
