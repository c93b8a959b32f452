package agent

import (
	"slices"
	"strings"
	"testing"

	"github.com/novalet/novalet"
)

// someDevices are what a host has.
type someDevices []novalet.PCIDevice

func (d someDevices) PCIDevices() ([]novalet.PCIDevice, error) { return slices.Clone(d), nil }

const directA, directB = "aaaaaaaa-0000-4000-8000-000000000001", "aaaaaaaa-0000-4000-8000-000000000002"

// deviceLab is a lab on a host with two functions, one on each network.
func deviceLab(t *testing.T) *lab {
	return newLab(t, func(l *lab) {
		l.pci = someDevices{
			{Address: "0000:03:10.0", VendorID: "8086", ProductID: "1520", Tags: map[string]string{"physical_network": "one"}},
			{Address: "0000:03:10.2", VendorID: "8086", ProductID: "1520", Tags: map[string]string{"physical_network": "Two"}},
		}
		l.world.AddPort(directA)
		l.world.AddPort(directB)
	})
}

// asking has a build bring a port that needs a function on a network.
func asking(port, network string) func(*novalet.Operation) {
	return func(op *novalet.Operation) {
		op.Args.Build.RequestedNetworks = []novalet.NetworkRequest{{PortID: port}}
		op.Instance.PCIRequests = []novalet.PCIRequest{{ID: "r-" + port, PortID: port, Count: 1,
			Spec: []map[string]string{{"physical_network": network, "remote_managed": "False"}}}}
	}
}

// claims says who has what, as the resource tracker hears it.
func (l *lab) claims() string {
	l.t.Helper()
	res, err := l.agent.Resources(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	var out []string
	for _, c := range res.PCIClaims {
		state := "claimed"
		if c.Allocated {
			state = "allocated"
		}
		out = append(out, c.Device.Address+" "+state+" "+c.InstanceUUID[:8]+" "+c.PortID)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func TestDevices(t *testing.T) {
	l := deviceLab(t)
	first := l.boot(asking(directA, "TWO"))
	const has = "0000:03:10.2 allocated 00000001 " + directA
	if got := l.claims(); got != has {
		t.Errorf("after the boot: %s", got)
	}
	// The next one wants the same network: the host has none left.
	op := l.server(asking(directB, "two"))
	l.submit(op)
	eventually(t, "the second build has failed", func() bool { return len(l.world.Row(op.Instance.UUID).Faults) > 0 && l.idle(op.Instance.UUID) })
	if got := l.claims(); got != has {
		t.Errorf("after a build that found none: %s", got)
	}
	// One that fails after it got a device gives that back.
	l.h.Faults.Fail("NetworkAPI.Allocate", novalet.ErrAbort, 1)
	op = l.server(asking(directB, "one"))
	l.submit(op)
	l.await(op.Instance.UUID, novalet.VMError)
	if got := l.claims(); got != has {
		t.Errorf("after a build that failed: %s", got)
	}
	// A crash does not lose it, nor does a stop.
	l.crash()
	l.open()
	if got := l.claims(); got != has {
		t.Errorf("after a crash: %s", got)
	}
	l.cast(first, novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{})
	l.await(first, novalet.VMStopped)
	if got := l.claims(); got != has {
		t.Errorf("after a stop: %s", got)
	}
	l.cast(first, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(first)
	if got := l.claims(); got != "" {
		t.Errorf("after the delete: %s", got)
	}
}

// A device that did not come back stays taken until it has.
func TestDeviceThatDoesNotComeBack(t *testing.T) {
	l := deviceLab(t)
	uuid := l.boot(asking(directA, "one"))
	l.h.Faults.Fail("VIFPlugger.Unplug", novalet.ErrBusy, 1)
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	eventually(t, "the row is gone", func() bool { return l.world.Row(uuid).Deleted && l.idle(uuid) })
	if got := l.claims(); !strings.HasPrefix(got, "0000:03:10.0 ") {
		t.Errorf("while it is not back: %q", got)
	}
	in, err := l.agent.lookup(uuid)
	if err != nil {
		t.Fatal(err)
	}
	in.retryUndo()
	l.awaitGone(uuid)
	if got := l.claims(); got != "" {
		t.Errorf("when it is back: %s", got)
	}
}

// Devices of flavors are none that a container can use.
func TestFlavorsDevicesAreRefused(t *testing.T) {
	l := deviceLab(t)
	op := l.server(func(op *novalet.Operation) {
		op.Instance.PCIRequests = []novalet.PCIRequest{{ID: "r", Alias: "gpu", Count: 1, Spec: []map[string]string{{"vendor_id": "8086"}}}}
	})
	l.submit(op)
	l.await(op.Instance.UUID, novalet.VMError)
	if f := l.world.Row(op.Instance.UUID).Faults; len(f) == 0 || !strings.Contains(novalet.FaultText(f[0]), "pci_passthrough:alias") {
		t.Errorf("faults: %v", f)
	}
	if got := l.claims(); got != "" {
		t.Errorf("claims: %s", got)
	}
}
