// Package hosttest holds what tests on the real host share.
package hosttest

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// RequireRoot skips the test, saying why, unless it runs as root and NOVALET_ROOT_TESTS=1 allows it to change the
// host (mounts, namespaces, cgroups, links).
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv("NOVALET_ROOT_TESTS") != "1" {
		t.Skip("changes the host: runs as root with NOVALET_ROOT_TESTS=1 (make test)")
	}
}

// Patience lengthens what a test waits for at most where NOVALET_PATIENCE says by how much: on a processor in
// software, everything takes ten times as long.
func Patience(d time.Duration) time.Duration {
	if n, err := strconv.Atoi(os.Getenv("NOVALET_PATIENCE")); err == nil && n > 1 {
		return d * time.Duration(n)
	}
	return d
}

// ProcStatus reads the status file of a process or thread, such as /proc/1/status, into its lines by name.
func ProcStatus(t testing.TB, path string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for l := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(l, ":")
		m[k] = strings.TrimSpace(v)
	}
	return m
}
