package agent

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/novalet/novalet"
)

// Devices of the host that an instance has for itself: virtual functions of network interfaces, one for a port. The record
// says which instance has which; Nova's rows follow it. One stays taken until it is back on the host, also when the
// instance is gone by then.

// deviceAsker is what a NetworkAPI that knows of devices has beside the contract.
type deviceAsker interface {
	// PCIRequest says which device a port needs; nil is none.
	PCIRequest(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance, portID string) (*novalet.PCIRequest, error)
}

// claimPCI gives an instance a device for each request, or keeps those it has. On error it has none more than before.
func (a *Agent) claimPCI(in *instance, requests []novalet.PCIRequest) error {
	if len(requests) == 0 {
		return nil
	}
	for i := range requests {
		if r := &requests[i]; r.PortID == "" || r.Alias != "" || r.Count != 1 {
			return novalet.Faultf(novalet.ErrAbort, "PciDeviceRequestFailed",
				"A container cannot use PCI devices other than network functions of ports with vnic_type direct. Choose a flavor without pci_passthrough:alias.")
		}
	}
	var devices []novalet.PCIDevice
	if a.pci != nil {
		var err error
		if devices, err = a.pci.PCIDevices(); err != nil {
			return fmt.Errorf("read devices: %w", err)
		}
	}
	a.pciMu.Lock()
	defer a.pciMu.Unlock()
	taken := map[string]bool{}
	for _, c := range a.pciClaims() {
		taken[c.Device.Address] = true
	}
	var claims []novalet.PCIClaim
	in.read(func(r *record) { claims = slices.Clone(r.PCI) })
	had := len(claims)
	for _, r := range requests {
		if slices.ContainsFunc(claims, func(c novalet.PCIClaim) bool { return c.PortID == r.PortID }) {
			continue
		}
		i := slices.IndexFunc(devices, func(d novalet.PCIDevice) bool { return !taken[d.Address] && meets(&d, &r) })
		if i < 0 {
			f := novalet.Faultf(novalet.ErrReschedule, "ComputeResourcesUnavailable",
				"The host has no network function left for port %s. Try again later.", r.PortID)
			f.Details = map[string]any{"reason": "no PCI device left"}
			return f
		}
		taken[devices[i].Address] = true
		claims = append(claims, novalet.PCIClaim{Device: devices[i], RequestID: r.ID, PortID: r.PortID})
	}
	if len(claims) == had {
		return nil
	}
	// On disk before anything is done with them: a crash must not leave one in two instances.
	return in.update(func(r *record) { r.PCI = claims })
}

// meets says whether a device has what a request asks for: every property the same text, in any case (nova/pci/utils.py,
// pci_device_prop_match).
func meets(d *novalet.PCIDevice, r *novalet.PCIRequest) bool {
	have := d.Properties()
	return slices.ContainsFunc(r.Spec, func(spec map[string]string) bool {
		for k, v := range spec {
			if !strings.EqualFold(have[k], v) {
				return false
			}
		}
		return true
	})
}

// claimForPort asks the network which device a port needs, and claims it.
func (a *Agent) claimForPort(ctx context.Context, in *instance, rc novalet.RequestContext, portID string) error {
	asker, ok := a.network.(deviceAsker)
	if !ok || portID == "" {
		return nil
	}
	r, err := asker.PCIRequest(ctx, rc, in.view(), portID)
	if err != nil {
		return fmt.Errorf("read port %s: %w", portID, err)
	}
	if r == nil {
		return nil
	}
	if err := a.claimPCI(in, []novalet.PCIRequest{*r}); err != nil {
		return err
	}
	a.announce(in)
	return nil
}

// dropClaim frees the device of a port that is back on the host.
func (a *Agent) dropClaim(in *instance, portID string) {
	dropped := false
	err := in.updateIf(func(r *record) bool {
		left := slices.DeleteFunc(slices.Clone(r.PCI), func(c novalet.PCIClaim) bool { return c.PortID == portID })
		dropped = len(left) < len(r.PCI)
		r.PCI = left
		return dropped
	}, nil)
	if err != nil && a.ctx.Err() == nil {
		in.log.Error("record is behind", "err", err)
	}
	if dropped {
		a.announce(in)
	}
}

