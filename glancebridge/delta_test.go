package glancebridge

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge/layer"
)

const deltaBaseSize = 700_000

// deltaLab is a service with the image "base" of alice's, which has two layers, and a store that makes deltas.
type deltaLab struct {
	*testing.T
	g *liveGlance
	s *Store
}

func newDeltaLab(t *testing.T, change func(*Options)) *deltaLab {
	l := &deltaLab{T: t, g: newLiveGlance(t)}
	l.g.tokens["alice"], l.g.tokens["bob"] = "project-a", "project-b"
	l.g.add("base", "project-a", dockerArchive(t, map[string]any{"Cmd": []string{"/x"}}, bigLayer(t, 1, "one", deltaBaseSize), bigLayer(t, 2, "two", 100)), nil)
	l.s = l.store(change)
	return l
}

// store is another host.
func (l *deltaLab) store(change func(*Options)) *Store {
	return liveStore(l.T, l.g, func(o *Options) {
		o.DeltaSnapshots = true
		if change != nil {
			change(o)
		}
	})
}

func (l *deltaLab) prepare(s *Store, token, id string) (*novalet.Image, error) {
	return s.Prepare(l.Context(), &novalet.ImageRequest{Context: as(token), ImageID: id, InstanceUUID: "inst-" + id})
}

// snap boots an image, writes a file, and has alice take a snapshot, of whose request change may alter more.
func (l *deltaLab) snap(s *Store, from, to string, change func(*novalet.SnapshotRequest)) {
	l.Helper()
	img, err := l.prepare(s, "alice", from)
	if err != nil {
		l.Fatal(err)
	}
	upper := l.TempDir()
	if err := os.WriteFile(filepath.Join(upper, "of-"+to), []byte(to), 0o644); err != nil {
		l.Fatal(err)
	}
	l.g.add(to, "project-a", nil, map[string]any{propDelta: "inherited"})
	r := &novalet.SnapshotRequest{Context: as("alice"), InstanceUUID: "inst-" + from, ImageID: to, Base: img,
		Root: novalet.RootDirs{Upper: upper, Layers: img.Layers}}
	if change != nil {
		change(r)
	}
	if err := s.Snapshot(l.Context(), r); err != nil {
		l.Fatal(err)
	}
}

// size is what an image takes in Glance, and what its record says that it lies on.
func (l *deltaLab) size(id string) (int, any) {
	rec, data := l.g.get(id)
	return len(data), rec[propDelta]
}

// sameAs compares the stack of an image with the files wanted, each in a layer of its own, base first.
func (l *deltaLab) sameAs(img *novalet.Image, want ...string) {
	l.Helper()
	if len(img.Layers) != len(want) || img.Config.Cmd[0] != "/x" {
		l.Fatalf("%s is %+v, want layers with %q", img.ID, img, want)
	}
	for i, name := range want {
		if _, err := os.Stat(filepath.Join(img.Layers[i].Path, name)); err != nil {
			l.Errorf("layer %d of %s: %v", i, img.ID, err)
		}
	}
}

// TestDeltaSnapshots: of a snapshot the instance's own layer alone is uploaded, also of an instance that was made from a
// snapshot; it boots here and on a host that has nothing; and where the option is off the next one is self-contained.
func TestDeltaSnapshots(t *testing.T) {
	bothWays(t, func(t *testing.T, change func(*Options)) {
		l := newDeltaLab(t, change)
		l.snap(l.s, "base", "first", nil)
		l.snap(l.s, "first", "second", nil)
		for id, of := range map[string]string{"first": "base", "second": "first"} {
			if n, on := l.size(id); n > 20_000 || on != of {
				t.Errorf("%s takes %d bytes and is said to lie on %v", id, n, on)
			}
		}
		for _, s := range []*Store{l.s, l.store(change)} {
			img, err := l.prepare(s, "alice", "second")
			if err != nil {
				t.Fatal(err)
			}
			l.sameAs(img, "one", "two", "of-first", "of-second")
			if img.Kind != novalet.KindApplication || img.Format != "delta-archive" {
				t.Errorf("got %+v", img)
			}
		}
		plain := l.store(func(o *Options) { change(o); o.DeltaSnapshots = false })
		l.snap(plain, "second", "third", nil)
		if n, on := l.size("third"); n < deltaBaseSize || on != "" {
			t.Errorf("the self-contained snapshot takes %d bytes and is said to lie on %v", n, on)
		}
		for _, id := range []string{"base", "first", "second"} {
			l.g.remove(id)
		}
		img, err := l.prepare(l.store(change), "alice", "third")
		if err != nil {
			t.Fatal(err)
		}
		l.sameAs(img, "one", "two", "of-first", "of-second", "of-third")
	})
}

