package fake

import (
	"context"
	"fmt"
	"slices"

	"github.com/novalet/novalet"
)

// AddAddress implements novalet.NetworkAPI.
func (n *Network) AddAddress(ctx context.Context, _ novalet.RequestContext, inst *novalet.Instance, networkID string) error {
	if err := n.f.enter(ctx, "NetworkAPI.AddAddress"); err != nil {
		return err
	}
	n.nmu.Lock()
	var found bool
	for _, p := range n.ports {
		if p.Device == inst.UUID && p.Network == networkID {
			n.nextID++
			p.More = append(slices.Clone(p.More), fmt.Sprintf("10.9.0.%d", n.nextID))
			found = true
			break
		}
	}
	n.nmu.Unlock()
	if !found {
		return novalet.Faultf(novalet.ErrNotFound, "NetworkNotFoundForInstance", "Network could not be found for instance %s.", inst.UUID)
	}
	return n.f.leave(ctx, "NetworkAPI.AddAddress")
}

// RemoveAddress implements novalet.NetworkAPI.
func (n *Network) RemoveAddress(ctx context.Context, _ novalet.RequestContext, inst *novalet.Instance, address string) error {
	if err := n.f.enter(ctx, "NetworkAPI.RemoveAddress"); err != nil {
		return err
	}
	n.nmu.Lock()
	var found bool
	for _, p := range n.ports {
		if i := slices.Index(p.More, address); p.Device == inst.UUID && i >= 0 {
			p.More = slices.Delete(slices.Clone(p.More), i, i+1)
			found = true
		}
	}
	n.nmu.Unlock()
	if !found {
		return novalet.Faultf(novalet.ErrNotFound, "FixedIpNotFoundForInstance", "Instance %s does not have fixed IP '%s'.", inst.UUID, address)
	}
	return n.f.leave(ctx, "NetworkAPI.RemoveAddress")
}
