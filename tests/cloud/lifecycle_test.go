package cloud_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/instanceactions"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// TestLifecycle takes one application instance through its life as a user does.
func TestLifecycle(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u) // before the snapshot: it stays
	leavesNothing(t)
	group := openGroup(t, u, 80)
	s := boot(t, u, bootOpts{name: "lifecycle", image: image, groups: []string{group}, metadata: map[string]string{"role": "web"}})
	ns := besideNS(t, u)
	ip, _ := fixedIP(t, u, s.ID)

	t.Run("show", func(t *testing.T) {
		if s.Metadata["role"] != "web" || s.Image["id"] != image || s.PowerState != servers.RUNNING {
			t.Errorf("server: %+v", s)
		}
		if !strings.Contains(fmt.Sprint(s.Addresses), ip) {
			t.Errorf("server is ACTIVE without its address %s: %v", ip, s.Addresses)
		}
		if s.LaunchedAt.IsZero() {
			t.Error("no launched_at")
		}
		admin, err := servers.Get(t.Context(), as(t, "admin").compute, s.ID).Extract()
		if err != nil || admin.Host != computeHost() {
			t.Errorf("server runs on %v, %v", admin, err)
		}
	})
	serves := func(t *testing.T) {
		t.Helper()
		eventually(t, long, "the instance serves port 80", func() error {
			body, err := get(ns, ip)
			if err == nil && body != "served by an instance\n" {
				err = fmt.Errorf("body %q", body)
			}
			return err
		})
	}
	t.Run("console log and service", func(t *testing.T) {
		waitLog(t, u, s.ID, "hello from lifecycle there", long)
		serves(t)
	})
	t.Run("stop and start", func(t *testing.T) {
		wantConflict(t, "start of a running server", servers.Start(t.Context(), u.compute, s.ID).ExtractErr())
		must(t, servers.Stop(t.Context(), u.compute, s.ID).ExtractErr())
		if got := waitStatus(t, u, s.ID, "SHUTOFF"); got.PowerState != servers.SHUTDOWN {
			t.Errorf("power state %v", got.PowerState)
		}
		if _, err := get(ns, ip); err == nil {
			t.Error("a stopped instance serves")
		}
		wantConflict(t, "stop of a stopped server", servers.Stop(t.Context(), u.compute, s.ID).ExtractErr())
		wantConflict(t, "pause of a stopped server", servers.Pause(t.Context(), u.compute, s.ID).ExtractErr())
		must(t, servers.Start(t.Context(), u.compute, s.ID).ExtractErr())
		waitStatus(t, u, s.ID, "ACTIVE")
		serves(t)
	})
	t.Run("reboot", func(t *testing.T) {
		for _, how := range []servers.RebootMethod{servers.SoftReboot, servers.HardReboot} {
			n := strings.Count(consoleLog(t, u, s.ID), "hello from")
			must(t, servers.Reboot(t.Context(), u.compute, s.ID, servers.RebootOpts{Type: how}).ExtractErr())
			waitStatus(t, u, s.ID, "ACTIVE")
			eventually(t, long, "the instance greets again", func() error {
				if got := strings.Count(consoleLog(t, u, s.ID), "hello from"); got <= n {
					return fmt.Errorf("%d greetings after a %s reboot, %d before", got, how, n)
				}
				return nil
			})
			serves(t)
		}
	})
	t.Run("pause", func(t *testing.T) {
		must(t, servers.Pause(t.Context(), u.compute, s.ID).ExtractErr())
		waitStatus(t, u, s.ID, "PAUSED")
		if _, err := get(ns, ip); err == nil {
			t.Error("a paused instance serves")
		}
		must(t, servers.Unpause(t.Context(), u.compute, s.ID).ExtractErr())
		waitStatus(t, u, s.ID, "ACTIVE")
		serves(t)
	})
	t.Run("suspend", func(t *testing.T) {
		must(t, servers.Suspend(t.Context(), u.compute, s.ID).ExtractErr())
		waitStatus(t, u, s.ID, "SUSPENDED")
		must(t, servers.Resume(t.Context(), u.compute, s.ID).ExtractErr())
		waitStatus(t, u, s.ID, "ACTIVE")
		serves(t)
	})
	t.Run("events", func(t *testing.T) {
		seen, open := hostEvents(t, u, s.ID)
		if len(open) > 0 {
			t.Errorf("the events of %v have not ended", open)
		}
		for _, want := range []string{"create", "stop", "start", "reboot", "pause", "unpause", "suspend", "resume"} {
			if !slices.Contains(seen, want) {
				t.Errorf("action %s has no event of the compute service", want)
			}
		}
	})
	t.Run("delete", func(t *testing.T) {
		remove(t, u, s.ID)
		for _, c := range allocations(t) {
			if c == s.ID {
				t.Error("the allocation is still there")
			}
		}
	})
}

