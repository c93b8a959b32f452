package main

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge"
)

// countingGlance counts the bytes of images that are read from a folder.
type countingGlance struct {
	*glancebridge.FileGlance
	n atomic.Int64
}

type countingBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}

func (g *countingGlance) Download(ctx context.Context, rc novalet.RequestContext, id string, off int64) (io.ReadCloser, int64, error) {
	body, start, err := g.FileGlance.Download(ctx, rc, id, off)
	if err != nil {
		return nil, 0, err
	}
	return &countingBody{body, &g.n}, start, nil
}

func (g *countingGlance) Range(ctx context.Context, rc novalet.RequestContext, id string, off, n int64) (io.ReadCloser, error) {
	body, err := g.FileGlance.Range(ctx, rc, id, off, n)
	if err != nil {
		return nil, err
	}
	return &countingBody{body, &g.n}, nil
}

// delta fetches an image that shares all but its top layer, of 10 MiB, with one that is stored, and counts the bytes.
func (b *bench) delta(tarFile string) (err error) {
	top := filepath.Join(b.work, "top.tar")
	if err := writeTop(top, 10<<20); err != nil {
		return err
	}
	layers, ids := []string{tarFile, top}, []string{"bench-base", "bench-derived"}
	for i, id := range ids {
		file := filepath.Join(b.work, id)
		if err := writeArchive(file, layers[:i+1]); err != nil {
			return err
		}
		if err := b.add(id, file, "raw"); err != nil {
			return err
		}
	}
	st, err := os.Stat(top)
	if err != nil {
		return err
	}
	dir := filepath.Join(b.work, "store")
	g := &countingGlance{FileGlance: glancebridge.NewFileGlance(b.images)}
	s, err := glancebridge.Open(glancebridge.Options{Dir: dir, Glance: g})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close(), os.RemoveAll(dir)) }()
	for i, id := range ids {
		g.n.Store(0)
		if _, err := s.Prepare(context.Background(), &novalet.ImageRequest{Context: novalet.RequestContext{AuthToken: "bench"},
			ImageID: id, InstanceUUID: fmt.Sprint("bench-", i)}); err != nil {
			return err
		}
	}
	b.r.Add("delta_bytes", "bytes", "the missing layer", 1.05, [][2]float64{{float64(g.n.Load()), float64(st.Size())}})
	return nil
}

// containerFormat is docker for the images that may be fetched in part.
func containerFormat(id string) string {
	if id == "bench-base" || id == "bench-derived" {
		return "docker"
	}
	return "bare"
}

// writeTop makes a layer of one file that does not compress.
func writeTop(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	if err := w.WriteHeader(&tar.Header{Name: "opt/app", Mode: 0o755, Size: size, Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	if _, err := io.CopyN(w, rand.NewChaCha8([32]byte{1}), size); err != nil {
		return err
	}
	return errors.Join(w.Close(), f.Close())
}

// writeArchive makes a docker archive of layers.
func writeArchive(path string, layers []string) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	w := tar.NewWriter(out)
	var ids, names []string
	for i, l := range layers {
		f, err := os.Open(l)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		h := sha256.New()
		names = append(names, fmt.Sprintf("%064x/layer.tar", i))
		if err := w.WriteHeader(&tar.Header{Name: names[i], Mode: 0o644, Size: st.Size(), Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		if _, err := io.Copy(w, io.TeeReader(f, h)); err != nil {
			return err
		}
		ids = append(ids, "sha256:"+hex.EncodeToString(h.Sum(nil)))
	}
	type object map[string]any
	for _, d := range []struct {
		name string
		doc  any
	}{
		{"config.json", object{"os": "linux", "config": object{"Cmd": []string{"/sbin/init"}}, "rootfs": object{"diff_ids": ids}}},
		{"manifest.json", []object{{"Config": "config.json", "Layers": names}}},
	} {
		b, err := json.Marshal(d.doc)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: d.name, Mode: 0o644, Size: int64(len(b)), Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), out.Close())
}
