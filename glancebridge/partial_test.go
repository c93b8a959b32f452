package glancebridge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge/layer"
)

// bigLayer is a layer of random data with one file of a known name.
func bigLayer(t *testing.T, seed uint64, name string, size int) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(rnd.Uint32())
	}
	return makeTar(t, member{name: name, data: string(data), mode: 0o644})
}

// ociLayers is an OCI layout, its layers compressed when asked for, index.json last as skopeo writes it.
func ociLayers(t *testing.T, compressed bool, layers ...[]byte) []byte {
	t.Helper()
	type object map[string]any
	var members []member
	blob := func(b []byte) object {
		members = append(members, member{name: "blobs/sha256/" + hexSum(b), data: string(b)})
		return object{"digest": "sha256:" + hexSum(b), "size": len(b), "mediaType": "application/x"}
	}
	var ids []string
	var descs []object
	for _, l := range layers {
		ids = append(ids, "sha256:"+hexSum(l))
		if compressed {
			l = gz(t, l)
		}
		descs = append(descs, blob(l))
	}
	enc := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	cfg := blob(enc(object{"os": "linux", "architecture": "amd64", "config": object{"Cmd": []string{"/x"}}, "rootfs": object{"diff_ids": ids}}))
	man := blob(enc(object{"schemaVersion": 2, "config": cfg, "layers": descs}))
	members = append(members, member{name: "oci-layout", data: "{}"},
		member{name: "index.json", data: string(enc(object{"schemaVersion": 2, "manifests": []object{man}}))})
	return makeTar(t, members...)
}

// partialLab is a service with two projects, and a store.
func partialLab(t *testing.T, change func(*Options)) (*liveGlance, *Store, func(token, id string) (int64, error)) {
	g := newLiveGlance(t)
	g.tokens["alice"], g.tokens["bob"] = "project-a", "project-b"
	s := openStore(t, "", func(o *Options) {
		o.Glance = NewGlance(plainCloud{g.URL})
		change(o)
	})
	return g, s, func(token, id string) (int64, error) {
		g.mu.Lock()
		before := g.served
		g.mu.Unlock()
		_, err := s.Prepare(t.Context(), &novalet.ImageRequest{Context: as(token), ImageID: id, InstanceUUID: "inst-" + id})
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.served - before, err
	}
}

// TestPartialFetch: of an image that shares all but its top layer with a stored one, little more than that layer is
// fetched.
func TestPartialFetch(t *testing.T) {
	const small, big = 600_000, 3 << 20
	cmd := map[string]any{"Cmd": []string{"/x"}}
	bothWays(t, func(t *testing.T, change func(*Options)) {
		var base [][]byte
		for i := range 12 {
			base = append(base, bigLayer(t, uint64(i), fmt.Sprint("base-", i), small))
		}
		top := bigLayer(t, 99, "top", big)
		for _, c := range []struct {
			name string
			make func(layers ...[]byte) []byte
		}{
			{"docker", func(l ...[]byte) []byte { return dockerArchive(t, cmd, l...) }},
			{"oci", func(l ...[]byte) []byte { return ociLayers(t, false, l...) }},
			{"oci, compressed", func(l ...[]byte) []byte { return ociLayers(t, true, l...) }},
		} {
			t.Run(c.name, func(t *testing.T) {
				g, s, prepare := partialLab(t, change)
				g.add("base", "project-a", c.make(base...), nil)
				g.add("derived", "project-a", c.make(append(base[:12:12], top)...), nil)
				if n, err := prepare("alice", "base"); err != nil || n < 12*small {
					t.Fatalf("the base took %d bytes, %v", n, err)
				}
				n, err := prepare("alice", "derived")
				if err != nil {
					t.Fatal(err)
				}
				if limit := int64(len(top)) * 105 / 100; n > limit || n < big {
					t.Errorf("fetched %d bytes for a layer of %d; at most %d", n, len(top), limit)
				}
				s.mu.Lock()
				rec := s.images["derived"]
				img := s.imageLocked(rec)
				s.mu.Unlock()
				if len(img.Layers) != 13 || len(rec.Joined) != 12 || img.Config.Cmd[0] != "/x" {
					t.Fatalf("got %+v, joined %v", img, rec.Joined)
				}
				for i, l := range img.Layers {
					want, size := fmt.Sprint("base-", i), int64(small)
					if i == 12 {
						want, size = "top", big
					}
					if st, err := os.Stat(filepath.Join(l.Path, want)); err != nil || st.Size() != size {
						t.Errorf("layer %d: %v, %v", i, st, err)
					}
				}
			})
		}
	})
}

