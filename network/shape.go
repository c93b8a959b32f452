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

// vifLimits reads the flavor's quota:vif_{inbound,outbound}_{average,peak,burst}: kilobytes per second, and kilobytes
// for the burst, as libvirt counts them. Inbound is what the instance receives.
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

// shape applies the limits to the host's end: a token bucket on what goes in, policing on what comes out.
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
		tbf := &netlink.Tbf{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			Rate:       in.rate,
			Buffer:     uint32(netlink.Xmittime(in.rate, uint32(in.burst))),
			Limit:      uint32(in.burst + in.rate/10), // a tenth of a second in the queue, then drop
		}
		if err := p.h.QdiscReplace(tbf); err != nil {
			return fmt.Errorf("limit what comes in: %w", err)
		}
	}
	if out != nil {
		err := p.police(link, out)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
			p.log.Warn("quota:vif_outbound is not enforced: the kernel has no act_police or cls_matchall",
				"instance", r.InstanceUUID, "vif", r.VIF.ID)
			return nil
		}
		return err
	}
	return nil
}

func (p *Plugger) police(link netlink.Link, l *limits) error {
	index := link.Attrs().Index
	ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
	if err := p.h.QdiscAdd(ingress); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("limit what goes out: %w", err)
	}
	action := netlink.NewPoliceAction()
	action.Rate, action.Burst = uint32(l.rate), uint32(l.burst)
	action.ExceedAction = netlink.TC_POLICE_SHOT
	filter := &netlink.MatchAll{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: ingress.Handle, Priority: 1, Protocol: unix.ETH_P_ALL, Handle: 1},
		Actions:     []netlink.Action{action},
	}
	if err := p.h.FilterReplace(filter); err != nil {
		return fmt.Errorf("limit what goes out: %w", err)
	}
	return nil
}
