package cloud_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2/openstack/image/v2/imagedata"
	"github.com/gophercloud/gophercloud/v2/openstack/image/v2/images"
)

// member is a file of a tar made here.
type member struct {
	name, link string
	mode       int64
	data       []byte
}

func makeTar(t testing.TB, members []member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Mode: m.mode, Size: int64(len(m.data)), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
		switch {
		case m.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, m.link
		case m.name[len(m.name)-1] == '/':
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// busyboxRoot is a root file system of the distribution's static busybox.
func busyboxRoot(t testing.TB) []member {
	t.Helper()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("package busybox-static: %v", err)
	}
	m := []member{{name: "bin/", mode: 0o755}, {name: "etc/", mode: 0o755}, {name: "tmp/", mode: 0o1777}, {name: "root/", mode: 0o700},
		{name: "www/", mode: 0o755}, {name: "proc/", mode: 0o755}, {name: "sys/", mode: 0o755}, {name: "dev/", mode: 0o755},
		{name: "bin/busybox", mode: 0o755, data: bin},
		{name: "etc/passwd", mode: 0o644, data: []byte("root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/www:/bin/sh\n")},
		{name: "etc/group", mode: 0o644, data: []byte("root:x:0:\nwww:x:33:\n")},
		{name: "www/index.html", mode: 0o644, data: []byte("served by an instance\n")}}
	out, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range bytes.Fields(out) {
		if string(n) != "busybox" {
			m = append(m, member{name: "bin/" + string(n), link: "busybox", mode: 0o777})
		}
	}
	return m
}

// appConfig is what the application image says to run: it greets on the console, then serves port 80.
func appConfig() map[string]any {
	return map[string]any{"Cmd": []string{"/bin/sh", "-c", "echo hello from $(hostname) $GREETING; exec httpd -f -p 80 -h /www"},
		"Env": []string{"PATH=/bin", "GREETING=there"}, "WorkingDir": "/", "StopSignal": "SIGTERM"}
}

// dockerArchive makes what `docker save` writes of a one-layer image.
func dockerArchive(t testing.TB, root []member, config map[string]any) []byte {
	t.Helper()
	layer := makeTar(t, root)
	diffID := fmt.Sprintf("%x", sha256.Sum256(layer))
	cfg, err := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux", "config": config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + diffID}}})
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("%x.json", sha256.Sum256(cfg))
	manifest, err := json.Marshal([]map[string]any{{"Config": name, "RepoTags": []string{"novalet/test:latest"}, "Layers": []string{diffID + "/layer.tar"}}})
	if err != nil {
		t.Fatal(err)
	}
	return makeTar(t, []member{{name: diffID + "/", mode: 0o755}, {name: diffID + "/layer.tar", mode: 0o644, data: layer},
		{name: name, mode: 0o644, data: cfg}, {name: "manifest.json", mode: 0o644, data: manifest}})
}

// imageSpec is how an image is registered.
type imageSpec struct {
	name, container, disk string
	props                 map[string]string
}

// upload puts an image into Glance and registers its removal.
func upload(t testing.TB, u *user, spec imageSpec, data io.Reader) string {
	t.Helper()
	id := uploadKept(t, u, spec, data)
	t.Cleanup(func() { _ = images.Delete(context.Background(), u.image, id).ExtractErr() })
	return id
}

func uploadKept(t testing.TB, u *user, spec imageSpec, data io.Reader) string {
	t.Helper()
	im, err := images.Create(t.Context(), u.image, images.CreateOpts{Name: spec.name, ContainerFormat: spec.container, DiskFormat: spec.disk,
		Properties: spec.props}).Extract()
	if err != nil {
		t.Fatalf("create image %s: %v", spec.name, err)
	}
	if err := imagedata.Upload(t.Context(), u.image, im.ID, data).ExtractErr(); err != nil {
		t.Fatalf("upload image %s: %v", spec.name, err)
	}
	return im.ID
}

// shared is an image that several tests use; TestMain removes it.
type shared struct {
	mu  sync.Mutex
	ids map[string]string // by user
	mk  func(t testing.TB) (imageSpec, io.Reader)
}

func (s *shared) id(t testing.TB, u *user) string {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ids == nil {
		s.ids = map[string]string{}
	}
	if s.ids[u.name] == "" {
		spec, data := s.mk(t)
		s.ids[u.name] = uploadKept(t, u, spec, data)
	}
	return s.ids[u.name]
}

// appImage is a busybox docker archive that serves port 80.
var appImage = &shared{mk: func(t testing.TB) (imageSpec, io.Reader) {
	return imageSpec{name: "novalet-test-app", container: "docker", disk: "raw"}, bytes.NewReader(dockerArchive(t, busyboxRoot(t), appConfig()))
}}

// debianImage is a plain root tarball with systemd, cloud-init and sshd.
var debianImage = &shared{mk: func(t testing.TB) (imageSpec, io.Reader) {
	return imageSpec{name: "novalet-test-debian", container: "bare", disk: "raw"}, mustOpen(t, debianTar(t))
}}

// debianTar is the tarball's path; it is made once per machine.
func debianTar(t testing.TB) string {
	t.Helper()
	path := filepath.Join(imageCache(), "debian-12.tar.gz")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	t.Logf("making %s: this takes minutes", path)
	if _, err := sh(context.Background(), "bash", "../images/debian.sh", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// cloudImage is the path of a disk image with the same root, made once per machine.
func cloudImage(t testing.TB) string {
	t.Helper()
	path := filepath.Join(imageCache(), "debian-12.qcow2")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if _, err := sh(context.Background(), "bash", "../images/cloudimage.sh", debianTar(t), path); err != nil {
		t.Fatal(err)
	}
	return path
}

func imageCache() string {
	if d := os.Getenv("NOVALET_IMAGE_CACHE"); d != "" {
		return d
	}
	return "/var/cache/novalet/images"
}

func mustOpen(t testing.TB, path string) io.Reader {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestMain(m *testing.M) {
	code := m.Run()
	for _, s := range []*shared{appImage, debianImage} {
		for name, id := range s.ids {
			if u, ok := logins.Load(name); ok {
				_ = images.Delete(context.Background(), u.(*user).image, id).ExtractErr()
			}
		}
	}
	os.Exit(code)
}
