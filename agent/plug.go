package agent

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/novalet/novalet"
)

// unplugAll takes the host's side of the interfaces away.
func (a *Agent) unplugAll(ctx context.Context, uuid string, info novalet.NetworkInfo) error {
	var errs []error
	for i := range info {
		if err := a.plugger.Unplug(ctx, uuid, &info[i]); err != nil {
			errs = append(errs, fmt.Errorf("unplug vif %s: %w", info[i].ID, err))
		}
	}
	return errors.Join(errs...)
}

// cutAll lets nothing pass the interfaces any more.
func (a *Agent) cutAll(ctx context.Context, uuid string, info novalet.NetworkInfo) error {
	var errs []error
	for i := range info {
		if err := a.plugger.Cut(ctx, uuid, &info[i]); err != nil {
			errs = append(errs, fmt.Errorf("cut vif %s: %w", info[i].ID, err))
		}
	}
	return errors.Join(errs...)
}

// plugAll plugs the interfaces, all at once.
func (a *Agent) plugAll(ctx context.Context, in *instance, info novalet.NetworkInfo, netns string, static bool) error {
	requests := in.plugRequests(info, netns, static)
	group, gctx := errgroup.WithContext(ctx)
	for i := range requests {
		group.Go(func() error {
			if err := a.plugger.Plug(gctx, &requests[i]); err != nil {
				return fmt.Errorf("plug vif %s: %w", requests[i].VIF.ID, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if len(info) > 0 {
		in.holdNet(netns)
	}
	return nil
}

// plugRequests numbers the interfaces. An interface keeps its number as long as the instance has it, so that eth1 stays
// eth1 when eth0 is detached.
func (in *instance) plugRequests(info novalet.NetworkInfo, netns string, static bool) []novalet.PlugRequest {
	in.mu.Lock()
	defer in.mu.Unlock()
	numbers, taken := map[string]int{}, map[int]bool{}
	for i := range info {
		if n, ok := in.rec.Interfaces[info[i].ID]; ok {
			numbers[info[i].ID], taken[n] = n, true
		}
	}
	out := make([]novalet.PlugRequest, len(info))
	next := 0
	for i := range info {
		n, ok := numbers[info[i].ID]
		if !ok {
			for taken[next] {
				next++
			}
			n = next
			numbers[info[i].ID], taken[n] = n, true
		}
		out[i] = novalet.PlugRequest{InstanceUUID: in.uuid, VIF: &info[i], NetNS: netns, Index: n, Static: static,
			ExtraSpecs: in.rec.Instance.Flavor.ExtraSpecs}
	}
	in.rec.Interfaces = numbers
	return out
}
