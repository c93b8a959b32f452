package glancebridge

import (
	"archive/tar"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// needTools skips the test without the tools it compares with.
func needTools(t *testing.T, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			t.Skip("needs " + n)
		}
	}
}

// overlay mounts the layers of an image as the engine does and returns where.
func overlay(t *testing.T, layers []novalet.Layer) string {
	t.Helper()
	at := t.TempDir()
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fs)
	for i := len(layers) - 1; i >= 0; i-- {
		if err := unix.FsconfigSetString(fs, "lowerdir+", layers[i].Path); err != nil {
			t.Skip("this kernel's overlayfs takes no lowerdir+: ", err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(m)
	if err := unix.MoveMount(m, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return at
}

// TestSameAsUmoci mounts layers with deletions, replacements and links across them as an instance sees them, and
// compares with what umoci unpacks from the same layers.
func TestSameAsUmoci(t *testing.T) {
	hosttest.RequireRoot(t)
	needTools(t, "umoci", "skopeo")
	layers := [][]byte{
		makeTar(t, member{name: "etc/", typ: tar.TypeDir}, member{name: "etc/keep", data: "k"}, member{name: "etc/gone", data: "g"},
			member{name: "opaque/", typ: tar.TypeDir}, member{name: "opaque/old/", typ: tar.TypeDir}, member{name: "opaque/old/x", data: "x"},
			member{name: "tree/", typ: tar.TypeDir}, member{name: "tree/a", data: "a"}, member{name: "becomes-file/", typ: tar.TypeDir},
			member{name: "becomes-file/x", data: "x"}, member{name: "becomes-dir", data: "f"}, member{name: "linked", data: "content", mode: 0o4755, uid: 7},
			member{name: "lib", typ: tar.TypeSymlink, link: "usr/lib", mode: 0o777}, member{name: "usr/", typ: tar.TypeDir},
			member{name: "usr/lib/", typ: tar.TypeDir}),
		makeTar(t, member{name: "etc/", typ: tar.TypeDir}, member{name: "etc/.wh.gone"}, member{name: "opaque/", typ: tar.TypeDir},
			member{name: "opaque/.wh..wh..opq"}, member{name: "opaque/new", data: "n"}, member{name: ".wh.tree"},
			member{name: "becomes-file", data: "now a file"}, member{name: "becomes-dir/", typ: tar.TypeDir},
			member{name: "becomes-dir/in", data: "i"}, member{name: "linked-too", typ: tar.TypeLink, link: "linked"},
			member{name: "linked", data: "content", mode: 0o4755, uid: 7}),
		makeTar(t, member{name: "etc/", typ: tar.TypeDir, mode: 0o700}, member{name: "etc/gone", data: "back"}, member{name: "tree/", typ: tar.TypeDir, mode: 0o711},
			member{name: "tree/b", data: "b"}, member{name: ".wh.lib"}),
	}
	work := t.TempDir()
	oci := filepath.Join(work, "oci")
	run(t, "umoci", "init", "--layout", oci)
	run(t, "umoci", "new", "--image", oci+":t")
	for i, l := range layers {
		f := filepath.Join(work, strconv.Itoa(i)+".tar")
		if err := os.WriteFile(f, l, 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "umoci", "raw", "add-layer", "--image", oci+":t", f)
	}
	run(t, "umoci", "config", "--image", oci+":t", "--config.cmd", "/x")
	run(t, "umoci", "unpack", "--image", oci+":t", filepath.Join(work, "bundle"))
	want := readTree(t, filepath.Join(work, "bundle/rootfs"))
	delete(want, ".") // made by umoci, not by the image
	for _, kind := range []string{"oci-archive", "docker-archive"} {
		t.Run(kind, func(t *testing.T) {
			file := filepath.Join(work, kind+".tar")
			run(t, "skopeo", "--insecure-policy", "copy", "oci:"+oci+":t", kind+":"+file+":t:latest")
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
			if img.Format != kind {
				t.Errorf("format is %s", img.Format)
			}
			got := readTree(t, overlay(t, img.Layers))
			delete(got, ".")
			for _, m := range []map[string]node{got, want} {
				for k, n := range m {
					// Which names share an inode across layers is not the same thing in a stack.
					n.Peers = ""
					m[k] = n
				}
			}
			sameTree(t, got, want)
		})
	}
}

// TestLinkToLayerBelow: a hard link to a file of another layer brings its content along.
func TestLinkToLayerBelow(t *testing.T) {
	bothWays(t, func(t *testing.T, change func(*Options)) {
		img, err := prepare(t, dockerArchive(t, map[string]any{"Cmd": []string{"/x"}},
			makeTar(t, member{name: "dir/target", data: "content", mode: 0o750}),
			makeTar(t, member{name: "other/", typ: tar.TypeDir}, member{name: "other/link", typ: tar.TypeLink, link: "dir/target"},
				member{name: "other/again", typ: tar.TypeLink, link: "other/link"})), change, nil)
		if err != nil {
			t.Fatal(err)
		}
		tree := readTree(t, img.Layers[1].Path)
		n := tree["other/link"]
		if n.Size != 7 || n.Mode&0o777 != 0o750 || n.Peers != "other/again,other/link" {
			t.Errorf("other/link is %+v", n)
		}
	})
}

// TestDigestIsNoRight: naming a layer that another tenant's image brought does not give it.
func TestDigestIsNoRight(t *testing.T) {
	ctx := context.Background()
	images := t.TempDir()
	secret := makeTar(t, member{name: "secret", data: "of tenant A"})
	hex := hexSum(secret)
	a := addImage(t, images, dockerArchive(t, map[string]any{"Cmd": []string{"/x"}}, secret), nil)
	s := openStore(t, images, nil)
	if _, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: a, InstanceUUID: "a"}); err != nil {
		t.Fatal(err)
	}
	cfg := `{"os":"linux","config":{"Cmd":["/x"]},"rootfs":{"diff_ids":["sha256:` + hex + `"]}}`
	man := `[{"Config":"c.json","Layers":["blobs/sha256/` + hex + `"]}]`
	named := addImage(t, images, makeTar(t, member{name: "manifest.json", data: man}, member{name: "c.json", data: cfg}), nil)
	_, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: named, InstanceUUID: "b"})
	wantRefused(t, err, "lacks the layer")
	for _, other := range [][]byte{makeTar(t, member{name: "x", data: "other"}), makeTar(t)} {
		forged := addImage(t, images, makeTar(t, member{name: "blobs/sha256/" + hex, data: string(other)},
			member{name: "manifest.json", data: man}, member{name: "c.json", data: cfg}), nil)
		_, err = s.Prepare(ctx, &novalet.ImageRequest{ImageID: forged, InstanceUUID: "b"})
		wantRefused(t, err, "does not match its digest")
	}
	own := addImage(t, images, makeTar(t, member{name: "blobs/sha256/" + hex, data: string(secret)},
		member{name: "manifest.json", data: man}, member{name: "c.json", data: cfg}), nil)
	img, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: own, InstanceUUID: "b"})
	if err != nil || img.Layers[0].DiffID != "sha256:"+hex {
		t.Errorf("with the bytes: %+v, %v", img, err)
	}
}