// TestDeltaForeignTools: other tools refuse a delta, instead of making an image of it that lacks its base.
func TestDeltaForeignTools(t *testing.T) {
	if _, err := exec.LookPath("skopeo"); err != nil {
		t.Skip("needs skopeo")
	}
	l := newDeltaLab(t, nil)
	l.snap(l.s, "base", "first", nil)
	_, data := l.g.get("first")
	file := filepath.Join(t.TempDir(), "delta.tar")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"docker-archive", "oci-archive"} {
		out, err := exec.Command("skopeo", "--insecure-policy", "copy", kind+":"+file, "dir:"+filepath.Join(t.TempDir(), "out")).CombinedOutput()
		if err == nil {
			t.Errorf("skopeo takes it as %s: %s", kind, out)
		}
	}
}

// TestDeltaIsNoRight: who may read a delta and not what it lies on gets a fault, whether the store has it or not, and
// whoever asked before.
func TestDeltaIsNoRight(t *testing.T) {
	for _, c := range []struct {
		name, token string
		set         func(l *deltaLab)
		ok          bool
	}{
		{"a stranger", "bob", nil, false},
		{"without a token", "", nil, false},
		{"with one that has run out", "expired", nil, false},
		{"a stranger, below another delta", "bob", func(l *deltaLab) { l.g.set("base", "visibility", "public"); l.g.set("first", "visibility", "private") }, false},
		{"a stranger, with bases open to all", "bob", func(l *deltaLab) { l.g.set("base", "visibility", "public") }, true},
		{"the owner", "alice", nil, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newDeltaLab(t, nil)
			l.snap(l.s, "base", "first", nil)
			l.snap(l.s, "first", "second", nil)
			for _, id := range []string{"first", "second"} {
				l.g.set(id, "visibility", "community")
			}
			if c.set != nil {
				c.set(l)
			}
			stored, reopened := l.store(nil), l.s.o
			if _, err := l.prepare(stored, "alice", "second"); err != nil {
				t.Fatal(err)
			}
			reopened.Dir = stored.o.Dir
			check := func(s *Store, when string) {
				t.Helper()
				img, err := l.prepare(s, c.token, "second")
				switch {
				case c.ok && err != nil:
					t.Errorf("%s: %v", when, err)
				case c.ok:
					l.sameAs(img, "one", "two", "of-first", "of-second")
				case err == nil:
					t.Errorf("%s: it boots", when)
				default:
					wantRefused(t, err, "may not be read by you")
				}
			}
			check(stored, "stored")
			// Stored meanwhile, after the user was asked about: not given unasked either.
			r := &novalet.ImageRequest{Context: as(c.token), ImageID: "second"}
			if img, f, _, err := stored.lookup(t.Context(), r, "second", stored.trustOf(nil), nil); img != nil || f != nil || err != nil {
				t.Errorf("it is given without asking: %v, %v, %v", img, f, err)
			}
			if err := stored.Close(); err != nil {
				t.Fatal(err)
			}
			again, err := Open(reopened)
			if err != nil {
				t.Fatal(err)
			}
			defer again.Close()
			if again.images["second"] == nil {
				t.Error("after a restart: its record is gone")
			}
			check(again, "after a restart")
			check(l.store(nil), "on a host that has nothing")
		})
	}
}

// TestDeltaJoins: a delta that is open to all proves no right to the layers of its base, which it has no bytes of.
func TestDeltaJoins(t *testing.T) {
	l := newDeltaLab(t, nil)
	l.snap(l.s, "base", "first", nil)
	l.g.set("first", "visibility", "public")
	if _, err := l.prepare(l.s, "alice", "first"); err != nil {
		t.Fatal(err)
	}
	secret := bigLayer(t, 1, "one", deltaBaseSize)
	hex := hexSum(secret)
	cfg, err := json.Marshal(map[string]any{"os": "linux", "config": map[string]any{"Cmd": []string{"/x"}},
		"rootfs": map[string]any{"diff_ids": []string{"sha256:" + hex}}})
	if err != nil {
		t.Fatal(err)
	}
	forged := makeTar(t, member{name: "blobs/sha256/" + hex, data: string(bigLayer(t, 9, "one", deltaBaseSize))},
		member{name: "c.json", data: string(cfg)}, member{name: "manifest.json", data: `[{"Config":"c.json","Layers":["blobs/sha256/` + hex + `"]}]`})
	l.g.add("forged", "project-b", forged, nil)
	_, err = l.prepare(l.s, "bob", "forged")
	wantRefused(t, err, "does not match its digest")
}

