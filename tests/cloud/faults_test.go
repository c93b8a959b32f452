package cloud_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// serversNamed lists the servers whose name begins so.
func serversNamed(t testing.TB, u *user, prefix string) []string {
	t.Helper()
	p, err := servers.List(u.compute, servers.ListOpts{Name: "^" + prefix}).AllPages(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	l, err := servers.ExtractServers(p)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, s := range l {
		ids = append(ids, s.ID)
	}
	return ids
}

func deleteAll(t testing.TB, u *user, ids []string) {
	t.Helper()
	var wg sync.WaitGroup
	for _, id := range ids {
		wg.Go(func() { remove(t, u, id) })
	}
	wg.Wait()
}

// bigTar is a gzipped root tarball with one file of so many bytes, none of them zero.
func bigTar(t testing.TB, size int64) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, h := range []*tar.Header{{Name: "sbin/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "sbin/init", Typeflag: tar.TypeReg, Mode: 0o755, Size: size}} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	// A little noise in each page: what compresses better than anything honest is refused as a bomb.
	block := bytes.Repeat([]byte("novalet "), 1<<17)
	noise := rand.New(rand.NewPCG(1, 2))
	for page := 0; page < len(block); page += 4096 {
		for i := range 128 {
			block[page+i] = byte(1 + noise.UintN(255))
		}
	}
	for left := size; left > 0; {
		n := min(left, int64(len(block)))
		if _, err := w.Write(block[:n]); err != nil {
			t.Fatal(err)
		}
		left -= n
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestBadImages: what cannot boot ends in ERROR at once, with a text that says what to do, is not tried on another
// host, and leaves nothing.
func TestBadImages(t *testing.T) {
	u := as(t, "demo")
	// Each has a layer that no other image has: of one that is known already nothing would be fetched.
	good := func(name string) []byte {
		return dockerArchive(t, append(busyboxRoot(t), member{name: "etc/image", mode: 0o644, data: []byte(name + "\n")}), appConfig())
	}
	noise := make([]byte, 1<<20)
	for i := range noise {
		noise[i] = byte(i*7 + i>>8)
	}
	iso := make([]byte, 64<<10)
	copy(iso[32769:], "CD001")
	plain := slices.DeleteFunc(busyboxRoot(t), func(m member) bool { return strings.HasSuffix(m.name, "/init") })
	cases := []struct {
		name, container string
		data            func() io.Reader
		want            []string // each must be in the fault
		flavor          string
	}{
		{"unknown", "bare", func() io.Reader { return bytes.NewReader(noise) }, []string{"format"}, ""},
		{"iso", "bare", func() io.Reader { return bytes.NewReader(iso) }, []string{"ISO"}, ""},
		{"truncated", "docker", func() io.Reader { b := good("truncated"); return bytes.NewReader(b[:len(b)/2]) }, []string{"cut short"}, ""},
		{"wrong-layer", "docker", func() io.Reader {
			return bytes.NewReader(bytes.Replace(good("wrong-layer"), []byte("served by an instance"), []byte("served by an intruder"), 1))
		}, []string{"layer"}, ""},
		{"no-command", "docker", func() io.Reader {
			return bytes.NewReader(dockerArchive(t, plain, map[string]any{"Env": []string{"PATH=/bin"}}))
		}, []string{"command", "os_command_line"}, ""},
		{"no-such-command", "docker", func() io.Reader {
			return bytes.NewReader(dockerArchive(t, busyboxRoot(t), map[string]any{"Cmd": []string{"/bin/nothing-here"}}))
		}, []string{"/bin/nothing-here"}, ""},
		{"no-init", "bare", func() io.Reader { return bytes.NewReader(gzipped(t, makeTar(t, plain))) }, []string{"init"}, ""},
		{"cut-download", "docker", func() io.Reader { return bytes.NewReader(good("cut-download")) }, []string{"ends after", "again"}, ""},
		{"wrong-checksum", "docker", func() io.Reader { return bytes.NewReader(good("wrong-checksum")) }, []string{"checksum"}, ""},
		{"too-large", "bare", func() io.Reader { return bytes.NewReader(bigTar(t, 1200<<20)) }, []string{"disk"}, ""},
	}
	ids := map[string]string{}
	for _, c := range cases {
		ids[c.name] = upload(t, u, imageSpec{name: "novalet-test-" + c.name, container: c.container, disk: "raw"}, c.data())
	}
	// What Glance's own disk does to an image after its upload: half of it is lost, or a byte of it turns.
	stored := func(name string) string { return filepath.Join(state(t), "glance", "images", ids[name]) }
	if err := os.Truncate(stored("cut-download"), int64(len(good("cut-download"))/2)); err != nil {
		t.Fatal(err)
	}
	turned := good("wrong-checksum")
	turned[bytes.Index(turned, []byte("served by an instance"))] ^= 1
	if err := os.WriteFile(stored("wrong-checksum"), turned, 0o640); err != nil {
		t.Fatal(err)
	}
	leavesNothing(t)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s, err := tryCreate(t, u, bootOpts{name: "bad-" + c.name, image: ids[c.name]})
			if err != nil {
				t.Fatal(err)
			}
			got := waitStatus(t, u, s.ID, "ERROR")
			t.Logf("fault: %s", got.Fault.Message)
			for _, w := range c.want {
				if !strings.Contains(strings.ToLower(got.Fault.Message), strings.ToLower(w)) {
					t.Errorf("the fault does not name %q: %s", w, got.Fault.Message)
				}
			}
			if strings.Contains(got.Fault.Message, "/srv/") || strings.Contains(got.Fault.Message, "/var/") || strings.Contains(got.Fault.Message, "No valid host") {
				t.Errorf("the fault tells of the host, or hides the reason: %s", got.Fault.Message)
			}
		})
	}
}
