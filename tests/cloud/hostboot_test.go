package cloud_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"golang.org/x/sys/unix"
)

// hostBoots leaves of the host, for its agent, what a boot of it leaves: nothing runs and nothing is mounted, the files are there,
// the kernel says that this is another boot. meanwhile is done while the host is away.
func hostBoots(t *testing.T, meanwhile func()) {
	t.Helper()
	const bootID = "/proc/sys/kernel/random/boot_id"
	id, err := os.ReadFile("/proc/sys/kernel/random/uuid") // another one at each reading
	must(t, err)
	file := filepath.Join(t.TempDir(), "boot_id")
	must(t, os.WriteFile(file, id, 0o444))
	kill9(t, func() {
		devstack(t, "host.sh", "guests")
		meanwhile()
		must(t, unix.Mount(file, bootID, "", unix.MS_BIND, ""))
		t.Cleanup(func() { _ = unix.Unmount(bootID, unix.MNT_DETACH) }) // done below already, unless the agent does not start
	})
	must(t, unix.Unmount(bootID, 0)) // it has read it
}

// containerOf is the state of a server's container; empty, when the agent knows nothing of the server.
func containerOf(t *testing.T, id string) string {
	t.Helper()
	out, err := novalet("ps", "--json")
	must(t, err)
	var list []struct{ UUID, State string }
	must(t, json.Unmarshal([]byte(out), &list))
	for _, v := range list {
		if v.UUID == id {
			return v.State
		}
	}
	return ""
}

// TestHostBoot: after a boot of the host what ran runs again when resume_guests_state_on_host_boot says so, with its address; else
// it is SHUTOFF and can be started. What was stopped stays so, and what was deleted while the host was away ends here, too.
func TestHostBoot(t *testing.T) {
	needAlone(t)
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	own := &secondHost{t: t, name: computeHost()}
	running := boot(t, u, bootOpts{name: "boot-running", image: image})
	stopped := boot(t, u, bootOpts{name: "boot-stopped", image: image})
	must(t, servers.Stop(t.Context(), u.compute, stopped.ID).ExtractErr())
	waitStatus(t, u, stopped.ID, "SHUTOFF")
	ip, _ := fixedIP(t, u, running.ID)
	reaches := func() {
		t.Helper()
		eventually(t, long, "the server reaches its router from "+ip, func() error {
			out, err := novalet("exec", running.ID, "/bin/ping", "-c", "1", "-W", "2", "-I", ip, "10.77.0.1")
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return err
		})
	}
	for _, resume := range []bool{true, false} {
		t.Run(fmt.Sprintf("resume=%v", resume), func(t *testing.T) {
			deleted := boot(t, u, bootOpts{name: "boot-deleted", image: image})
			withOptions(t, "DEFAULT", fmt.Sprintf("resume_guests_state_on_host_boot = %v", resume))
			hostBoots(t, func() {
				// Nova deletes by itself what is on a host that is down.
				own.forceDown(true)
				remove(t, u, deleted.ID)
				own.forceDown(false)
			})
			state, status := "stopped", "SHUTOFF"
			if resume {
				state, status = "running", "ACTIVE"
			}
			eventually(t, long, "the host is as it should be", func() error {
				if r, s, d := containerOf(t, running.ID), containerOf(t, stopped.ID), containerOf(t, deleted.ID); r != state || s != "stopped" || d != "" {
					return fmt.Errorf("running one %q, stopped one %q, deleted one %q", r, s, d)
				}
				return nil
			})
			waitStatus(t, u, running.ID, status)
			waitStatus(t, u, stopped.ID, "SHUTOFF")
			if !resume {
				must(t, servers.Start(t.Context(), u.compute, running.ID).ExtractErr())
				waitStatus(t, u, running.ID, "ACTIVE")
			}
			reaches()
		})
	}
}
