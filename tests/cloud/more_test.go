package cloud_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/attachinterfaces"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/image/v2/images"
)

// inside runs a command in an instance and returns what it prints.
func inside(t testing.TB, id string, args ...string) string {
	t.Helper()
	out, err := novalet(append([]string{"exec", id}, args...)...)
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out
}

// TestSnapshot: an image of a running server holds what it wrote and what it deleted, and boots.
func TestSnapshot(t *testing.T) {
	u := as(t, "demo")
	base := appImage.id(t, u)
	leavesNothing(t)
	s := boot(t, u, bootOpts{name: "snapped", image: base, noNet: true})
	inside(t, s.ID, "/bin/sh", "-c", "echo written >/root/mark; rm /www/index.html; chown 33:33 /root/mark; sync")
	again := boot(t, u, bootOpts{name: "from-snapshot", image: takeSnapshot(t, u, s.ID).ID, noNet: true})
	if out := inside(t, again.ID, "/bin/sh", "-c", "cat /root/mark; stat -c %u /root/mark; ls /www"); out != "written\n33\n" {
		t.Errorf("in the server made from the snapshot: %q", out)
	}
}

// takeSnapshot makes an image of a server, waits until it can be used, and removes it at the end.
func takeSnapshot(t testing.TB, u *user, server string) *images.Image {
	t.Helper()
	id, err := servers.CreateImage(t.Context(), u.compute, server, servers.CreateImageOpts{Name: "novalet-test-snapshot"}).ExtractImageID()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = images.Delete(context.Background(), u.image, id).ExtractErr() })
	var im *images.Image
	eventually(t, long, "the image is active", func() (err error) {
		im, err = images.Get(t.Context(), u.image, id).Extract()
		if err == nil && im.Status != "active" {
			err = fmt.Errorf("status %s", im.Status)
		}
		return err
	})
	waitStatus(t, u, server, "ACTIVE")
	return im
}

// TestRebuild: the same server, address and port with a fresh root.
func TestRebuild(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	s := boot(t, u, bootOpts{name: "rebuilt", image: image})
	ip, port := fixedIP(t, u, s.ID)
	inside(t, s.ID, "/bin/touch", "/root/mark")
	if _, err := servers.Rebuild(t.Context(), u.compute, s.ID, servers.RebuildOpts{ImageRef: image}).Extract(); err != nil {
		t.Fatal(err)
	}
	waitStatus(t, u, s.ID, "ACTIVE")
	if nowIP, nowPort := fixedIP(t, u, s.ID); nowIP != ip || nowPort != port {
		t.Errorf("address %s on port %s, was %s on %s", nowIP, nowPort, ip, port)
	}
	if out := inside(t, s.ID, "/bin/ls", "/root"); out != "" {
		t.Errorf("the root still has %q", out)
	}
}

// TestRescue: the rescue image runs with the server's own root shown inside; afterwards the server is as before.
func TestRescue(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	s := boot(t, u, bootOpts{name: "rescued", image: image, noNet: true})
	inside(t, s.ID, "/bin/sh", "-c", "echo lost >/root/mark")
	if _, err := servers.Rescue(t.Context(), u.compute, s.ID, servers.RescueOpts{AdminPass: "Abc123-xyz"}).Extract(); err != nil {
		t.Fatal(err)
	}
	waitStatus(t, u, s.ID, "RESCUE")
	if out := inside(t, s.ID, "/bin/sh", "-c", "cat /*/root/mark /*/*/root/mark 2>/dev/null; true"); !strings.Contains(out, "lost") {
		t.Errorf("the server's root is not there: %q", inside(t, s.ID, "/bin/mount"))
	}
	must(t, servers.Unrescue(t.Context(), u.compute, s.ID).ExtractErr())
	waitStatus(t, u, s.ID, "ACTIVE")
	if out := inside(t, s.ID, "/bin/cat", "/root/mark"); out != "lost\n" {
		t.Errorf("after the rescue: %q", out)
	}
}

