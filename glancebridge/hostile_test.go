package glancebridge

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/novalet/novalet"
)

// prepare puts data into a store of its own and fetches it.
func prepare(t *testing.T, data []byte, change func(*Options), record func(*ImageRecord)) (*novalet.Image, error) {
	t.Helper()
	images := t.TempDir()
	id := addImage(t, images, data, record)
	s := openStore(t, images, change)
	img, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
	if err != nil {
		checkEmpty(t, s)
	}
	return img, err
}

// checkEmpty fails when a failed fetch left anything.
func checkEmpty(t *testing.T, s *Store) {
	t.Helper()
	for _, d := range []string{"layers", "images", "leases", "ingest"} {
		left, err := os.ReadDir(s.path(d))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range left {
			t.Errorf("%s/%s is left", d, e.Name())
		}
	}
}

// wantRefused checks for a fault that a tenant can act on.
func wantRefused(t *testing.T, err error, text string) {
	t.Helper()
	var f *novalet.Fault
	if !errors.As(err, &f) || !errors.Is(err, novalet.ErrAbort) {
		t.Fatalf("got %v, want a refusal", err)
	}
	if !strings.Contains(f.Text, text) {
		t.Errorf("fault says %q, want %q", f.Text, text)
	}
	if strings.Contains(f.Text, "/tmp/") || strings.Contains(f.Text, "ingest") {
		t.Errorf("fault %q names a path of the host", f.Text)
	}
}

// root adds members to what makes a root file system.
func root(t *testing.T, more ...member) []byte {
	return makeTar(t, append([]member{{name: "etc/", typ: tar.TypeDir}, {name: "sbin/init", data: "#!"}}, more...)...)
}

