package network

import (
	"os/exec"
	"slices"
	"testing"

	"github.com/novalet/novalet"
)

// TestNothingPassesAfterTheCut: of a plug that is still there; the next plug mends it.
func TestNothingPassesAfterTheCut(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	a, b := newNS(t), newNS(t)
	ra := &novalet.PlugRequest{InstanceUUID: instA, VIF: vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10"), NetNS: nsPath(a), Static: true}
	rb := &novalet.PlugRequest{InstanceUUID: instB, VIF: vif(portB, "fa:16:3e:00:00:0b", "10.78.0.11"), NetNS: nsPath(b), Static: true}
	for _, r := range []*novalet.PlugRequest{ra, rb} {
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Cut(t.Context(), instB, ra.VIF); err != nil { // not that instance's
		t.Fatal(err)
	}
	if err := ping(a, "10.78.0.11"); err != nil {
		t.Fatal(err)
	}
	before := hostLinks(t, p)
	if err := p.Cut(t.Context(), instA, ra.VIF); err != nil {
		t.Fatal(err)
	}
	if err := inNetNS(a, func() error { return exec.Command("ping", "-c", "1", "-W", "1", "10.78.0.11").Run() }); err == nil {
		t.Error("the instance still reaches its neighbour")
	}
	if after := hostLinks(t, p); !slices.Equal(before, after) {
		t.Errorf("devices %v, before the cut %v", after, before)
	}
	if err := p.Plug(t.Context(), ra); err != nil {
		t.Fatal(err)
	}
	if err := ping(a, "10.78.0.11"); err != nil {
		t.Errorf("after the next plug: %v", err)
	}
}
