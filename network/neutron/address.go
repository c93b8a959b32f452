package neutron

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"

	"github.com/novalet/novalet"
)

// wantedIP is an address as a request asks for it: any of a subnet, or one that the port has.
type wantedIP struct {
	SubnetID string `json:"subnet_id"`
	Address  string `json:"ip_address,omitempty"`
}

// AddAddress implements novalet.NetworkAPI. It asks as the user, whose right it is to choose a port's addresses.
func (a *API) AddAddress(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, networkID string) error {
	ctx = withRequest(ctx, rc)
	if !uuidRE.MatchString(networkID) {
		return noNetwork(inst)
	}
	by, ports, err := a.changeable(ctx, rc, inst)
	if err != nil {
		return fmt.Errorf("add an address of network %s: %w", networkID, err)
	}
	ports = slices.DeleteFunc(ports, func(p *port) bool { return p.NetworkID != networkID })
	if len(ports) == 0 {
		return noNetwork(inst)
	}
	var body struct{ Subnets []subnet }
	if err := by.get(ctx, "subnets", url.Values{"network_id": {networkID}}, &body); err != nil {
		return fmt.Errorf("add an address of network %s: %w", networkID, err)
	}
	var refused error
	for _, p := range ports {
		for _, s := range body.Subnets {
			err := a.setAddresses(ctx, by, p, append(held(p, ""), wantedIP{SubnetID: s.ID}))
			if err == nil || !definite(err) {
				return err
			}
			refused = err // the subnet may be full, or not reach this host: the next one gets its chance
		}
	}
	if refused != nil {
		return portFault(refused, inst, networkID, novalet.NetworkRequest{})
	}
	return noNetwork(inst)
}

// RemoveAddress implements novalet.NetworkAPI.
func (a *API) RemoveAddress(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, address string) error {
	ctx = withRequest(ctx, rc)
	by, ports, err := a.changeable(ctx, rc, inst)
	if err != nil {
		return fmt.Errorf("remove an address: %w", err)
	}
	want, err := netip.ParseAddr(address)
	for _, p := range ports {
		for _, ip := range p.FixedIPs {
			if have, herr := netip.ParseAddr(ip.Address); err == nil && herr == nil && have == want {
				return a.setAddresses(ctx, by, p, held(p, ip.Address))
			}
		}
	}
	f := novalet.Faultf(novalet.ErrNotFound, "FixedIpNotFoundForInstance", "Instance %s does not have fixed IP '%.60s'.", inst.UUID, address)
	f.Details = map[string]any{"instance_uuid": inst.UUID, "ip": address}
	return f
}

// changeable returns the ports of the instance, and who may change them: the user, or the agent where no token came.
func (a *API) changeable(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance) (*caller, []*port, error) {
	admin, err := a.admin(ctx)
	if err != nil {
		return nil, nil, err
	}
	by, err := a.asUser(ctx, rc)
	if err != nil {
		return nil, nil, err
	}
	if by == nil {
		by = admin
	}
	ports, err := a.instancePorts(ctx, admin, inst)
	return by, ports, err
}

// held lists the addresses of a port but one.
func held(p *port, but string) []wantedIP {
	out := []wantedIP{}
	for _, ip := range p.FixedIPs {
		if ip.Address != but {
			out = append(out, wantedIP(ip))
		}
	}
	return out
}

func (a *API) setAddresses(ctx context.Context, by *caller, p *port, ips []wantedIP) error {
	return by.put(ctx, "ports/"+p.ID, map[string]any{"port": map[string]any{"fixed_ips": ips}}, nil)
}

// definite says that Neutron answered and will answer the same again.
func definite(err error) bool {
	var e *apiError
	return errors.As(err, &e) && !errors.Is(err, novalet.ErrTryAgain)
}

func noNetwork(inst *novalet.Instance) error {
	f := novalet.Faultf(novalet.ErrNotFound, "NetworkNotFoundForInstance", "Network could not be found for instance %s.", inst.UUID)
	f.Details = map[string]any{"instance_id": inst.UUID}
	return f
}
