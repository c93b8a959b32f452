package cloud_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"golang.org/x/sys/unix"
)

func jsonField(t testing.TB, text, id string) int {
	t.Helper()
	var list []struct {
		UUID string `json:"uuid"`
		PID  int    `json:"pid"`
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatal(err)
	}
	for _, v := range list {
		if v.UUID == id && v.PID != 0 {
			return v.PID
		}
	}
	t.Fatalf("instance %s does not run: %s", id, text)
	return 0
}

// tickImage prints a line a second: its console log shows a break.
func tickImage(t testing.TB, u *user) string {
	t.Helper()
	return upload(t, u, imageSpec{name: "novalet-test-tick", container: "docker", disk: "raw"},
		strings.NewReader(string(dockerArchive(t, busyboxRoot(t), map[string]any{
			"Cmd": []string{"/bin/sh", "-c", "n=0; while :; do n=$((n+1)); echo tick $n; sleep 1; done"}, "Env": []string{"PATH=/bin"}}))))
}

// TestKillRunning: SIGKILL of the agent does not touch a running instance: same init, and its console log has no gap.
func TestKillRunning(t *testing.T) {
	u := as(t, "demo")
	s := boot(t, u, bootOpts{image: tickImage(t, u), noNet: true})
	waitLog(t, u, s.ID, "tick 3\n", long)
	was := initPID(t, s.ID)
	var gone time.Time
	kill9(t, func() { gone = time.Now(); time.Sleep(3 * time.Second) })
	if now := initPID(t, s.ID); now != was {
		t.Errorf("init was %s, is %s", was, now)
	}
	// What was printed while no agent ran must be there.
	n := int(time.Since(gone).Seconds())
	log := waitLog(t, u, s.ID, fmt.Sprintf("tick %d\n", 3+n), long)
	for i := 1; i <= 3+n; i++ {
		if !strings.Contains(log, fmt.Sprintf("tick %d\n", i)) {
			t.Errorf("the console log lacks tick %d", i)
		}
	}
	if got := waitStatus(t, u, s.ID, "ACTIVE"); got.Status != "ACTIVE" {
		t.Errorf("status %s", got.Status)
	}
	// The new agent is in charge of it.
	must(t, servers.Stop(t.Context(), u.compute, s.ID).ExtractErr())
	waitStatus(t, u, s.ID, "SHUTOFF")
}

// TestKillBuilding: an instance that is being built when the agent is killed ends ACTIVE or in ERROR with a reason, and
// its deletion leaves nothing.
func TestKillBuilding(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	// The moments are spread over a boot, which takes a second or two with its port.
	for i, delay := range []time.Duration{100, 400, 800, 1300, 2000} {
		s := create(t, u, bootOpts{name: fmt.Sprintf("kill-%d", i), image: image})
		time.Sleep(delay * time.Millisecond)
		kill9(t, nil)
		eventually(t, long, "the build ends", func() error {
			got, err := servers.Get(t.Context(), u.compute, s.ID).Extract()
			switch {
			case err != nil:
				return err
			case got.Status == "ACTIVE" && got.TaskState == "":
				return nil
			case got.Status == "ERROR":
				if got.Fault.Message == "" {
					t.Errorf("killed after %v: ERROR without a reason", delay)
				}
				return nil
			}
			return fmt.Errorf("killed after %v ms: status %s, task %q", delay, got.Status, got.TaskState)
		})
		remove(t, u, s.ID)
	}
}

// TestKillDeleting: a delete that the kill interrupts is finished by the next agent.
func TestKillDeleting(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	for i, delay := range []time.Duration{0, 50, 200} {
		s := boot(t, u, bootOpts{name: fmt.Sprintf("kill-delete-%d", i), image: image})
		must(t, servers.Delete(t.Context(), u.compute, s.ID).ExtractErr())
		time.Sleep(delay * time.Millisecond)
		kill9(t, nil)
		remove(t, u, s.ID)
	}
}

// TestDeleteOnFullDisk: a server can be deleted although the agent cannot write anything down any more.
func TestDeleteOnFullDisk(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	records := filepath.Join(os.Getenv("NOVALET_CLOUD"), "novalet", "records")
	kill9(t, func() {
		kept := t.TempDir()
		must(t, os.CopyFS(kept, os.DirFS(records)))
		must(t, unix.Mount("none", records, "tmpfs", 0, "size=1m,mode=700"))
		must(t, os.CopyFS(records, os.DirFS(kept)))
	})
	t.Cleanup(func() { kill9(t, func() { must(t, unix.Unmount(records, 0)) }) })
	s := boot(t, u, bootOpts{image: image})
	fill := filepath.Join(records, "fill")
	if err := os.WriteFile(fill, make([]byte, 2<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("a file of 2 MiB on 1 MiB: %v", err)
	}
	remove(t, u, s.ID)
	log, err := os.ReadFile(filepath.Join(os.Getenv("NOVALET_CLOUD"), "log", "novalet.log"))
	must(t, err)
	if !regexp.MustCompile(`instance ` + s.ID + `: .*no space left on device`).Match(log) {
		t.Error("the delete was written down: the disk was not full")
	}
	must(t, os.Remove(fill))
	eventually(t, long, "the record goes", func() error {
		if left, err := filepath.Glob(filepath.Join(records, "instances", "*"+s.ID+"*")); err != nil || len(left) > 0 {
			return fmt.Errorf("left: %v (%v)", left, err)
		}
		return nil
	})
}