// TestPartialCut: cut connections cost a further request each, and not the layers that are left out.
func TestPartialCut(t *testing.T) {
	const size = 600_000
	cmd := map[string]any{"Cmd": []string{"/x"}}
	base, top := bigLayer(t, 1, "base", 4*size), bigLayer(t, 2, "top", size)
	g, s, prepare := partialLab(t, func(*Options) {})
	g.add("base", "project-a", dockerArchive(t, cmd, base), nil)
	g.add("derived", "project-a", dockerArchive(t, cmd, base, top), nil)
	if _, err := prepare("alice", "base"); err != nil {
		t.Fatal(err)
	}
	g.cut = func(n int) int {
		if n%2 == 0 {
			return -1
		}
		return 3000
	}
	n, err := prepare("alice", "derived")
	if err != nil || n < size || n > 2*size {
		t.Errorf("fetched %d bytes, %v", n, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if rec := s.images["derived"]; rec == nil || len(rec.Joined) != 1 {
		t.Errorf("recorded %+v", rec)
	}
}

// TestPartialWhole: when parts cannot or must not be fetched, the whole is.
func TestPartialWhole(t *testing.T) {
	const size = 600_000
	cmd := map[string]any{"Cmd": []string{"/x"}}
	base, top := bigLayer(t, 1, "base", size), bigLayer(t, 2, "top", size)
	archive := dockerArchive(t, cmd, base, top)
	for _, c := range []struct {
		name   string
		change func(o *Options)
		set    func(g *liveGlance)
	}{
		{"members that do not come", func(*Options) {}, func(g *liveGlance) {
			g.hang = func(r *http.Request) bool { return r.Header.Get("Range") != "" }
		}},
		{"a store without ranges", func(*Options) {}, func(g *liveGlance) { g.noRange = true }},
		{"the operator's will", func(o *Options) { o.WholeImages = true }, func(*liveGlance) {}},
		{"a compressed archive", func(*Options) {}, func(g *liveGlance) {
			g.replace("derived", gz(t, archive))
		}},
		{"a digest that is wrong", func(*Options) {}, func(g *liveGlance) {
			// The first attempt fails over the damaged top layer; what counts is what the whole says.
			b := append([]byte{}, archive...)
			b[len(base)+size] ^= 1
			g.replace("derived", b)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, s, prepare := partialLab(t, c.change)
			if c.name == "members that do not come" {
				s.look = 50 * time.Millisecond
			}
			g.add("base", "project-a", dockerArchive(t, cmd, base), nil)
			g.add("derived", "project-a", archive, nil)
			if _, err := prepare("alice", "base"); err != nil {
				t.Fatal(err)
			}
			c.set(g)
			n, err := prepare("alice", "derived")
			if c.name == "a digest that is wrong" {
				wantRefused(t, err, "does not match the digest in its config")
			} else if err != nil {
				t.Fatal(err)
			}
			if _, data := g.get("derived"); n < int64(len(data)) {
				t.Errorf("fetched %d of %d bytes", n, len(data))
			}
		})
	}
}

// TestPartialIsNoRight: bob names a layer of alice's private image by its digest, in archives that do not hold it.
func TestPartialIsNoRight(t *testing.T) {
	const size = 600_000
	cmd := map[string]any{"Cmd": []string{"/x"}}
	secret := bigLayer(t, 1, "secret", size)
	hex := hexSum(secret)
	cfg, err := json.Marshal(map[string]any{"os": "linux", "config": cmd, "rootfs": map[string]any{"diff_ids": []string{"sha256:" + hex}}})
	if err != nil {
		t.Fatal(err)
	}
	// Of the right size, name and place, and all of it something else.
	forged := makeTar(t, member{name: "blobs/sha256/" + hex, data: string(bigLayer(t, 2, "secret", size))},
		member{name: "c.json", data: string(cfg)}, member{name: "manifest.json", data: `[{"Config":"c.json","Layers":["blobs/sha256/` + hex + `"]}]`})
	for _, c := range []struct {
		name  string
		set   func(g *liveGlance)
		token string
		ok    bool
	}{
		{"a stranger", func(*liveGlance) {}, "bob", false},
		{"a stranger whose request comes from an administrator", func(*liveGlance) {}, "service", false},
		{"without a token", func(*liveGlance) {}, "", false},
		{"with one that has run out", func(*liveGlance) {}, "expired", false},
		{"the owner of the layer with an image of the stranger's", func(g *liveGlance) { g.set("forged", "visibility", "community") }, "alice", false},
		{"a stranger with an image of the owner's", func(g *liveGlance) {
			g.set("forged", "owner", "project-a")
			g.set("forged", "visibility", "community")
		}, "bob", false},
		{"the owner, whose token has run out", func(g *liveGlance) { g.set("forged", "owner", "project-a") }, "expired", false},
		{"an image that is gone", func(g *liveGlance) {
			g.set("forged", "owner", "project-a")
			g.remove("private")
		}, "alice", false},
		// Whoever may read the layer's image may have the layer, whatever his own archive holds.
		{"open to all", func(*liveGlance) {}, "bob", true},
		{"the owner", func(g *liveGlance) { g.set("forged", "owner", "project-a") }, "alice", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, s, prepare := partialLab(t, func(*Options) {})
			g.add("private", "project-a", dockerArchive(t, cmd, secret), nil)
			if c.name == "open to all" {
				g.set("private", "visibility", "public")
			}
			g.add("forged", "project-b", forged, nil)
			if _, err := prepare("alice", "private"); err != nil {
				t.Fatal(err)
			}
			c.set(g)
			n, err := prepare(c.token, "forged")
			if c.ok {
				if err != nil || n > size/2 {
					t.Fatalf("fetched %d bytes, %v", n, err)
				}
				// What joined that way is no proof for others.
				g.remove("private")
				g.set("forged", "visibility", "public")
				g.mu.Lock()
				g.tokens["carol"] = "project-c"
				g.mu.Unlock()
				g.add("forged-too", "project-c", forged, nil)
				_, err = prepare("carol", "forged-too")
				wantRefused(t, err, "does not match its digest")
				return
			}
			wantRefused(t, err, "does not match its digest")
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.images["forged"] != nil {
				t.Error("the forged image is stored")
			}
		})
	}
}

// TestGapReader: what is left out reads as zeros, the rest as it is.
func TestGapReader(t *testing.T) {
	whole := []byte("0123456789abcdefghij")
	p := &partial{size: int64(len(whole))}
	p.gaps = append(p.gaps, layer.IndexedLayer{Off: 3, Size: 4}, layer.IndexedLayer{Off: 7, Size: 2}, layer.IndexedLayer{Off: 15, Size: 5})
	p.open = func(from, to int64) *download {
		d := &download{ctx: t.Context(), rec: &ImageRecord{}, limit: to, tries: 1, idle: 1 << 40, log: func(string, ...any) {}}
		d.off.Store(from)
		d.openAt = func(_ context.Context, off int64) (io.ReadCloser, int64, error) {
			return io.NopCloser(bytes.NewReader(whole[off:to])), off, nil
		}
		return d
	}
	if b, err := p.answer(9, 3); err != nil || string(b) != "9ab" {
		t.Fatalf("answer %q, %v", b, err)
	}
	got, err := io.ReadAll(&gapReader{r: p, gaps: p.gaps})
	if want := "012\x00\x00\x00\x00\x00\x009abcde\x00\x00\x00\x00\x00"; err != nil || string(got) != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if p.fetched() != 9 || !errors.Is(p.failure(), io.EOF) {
		t.Errorf("fetched %d, %v", p.fetched(), p.failure())
	}
}
