package engine

import (
	"testing"

	"github.com/novalet/novalet/internal/contracttest"
)

// The contract that all runtimes keep.
func TestContract(t *testing.T) {
	contracttest.Runtime(t, func(t *testing.T) *contracttest.RuntimeFixture {
		te := newEngine(t)
		layers := busybox(t)
		missing := app(layers, "")
		missing.Process.Args = []string{"/bin/nothing"}
		return &contracttest.RuntimeFixture{Runtime: te, Spec: app(layers, `trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done`), Missing: missing, Prints: "ready"}
	})
}