// TestAttachInterface: a second interface comes and goes while the server runs.
func TestAttachInterface(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	s := boot(t, u, bootOpts{name: "two-legs", image: image})
	got, err := attachinterfaces.Create(t.Context(), u.compute, s.ID, attachinterfaces.CreateOpts{NetworkID: networkID(t, u, "private")}).Extract()
	if err != nil {
		t.Fatal(err)
	}
	ip := got.FixedIPs[0].IPAddress
	eventually(t, long, "eth1 has "+ip, func() error {
		if out := inside(t, s.ID, "/bin/ip", "-4", "addr", "show"); !strings.Contains(out, ip+"/") {
			return fmt.Errorf("addresses: %s", out)
		}
		return nil
	})
	must(t, attachinterfaces.Delete(t.Context(), u.compute, s.ID, got.PortID).ExtractErr())
	eventually(t, long, "the interface is gone", func() error {
		if out := inside(t, s.ID, "/bin/ip", "-4", "addr", "show"); strings.Contains(out, ip+"/") {
			return fmt.Errorf("addresses: %s", out)
		}
		return nil
	})
}

// TestShelve: a shelved server is off the host, and comes back with its root and its address.
func TestShelve(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	s := boot(t, u, bootOpts{name: "shelved", image: image})
	ip, _ := fixedIP(t, u, s.ID)
	inside(t, s.ID, "/bin/sh", "-c", "echo kept >/root/mark; sync")
	must(t, servers.Shelve(t.Context(), u.compute, s.ID).ExtractErr())
	waitStatus(t, u, s.ID, "SHELVED_OFFLOADED")
	if out, err := novalet("ps", "-q"); err != nil || strings.Contains(out, s.ID) {
		t.Errorf("a shelved server is still on the host: %v, %s", err, out)
	}
	must(t, servers.Unshelve(t.Context(), u.compute, s.ID, servers.UnshelveOpts{}).ExtractErr())
	waitStatus(t, u, s.ID, "ACTIVE")
	if out := inside(t, s.ID, "/bin/cat", "/root/mark"); out != "kept\n" {
		t.Errorf("after unshelve: %q", out)
	}
	if now, _ := fixedIP(t, u, s.ID); now != ip {
		t.Errorf("address %s, was %s", now, ip)
	}
}

// TestBackup: of the backups of a server only so many stay as its rotation says, the newest.
func TestBackup(t *testing.T) {
	u := as(t, "demo")
	s := boot(t, u, bootOpts{name: "backed-up", image: appImage.id(t, u), noNet: true})
	list := func() []string {
		t.Helper()
		p, err := images.List(u.image, images.ListOpts{Owner: u.project, SortKey: "created_at", SortDir: "asc"}).AllPages(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		all, err := images.ExtractImages(p)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, im := range all {
			if im.Properties["instance_uuid"] == s.ID && im.Status == images.ImageStatusActive {
				names = append(names, im.Name)
			}
		}
		return names
	}
	t.Cleanup(func() {
		p, err := images.List(u.image, images.ListOpts{Owner: u.project}).AllPages(context.Background())
		if err != nil {
			t.Error(err)
			return
		}
		all, err := images.ExtractImages(p)
		if err != nil {
			t.Error(err)
		}
		for _, im := range all {
			if strings.HasPrefix(im.Name, "novalet-test-backup-") {
				_ = images.Delete(context.Background(), u.image, im.ID).ExtractErr()
			}
		}
	})
	for i := range 3 {
		// Glance tells the age of images in whole seconds; which of two of the same second is the older one is nobody's to say.
		if i > 0 {
			time.Sleep(1100 * time.Millisecond)
		}
		body := map[string]any{"createBackup": map[string]any{"name": fmt.Sprintf("novalet-test-backup-%d", i), "backup_type": "daily", "rotation": 2}}
		if _, err := u.compute.Post(t.Context(), u.compute.ServiceURL("servers", s.ID, "action"), body, nil, &gophercloud.RequestOpts{OkCodes: []int{202}}); err != nil {
			t.Fatalf("backup %d: %v", i, err)
		}
		want := []string{"[novalet-test-backup-0]", "[novalet-test-backup-0 novalet-test-backup-1]", "[novalet-test-backup-1 novalet-test-backup-2]"}[i]
		eventually(t, long, "the backups are "+want, func() error {
			if got := fmt.Sprint(list()); got != want {
				return fmt.Errorf("they are %s", got)
			}
			return nil
		})
		waitStatus(t, u, s.ID, "ACTIVE")
	}
}
