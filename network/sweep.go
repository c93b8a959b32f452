package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/novalet/novalet"
)

// Sweep implements novalet.VIFPlugger. What it returns are device names; those without a device are ports left in the
// switch's database, which outlives a reboot.
func (p *Plugger) Sweep(ctx context.Context, keep map[string]bool) ([]string, error) {
	return p.sweep(ctx, keep, true)
}

// Orphans lists what Sweep would remove.
func (p *Plugger) Orphans(ctx context.Context, keep map[string]bool) ([]string, error) {
	return p.sweep(ctx, keep, false)
}

func (p *Plugger) sweep(ctx context.Context, keep map[string]bool, remove bool) ([]string, error) {
	links, err := p.h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("sweep network devices: %w", err)
	}
	var removed []string
	var errs []error
	switched, err := p.switchPorts(ctx)
	if err != nil {
		errs = append(errs, err)
	}
	for name, mark := range switched {
		inst, port, ok := parseAlias(mark)
		if !ok || keep[inst] || ownerOf(mark) != p.o.Owner {
			continue
		}
		if remove {
			unlock := p.locks.lock(port)
			err := errors.Join(p.ovs.DelPort(ctx, name, owned(inst, port)), p.ovs.DelBridge(ctx, name, owned(inst, port)))
			unlock()
			if err != nil {
				errs = append(errs, err)
				continue
			}
		}
		removed = append(removed, name)
	}
	for _, l := range links {
		a := l.Attrs()
		if a.Alias == goneAlias {
			if remove {
				p.reap.add(l)
			}
			continue
		}
		inst, port, ok := parseAlias(a.Alias)
		if !ok || keep[inst] || ownerOf(a.Alias) != p.o.Owner {
			continue
		}
		if remove {
			unlock := p.locks.lock(port)
			err := p.discard(l)
			unlock()
			if err != nil {
				errs = append(errs, err)
				continue
			}
		}
		if !slices.Contains(removed, a.Name) {
			removed = append(removed, a.Name)
		}
	}
	slices.Sort(removed)
	return removed, errors.Join(errs...)
}

// switchPorts lists our ports and trunk bridges of the switch, by name. A host without Open vSwitch has none.
func (p *Plugger) switchPorts(ctx context.Context) (map[string]string, error) {
	if path, ok := strings.CutPrefix(p.o.OVSDB, "unix:"); ok {
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
	}
	ifaces, err := p.ovs.Interfaces(ctx, markKey)
	if err != nil {
		return nil, err
	}
	bridges, err := p.ovs.Bridges(ctx, markKey)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, rows := range []map[string]map[string]string{ifaces, bridges} {
		for name, ids := range rows {
			out[name] = ids[markKey]
		}
	}
	return out, nil
}

// Stats implements novalet.VIFPlugger. VIFs without a device are left out.
func (p *Plugger) Stats(_ context.Context, instanceUUID string, info novalet.NetworkInfo) (map[string]novalet.InterfaceStats, error) {
	out := map[string]novalet.InterfaceStats{}
	for i := range info {
		if !uuidRE.MatchString(info[i].ID) {
			continue
		}
		l, err := p.link(tapName(info[i].ID))
		if err != nil {
			return nil, err
		}
		if l == nil || !mine(l.Attrs().Alias, instanceUUID, info[i].ID) || l.Attrs().Statistics == nil {
			continue
		}
		out[info[i].ID] = seenFromInside(l.Attrs().Statistics)
	}
	return out, nil
}

// seenFromInside: what the host's end sends is what the instance receives.
func seenFromInside(s *netlink.LinkStatistics) novalet.InterfaceStats {
	return novalet.InterfaceStats{
		RxBytes: s.TxBytes, RxPackets: s.TxPackets, RxErrors: s.TxErrors, RxDrop: s.TxDropped,
		TxBytes: s.RxBytes, TxPackets: s.RxPackets, TxErrors: s.RxErrors, TxDrop: s.RxDropped,
	}
}