// hostEvents are the actions of a server whose event the compute service has ended, all of them with success, and those whose it
// has only begun.
func hostEvents(t *testing.T, u *user, id string) (ended, open []string) {
	t.Helper()
	page, err := instanceactions.List(u.compute, id, nil).AllPages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	list, err := instanceactions.ExtractInstanceActions(page)
	if err != nil {
		t.Fatal(err)
	}
	admin := as(t, "admin")
	for _, a := range list {
		d, err := instanceactions.Get(t.Context(), admin.compute, id, a.RequestID).Extract()
		if err != nil || d.Events == nil {
			t.Fatalf("events of %s: %v, %v", a.Action, d, err)
		}
		for _, e := range *d.Events {
			switch {
			case !strings.HasPrefix(e.Event, "compute_"):
			case e.FinishTime.IsZero():
				open = append(open, a.Action)
			case e.Result != "Success" || e.FinishTime.Before(e.StartTime):
				t.Errorf("event %s of %s: %+v", e.Event, a.Action, e)
			default:
				ended = append(ended, a.Action)
			}
		}
	}
	return ended, open
}

// TestDeleteEvent: a delete stands with its end among the actions of the server that is gone, as quick as it was.
func TestDeleteEvent(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	for name, noNet := range map[string]bool{"network": false, "no network": true} {
		t.Run(name, func(t *testing.T) {
			s := boot(t, u, bootOpts{image: image, noNet: noNet})
			remove(t, u, s.ID)
			eventually(t, long, "the delete is an event that has ended", func() error {
				if ended, _ := hostEvents(t, u, s.ID); !slices.Contains(ended, "delete") {
					return fmt.Errorf("events of %v only", ended)
				}
				return nil
			})
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestGuestPowersOff: an instance whose process ends by itself becomes SHUTOFF, and can be started again.
func TestGuestPowersOff(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	s := boot(t, u, bootOpts{image: image, noNet: true})
	// The command may go down with the instance that it ends.
	out, err := novalet("exec", s.ID, "/bin/kill", "-TERM", "1")
	if err != nil && !strings.Contains(err.Error(), "exit status 137") {
		t.Fatalf("exec: %v: %s", err, out)
	}
	waitStatus(t, u, s.ID, "SHUTOFF")
	must(t, servers.Start(t.Context(), u.compute, s.ID).ExtractErr())
	waitStatus(t, u, s.ID, "ACTIVE")
}

// TestCommandLine: what an operator sees with the agent's own commands.
func TestCommandLine(t *testing.T) {
	u := as(t, "demo")
	s := boot(t, u, bootOpts{name: "cli", image: appImage.id(t, u)})
	waitLog(t, u, s.ID, "hello from cli", long)
	ip, _ := fixedIP(t, u, s.ID)
	out, err := novalet("ps")
	if err != nil || !strings.Contains(out, s.ID) || !strings.Contains(out, ip) || !strings.Contains(out, "running") {
		t.Errorf("ps: %v\n%s", err, out)
	}
	if out, err = novalet("logs", "cli"); err != nil || !strings.Contains(out, "hello from cli") {
		t.Errorf("logs: %v\n%s", err, out)
	}
	if out, err = novalet("exec", "-u", "www", s.ID[:8], "/bin/id", "-u"); err != nil || out != "33\n" {
		t.Errorf("exec: %v\n%q", err, out)
	}
	if out, err = novalet("exec", s.ID, "/bin/sh", "-c", "exit 7"); err == nil || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("exit code: %v\n%q", err, out)
	}
	if out, err = novalet("images"); err != nil || !strings.Contains(out, "docker") {
		t.Errorf("images: %v\n%s", err, out)
	}
	if out, err = novalet("health"); err != nil || !strings.HasPrefix(out, "ok") {
		t.Errorf("health: %v\n%s", err, out)
	}
	if out, err = novalet("health", "--metrics"); err != nil || !strings.Contains(out, "novalet_") {
		t.Errorf("metrics: %v\n%s", err, out)
	}
	if out, err = novalet("logs", "no-such-instance"); err == nil || !strings.Contains(err.Error(), "exit status 4") {
		t.Errorf("unknown instance: %v\n%s", err, out)
	}
}
