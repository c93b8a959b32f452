package glancebridge

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// TestSameAsGNUTar unpacks a tree of oddities as GNU tar does.
func TestSameAsGNUTar(t *testing.T) {
	hosttest.RequireRoot(t)
	src := t.TempDir()
	oddTree(t, src)
	for _, c := range []struct{ name, format, compress, want string }{
		{"pax", "--format=posix", "", "root-tar"},
		{"pax-sparse-gzip", "--format=posix --sparse", "gzip", "root-tar.gzip"},
		{"gnu-sparse-xz", "--format=gnu --sparse", "xz", "root-tar.xz"},
		{"pax-zstd", "--format=posix", "zstd", "root-tar.zstd"},
		{"gnu-bzip2", "--format=gnu", "bzip2", "root-tar.bzip2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			work := t.TempDir()
			file := filepath.Join(work, "image.tar")
			run(t, "sh", "-c", "tar -C '"+src+"' "+c.format+" --xattrs --xattrs-include='*' --acls --numeric-owner -cf '"+file+"' .")
			plain := file
			if c.compress != "" {
				if _, err := exec.LookPath(c.compress); err != nil {
					t.Skip("needs " + c.compress)
				}
				out := file + ".c"
				run(t, "sh", "-c", c.compress+" -c < '"+file+"' > '"+out+"'")
				file = out
			}
			oracle := filepath.Join(work, "oracle")
			if err := os.Mkdir(oracle, 0o755); err != nil {
				t.Fatal(err)
			}
			run(t, "tar", "-C", oracle, "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "-p", "-xf", plain)
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			images := t.TempDir()
			id := addImage(t, images, data, nil)
			s := openStore(t, images, func(o *Options) { o.Unconfined = false })
			img, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
			if err != nil {
				t.Fatal(err)
			}
			if img.Format != c.want {
				t.Errorf("format is %q, want %q", img.Format, c.want)
			}
			sameTree(t, readTree(t, img.Layers[0].Path), readTree(t, oracle))
			// A hole must not cost disk.
			var st, ost os.FileInfo
			if st, err = os.Stat(filepath.Join(img.Layers[0].Path, "var/sparse")); err != nil {
				t.Fatal(err)
			}
			if ost, err = os.Stat(filepath.Join(src, "var/sparse")); err != nil {
				t.Fatal(err)
			}
			if got, want := blocks(st), blocks(ost); got > want+64 {
				t.Errorf("the sparse file takes %d blocks, the original %d", got, want)
			}
		})
	}
}

// TestDebianTree unpacks a real distribution as GNU tar does.
func TestDebianTree(t *testing.T) {
	hosttest.RequireRoot(t)
	file := os.Getenv("NOVALET_DEBIAN_TAR")
	if file == "" {
		t.Skip("set NOVALET_DEBIAN_TAR to a tar.gz of a distribution's root, such as debootstrap makes")
	}
	oracle := t.TempDir()
	// Not --acls: without records of its own kind it would remove the ACLs that came as xattrs.
	run(t, "tar", "-C", oracle, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-p", "-xzf", file)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	images := t.TempDir()
	id := addImage(t, images, data, nil)
	s := openStore(t, images, func(o *Options) { o.Unconfined = false })
	img, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
	if err != nil {
		t.Fatal(err)
	}
	if img.Kind != novalet.KindMachine {
		t.Errorf("kind is %q", img.Kind)
	}
	sameTree(t, readTree(t, img.Layers[0].Path), readTree(t, oracle))
}