func TestRefusedImages(t *testing.T) {
	cmd := map[string]any{"Cmd": []string{"/x"}}
	l := makeTar(t, member{name: "x", data: "x"})
	head := func(off int, s string) []byte {
		b := make([]byte, 128<<10)
		copy(b[off:], s)
		return b
	}
	bomb := func() []byte {
		var b bytes.Buffer
		w, err := gzip.NewWriterLevel(&b, 9)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.CopyN(w, zeroReader{}, 1<<20)
		if err = errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	doc := func(files map[string]any) []byte {
		var m []member
		for _, name := range sortedNames(files) {
			v := files[name]
			b, ok := v.([]byte)
			if !ok {
				var err error
				if b, err = json.Marshal(v); err != nil {
					t.Fatal(err)
				}
			}
			m = append(m, member{name: name, data: string(b)})
		}
		return makeTar(t, m...)
	}
	type obj = map[string]any
	for _, c := range []struct {
		name string
		data []byte
		text string
	}{
		{"empty", nil, "empty"},
		{"text", []byte("hello, this is no image"), "no format"},
		{"lz4", head(0, "\x04\x22\x4d\x18"), "lz4"},
		{"vmdk descriptor (CVE-2022-47951)", []byte("# Disk DescriptorFile\nversion=1\nRW 1 FLAT \"/etc/passwd\" 0\n"), "descriptor"},
		{"iso", head(32769, "CD001"), "ISO"},
		{"luks", head(0, "LUKS\xba\xbe"), "encrypted"},
		{"lvm", head(512, "LABELONE"), "LVM"},
		{"vhdx", head(0, "vhdxfile"), "vhdx"},
		{"erofs", head(1024, "\xe2\xe1\xf5\xe0"), "EROFS"},
		{"cpio", head(0, "070701"), "cpio"},
		{"polyglot", func() []byte { b := head(0, "QFI\xfb"); copy(b[32769:], "CD001"); return b }(), "at once"},
		{"raw that is qcow2 (CVE-2024-40767)", head(0, "QFI\xfb\x00\x00\x00\x03"), "declared"},
		{"gzip of garbage", gz(t, []byte("garbage")), "no format"},
		{"gzip thrice", gz(t, gz(t, gz(t, rootTar(t)))), "more than twice"},
		{"gzip cut", gz(t, rootTar(t))[:200], "damaged or cut"},
		{"gzip bomb", gz(t, bytes.Repeat(bomb(), 1)), ""},
		{"tar without a root", makeTar(t, member{name: "readme", data: "x"}), "neither"},
		{"tar of one disk", makeTar(t, member{name: "disk.img", data: "x"}), "disk.img"},
		{"metadata half of an incus image", makeTar(t, member{name: "metadata.yaml", data: "architecture: x86_64\n"}), "split incus"},
		{"incus virtual machine", makeTar(t, member{name: "metadata.yaml", data: "x"}, member{name: "rootfs.img", data: "x"}), "rootfs.img"},
		{"path upwards", root(t, member{name: "../../etc/passwd", data: "x"}), "out of its root"},
		{"path upwards in the middle", root(t, member{name: "etc/../../x", data: "x"}), "out of its root"},
		{"hard link upwards", root(t, member{name: "x", typ: tar.TypeLink, link: "../../etc/shadow"}), "out of its root"},
		{"hard link to nothing", root(t, member{name: "x", typ: tar.TypeLink, link: "nothing"}), "does not hold"},
		{"hard link to a directory", root(t, member{name: "x", typ: tar.TypeLink, link: "etc"}), "directory"},
		{"hard link loop", root(t, member{name: "a", typ: tar.TypeLink, link: "b"}, member{name: "b", typ: tar.TypeLink, link: "a"}), "does not hold"},
		{"whiteout device", root(t, member{name: "etc/x", typ: tar.TypeChar}), "0:0"},
		{"symlink loop as a parent", root(t, member{name: "a", typ: tar.TypeSymlink, link: "b"}, member{name: "b", typ: tar.TypeSymlink, link: "a"},
			member{name: "a/x", data: "x"}), "no directory"},
		{"file as a parent", root(t, member{name: "f", data: "x"}, member{name: "f/x", data: "x"}), "no directory"},
		{"magic link as a parent", root(t, member{name: "a", typ: tar.TypeSymlink, link: "/proc/self/root"}, member{name: "a/etc/x", data: "x"}), "no directory"},
		{"long name", root(t, member{name: strings.Repeat("n", 300), data: "x"}), "255"},
		{"deep path", root(t, member{name: strings.Repeat("d/", 600) + "x", data: "x"}), "512"},
		{"long path", root(t, member{name: strings.Repeat("long-name/", 500) + "x", data: "x"}), ""},
		{"other architecture", root(t, member{name: "bin/sh", data: "\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 11) + "\xb7\x00" + strings.Repeat("x", 50)}), "arm64"},
		{"deletion of dots", dockerArchive(t, cmd, makeTar(t, member{name: "a/.wh..", data: ""})), "names nothing"},
		{"deletion of nothing", dockerArchive(t, cmd, makeTar(t, member{name: "a/.wh.", data: ""})), "names nothing"},
		{"docker archive cut before its manifest", makeTar(t, member{name: "blobs/sha256/" + hexSum(l), data: string(l)}), "neither manifest.json"},
		{"docker archive without the layer", doc(obj{"manifest.json": []any{obj{"Config": "c.json", "Layers": []string{"gone/layer.tar"}}},
			"c.json": obj{"os": "linux"}}), "lacks the layer"},
		{"two images", doc(obj{"manifest.json": []any{obj{"Config": "a"}, obj{"Config": "b"}}}), "2 images"},
		{"wrong diffID", doc(obj{"manifest.json": []any{obj{"Config": "c.json", "Layers": []string{"l.tar"}}}, "l.tar": l,
			"c.json": obj{"rootfs": obj{"diff_ids": []string{"sha256:" + hexSum([]byte("other"))}}}}), "does not match the digest"},
		{"windows", doc(obj{"manifest.json": []any{obj{"Config": "c.json", "Layers": []string{"l.tar"}}}, "l.tar": l, "c.json": obj{"os": "windows"}}), "windows"},
		{"arm64", doc(obj{"manifest.json": []any{obj{"Config": "c.json", "Layers": []string{"l.tar"}}}, "l.tar": l,
			"c.json": obj{"os": "linux", "architecture": "arm64"}}), "arm64"},
		{"index that is a manifest (CVE-2021-41190)", doc(obj{"oci-layout": obj{}, "index.json": obj{"manifests": []any{}, "layers": []any{obj{}}}}), "claims to be"},
		{"blob that is not its name", doc(obj{"blobs/sha256/" + hexSum([]byte("other")): l, "manifest.json": []any{obj{"Config": "c.json",
			"Layers": []string{"blobs/sha256/" + hexSum([]byte("other"))}}}, "c.json": obj{"os": "linux"}}), "does not match its digest"},
		{"foreign layer", ociArchive(t, l, func(d obj) { d["urls"] = []string{"http://example.org/"} }), "lies elsewhere"},
		{"digest that is a path", ociArchive(t, l, func(d obj) { d["digest"] = "sha256:../../etc/passwd" }), "which is none"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := prepare(t, c.data, nil, nil)
			wantRefused(t, err, c.text)
		})
	}
}

func sortedNames(m map[string]any) []string {
	var names []string
	for k := range m {
		names = append(names, k)
	}
	for i := range names {
		for j := i + 1; j < len(names); j++ {
			if names[j] < names[i] {
				names[i], names[j] = names[j], names[i]
			}
		}
	}
	return names
}

// ociArchive makes an OCI layout of one layer.
func ociArchive(t testing.TB, l []byte, change func(desc map[string]any)) []byte {
	t.Helper()
	type obj = map[string]any
	blob := func(v any) (string, string) {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b), hexSum(b)
	}
	zl := gz(t, l)
	cfg, cfgHex := blob(obj{"os": "linux", "architecture": "amd64", "config": obj{"Cmd": []string{"/x"}},
		"rootfs": obj{"diff_ids": []string{"sha256:" + hexSum(l)}}})
	desc := obj{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": "sha256:" + hexSum(zl), "size": len(zl)}
	if change != nil {
		change(desc)
	}
	man, manHex := blob(obj{"schemaVersion": 2, "config": obj{"digest": "sha256:" + cfgHex}, "layers": []any{desc}})
	att, attHex := blob(obj{"schemaVersion": 2, "config": obj{"digest": "sha256:" + cfgHex}, "layers": []any{}})
	inner, innerHex := blob(obj{"manifests": []any{
		obj{"digest": "sha256:" + manHex, "platform": obj{"os": "linux", "architecture": "amd64"}},
		obj{"digest": "sha256:" + strings.Repeat("0", 64), "platform": obj{"os": "linux", "architecture": "s390x"}},
		obj{"digest": "sha256:" + attHex, "platform": obj{"os": "unknown", "architecture": "unknown"},
			"annotations": obj{"vnd.docker.reference.type": "attestation-manifest"}},
	}})
	idx, _ := blob(obj{"schemaVersion": 2, "manifests": []any{obj{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": "sha256:" + innerHex}}})
	b := func(h, data string) member { return member{name: "blobs/sha256/" + h, data: data} }
	return makeTar(t, b(hexSum(zl), string(zl)), b(cfgHex, cfg), b(manHex, man), b(attHex, att), b(innerHex, inner),
		member{name: "index.json", data: idx}, member{name: "oci-layout", data: `{"imageLayoutVersion":"1.0.0"}`})
}

// TestAcceptedImages are the layouts that tools write.
func TestAcceptedImages(t *testing.T) {
	l := makeTar(t, member{name: "x", data: "program"})
	type obj = map[string]any
	js := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	cfg := js(obj{"os": "linux", "architecture": "amd64", "config": obj{"Cmd": []string{"/x"}}, "rootfs": obj{"diff_ids": []string{"sha256:" + hexSum(l)}}})
	v1 := strings.Repeat("a", 64)
	for _, c := range []struct {
		name   string
		data   []byte
		format string
	}{
		{"docker save", dockerArchive(t, obj{"Cmd": []string{"/x"}}, l), "docker-archive"},
		{"gzipped docker save", gz(t, dockerArchive(t, obj{"Cmd": []string{"/x"}}, l)), "docker-archive.gzip"},
		{"OCI layout with a nested index", ociArchive(t, l, nil), "oci-archive"},
		{"names of no known tool", makeTar(t, member{name: "layer1.tar", data: string(gz(t, l))}, member{name: "config", data: cfg},
			member{name: "manifest.json", data: js([]any{obj{"Config": "config", "Layers": []string{"layer1.tar"}}})}), "docker-archive"},
		{"manifest first", makeTar(t, member{name: "./manifest.json", data: js([]any{obj{"Config": "sha256:" + hexSum([]byte(cfg)), "Layers": []string{hexSum(l) + ".tar.gz"}}})},
			member{name: "./sha256:" + hexSum([]byte(cfg)), data: cfg}, member{name: "./" + hexSum(l) + ".tar.gz", data: string(gz(t, l))}), "docker-archive"},
		{"symlinked layer (skopeo)", makeTar(t, member{name: hexSum(l) + ".tar", data: string(l)},
			member{name: v1 + "/layer.tar", typ: tar.TypeSymlink, link: "../" + hexSum(l) + ".tar"}, member{name: "c.json", data: cfg},
			member{name: "manifest.json", data: js([]any{obj{"Config": "c.json", "Layers": []string{v1 + "/layer.tar"}}})}), "docker-archive"},
		{"before manifest.json", makeTar(t, member{name: v1 + "/", typ: tar.TypeDir}, member{name: v1 + "/VERSION", data: "1.0"},
			member{name: v1 + "/json", data: js(obj{"id": v1, "os": "linux", "config": obj{"Cmd": []string{"/x"}}})},
			member{name: v1 + "/layer.tar", data: string(l)}, member{name: "repositories", data: js(obj{"test": obj{"latest": v1}})}), "docker-archive"},
		{"null manifest beside an index (moby 47210)", func() []byte {
			b := ociArchive(t, l, nil)
			var m []member
			tr := tar.NewReader(bytes.NewReader(b))
			for {
				h, err := tr.Next()
				if err != nil {
					break
				}
				data, _ := io.ReadAll(tr)
				m = append(m, member{name: h.Name, data: string(data)})
			}
			return makeTar(t, append(m, member{name: "manifest.json", data: `[{"Config":"","RepoTags":null,"Layers":null}]`})...)
		}(), "oci-archive"},
	} {
		t.Run(c.name, func(t *testing.T) {
			img, err := prepare(t, c.data, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if img.Format != c.format || img.Kind != novalet.KindApplication || len(img.Layers) != 1 || img.Layers[0].DiffID != "sha256:"+hexSum(l) {
				t.Errorf("got %+v", img)
			}
			if b, err := os.ReadFile(filepath.Join(img.Layers[0].Path, "x")); err != nil || string(b) != "program" {
				t.Errorf("x is %q, %v", b, err)
			}
		})
	}
	t.Run("incus unified", func(t *testing.T) {
		img, err := prepare(t, makeTar(t, member{name: "metadata.yaml", data: "architecture: x86_64\n"}, member{name: "rootfs/sbin/init", data: "i"},
			member{name: "rootfs/etc/same", typ: tar.TypeLink, link: "rootfs/sbin/init"}, member{name: "rootfs/etc/x", data: "x"},
			member{name: "templates/hosts.tpl", data: "x"}), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if img.Format != "incus-unified" || img.Kind != novalet.KindMachine {
			t.Errorf("got %+v", img)
		}
		if b, err := os.ReadFile(filepath.Join(img.Layers[0].Path, "etc/same")); err != nil || string(b) != "i" {
			t.Errorf("etc/same is %q, %v", b, err)
		}
	})
}

// TestTruncatedEverywhere cuts small images at every block: each must be refused, whatever is left of it.
func TestTruncatedEverywhere(t *testing.T) {
	images := t.TempDir()
	s := openStore(t, images, func(o *Options) { o.Tries = 1 })
	l := makeTar(t, member{name: "x", data: strings.Repeat("x", 2000)})
	for name, whole := range map[string][]byte{
		"docker": dockerArchive(t, map[string]any{"Cmd": []string{"/x"}}, l), "oci": ociArchive(t, l, nil), "root": rootTar(t),
	} {
		last := len(whole) - 1024 // the end mark
		for n := 0; n < last; n += 512 {
			id := addImage(t, images, whole[:n], nil)
			_, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id})
			if !errors.Is(err, novalet.ErrAbort) || novalet.FaultText(err) == "" {
				t.Fatalf("%s cut at %d: %v", name, n, err)
			}
			// The same cut on the way, where the record knows better.
			id = addImage(t, images, whole[:n], func(r *ImageRecord) { r.Size = int64(len(whole)) })
			if _, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id}); !errors.Is(err, novalet.ErrAbort) {
				t.Fatalf("%s cut on the way at %d: %v", name, n, err)
			}
		}
	}
	checkEmpty(t, s)
}

// TestNothingOutside unpacks archives that try to write through symlinks, and looks whether a file beside the store
// changed.
func TestNothingOutside(t *testing.T) {
	bothWays(t, func(t *testing.T, change func(*Options)) {
		outside := t.TempDir()
		victim := filepath.Join(outside, "victim")
		if err := os.WriteFile(victim, []byte("as it was"), 0o666); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(outside, 0o777); err != nil {
			t.Fatal(err)
		}
		data := makeTar(t, member{name: "etc/x", data: "x"}, member{name: "sbin/init", data: "x"},
			member{name: "esc", typ: tar.TypeSymlink, link: outside},
			member{name: "up", typ: tar.TypeSymlink, link: "../../../../../../../../" + outside},
			member{name: "etc/hosts", typ: tar.TypeSymlink, link: victim},
			member{name: "etc/hosts", data: "replaced inside"},
			member{name: "tmp", typ: tar.TypeSymlink, link: "/"},
			member{name: "tmp/etc/inside", data: "inside"},
		)
		img, err := prepare(t, data, change, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"etc/hosts", "etc/inside"} {
			if st, err := os.Lstat(filepath.Join(img.Layers[0].Path, name)); err != nil || !st.Mode().IsRegular() {
				t.Errorf("%s: %v, %v", name, st, err)
			}
		}
		for _, through := range []string{"esc", "up"} {
			_, err := prepare(t, root(t, member{name: through, typ: tar.TypeSymlink, link: outside},
				member{name: through + "/victim", data: "overwritten"}), change, nil)
			if err == nil {
				t.Errorf("an entry below the symlink %s was accepted", through)
			}
		}
		if b, err := os.ReadFile(victim); err != nil || string(b) != "as it was" {
			t.Errorf("the file outside is %q, %v", b, err)
		}
		left, err := os.ReadDir(outside)
		if err != nil || len(left) != 1 {
			t.Errorf("outside holds %v, %v", left, err)
		}
	})
}

func TestTooLargeForFlavor(t *testing.T) {
	bothWays(t, func(t *testing.T, change func(*Options)) {
		images := t.TempDir()
		id := addImage(t, images, gz(t, root(t, member{name: "etc/big", data: strings.Repeat("0123456789abcdef", 1<<16)})), nil)
		s := openStore(t, images, change)
		ctx := context.Background()
		_, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "a", MaxBytes: 100_000})
		if !isTooSmall(err) {
			t.Fatalf("got %v", err)
		}
		if _, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "a", MaxBytes: 2 << 20}); err != nil {
			t.Fatal(err)
		}
		// Also when it is cached.
		if _, err = s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "b", MaxBytes: 100_000}); !isTooSmall(err) {
			t.Fatalf("got %v", err)
		}
	})
}
