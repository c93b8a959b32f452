package glancebridge

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// TestSnapshotBoots makes a writable layer as an instance with shifted ids leaves it, snapshots it, and looks at what the
// snapshot's image is here.
func TestSnapshotBoots(t *testing.T) {
	hosttest.RequireRoot(t)
	ctx := context.Background()
	images := t.TempDir()
	glance := NewFileGlance(images)
	base := addImage(t, images, dockerArchive(t, map[string]any{"Cmd": []string{"/bin/app"}},
		makeTar(t, member{name: "bin/app", data: "one"}, member{name: "etc/gone", data: "x"},
			member{name: "dir/old", data: "x"}, member{name: "dev/null", typ: tar.TypeChar, dev: [2]int64{1, 3}})), nil)
	s := openStore(t, images, func(o *Options) { o.Unconfined = false })
	img, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: base, InstanceUUID: "inst-1"})
	if err != nil {
		t.Fatal(err)
	}
	const uid = 500_000
	upper := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p := func(n string) string { return filepath.Join(upper, n) }
	for _, d := range []string{"etc", "dir", "home"} {
		must(os.Mkdir(p(d), 0o755))
		must(os.Chown(p(d), uid, uid))
	}
	must(unix.Mknod(p("etc/gone"), unix.S_IFCHR, 0))
	must(unix.Setxattr(p("dir"), "trusted.overlay.opaque", []byte("y"), 0))
	must(unix.Setxattr(p("dir"), "trusted.overlay.origin", []byte("xyz"), 0))
	must(os.WriteFile(p("dir/new"), []byte("new"), 0o644))
	must(os.WriteFile(p("home/file"), []byte("data of the user"), 0o600))
	must(os.Chown(p("home/file"), uid+1000, uid+1000))
	must(unix.Chmod(p("home/file"), 0o4711))
	must(os.Link(p("home/file"), p("home/same")))
	must(unix.Setxattr(p("home/file"), "security.capability",
		[]byte("\x01\x00\x00\x03\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20\xa1\x07\x00"), 0))
	must(os.Symlink("../etc", p("home/link")))
	must(os.WriteFile(p("home/sparse"), nil, 0o644))
	must(os.Truncate(p("home/sparse"), 3<<20))

	frozen := 0
	snap := "11111111-0000-4000-8000-000000000001"
	must(glance.Create(ImageRecord{ImageMeta: novalet.ImageMeta{ID: snap, Name: "snap"}}))
	captured := false
	err = s.Snapshot(ctx, &novalet.SnapshotRequest{InstanceUUID: "inst-1", ImageID: snap, Base: img,
		Root: novalet.RootDirs{Upper: upper, Layers: img.Layers, UIDBase: uid, UIDSize: 65536},
		Freeze: func(context.Context) (func(), error) {
			frozen++
			// A last change of the instance: the copy made before must not be used.
			must(os.WriteFile(p("dir/new"), []byte("newer"), 0o644))
			return func() { frozen-- }, nil
		},
		Captured: func(context.Context) error { captured = frozen == 0; return nil }})
	if err != nil {
		t.Fatal(err)
	}
	if frozen != 0 || !captured {
		t.Errorf("frozen %d, captured %v", frozen, captured)
	}
	rec, err := glance.Get(ctx, novalet.RequestContext{}, snap)
	if err != nil || rec.Status != "active" || rec.DiskFormat != "raw" || rec.ContainerFormat != "docker" {
		t.Fatalf("record %+v, %v", rec, err)
	}
	if rec.Properties[propKind] != "application" {
		t.Errorf("properties %v", rec.Properties)
	}
	got, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: snap, InstanceUUID: "inst-2", Meta: rec.ImageMeta})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Layers) != 2 || got.Kind != novalet.KindApplication || got.Config.Cmd[0] != "/bin/app" {
		t.Fatalf("got %+v", got)
	}
	top := readTree(t, got.Layers[1].Path)
	f := top["home/file"]
	if f.UID != 1000 || f.Mode&07777 != 0o4711 || f.Peers != "home/file,home/same" {
		t.Errorf("home/file is %+v", f)
	}
	if f.Xattr != "security.capability=0100000200200000000000000000000000000000;" {
		t.Errorf("home/file has %s", f.Xattr)
	}
	if b, err := os.ReadFile(filepath.Join(got.Layers[1].Path, "dir/new")); err != nil || string(b) != "newer" {
		t.Errorf("dir/new is %q, %v", b, err)
	}
	if x := top["dir"].Xattr; x != "trusted.overlay.opaque=79;" {
		t.Errorf("dir has %q", x)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(got.Layers[1].Path, "etc/gone"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("etc/gone is %o, %v", st.Mode, err)
	}
	if top["home/link"].Link != "../etc" || top["home/sparse"].Size != 3<<20 {
		t.Errorf("got %+v, %+v", top["home/link"], top["home/sparse"])
	}
	// Other tools read it, by either of its manifests.
	if _, err := exec.LookPath("skopeo"); err == nil {
		for _, kind := range []string{"docker-archive", "oci-archive"} {
			run(t, "skopeo", "--insecure-policy", "copy", kind+":"+filepath.Join(images, snap), "dir:"+filepath.Join(t.TempDir(), "out"))
		}
	}
	// A snapshot of the same layers names them the same: the base is stored once from then on.
	again := "11111111-0000-4000-8000-000000000002"
	must(glance.Create(ImageRecord{ImageMeta: novalet.ImageMeta{ID: again}}))
	err = s.Snapshot(ctx, &novalet.SnapshotRequest{InstanceUUID: "inst-2", ImageID: again, Base: got,
		Root: novalet.RootDirs{Upper: t.TempDir(), Layers: got.Layers}})
	if err != nil {
		t.Fatal(err)
	}
	third, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: again, InstanceUUID: "inst-3"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range got.Layers {
		if third.Layers[i].DiffID != got.Layers[i].DiffID {
			t.Errorf("layer %d is %s, was %s", i, third.Layers[i].DiffID, got.Layers[i].DiffID)
		}
	}
}