// TestDeltaOthersRight: a user who joins the fetch that one without the right began is not refused with that one.
func TestDeltaOthersRight(t *testing.T) {
	l := newDeltaLab(t, nil)
	l.snap(l.s, "base", "first", nil)
	l.g.set("first", "visibility", "community")
	s := l.store(nil)
	begun, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	l.g.hang = func(r *http.Request) bool {
		once.Do(func() { close(begun); <-goOn })
		return false
	}
	errs := make(chan error, 1)
	go func() {
		_, err := l.prepare(s, "bob", "first")
		errs <- err
	}()
	<-begun
	s.mu.Lock()
	f := s.flights["first"]
	s.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		_, err := l.prepare(s, "alice", "first")
		done <- err
	}()
	for {
		s.mu.Lock()
		n := f.waiters
		s.mu.Unlock()
		if n == 2 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	close(goOn)
	wantRefused(t, <-errs, "may not be read by you")
	if err := <-done; err != nil {
		t.Errorf("the owner: %v", err)
	}
}

// TestDeltaBaseChanged: a base that is gone or is not what it was is told of, not worked around.
func TestDeltaBaseChanged(t *testing.T) {
	for _, c := range []struct {
		name, text string
		set        func(l *deltaLab)
	}{
		{"deleted", "is gone or may not be read", func(l *deltaLab) { l.g.remove("base") }},
		{"other data", "whose data has changed", func(l *deltaLab) {
			l.g.replace("base", dockerArchive(l.T, map[string]any{"Cmd": []string{"/x"}}, bigLayer(l.T, 3, "one", 1000)))
		}},
		{"deactivated", "is in status \"deactivated\"", func(l *deltaLab) { l.g.set("base", "status", "deactivated") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newDeltaLab(t, nil)
			l.snap(l.s, "base", "first", nil)
			fresh := l.store(nil)
			if _, err := l.prepare(l.s, "alice", "first"); err != nil {
				t.Fatal(err)
			}
			c.set(l)
			for when, s := range map[string]*Store{"stored": l.s, "on a host that has nothing": fresh} {
				_, err := l.prepare(s, "alice", "first")
				if err == nil {
					t.Fatalf("%s: it boots", when)
				}
				wantRefused(t, err, c.text)
			}
			fresh.mu.Lock()
			defer fresh.mu.Unlock()
			if len(fresh.images) != 0 {
				t.Errorf("stored %v", fresh.images)
			}
		})
	}
}

// TestDeltaNot: when a snapshot is self-contained although the option is on.
func TestDeltaNot(t *testing.T) {
	for _, c := range []struct {
		name   string
		set    func(l *deltaLab)
		change func(l *deltaLab, r *novalet.SnapshotRequest)
	}{
		{"asked for", nil, func(_ *deltaLab, r *novalet.SnapshotRequest) { r.Whole = true }},
		{"a base that is gone", nil, func(l *deltaLab, _ *novalet.SnapshotRequest) { l.g.remove("base") }},
		{"a base that has changed", nil, func(l *deltaLab, _ *novalet.SnapshotRequest) {
			l.g.set("base", "os_hash_value", strings.Repeat("ab", 64))
		}},
		{"a base of somebody else's", func(l *deltaLab) { l.g.set("base", "owner", "project-b"); l.g.set("base", "visibility", "shared") }, nil},
		{"a base without a strong digest", func(l *deltaLab) { l.g.set("base", "os_hash_value", ""); l.g.set("base", "os_hash_algo", "") }, nil},
		{"a request without a token", nil, func(_ *deltaLab, r *novalet.SnapshotRequest) { r.Context = novalet.RequestContext{} }},
		{"a root on other layers", nil, func(_ *deltaLab, r *novalet.SnapshotRequest) { r.Root.Layers = r.Root.Layers[:1] }},
		{"a base that the store has forgotten", nil, func(l *deltaLab, _ *novalet.SnapshotRequest) {
			l.s.mu.Lock()
			defer l.s.mu.Unlock()
			delete(l.s.images, "base")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newDeltaLab(t, nil)
			if c.set != nil {
				c.set(l)
			}
			l.snap(l.s, "base", "first", func(r *novalet.SnapshotRequest) {
				if c.change != nil {
					c.change(l, r)
				}
			})
			if n, on := l.size("first"); n < deltaBaseSize || on != "" {
				t.Errorf("it takes %d bytes and is said to lie on %v", n, on)
			}
		})
	}
	t.Run("too many below", func(t *testing.T) {
		l := newDeltaLab(t, nil)
		from := "base"
		for i := range maxBases + 1 {
			to := fmt.Sprint("snap-", i)
			l.snap(l.s, from, to, nil)
			if n, _ := l.size(to); n > deltaBaseSize != (i == maxBases) {
				t.Errorf("snapshot %d takes %d bytes", i, n)
			}
			from = to
		}
		if _, err := l.prepare(l.store(nil), "alice", from); err != nil {
			t.Error(err)
		}
	})
}

