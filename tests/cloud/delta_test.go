package cloud_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/image/v2/images"
)

// withOptions restarts the agent with more options in a section of its configuration until the test ends.
func withOptions(t *testing.T, section, lines string) {
	t.Helper()
	path := filepath.Join(state(t), "etc", "nova-compute.conf")
	conf, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(conf, []byte("["+section+"]\n"), []byte("["+section+"]\n"+lines+"\n"), 1)
	if bytes.Equal(changed, conf) {
		t.Fatalf("%s has no section [%s]", path, section)
	}
	restart := func(conf []byte) {
		if err := os.WriteFile(path, conf, 0o600); err != nil {
			t.Error(err)
		}
		devstack(t, "compute.sh", "restart", "novalet")
		answersAgain(t)
	}
	t.Cleanup(func() { restart(conf) })
	restart(changed)
}

// TestDeltaSnapshot: with snapshot_deltas a snapshot is as large as what the server wrote, boots as long as the image below
// it is there, and a snapshot of what was made from it, too. Without that image, and for a user who may read the snapshot
// but not what is below, the fault says so.
func TestDeltaSnapshot(t *testing.T) {
	u, other := as(t, "demo"), as(t, "demo2")
	withOptions(t, "novalet", "snapshot_deltas = true")
	archive := dockerArchive(t, busyboxRoot(t), appConfig())
	base := uploadKept(t, u, imageSpec{name: "novalet-test-base", container: "docker", disk: "raw"}, bytes.NewReader(archive))
	t.Cleanup(func() { _ = images.Delete(context.Background(), u.image, base).ExtractErr() })
	image := base
	for _, name := range []string{"first", "second"} {
		s := boot(t, u, bootOpts{name: name, image: image, noNet: true})
		inside(t, s.ID, "/bin/sh", "-c", "echo "+name+" >>/root/mark; rm -f /www/index.html; sync")
		im := takeSnapshot(t, u, s.ID)
		if im.SizeBytes > int64(len(archive))/10 || im.Properties["novalet_delta_of"] != image {
			t.Errorf("the snapshot takes %d bytes, the image below %d; it is said to lie on %v", im.SizeBytes, len(archive), im.Properties["novalet_delta_of"])
		}
		image = im.ID
		remove(t, u, s.ID)
	}
	s := boot(t, u, bootOpts{name: "third", image: image, noNet: true})
	if out := inside(t, s.ID, "/bin/sh", "-c", "cat /root/mark; ls /www"); out != "first\nsecond\n" {
		t.Errorf("in the server made from a snapshot of a snapshot: %q", out)
	}
	remove(t, u, s.ID)
	refused := func(u *user, why string) {
		t.Helper()
		s := create(t, u, bootOpts{image: image, noNet: true})
		if got := waitStatus(t, u, s.ID, "ERROR"); !strings.Contains(got.Fault.Message, why) {
			t.Errorf("fault %q, want %q", got.Fault.Message, why)
		}
		remove(t, u, s.ID)
	}
	_, err := images.Update(t.Context(), u.image, image, images.UpdateOpts{images.UpdateVisibility{Visibility: images.ImageVisibilityCommunity}}).Extract()
	must(t, err)
	refused(other, "which is gone or may not be read by you")
	must(t, images.Delete(t.Context(), u.image, base).ExtractErr())
	refused(u, "is a delta of image "+base+", which is gone")
}
