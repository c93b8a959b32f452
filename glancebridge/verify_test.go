package glancebridge

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// sealed waits until what the layers come to is recorded.
func sealed(t *testing.T, s *Store) {
	t.Helper()
	for range 6000 {
		names, err := filepath.Glob(s.path("layers", "*", "meta.json"))
		if err != nil {
			t.Fatal(err)
		}
		sums, err := filepath.Glob(s.path("layers", "*", sumName))
		if err != nil {
			t.Fatal(err)
		}
		if len(names) > 0 && len(names) == len(sums) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the layers are not recorded")
}

// TestVerifyHeals: whatever is done to a stored layer is named by verify, also after a restart, and healed by the next
// prepare or by verify itself; instances keep the tree they run on.
func TestVerifyHeals(t *testing.T) {
	bothWays(t, func(t *testing.T, change func(*Options)) {
		for _, c := range []struct {
			name  string
			early bool // before the layer was recorded
			do    func(fs string) error
		}{
			{"content", false, func(fs string) error {
				f, err := os.OpenFile(filepath.Join(fs, "etc/file"), os.O_WRONLY, 0)
				if err != nil {
					return err
				}
				st, err := f.Stat()
				if err == nil {
					_, err = f.WriteAt([]byte("X"), 2)
				}
				// As a disk does it: nothing but the data changes.
				return errors.Join(err, f.Close(), os.Chtimes(f.Name(), st.ModTime(), st.ModTime()))
			}},
			{"mode", false, func(fs string) error { return os.Chmod(filepath.Join(fs, "etc/file"), 0o777) }},
			{"attribute", false, func(fs string) error {
				return unix.Lsetxattr(filepath.Join(fs, "etc/file"), "user.x", []byte("y"), 0)
			}},
			{"missing file", false, func(fs string) error { return os.Remove(filepath.Join(fs, "etc/file")) }},
			{"missing tree", false, func(fs string) error { return os.RemoveAll(fs) }},
			{"before it was recorded", true, func(fs string) error {
				return os.WriteFile(filepath.Join(fs, "etc/file"), []byte("other"), 0o644)
			}},
		} {
			t.Run(c.name, func(t *testing.T) {
				images := t.TempDir()
				other := makeTar(t, member{name: "other", data: "o"})
				layer := makeTar(t, member{name: "etc/file", data: "content", mode: 0o644})
				cfg := map[string]any{"Cmd": []string{"/x"}}
				id := addImage(t, images, dockerArchive(t, cfg, other, layer), nil)
				dir := filepath.Join(t.TempDir(), "store")
				open := func() *Store { return openStore(t, images, func(o *Options) { o.Dir = dir; change(o) }) }
				s := open()
				img, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
				if err != nil {
					t.Fatal(err)
				}
				sealed(t, s)
				fs := img.Layers[1].Path
				file := filepath.Join(fs, "etc/file")
				if c.early {
					// What was recorded is gone, as if it had not come to that yet. The clock of inodes is coarse.
					if err := os.Remove(filepath.Join(filepath.Dir(fs), sumName)); err != nil {
						t.Fatal(err)
					}
					time.Sleep(50 * time.Millisecond)
				}
				held, err := os.Open(fs) // as an instance does
				if err != nil {
					t.Fatal(err)
				}
				defer held.Close()
				if err := c.do(fs); err != nil {
					t.Fatal(err)
				}
				verify := func(heal bool) (bad []novalet.LayerCheck) {
					t.Helper()
					list, err := s.Verify(t.Context(), heal)
					if err != nil || len(list) != 2 {
						t.Fatalf("verify: %+v, %v", list, err)
					}
					return slices.DeleteFunc(list, func(c novalet.LayerCheck) bool { return c.Problem == "" })
				}
				named := func(bad []novalet.LayerCheck) {
					t.Helper()
					if len(bad) != 1 || bad[0].DiffID != img.Layers[1].DiffID || !slices.Equal(bad[0].Images, []string{id}) {
						t.Fatalf("corrupt are %+v", bad)
					}
				}
				named(verify(false))
				if c.name != "missing tree" {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					s = open()
					named(verify(false))
				}
				if list, err := s.List(t.Context()); err != nil || len(list) != 1 || list[0].Format != "docker-archive, corrupt" {
					t.Errorf("list: %+v, %v", list, err)
				}
				if _, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-2"}); err != nil {
					t.Fatal(err)
				}
				healed := func() {
					t.Helper()
					st, err := os.Stat(file)
					if err != nil || st.Mode().Perm() != 0o644 {
						t.Fatalf("healed file: %v, %v", st, err)
					}
					if b, err := os.ReadFile(file); err != nil || string(b) != "content" {
						t.Errorf("healed file: %q, %v", b, err)
					}
				}
				healed()
				if bad := verify(false); len(bad) != 0 {
					t.Errorf("after the prepare: %+v", bad)
				}
				// The old tree is there for the instance that was on it, until that has gone.
				kept := func() int {
					t.Helper()
					if _, err := s.Collect(t.Context()); err != nil {
						t.Fatal(err)
					}
					l, err := os.ReadDir(s.path("replaced"))
					if err != nil {
						t.Fatal(err)
					}
					return len(l)
				}
				if n := kept(); n != 1 {
					t.Errorf("%d old trees are kept", n)
				}
				if err := s.Release(t.Context(), "inst-1"); err != nil {
					t.Fatal(err)
				}
				if n := kept(); n != 0 {
					t.Errorf("%d old trees are kept for nobody", n)
				}
				// Once more, healed by verify. The folder is another one now.
				if err := os.WriteFile(file, []byte("again"), 0o644); err != nil {
					t.Fatal(err)
				}
				bad := verify(true)
				named(bad)
				if !bad[0].Healed || bad[0].Error != "" {
					t.Errorf("verify: %+v", bad)
				}
				healed()
			})
		}
	})
}

// TestVerifyCannotHeal: without the image in Glance the layer stays named.
func TestVerifyCannotHeal(t *testing.T) {
	images := t.TempDir()
	id := addImage(t, images, rootTar(t), nil)
	s := openStore(t, images, nil)
	img, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
	if err != nil {
		t.Fatal(err)
	}
	sealed(t, s)
	if err := os.Remove(filepath.Join(img.Layers[0].Path, "lib")); err != nil {
		t.Fatal(err)
	}
	if err := NewFileGlance(images).Delete(t.Context(), novalet.RequestContext{}, id); err != nil {
		t.Fatal(err)
	}
	list, err := s.Verify(t.Context(), true)
	if err != nil || len(list) != 1 || list[0].Problem == "" || list[0].Healed || list[0].Error == "" {
		t.Errorf("verify: %+v, %v", list, err)
	}
	if _, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"}); err == nil {
		t.Error("a corrupt image is given out")
	}
}
