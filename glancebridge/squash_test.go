package glancebridge

import (
	"archive/tar"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// randomLayer is a layer over few names, so that layers replace, delete and hide what others have.
func randomLayer(t *testing.T, rnd *rand.Rand, n int) []byte {
	names := []string{"a", "b", "c", "d", "e"}
	if n >= 460 {
		names = []string{"p", "q"} // leaves to be seen what the squashed ones came to
	}
	entries := map[string]member{}
	dirs := []string{""}
	for range 1 + rnd.IntN(4) {
		d := path.Join(dirs[rnd.IntN(len(dirs))], names[rnd.IntN(len(names))])
		if _, ok := entries[d]; ok {
			continue
		}
		m := member{name: d + "/", typ: tar.TypeDir, mode: []int64{0o755, 0o700, 0o2775, 0o1777}[rnd.IntN(4)], uid: rnd.IntN(3) * 10}
		if rnd.IntN(3) == 0 {
			m.pax = map[string]string{"SCHILY.xattr.user.of": fmt.Sprint(n)}
		}
		entries[d] = m
		dirs = append(dirs, d)
	}
	for _, d := range dirs {
		if d != "" && rnd.IntN(3) == 0 {
			entries[path.Join(d, ".wh..wh..opq")] = member{name: path.Join(d, ".wh..wh..opq")}
		}
		for range rnd.IntN(3) {
			p := path.Join(d, names[rnd.IntN(len(names))])
			if _, ok := entries[p]; ok {
				continue
			}
			switch rnd.IntN(5) {
			case 0:
				w := path.Join(d, ".wh."+path.Base(p))
				entries[p], entries[w] = member{}, member{name: w}
			case 1:
				entries[p] = member{name: p, typ: tar.TypeSymlink, link: names[rnd.IntN(len(names))], mode: 0o777}
			default:
				m := member{name: p, data: fmt.Sprint(n, p), mode: []int64{0o644, 0o4755}[rnd.IntN(2)], uid: rnd.IntN(3)}
				entries[p] = m
				if rnd.IntN(4) == 0 {
					entries[p+"-link"] = member{name: p + "-link", typ: tar.TypeLink, link: p}
				}
			}
		}
	}
	var list []member
	for _, k := range slices.Sorted(maps.Keys(entries)) {
		if entries[k].name != "" {
			list = append(list, entries[k])
		}
	}
	if n%100 == 50 {
		// A hard link to a file of the base, and one to that.
		list = append(list, member{name: fmt.Sprintf("anchor-%d", n), typ: tar.TypeLink, link: "anchor"},
			member{name: fmt.Sprintf("anchor-%d-b", n), typ: tar.TypeLink, link: fmt.Sprintf("anchor-%d", n)})
	}
	if n == 0 {
		list = append(list, member{name: "anchor", data: "content", mode: 0o4711, uid: 5},
			member{name: "null", typ: tar.TypeChar, dev: [2]int64{1, 3}})
	}
	return makeTar(t, list...)
}

func plainNodes(t *testing.T, dir string) map[string]node {
	tree := readTree(t, dir)
	delete(tree, ".")
	for k, n := range tree {
		n.Peers = "" // names that share an inode across layers are not the same in a stack
		tree[k] = n
	}
	return tree
}

// TestManyLayers: an image of more layers than the kernel stacks looks as the stack would, here one overlay over what another shows.
func TestManyLayers(t *testing.T) {
	hosttest.RequireRoot(t)
	const count, half = 600, 300
	rnd := rand.New(rand.NewPCG(1, 2))
	var layers [][]byte
	for n := range count {
		layers = append(layers, randomLayer(t, rnd, n))
	}
	cfg := map[string]any{"Cmd": []string{"/x"}}
	images := t.TempDir()
	s := openStore(t, images, func(o *Options) { o.Unconfined = false })
	get := func(data []byte) *novalet.Image {
		t.Helper()
		img, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: addImage(t, images, data, nil), InstanceUUID: "inst-1"})
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	// The anchor must be there for the links of the upper half too.
	lower := get(dockerArchive(t, cfg, layers[:half]...))
	upper := get(dockerArchive(t, cfg, append([][]byte{layers[0]}, layers[half:]...)...))
	if len(lower.Layers) < half/2 || len(upper.Layers) < half/2 {
		t.Fatalf("%d and %d layers", len(lower.Layers), len(upper.Layers))
	}
	// A copy, since the kernel bounds how many file systems lie on one another.
	below := filepath.Join(t.TempDir(), "below")
	// It complains of deletions that have nothing to delete: overlayfs lists those.
	_ = exec.Command("cp", "-a", overlay(t, lower.Layers), below).Run()
	want := plainNodes(t, overlay(t, append([]novalet.Layer{{Path: below}}, upper.Layers[1:]...)))
	archive := dockerArchive(t, cfg, layers...)
	// Its layers are all stored by now, so their trees come from the store.
	all := get(archive)
	if n := len(all.Layers); n > keepAbove+1 || n < keepAbove/2 {
		t.Fatalf("%d layers", len(all.Layers))
	}
	sameTree(t, plainNodes(t, overlay(t, all.Layers)), want)
	if len(want) < 20 {
		t.Errorf("the layers come to %d files only", len(want))
	}
	// And with nothing stored, from the archive alone; the name is the same.
	s = openStore(t, images, func(o *Options) { o.Unconfined = false })
	fresh := get(archive)
	if fresh.Layers[0].DiffID != all.Layers[0].DiffID {
		t.Errorf("the squashed layer is %s, was %s", fresh.Layers[0].DiffID, all.Layers[0].DiffID)
	}
	sameTree(t, plainNodes(t, overlay(t, fresh.Layers)), want)
	if l, err := os.ReadDir(s.path("layers")); err != nil || len(l) != len(fresh.Layers) {
		t.Errorf("the store holds %d layers, %v", len(l), err)
	}
	s.mu.Lock()
	m := s.layers[fresh.Layers[0].DiffID]
	s.mu.Unlock()
	if len(m.Devices) != 1 || m.Data == 0 || m.Bytes != m.Data {
		t.Errorf("recorded %+v", m)
	}
}

