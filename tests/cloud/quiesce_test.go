package cloud_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// askNova sends what nova-api sends for the snapshot of a server's volumes, which nothing in the API leads to without volumes: by
// the code of the cloud's own Nova. It returns what that says.
func askNova(t *testing.T, id, method string) string {
	t.Helper()
	out, err := sh(t.Context(), "env", "STATE="+state(t), "bash", "-c", `. ../../devstack/vars.sh; exec "$PYTHON" -W ignore testdata/quiesce.py "$@"`,
		"bash", filepath.Join(state(t), "etc", "nova.conf"), id, method)
	if err != nil {
		t.Fatalf("%s: %v: %s", method, err, tail(out, 2000))
	}
	return out
}

// TestQuiesce: a quiesced guest stops where it is, with its files on disk, and stays so when the agent is killed; to its user it is
// ACTIVE all the while. It goes on when it is unquiesced, and every operation finds it as it was.
func TestQuiesce(t *testing.T) {
	u := as(t, "demo")
	image := upload(t, u, imageSpec{name: "novalet-test-count", container: "docker", disk: "raw"},
		strings.NewReader(string(dockerArchive(t, busyboxRoot(t), map[string]any{
			"Cmd": []string{"/bin/sh", "-c", "trap 'echo told to end; exit' TERM; n=0; while :; do n=$((n+1)); echo $n >/count; sleep 0.1; done"}, "Env": []string{"PATH=/bin"}}))))
	leavesNothing(t)
	said := agentLog(t)
	id := boot(t, u, bootOpts{image: image}).ID
	was := initPID(t, id)
	count := func() string {
		pid, _, _ := strings.Cut(initPID(t, id), "@")
		b, err := os.ReadFile(filepath.Join("/proc", pid, "root", "count"))
		must(t, err)
		return strings.TrimSpace(string(b))
	}
	frozen := func(when string) {
		t.Helper()
		n := count()
		time.Sleep(500 * time.Millisecond)
		if is := containerOf(t, id); is != "paused" || count() != n {
			t.Errorf("%s: the guest is %s and counted from %s to %s", when, is, n, count())
		}
		var s struct {
			Status, VMState string
			Power           int `json:"OS-EXT-STS:power_state"`
		}
		must(t, servers.Get(t.Context(), u.compute, id).ExtractInto(&s))
		if s.Status != "ACTIVE" || s.Power != 1 {
			t.Errorf("%s: its user sees it %s, power state %d", when, s.Status, s.Power)
		}
	}
	goesOn := func(when string) {
		t.Helper()
		eventually(t, long, "the guest goes on "+when, func() error {
			n := count()
			time.Sleep(300 * time.Millisecond)
			if is := containerOf(t, id); is != "running" || count() == n {
				return fmt.Errorf("%s at %s", is, n)
			}
			return nil
		})
	}
	ask := func(method, want string) {
		t.Helper()
		if out := askNova(t, id, method); !strings.Contains(out, want) {
			t.Errorf("%s: %q, want %q", method, tail(out, 500), want)
		}
	}

	ask("quiesce", "done")
	frozen("quiesced")
	kill9(t, nil)
	frozen("after the agent was killed")
	ask("unquiesce", "done")
	goesOn("when it is unquiesced")
	if now := initPID(t, id); now != was {
		t.Errorf("init was %s, is %s", was, now)
	}

	// All of it, as nova-api does it.
	ended := strings.Count(said(), "guest is not quiesced any more")
	ask("snapshot", "done")
	eventually(t, long, "the snapshot's end is heard", func() error {
		if n := strings.Count(said(), "guest is not quiesced any more"); n != ended+1 {
			return fmt.Errorf("%d, before it %d", n, ended)
		}
		return nil
	})
	goesOn("after a snapshot")

	// An unquiesce that comes to an agent that is away waits for the next one.
	ask("quiesce", "done")
	kill9(t, func() { ask("unquiesce", "done") })
	goesOn("when the agent is back")

	// A stop lets it end by itself; what does not run cannot be quiesced, and is snapshotted all the same.
	ask("quiesce", "done")
	must(t, servers.Stop(t.Context(), u.compute, id).ExtractErr())
	waitStatus(t, u, id, "SHUTOFF")
	waitLog(t, u, id, "told to end", long)
	ask("quiesce", "InstanceQuiesceNotSupported_Remote Quiescing is not supported in instance "+id+": it is not running.")
	ask("unquiesce", "done")
	must(t, servers.Start(t.Context(), u.compute, id).ExtractErr())
	waitStatus(t, u, id, "ACTIVE")
	goesOn("when it is started")

	ask("quiesce", "done")
	remove(t, u, id)
}
