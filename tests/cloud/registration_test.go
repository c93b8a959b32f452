package cloud_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/hypervisors"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/services"
	"github.com/gophercloud/gophercloud/v2/openstack/placement/v1/resourceproviders"
)

// serviceState is the agent's line of `openstack compute service list`.
func serviceState(t testing.TB) (state, status string) {
	t.Helper()
	admin := as(t, "admin")
	p, err := services.List(admin.compute, services.ListOpts{Binary: "nova-compute", Host: computeHost()}).AllPages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := services.ExtractServices(p)
	if err != nil {
		t.Fatal(err)
	}
	if len(l) != 1 {
		return "", ""
	}
	return l[0].State, l[0].Status
}

// TestRegistration: the service is up and enabled, the hypervisor has believable figures, Placement has the provider
// with the same uuid, inventories and traits.
func TestRegistration(t *testing.T) {
	admin := as(t, "admin")
	eventually(t, long, "the compute service is up", func() error {
		if state, status := serviceState(t); state != "up" || status != "enabled" {
			return fmt.Errorf("state %q, status %q", state, status)
		}
		return nil
	})
	page, err := hypervisors.List(admin.compute, nil).AllPages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	list, err := hypervisors.ExtractHypervisors(page)
	if err != nil {
		t.Fatal(err)
	}
	var hv *hypervisors.Hypervisor
	for i := range list {
		if list[i].HypervisorHostname == computeHost() {
			hv = &list[i]
		}
	}
	if hv == nil {
		t.Fatalf("no hypervisor %s among %d", computeHost(), len(list))
	}
	if hv.HypervisorType != "novalet" || hv.State != "up" {
		t.Errorf("hypervisor type %q, state %q", hv.HypervisorType, hv.State)
	}
	if want := cpus(t); hv.VCPUs != want {
		t.Errorf("hypervisor has %d vcpus, this machine %d", hv.VCPUs, want)
	}
	if want := memoryMB(t); hv.MemoryMB < want*9/10 || hv.MemoryMB > want {
		t.Errorf("hypervisor has %d MiB, this machine %d", hv.MemoryMB, want)
	}
	if hv.LocalGB <= 0 {
		t.Errorf("hypervisor has %d GB of disk", hv.LocalGB)
	}
	id := providerID(t)
	if hv.ID != id {
		t.Errorf("hypervisor %s and resource provider %s differ", hv.ID, id)
	}
	inv, err := resourceproviders.GetInventories(t.Context(), admin.placement, id).Extract()
	if err != nil {
		t.Fatal(err)
	}
	for class, want := range map[string]int{"VCPU": hv.VCPUs, "MEMORY_MB": hv.MemoryMB, "DISK_GB": hv.LocalGB} {
		if got := inv.Inventories[class].Total; got != want {
			t.Errorf("inventory of %s: %d, hypervisor says %d", class, got, want)
		}
	}
	traits, err := resourceproviders.GetTraits(t.Context(), admin.placement, id).Extract()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"COMPUTE_NODE", "COMPUTE_NET_ATTACH_INTERFACE", "COMPUTE_NET_ATTACH_INTERFACE_WITH_TAG", "COMPUTE_DEVICE_TAGGING", "CUSTOM_NOVALET"} {
		if !slices.Contains(traits.Traits, want) {
			t.Errorf("provider lacks the trait %s: %v", want, traits.Traits)
		}
	}
}

func cpus(t testing.TB) int {
	t.Helper()
	l, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

func memoryMB(t testing.TB) int {
	t.Helper()
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	var kb int
	if _, err := fmt.Sscanf(string(b), "MemTotal: %d kB", &kb); err != nil {
		t.Fatal(err)
	}
	return kb / 1024
}

// TestDisable: disabling the service puts the trait on the provider, so that nothing is scheduled here.
func TestDisable(t *testing.T) {
	admin := as(t, "admin")
	p, err := services.List(admin.compute, services.ListOpts{Binary: "nova-compute", Host: computeHost()}).AllPages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := services.ExtractServices(p)
	if err != nil || len(l) != 1 {
		t.Fatalf("service: %v, %v", l, err)
	}
	set := func(s services.ServiceStatus) {
		t.Helper()
		if _, err := services.Update(t.Context(), admin.compute, l[0].ID, services.UpdateOpts{Status: s}).Extract(); err != nil {
			t.Fatalf("set status %s: %v", s, err)
		}
	}
	hasTrait := func(want bool) {
		t.Helper()
		eventually(t, long, "the trait follows", func() error {
			traits, err := resourceproviders.GetTraits(t.Context(), admin.placement, providerID(t)).Extract()
			if err != nil {
				return err
			}
			if got := strings.Contains(strings.Join(traits.Traits, " "), "COMPUTE_STATUS_DISABLED"); got != want {
				return fmt.Errorf("COMPUTE_STATUS_DISABLED: %v", got)
			}
			return nil
		})
	}
	set(services.ServiceDisabled)
	defer set(services.ServiceEnabled)
	hasTrait(true)
	set(services.ServiceEnabled)
	hasTrait(false)
}
