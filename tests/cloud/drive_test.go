package cloud_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// TestConfigDrive: a machine without any network gets its user data, its key pair and the files of the request by the config drive.
func TestConfigDrive(t *testing.T) {
	u := as(t, "demo")
	image := debianImage.id(t, u)
	leavesNothing(t)
	key, file := newKey(t, u)
	pub, err := os.ReadFile(file + ".pub")
	must(t, err)
	made := create(t, u, bootOpts{name: "drive", image: image, flavor: "m1.small", noNet: true, drive: true, key: key,
		userData: cloudConfig,
		files:    servers.Personality{&servers.File{Path: "/srv/injected", Contents: []byte("from the request\n")}}})
	waitStatus(t, u, made.ID, "ACTIVE")
	eventually(t, long, "cloud-init is through", func() error {
		out, err := novalet("exec", made.ID, "cat", "/srv/from-user-data", "/home/debian/.ssh/authorized_keys")
		if want := strings.Fields(string(pub))[1]; err != nil || !strings.HasPrefix(out, "it works") || !strings.Contains(out, want) {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if out := inside(t, made.ID, "cat", "/srv/injected"); out != "from the request\n" {
		t.Errorf("the injected file: %q", out)
	}
	var meta struct {
		UUID     string
		Password string `json:"admin_pass"`
		Files    []struct {
			Path string
			At   string `json:"content_path"`
		}
	}
	must(t, json.Unmarshal([]byte(inside(t, made.ID, "cat", "/config-drive/openstack/latest/meta_data.json")), &meta))
	if meta.UUID != made.ID || meta.Password == "" || meta.Password != made.AdminPass || len(meta.Files) != 1 || meta.Files[0].Path != "/srv/injected" {
		t.Fatalf("the drive's metadata: %+v", meta)
	}
	if out := inside(t, made.ID, "cat", "/config-drive/openstack/"+meta.Files[0].At); out != "from the request\n" {
		t.Errorf("on the drive the file is %q", out)
	}
	var s struct {
		Drive string `json:"config_drive"`
	}
	must(t, servers.Get(t.Context(), u.compute, made.ID).ExtractInto(&s))
	if s.Drive != "True" {
		t.Errorf("config_drive is %q", s.Drive)
	}
	remove(t, u, made.ID)
}
