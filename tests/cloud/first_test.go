package cloud_test

import (
	"regexp"
	"strings"
	"testing"
)

// TestFirstServer: what `make cloud` ends with, the first server of a user on the command line, twice.
func TestFirstServer(t *testing.T) {
	u := as(t, "demo")
	deleteAll(t, u, serversNamed(t, u, "hello$")) // the one that `make cloud` made, unless that is CI's
	before := snapshot(t)
	t.Cleanup(func() {
		deleteAll(t, u, serversNamed(t, u, "hello$"))
		unchanged(t, before)
	})
	listed := regexp.MustCompile(`\| hello +\| ACTIVE +\|`)
	first := devstack(t, "try.sh")
	if !listed.MatchString(first) {
		t.Errorf("it does not list the server:\n%s", first)
	}
	for _, want := range []string{"$ openstack server create --image busybox", "$ openstack console log show hello", "up: hello"} {
		if !strings.Contains(first, want) {
			t.Errorf("it does not show %q:\n%s", want, first)
		}
	}
	if again := devstack(t, "try.sh"); strings.Contains(again, "server create") || !listed.MatchString(again) {
		t.Errorf("the second run does not show the server of the first:\n%s", again)
	}
	if l := serversNamed(t, u, "hello$"); len(l) != 1 {
		t.Errorf("%d servers: %v", len(l), l)
	}
}