// TestPrepareDisk boots from a qcow2 disk as a cloud has it: GPT would only repeat what the readers' own tests show.
func TestPrepareDisk(t *testing.T) {
	needTools(t, "mkfs.ext4", "qemu-img")
	work := t.TempDir()
	tree := filepath.Join(work, "tree")
	for name, data := range map[string]string{"sbin/init": "#!", "etc/os-release": "ID=test\n", "usr/share/zeros": string(make([]byte, 300_000))} {
		if err := os.MkdirAll(filepath.Join(tree, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, name), []byte(data), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	raw, qcow2 := filepath.Join(work, "raw"), filepath.Join(work, "qcow2")
	run(t, "mkfs.ext4", "-q", "-d", tree, raw, "16m")
	run(t, "qemu-img", "convert", "-c", "-O", "qcow2", raw, qcow2)
	bothWays(t, func(t *testing.T, change func(*Options)) {
		ids := map[string]string{}
		for file, format := range map[string]string{raw: "raw", qcow2: "qcow2"} {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, compressed := range []bool{false, true} {
				declared := format
				if compressed {
					data, declared = gz(t, data), "raw"
				}
				img, err := prepare(t, data, change, func(r *ImageRecord) { r.DiskFormat = declared })
				if err != nil {
					t.Fatalf("%s, compressed %v: %v", format, compressed, err)
				}
				if img.Kind != novalet.KindMachine || img.Init != "/sbin/init" {
					t.Errorf("got %+v", img)
				}
				if b, err := os.ReadFile(filepath.Join(img.Layers[0].Path, "etc/os-release")); err != nil || string(b) != "ID=test\n" {
					t.Errorf("etc/os-release is %q, %v", b, err)
				}
				ids[img.Layers[0].DiffID] = img.Format
			}
		}
		if len(ids) != 1 {
			t.Errorf("one tree has the names %v", ids)
		}
	})
}

// TestPrivateRoot: a tar of a private folder still makes a root that everybody may enter.
func TestPrivateRoot(t *testing.T) {
	data := makeTar(t, member{name: "./", typ: tar.TypeDir, mode: 0o700}, member{name: "./sbin/init", data: "x"})
	img, err := prepare(t, data, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := readTree(t, img.Layers[0].Path)["."]; n.Mode&0o777 != 0o755 {
		t.Errorf("the root has mode %o", n.Mode)
	}
	if img.Layers[0].DiffID == "sha256:"+hexSum(data) {
		t.Error("the changed tree has the name of the tar")
	}
}

// TestMountOfKilledProcess: the store's mount is taken over and goes with the store.
func TestMountOfKilledProcess(t *testing.T) {
	hosttest.RequireRoot(t)
	dir := filepath.Join(t.TempDir(), "store")
	o := Options{Dir: dir, Glance: NewFileGlance(t.TempDir())}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	s.unbnd = nil // as if killed: nothing undoes the mount
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if ours, err := selfBound(dir); err != nil || !ours {
		t.Fatalf("bound: %v, %v", ours, err)
	}
	if s, err = Open(o); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if ours, err := selfBound(dir); err != nil || ours {
		t.Errorf("still bound: %v, %v", ours, err)
	}
}