// pciClaims lists who has which device, those included that an instance left behind in a namespace.
func (a *Agent) pciClaims() []novalet.PCIClaim {
	var out []novalet.PCIClaim
	for _, in := range a.all() {
		in.read(func(r *record) {
			for _, c := range r.PCI {
				c.InstanceUUID = in.uuid
				c.Allocated = r.Instance.VMState != novalet.VMBuilding
				out = append(out, c)
			}
		})
	}
	return out
}

// deviceFor returns the device that the instance has for a port, or nil.
func (in *instance) deviceFor(portID string) (d *novalet.PCIDevice) {
	in.read(func(r *record) {
		for _, c := range r.PCI {
			if c.PortID == portID {
				d = &c.Device
			}
		}
	})
	return d
}

// withDevices names the devices claimed for the ports of a request.
func (in *instance) withDevices(requests []novalet.NetworkRequest) []novalet.NetworkRequest {
	out := slices.Clone(requests)
	for i := range out {
		if out[i].PortID != "" {
			out[i].Device = in.deviceFor(out[i].PortID)
		}
	}
	return out
}

// devicesOf names the devices of interfaces.
func (in *instance) devicesOf(info novalet.NetworkInfo) novalet.NetworkInfo {
	out := slices.Clone(info)
	for i := range out {
		out[i].Device = in.deviceFor(out[i].ID)
	}
	return out
}

// retrieveDevices takes the devices of an instance out of its namespace, if that is still there, before it ends: the
// kernel gives them back when it does, but in its own time and under another name.
func (a *Agent) retrieveDevices(ctx context.Context, in *instance, info novalet.NetworkInfo) {
	for i := range info {
		if in.deviceFor(info[i].ID) == nil {
			continue
		}
		netns, done := a.netnsOf(ctx, in)
		if netns == "" {
			return
		}
		err := a.plugger.Park(ctx, in.uuid, &info[i], netns)
		done()
		if err != nil && ctx.Err() == nil {
			in.log.Warn("device is left to come back with the end of its namespace", "vif", info[i].ID, "err", err)
		}
	}
}

// netnsOf is a path to the instance's network namespace, "" when there is none.
func (a *Agent) netnsOf(ctx context.Context, in *instance) (path string, done func()) {
	if st, err := a.runtime.Status(ctx, in.uuid); err == nil && st.NetNS != "" {
		return st.NetNS, func() {}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.netns == nil {
		return "", func() {}
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", in.netns.Fd()))
	if err != nil {
		return "", func() {}
	}
	return fmt.Sprintf("/proc/self/fd/%d", f.Fd()), func() { f.Close() }
}

// devicePlugger tells a VIFPlugger which device each VIF has.
type devicePlugger struct {
	novalet.VIFPlugger
	a *Agent
}

func (p *devicePlugger) with(uuid string, vif *novalet.VIF) *novalet.VIF {
	in, err := p.a.lookup(uuid)
	if err != nil {
		return vif
	}
	d := in.deviceFor(vif.ID)
	if d == nil {
		return vif
	}
	v := *vif
	v.Device = d
	return &v
}

// Plug implements novalet.VIFPlugger.
func (p *devicePlugger) Plug(ctx context.Context, r *novalet.PlugRequest) error {
	c := *r
	c.VIF = p.with(r.InstanceUUID, r.VIF)
	return p.VIFPlugger.Plug(ctx, &c)
}

// Configure implements novalet.VIFPlugger.
func (p *devicePlugger) Configure(ctx context.Context, r *novalet.PlugRequest) error {
	c := *r
	c.VIF = p.with(r.InstanceUUID, r.VIF)
	return p.VIFPlugger.Configure(ctx, &c)
}

// Unplug implements novalet.VIFPlugger.
func (p *devicePlugger) Unplug(ctx context.Context, uuid string, vif *novalet.VIF) error {
	return p.VIFPlugger.Unplug(ctx, uuid, p.with(uuid, vif))
}

// Park implements novalet.VIFPlugger.
func (p *devicePlugger) Park(ctx context.Context, uuid string, vif *novalet.VIF, netns string) error {
	return p.VIFPlugger.Park(ctx, uuid, p.with(uuid, vif), netns)
}

// Silence implements novalet.VIFPlugger.
func (p *devicePlugger) Silence(ctx context.Context, uuid string, vif *novalet.VIF, netns string, on bool) error {
	return p.VIFPlugger.Silence(ctx, uuid, p.with(uuid, vif), netns, on)
}
