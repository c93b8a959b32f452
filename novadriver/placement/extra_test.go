package placement

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What an operator adds stands beside what is the host's own, exactly as written, and is changed with the file.
func TestSyncExtra(t *testing.T) {
	s, c := newServer(t)
	ctx := t.Context()
	w := want()
	w.Extra = map[string]Inventory{"CUSTOM_LICENSE": {Total: 5, Reserved: 1, MinUnit: 1, MaxUnit: 2, StepSize: 1, AllocationRatio: 1.5}}
	for range 2 {
		if _, err := c.Sync(ctx, w); err != nil {
			t.Fatal(err)
		}
	}
	p := s.providers[w.UUID]
	if diff := cmp.Diff(w.Extra["CUSTOM_LICENSE"], p.inventories["CUSTOM_LICENSE"]); diff != "" || p.inventories["VCPU"].Total == 0 {
		t.Errorf("inventories %+v\n%s", p.inventories, diff)
	}
	classes := 0
	for _, r := range s.requests() {
		if r == "PUT /resource_classes/CUSTOM_LICENSE" {
			classes++
		}
	}
	if classes != 1 {
		t.Errorf("the class was made %d times", classes)
	}
	w.Extra["CUSTOM_LICENSE"] = Inventory{Total: 7, MinUnit: 1, MaxUnit: 7, StepSize: 1, AllocationRatio: 1}
	if _, err := c.Sync(ctx, w); err != nil || p.inventories["CUSTOM_LICENSE"].Total != 7 {
		t.Errorf("inventories %+v, %v", p.inventories, err)
	}
	// It goes with its file, but not from under an instance.
	s.consumers["i1"] = &consumer{held: map[string]map[string]any{w.UUID: {"resources": map[string]any{"CUSTOM_LICENSE": 1.0}}}}
	w.Extra = nil
	if _, err := c.Sync(ctx, w); err != nil || p.inventories["CUSTOM_LICENSE"].Total != 7 {
		t.Errorf("held by an instance: inventories %+v, %v", p.inventories, err)
	}
	delete(s.consumers, "i1")
	if _, err := c.Sync(ctx, w); err != nil || len(p.inventories) != len(w.Classes) {
		t.Errorf("inventories %+v, %v", p.inventories, err)
	}
}