// TestDeltaHostile: documents that no snapshot has.
func TestDeltaHostile(t *testing.T) {
	l := newDeltaLab(t, nil)
	l.snap(l.s, "base", "first", nil)
	rec, _ := l.g.get("base")
	good := map[string]any{"version": 1, "image": "base", "os_hash_algo": rec["os_hash_algo"], "os_hash_value": rec["os_hash_value"]}
	top := makeTar(t, member{name: "top", data: "x"})
	cfg, err := json.Marshal(map[string]any{"os": "linux", "config": map[string]any{"Cmd": []string{"/x"}},
		"rootfs": map[string]any{"diff_ids": []string{"sha256:" + strings.Repeat("0", 64), "sha256:" + hexSum(top)}}})
	if err != nil {
		t.Fatal(err)
	}
	archive := func(doc []byte) []byte {
		return makeTar(t, member{name: hexSum(top) + "/layer.tar", data: string(top)}, member{name: "c.json", data: string(cfg)},
			member{name: layer.DeltaName, data: string(doc)},
			member{name: "manifest.json", data: `[{"Config":"c.json","Layers":["` + hexSum(top) + `/layer.tar"]}]`})
	}
	for i, c := range []struct {
		change map[string]any
		text   string
	}{
		{nil, ""},
		{map[string]any{"version": 0}, "does not name a base"},
		{map[string]any{"version": 2}, "newer than what this cloud reads"},
		{map[string]any{"image": ""}, "does not name a base"},
		{map[string]any{"image": "../../base"}, "does not name its base"},
		{map[string]any{"image": 3}, "is damaged"},
		{map[string]any{"os_hash_algo": "md5", "os_hash_value": strings.Repeat("0", 32)}, "does not name a base"},
		{map[string]any{"os_hash_value": ""}, "does not name a base"},
		{map[string]any{"os_hash_value": strings.Repeat("0", 128)}, "whose data has changed"},
		// Itself: that would take its own digest.
		{map[string]any{"image": "hostile-9"}, "whose data has changed"},
		{map[string]any{"image": "nowhere"}, "is gone or may not be read"},
	} {
		doc := maps.Clone(good)
		maps.Copy(doc, c.change)
		b, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		id := fmt.Sprint("hostile-", i)
		l.g.add(id, "project-a", archive(b), nil)
		img, err := l.prepare(l.s, "alice", id)
		switch {
		case c.text == "" && err != nil:
			t.Errorf("%s: %v", b, err)
		case c.text == "":
			l.sameAs(img, "one", "two", "top")
		case err == nil:
			t.Errorf("%s boots", b)
		default:
			wantRefused(t, err, c.text)
		}
	}
	// A chain longer than any that is made here.
	below, sum := "base", rec["os_hash_value"]
	for i := range maxBases + 2 {
		b, err := json.Marshal(map[string]any{"version": 1, "image": below, "os_hash_algo": "sha512", "os_hash_value": sum})
		if err != nil {
			t.Fatal(err)
		}
		below = fmt.Sprint("chain-", i)
		l.g.add(below, "project-a", archive(b), nil)
		rec, _ := l.g.get(below)
		sum = rec["os_hash_value"]
	}
	_, err = l.prepare(l.store(func(o *Options) { o.Concurrency = 1 }), "alice", below)
	wantRefused(t, err, "more than 8 images below it")
}

// TestDeltaConcurrent: deltas that wait for what they lie on do not take the places that it needs.
func TestDeltaConcurrent(t *testing.T) {
	l := newDeltaLab(t, nil)
	for i := range 6 {
		l.snap(l.s, "base", fmt.Sprint("snap-", i), nil)
	}
	s := l.store(func(o *Options) { o.Concurrency = 2 })
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			if _, err := l.prepare(s, "alice", fmt.Sprint("snap-", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
