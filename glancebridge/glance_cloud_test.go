package glancebridge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/keystone"
)

// cloudSession signs in with the OS_* variables of an openrc file.
func cloudSession(t *testing.T) *keystone.Session {
	t.Helper()
	if os.Getenv("NOVALET_CLOUD_TESTS") != "1" || os.Getenv("OS_AUTH_URL") == "" {
		t.Skip("uses a running cloud: set NOVALET_CLOUD_TESTS=1 and the OS_* variables of an openrc file")
	}
	return cloudSessionAs(t, "")
}

// cloudSessionAs signs in with a name, password and project whose variables end like this.
func cloudSessionAs(t *testing.T, suffix string) *keystone.Session {
	t.Helper()
	s, err := keystone.New(keystone.Options{Section: "glance", AuthType: "password", AuthURL: os.Getenv("OS_AUTH_URL"),
		Username: os.Getenv("OS_USERNAME" + suffix), Password: novalet.Secret(os.Getenv("OS_PASSWORD" + suffix)),
		UserDomainName: "Default", ProjectDomainName: "Default", ProjectName: os.Getenv("OS_PROJECT_NAME" + suffix),
		RegionName: os.Getenv("OS_REGION_NAME"), ValidInterfaces: []string{"public"}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// createImage makes a queued image and removes it with the test.
func createImage(t *testing.T, s *keystone.Session, fields map[string]any) string {
	t.Helper()
	ctx := context.Background()
	c, err := s.Client(ctx, "image")
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	req, err := newRequest(ctx, http.MethodPost, imageBase(c.Endpoint)+"images", bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := call(c, req, "create image", http.StatusCreated)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var rec ImageRecord
	if err := json.NewDecoder(resp.Body).Decode(&rec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := NewGlance(s).Delete(context.Background(), novalet.RequestContext{}, rec.ID); err != nil && !errors.Is(err, novalet.ErrNotFound) {
			t.Error(err)
		}
	})
	return rec.ID
}

func TestCloudGlance(t *testing.T) {
	s := cloudSession(t)
	ctx := context.Background()
	g := NewGlance(s)
	data := gz(t, rootTar(t))
	id := createImage(t, s, map[string]any{"name": "novalet-test", "visibility": "private"})
	token, err := s.Token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	rc := novalet.RequestContext{RequestID: "req-test", AuthToken: token}
	if err := g.Update(ctx, rc, id, ImageUpdate{DiskFormat: "raw", ContainerFormat: "bare",
		Properties: map[string]string{"novalet_test": "a/b", "os_type": "linux"}}); err != nil {
		t.Fatal(err)
	}
	if err := g.Upload(ctx, rc, id, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	rec, err := g.Get(ctx, rc, id)
	if err != nil {
		t.Fatal(err)
	}
	if rec.Status != "active" || rec.Size != int64(len(data)) || rec.Properties["novalet_test"] != "a/b" || rec.HashValue == "" {
		t.Errorf("record is %+v", rec)
	}
	body, start, err := g.Download(ctx, rc, id, 10)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(body)
	if body.Close(); err != nil || !bytes.Equal(b, data[start:]) {
		t.Errorf("download from %d gives %d bytes, %v", start, len(b), err)
	}
	// A token that is no longer accepted gives way to the service credentials.
	expired := novalet.RequestContext{AuthToken: "gAAAAA-expired"}
	if _, err := g.Get(ctx, expired, id); err != nil {
		t.Errorf("with an expired token: %v", err)
	}
	bothWays(t, func(t *testing.T, change func(*Options)) {
		st := openStore(t, "", func(o *Options) { o.Glance = g; change(o) })
		img, err := st.Prepare(ctx, &novalet.ImageRequest{Context: rc, ImageID: id, InstanceUUID: "inst-1"})
		if err != nil {
			t.Fatal(err)
		}
		if img.Kind != novalet.KindMachine || img.Format != "root-tar.gzip" {
			t.Errorf("got %+v", img)
		}
	})
}

func TestCloudSnapshot(t *testing.T) {
	s := cloudSession(t)
	ctx := context.Background()
	g := NewGlance(s)
	// As nova-api makes it: without formats.
	id := createImage(t, s, map[string]any{"name": "novalet-test-snapshot", "visibility": "private", "image_type": "snapshot"})
	upper := t.TempDir()
	if err := os.WriteFile(upper+"/file", []byte("data"), 0o644); err != nil {
		t.Fatal(err)
	}
	st := openStore(t, "", func(o *Options) { o.Glance = g })
	base := &novalet.Image{Kind: novalet.KindApplication, Config: novalet.ImageConfig{Cmd: []string{"/x"}}}
	err := st.Snapshot(ctx, &novalet.SnapshotRequest{ImageID: id, InstanceUUID: "inst-1", Base: base,
		Root: novalet.RootDirs{Upper: upper}, Properties: map[string]string{"instance_uuid": "inst-1"}})
	if err != nil {
		t.Fatal(err)
	}
	rec, err := g.Get(ctx, novalet.RequestContext{}, id)
	if err != nil || rec.Status != "active" || rec.ContainerFormat != "docker" || rec.DiskFormat != "raw" ||
		rec.Properties["instance_uuid"] != "inst-1" || rec.Properties["image_type"] != "snapshot" {
		t.Errorf("record is %+v, %v", rec, err)
	}
	img, err := st.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-2", Meta: rec.ImageMeta})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(img.Layers[0].Path + "/file"); err != nil || string(b) != "data" {
		t.Errorf("file is %q, %v", b, err)
	}
}

// TestCloudDelta: of two real users of different projects the one who may not read the image below a delta gets a fault; and
// so does the owner when that image is gone.
func TestCloudDelta(t *testing.T) {
	s := cloudSession(t)
	if os.Getenv("OS_USERNAME_OTHER") == "" {
		t.Skip("needs a user of another project: set OS_USERNAME_OTHER, OS_PASSWORD_OTHER and OS_PROJECT_NAME_OTHER")
	}
	ctx := context.Background()
	rcOf := func(s *keystone.Session) novalet.RequestContext {
		token, err := s.Token(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return novalet.RequestContext{RequestID: "req-test", AuthToken: token}
	}
	owner, other := rcOf(s), rcOf(cloudSessionAs(t, "_OTHER"))
	g := NewGlance(s)
	base := createImage(t, s, map[string]any{"name": "novalet-test-base", "visibility": "private", "disk_format": "raw", "container_format": "docker"})
	archive := dockerArchive(t, map[string]any{"Cmd": []string{"/x"}}, bigLayer(t, 1, "one", 600_000))
	if err := g.Upload(ctx, owner, base, bytes.NewReader(archive)); err != nil {
		t.Fatal(err)
	}
	delta := createImage(t, s, map[string]any{"name": "novalet-test-delta", "visibility": "community", "image_type": "snapshot"})
	open := func() *Store {
		return openStore(t, "", func(o *Options) { o.Glance, o.DeltaSnapshots = g, true })
	}
	st := open()
	prepare := func(st *Store, rc novalet.RequestContext, id string) (*novalet.Image, error) {
		return st.Prepare(ctx, &novalet.ImageRequest{Context: rc, ImageID: id, InstanceUUID: "inst-" + id})
	}
	img, err := prepare(st, owner, base)
	if err != nil {
		t.Fatal(err)
	}
	upper := t.TempDir()
	if err := os.WriteFile(upper+"/file", []byte("data"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := st.Snapshot(ctx, &novalet.SnapshotRequest{Context: owner, ImageID: delta, InstanceUUID: "inst-1", Base: img,
		Root: novalet.RootDirs{Upper: upper, Layers: img.Layers}}); err != nil {
		t.Fatal(err)
	}
	rec, err := g.Get(ctx, other, delta)
	if err != nil || rec.Size > 20_000 || rec.Properties[propDelta] != base {
		t.Fatalf("record is %+v, %v", rec, err)
	}
	fresh := open()
	for when, st := range map[string]*Store{"stored": st, "on a host that has nothing": fresh} {
		if img, err := prepare(st, owner, delta); err != nil || len(img.Layers) != 2 {
			t.Fatalf("%s: %+v, %v", when, img, err)
		}
		_, err := prepare(st, other, delta)
		if err == nil {
			t.Fatalf("%s: it boots for somebody who may not read what is below", when)
		}
		wantRefused(t, err, "may not be read by you")
	}
	_, err = prepare(open(), other, delta)
	wantRefused(t, err, "may not be read by you")
	if err := g.Delete(ctx, owner, base); err != nil {
		t.Fatal(err)
	}
	_, err = prepare(st, owner, delta)
	wantRefused(t, err, "is gone or may not be read by you")
}
