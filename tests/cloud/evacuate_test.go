package cloud_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/migrations"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// evacuate moves a server from a dead host to novalet's, and waits until it runs there.
func evacuate(t *testing.T, admin *user, id string) *servers.Server {
	t.Helper()
	c := *admin.compute
	c.Microversion = "2.29"
	body := map[string]any{"evacuate": map[string]any{"host": computeHost()}}
	eventually(t, long, "Nova evacuates", func() error {
		_, err := c.Post(t.Context(), c.ServiceURL("servers", id, "action"), body, nil, &gophercloud.RequestOpts{OkCodes: []int{http.StatusOK}})
		return err
	})
	s := waitStatus(t, admin, id, "ACTIVE")
	if s.Host != computeHost() {
		t.Errorf("it is on %s", s.Host)
	}
	return s
}

// TestEvacuateReturn: the servers of a host that died run here, anew; when that host comes back it ends its own copy, and
// only that.
func TestEvacuateReturn(t *testing.T) {
	needAlone(t)
	admin := as(t, "admin")
	image := appImage.id(t, admin)
	leavesNothing(t)
	h := newSecondHost(t, "second", "")
	s := bootOn(t, admin, "second", bootOpts{name: "evacuated", image: image, noNet: true})
	h.end(syscall.SIGKILL)
	h.forceDown(true)
	evacuate(t, admin, s.ID)
	waitLog(t, admin, s.ID, "hello from evacuated", long)
	was := initPID(t, s.ID)
	h.start()
	eventually(t, long, "the host that came back runs it no more", func() error {
		if out := h.containers(); strings.Contains(out, s.ID) {
			return fmt.Errorf("it runs %s", out)
		}
		return nil
	})
	waitEvacuated(t, admin, s.ID)
	h.forceDown(false)
	if now := initPID(t, s.ID); now != was {
		t.Errorf("its init was %s, is %s", was, now)
	}
	remove(t, admin, s.ID)
}

// waitEvacuated waits until the host that came back has cleaned up what was evacuated from it.
func waitEvacuated(t *testing.T, admin *user, id string) {
	t.Helper()
	eventually(t, long, "the evacuation is completed", func() error {
		p, err := migrations.List(admin.compute, nil).AllPages(t.Context())
		if err != nil {
			return err
		}
		l, err := migrations.ExtractMigrations(p)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(l, func(m migrations.Migration) bool {
			return m.InstanceID == id && m.MigrationType == "evacuation" && m.Status == "completed"
		}) {
			return fmt.Errorf("migrations: %+v", l)
		}
		return nil
	})
}

// TestEvacuateNetwork: a server of a dead stock nova-compute comes here with the address and the port it had, and its
// network works.
func TestEvacuateNetwork(t *testing.T) {
	needAlone(t)
	admin, demo := as(t, "admin"), as(t, "demo")
	image := appImage.id(t, admin)
	leavesNothing(t)
	t.Cleanup(func() { devstack(t, "compute.sh", "stop", "stock", "stock1") })
	devstack(t, "compute.sh", "start", "stock", "stock1")
	h := &secondHost{t: t, name: "stock1"}
	s := bootOn(t, admin, "stock1", bootOpts{name: "evacuated", image: image,
		networks: []servers.Network{{UUID: networkID(t, demo, "private")}}})
	ip, port := fixedIP(t, admin, s.ID)
	if out, err := sh(t.Context(), "bash", "-c", `. ../../devstack/vars.sh; . ../../devstack/lib.sh; kill -KILL "$(pid_of nova-compute-stock1)"`); err != nil {
		t.Fatalf("kill nova-compute: %v: %s", err, out)
	}
	h.forceDown(true)
	evacuate(t, admin, s.ID)
	waitLog(t, admin, s.ID, "hello from evacuated", long)
	if nowIP, nowPort := fixedIP(t, admin, s.ID); nowIP != ip || nowPort != port {
		t.Errorf("address %s on port %s, was %s on %s", nowIP, nowPort, ip, port)
	}
	eventually(t, long, "the server reaches its router", func() error {
		_, err := novalet("exec", s.ID, "/bin/ping", "-c", "1", "-W", "2", "10.77.0.1")
		return err
	})
	devstack(t, "compute.sh", "start", "stock", "stock1")
	waitEvacuated(t, admin, s.ID)
	h.forceDown(false)
	remove(t, admin, s.ID)
}
