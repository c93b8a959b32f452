package glancebridge

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// bothWays runs a test with the helpers inside and, given the rights, as confined processes.
func bothWays(t *testing.T, f func(t *testing.T, change func(*Options))) {
	t.Run("inside", func(t *testing.T) { f(t, func(*Options) {}) })
	t.Run("confined", func(t *testing.T) {
		hosttest.RequireRoot(t)
		f(t, func(o *Options) { o.Unconfined = false })
	})
}

func TestPrepareDockerArchive(t *testing.T) {
	bothWays(t, func(t *testing.T, change func(*Options)) {
		dir := t.TempDir()
		base := makeTar(t, member{name: "bin/busybox", data: "program"}, member{name: "etc/gone", data: "x"})
		top := makeTar(t, member{name: "etc/.wh.gone"}, member{name: "bin/app", data: "app"})
		id := addImage(t, dir, dockerArchive(t, map[string]any{"Cmd": []string{"/bin/app", "-v"}, "Env": []string{"A=b"}}, base, top), nil)
		s := openStore(t, dir, change)
		img, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
		if err != nil {
			t.Fatal(err)
		}
		if img.Kind != novalet.KindApplication || len(img.Layers) != 2 || img.Format != "docker-archive" {
			t.Fatalf("got %+v", img)
		}
		if img.Layers[0].DiffID != "sha256:"+hexSum(base) || img.Layers[1].DiffID != "sha256:"+hexSum(top) {
			t.Errorf("layers %+v are not named by their diffIDs", img.Layers)
		}
		b, err := os.ReadFile(filepath.Join(img.Layers[1].Path, "bin/app"))
		if err != nil || string(b) != "app" {
			t.Errorf("bin/app is %q, %v", b, err)
		}
		st, err := os.Lstat(filepath.Join(img.Layers[1].Path, "etc/gone"))
		if err != nil && os.Geteuid() == 0 {
			t.Errorf("no deletion mark: %v", err)
		} else if err == nil && st.Mode()&os.ModeCharDevice == 0 {
			t.Errorf("deletion mark is %v", st.Mode())
		}
	})
}

func TestPrepareRootTar(t *testing.T) {
	bothWays(t, func(t *testing.T, change func(*Options)) {
		dir := t.TempDir()
		id := addImage(t, dir, gz(t, rootTar(t)), nil)
		s := openStore(t, dir, change)
		img, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
		if err != nil {
			t.Fatal(err)
		}
		if img.Kind != novalet.KindMachine || img.Init != "/sbin/init" || img.Format != "root-tar.gzip" || len(img.Layers) != 1 {
			t.Fatalf("got %+v", img)
		}
		if id := img.Layers[0].DiffID; id != "sha256:"+hexSum(rootTar(t)) {
			t.Errorf("layer is named %s", id)
		}
		b, err := os.ReadFile(filepath.Join(img.Layers[0].Path, "home/user/again"))
		if err != nil || string(b) != "hello" {
			t.Errorf("hard link holds %q, %v", b, err)
		}
	})
}

func TestWrongChecksum(t *testing.T) {
	bothWays(t, func(t *testing.T, change func(*Options)) {
		dir := t.TempDir()
		id := addImage(t, dir, gz(t, rootTar(t)), func(r *ImageRecord) { r.HashValue = "00" + r.HashValue[2:] })
		s := openStore(t, dir, change)
		_, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
		if !errors.Is(err, novalet.ErrAbort) || novalet.FaultText(err) == "" {
			t.Fatalf("got %v", err)
		}
		list, err := s.List(context.Background())
		if err != nil || len(list) != 0 {
			t.Errorf("store lists %v, %v", list, err)
		}
	})
}
