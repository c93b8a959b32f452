package fake

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/novalet/novalet"
)

// Plug is what the host holds of one VIF.
type Plug struct {
	NetNS    string
	Index    int
	Static   bool
	Address  string // configured inside
	Replaced int    // times it was plugged
	Silent   bool
	Cut      bool
}

type plugState struct {
	vmu     sync.Mutex
	plugs   map[string]map[string]*Plug // instance → vif id
	network *networkState
}

// Plugs returns what is plugged for an instance.
func (s *plugState) Plugs(uuid string) map[string]Plug {
	s.vmu.Lock()
	defer s.vmu.Unlock()
	out := map[string]Plug{}
	for id, p := range s.plugs[uuid] {
		out[id] = *p
	}
	return out
}

// Plugger is a fake novalet.VIFPlugger. Plugging a port makes it active unless SetAutoActive says otherwise.
type Plugger struct {
	*plugState
	f *Faults
}

var _ novalet.VIFPlugger = (*Plugger)(nil)

// Check implements novalet.VIFPlugger.
func (p *Plugger) Check(vif *novalet.VIF) error {
	if err := p.f.enter(context.Background(), "VIFPlugger.Check"); err != nil {
		return err
	}
	if vif.Type == "binding_failed" || vif.Type == "unbound" {
		return novalet.Faultf(novalet.ErrAbort, "PortBindingFailed", "Binding failed for port %s.", vif.ID)
	}
	return p.f.leave(context.Background(), "VIFPlugger.Check")
}

// Plug implements novalet.VIFPlugger.
func (p *Plugger) Plug(ctx context.Context, r *novalet.PlugRequest) error {
	if err := p.f.enter(ctx, "VIFPlugger.Plug"); err != nil {
		return err
	}
	if r.NetNS == "" {
		return fmt.Errorf("plug vif %s: no network namespace", r.VIF.ID)
	}
	p.vmu.Lock()
	if p.plugs[r.InstanceUUID] == nil {
		p.plugs[r.InstanceUUID] = map[string]*Plug{}
	}
	pl := p.plugs[r.InstanceUUID][r.VIF.ID]
	if pl == nil {
		pl = &Plug{}
		p.plugs[r.InstanceUUID][r.VIF.ID] = pl
	}
	pl.NetNS, pl.Index, pl.Static = r.NetNS, r.Index, r.Static
	pl.Replaced++
	pl.Cut = false
	if r.Static {
		pl.Address = addresses(r.VIF)
	}
	p.vmu.Unlock()
	p.network.nmu.Lock()
	auto := p.network.autoActive
	p.network.nmu.Unlock()
	if auto {
		p.network.Activate(r.VIF.ID)
	}
	return p.f.leave(ctx, "VIFPlugger.Plug")
}

func addresses(v *novalet.VIF) string {
	var out []string
	for _, s := range v.Network.Subnets {
		for _, ip := range s.IPs {
			out = append(out, ip.Address)
		}
	}
	return strings.Join(out, ",")
}

// Configure implements novalet.VIFPlugger.
func (p *Plugger) Configure(ctx context.Context, r *novalet.PlugRequest) error {
	if err := p.f.enter(ctx, "VIFPlugger.Configure"); err != nil {
		return err
	}
	p.vmu.Lock()
	pl := p.plugs[r.InstanceUUID][r.VIF.ID]
	if pl != nil && r.Static {
		pl.Address = addresses(r.VIF)
	}
	p.vmu.Unlock()
	if pl == nil {
		return fmt.Errorf("configure vif %s: %w", r.VIF.ID, novalet.ErrNotFound)
	}
	return p.f.leave(ctx, "VIFPlugger.Configure")
}

// Cut implements novalet.VIFPlugger: the plug and the port's state stay.
func (p *Plugger) Cut(ctx context.Context, uuid string, vif *novalet.VIF) error {
	if err := p.f.enter(ctx, "VIFPlugger.Cut"); err != nil {
		return err
	}
	p.vmu.Lock()
	if pl := p.plugs[uuid][vif.ID]; pl != nil {
		pl.Cut = true
	}
	p.vmu.Unlock()
	return p.f.leave(ctx, "VIFPlugger.Cut")
}

// Unplug implements novalet.VIFPlugger.
func (p *Plugger) Unplug(ctx context.Context, uuid string, vif *novalet.VIF) error {
	if err := p.f.enter(ctx, "VIFPlugger.Unplug"); err != nil {
		return err
	}
	p.vmu.Lock()
	delete(p.plugs[uuid], vif.ID)
	if len(p.plugs[uuid]) == 0 {
		delete(p.plugs, uuid)
	}
	p.vmu.Unlock()
	p.network.nmu.Lock()
	if port := p.network.ports[vif.ID]; port != nil {
		port.Active = false
	}
	p.network.nmu.Unlock()
	return p.f.leave(ctx, "VIFPlugger.Unplug")
}

// Park implements novalet.VIFPlugger: the plug and the port's state stay.
func (p *Plugger) Park(ctx context.Context, _ string, _ *novalet.VIF, _ string) error {
	if err := p.f.enter(ctx, "VIFPlugger.Park"); err != nil {
		return err
	}
	return p.f.leave(ctx, "VIFPlugger.Park")
}

// Silence implements novalet.VIFPlugger.
func (p *Plugger) Silence(ctx context.Context, uuid string, vif *novalet.VIF, _ string, on bool) error {
	if err := p.f.enter(ctx, "VIFPlugger.Silence"); err != nil {
		return err
	}
	p.vmu.Lock()
	if plug := p.plugs[uuid][vif.ID]; plug != nil {
		plug.Silent = on
	}
	p.vmu.Unlock()
	return p.f.leave(ctx, "VIFPlugger.Silence")
}

// Sweep implements novalet.VIFPlugger.
func (p *Plugger) Sweep(ctx context.Context, keep map[string]bool) ([]string, error) {
	if err := p.f.enter(ctx, "VIFPlugger.Sweep"); err != nil {
		return nil, err
	}
	p.vmu.Lock()
	defer p.vmu.Unlock()
	var out []string
	for uuid, plugs := range p.plugs {
		if keep[uuid] {
			continue
		}
		for id := range plugs {
			out = append(out, id)
		}
		delete(p.plugs, uuid)
	}
	slices.Sort(out)
	return out, nil
}

// Stats implements novalet.VIFPlugger.
func (p *Plugger) Stats(ctx context.Context, uuid string, info novalet.NetworkInfo) (map[string]novalet.InterfaceStats, error) {
	if err := p.f.enter(ctx, "VIFPlugger.Stats"); err != nil {
		return nil, err
	}
	p.vmu.Lock()
	defer p.vmu.Unlock()
	out := map[string]novalet.InterfaceStats{}
	for _, v := range info {
		if p.plugs[uuid][v.ID] != nil {
			out[v.ID] = novalet.InterfaceStats{RxBytes: 1, TxBytes: 2}
		}
	}
	return out, nil
}
