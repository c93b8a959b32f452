// Package hosttest holds what tests on the real host share.
package hosttest

import (
	"os"
	"testing"
)

// RequireRoot skips the test, saying why, unless it runs as root and NOVALET_ROOT_TESTS=1 allows it to change the
// host (mounts, namespaces, cgroups, links).
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv("NOVALET_ROOT_TESTS") != "1" {
		t.Skip("changes the host: runs as root with NOVALET_ROOT_TESTS=1 (make test)")
	}
}
