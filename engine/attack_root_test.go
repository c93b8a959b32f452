package engine

import (
	"strings"
	"testing"
)

// TestAttackBelowRoot: what an instance's root lies on holds nothing, for who takes the root away.
func TestAttackBelowRoot(t *testing.T) {
	bothKinds(t, func(t *testing.T, te *testEngine, id string) {
		out := te.try(t, id, "below")
		want := "no mount namespace: operation not permitted"
		if id == "machine" {
			want = "below: /new"
		}
		if !strings.Contains(out, want) {
			t.Errorf("it saw nothing: %q", out)
		}
	})
}