// TestLayerTwice: builders write the empty layer, and others, several times in one image.
func TestLayerTwice(t *testing.T) {
	hosttest.RequireRoot(t)
	empty := makeTar(t)
	one := makeTar(t, member{name: "d/", typ: tar.TypeDir}, member{name: "d/x", data: "x"}, member{name: "d/y", data: "y"}, member{name: "d/.wh.gone"})
	two := makeTar(t, member{name: "d/", typ: tar.TypeDir}, member{name: "d/.wh.x"}, member{name: "d/gone", data: "back"}, member{name: "link", typ: tar.TypeLink, link: "d/y"})
	img, err := prepare(t, dockerArchive(t, map[string]any{"Cmd": []string{"/x"}}, empty, one, empty, two, empty, one, empty),
		func(o *Options) { o.Unconfined = false }, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(img.Layers) != 3 {
		t.Errorf("%d layers", len(img.Layers))
	}
	tree := readTree(t, overlay(t, img.Layers))
	delete(tree, ".")
	if names := slices.Sorted(maps.Keys(tree)); !slices.Equal(names, []string{"d", "d/x", "d/y", "link"}) {
		t.Errorf("the root holds %v", names)
	}
}

// TestSquashRefusesBadLinks: what the stack would refuse, the squashed layer does too.
func TestSquashRefusesBadLinks(t *testing.T) {
	var layers [][]byte
	for n := range maxStack + 1 {
		layers = append(layers, makeTar(t, member{name: fmt.Sprintf("f%d", n), data: "x"}))
	}
	layers[3] = makeTar(t, member{name: "link", typ: tar.TypeLink, link: "missing"})
	_, err := prepare(t, dockerArchive(t, map[string]any{"Cmd": []string{"/x"}}, layers...), nil, nil)
	wantRefused(t, err, "hard link to a file it does not hold")
	layers[3] = makeTar(t, member{name: "link", typ: tar.TypeLink, link: "f2"})
	img, err := prepare(t, dockerArchive(t, map[string]any{"Cmd": []string{"/x"}}, layers...), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(img.Layers[0].Path, "link")); err != nil || string(b) != "x" {
		t.Errorf("the link reads %q, %v", b, err)
	}
}