// faultyGlance spoils uploads.
type faultyGlance struct {
	*FileGlance
	upload func(n int, body io.Reader) (io.Reader, error)
	n      int
}

func (g *faultyGlance) Upload(ctx context.Context, rc novalet.RequestContext, id string, body io.Reader) error {
	g.n++
	r, err := g.upload(g.n, body)
	if err != nil {
		return err
	}
	return g.FileGlance.Upload(ctx, rc, id, r)
}

func TestSnapshotUploadFaults(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		name   string
		upload func(n int, body io.Reader) (io.Reader, error)
		ok     bool
	}{
		{"first refused", func(n int, body io.Reader) (io.Reader, error) {
			if n == 1 {
				_, _ = io.CopyN(io.Discard, body, 100)
				return nil, novalet.ErrTryAgain
			}
			return body, nil
		}, true},
		{"always refused", func(int, io.Reader) (io.Reader, error) { return nil, novalet.ErrTryAgain }, false},
		{"cut and called a success", func(_ int, body io.Reader) (io.Reader, error) { return io.LimitReader(body, 1000), nil }, false},
		{"damaged and called a success", func(_ int, body io.Reader) (io.Reader, error) {
			b, err := io.ReadAll(body)
			b[700] ^= 1
			return bytes.NewReader(b), err
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			images := t.TempDir()
			g := &faultyGlance{FileGlance: NewFileGlance(images), upload: c.upload}
			s := openStore(t, images, func(o *Options) { o.Glance = g })
			id := "22222222-0000-4000-8000-000000000001"
			if err := g.Create(ImageRecord{ImageMeta: novalet.ImageMeta{ID: id}}); err != nil {
				t.Fatal(err)
			}
			upper := t.TempDir()
			if err := os.WriteFile(filepath.Join(upper, "file"), bytes.Repeat([]byte("x"), 5000), 0o644); err != nil {
				t.Fatal(err)
			}
			err := s.Snapshot(ctx, &novalet.SnapshotRequest{ImageID: id, InstanceUUID: "i",
				Root: novalet.RootDirs{Upper: upper}})
			_, gerr := g.Get(ctx, novalet.RequestContext{}, id)
			if c.ok && (err != nil || gerr != nil) {
				t.Fatalf("got %v, %v", err, gerr)
			}
			if !c.ok && (err == nil || !errors.Is(gerr, novalet.ErrNotFound)) {
				t.Fatalf("got %v, and the image is left: %v", err, gerr)
			}
		})
	}
}
