package glancebridge

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// member is one member of a tar made by a test.
type member struct {
	name string
	typ  byte
	mode int64
	uid  int
	data string
	link string
	pax  map[string]string
	dev  [2]int64
}

var testTime = time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)

func makeTar(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Typeflag: m.typ, Mode: m.mode, Uid: m.uid, Gid: m.uid, Linkname: m.link,
			Size: int64(len(m.data)), ModTime: testTime, PAXRecords: m.pax, Devmajor: m.dev[0], Devminor: m.dev[1]}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(m.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
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

func hexSum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// dockerArchive makes a docker save archive of layers, with members in the order docker has them.
func dockerArchive(t testing.TB, config map[string]any, layers ...[]byte) []byte {
	t.Helper()
	ids := []string{}
	var members []member
	var names []string
	for _, l := range layers {
		ids = append(ids, "sha256:"+hexSum(l))
		name := hexSum(append([]byte("v1"), l...)) + "/layer.tar"
		names = append(names, name)
		members = append(members, member{name: name, data: string(l)})
	}
	cfg, err := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux", "config": config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids}})
	if err != nil {
		t.Fatal(err)
	}
	cfgName := hexSum(cfg) + ".json"
	man, err := json.Marshal([]any{map[string]any{"Config": cfgName, "RepoTags": []string{"test:latest"}, "Layers": names}})
	if err != nil {
		t.Fatal(err)
	}
	members = append(members, member{name: cfgName, data: string(cfg)}, member{name: "manifest.json", data: string(man)})
	return makeTar(t, members...)
}

// rootTar is a small root file system.
func rootTar(t testing.TB) []byte {
	return makeTar(t,
		member{name: "./", typ: tar.TypeDir},
		member{name: "./etc/", typ: tar.TypeDir},
		member{name: "./etc/os-release", mode: 0o644, data: "ID=test\n"},
		member{name: "./sbin/", typ: tar.TypeDir},
		member{name: "./sbin/init", data: "#!/bin/sh\n"},
		member{name: "./home/", typ: tar.TypeDir, mode: 0o755},
		member{name: "./home/user/", typ: tar.TypeDir, mode: 0o700, uid: 1000},
		member{name: "./home/user/file", mode: 0o4640, uid: 1000, data: "hello"},
		member{name: "./home/user/again", typ: tar.TypeLink, link: "./home/user/file"},
		member{name: "./lib", typ: tar.TypeSymlink, link: "usr/lib", mode: 0o777},
	)
}

var imageCount atomic.Int64

// addImage puts an image into a folder served by FileGlance and returns its id.
func addImage(t testing.TB, dir string, data []byte, change func(*ImageRecord)) string {
	t.Helper()
	id := fmt.Sprintf("00000000-0000-4000-8000-%012d", imageCount.Add(1))
	sum := sha512.Sum512(data)
	r := ImageRecord{ImageMeta: novalet.ImageMeta{ID: id, Name: "image-" + id[30:], Status: "active", Size: int64(len(data)),
		DiskFormat: "raw", ContainerFormat: "bare", Properties: map[string]string{}},
		HashAlgo: "sha512", HashValue: hex.EncodeToString(sum[:])}
	if change != nil {
		change(&r)
	}
	b, err := json.Marshal(fileRecord{ImageRecord: r})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, id+".json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, id), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return id
}

// openStore opens a store over a folder of images; confined when the test runs with rights.
func openStore(t testing.TB, images string, change func(*Options)) *Store {
	t.Helper()
	o := Options{Dir: filepath.Join(t.TempDir(), "store"), Glance: NewFileGlance(images), Arch: "amd64",
		Unconfined: true, RetryDelay: time.Millisecond}
	if change != nil {
		change(&o)
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}
