package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
	"github.com/novalet/novalet/internal/statefile"
)

// atStage is told of each step that a crash may come between; tests make one there.
var atStage = func(string) {}

// publish moves the layers of an image that was read whole and verified into the store, each by one rename, then
// writes the image's record. Layers that were stored meanwhile by somebody else win over ours.
func (s *Store) publish(ctx context.Context, rec *ImageRecord, res *layer.Result, applied *layer.ApplyResult, base *imageRecord, gaps []layer.IndexedLayer, signer []byte, work string) error {
	if err := checkMachine(rec.ID, s.o.Arch, res); err != nil {
		return err
	}
	byIndex := map[int]*layer.Applied{}
	for i := range applied.Layers {
		byIndex[applied.Layers[i].Index] = &applied.Layers[i]
	}
	streamed := map[int]*layer.StreamLayer{}
	for i := range res.Layers {
		streamed[res.Layers[i].Index] = &res.Layers[i]
	}
	img := &imageRecord{Version: recordVersion, ID: rec.ID, Name: rec.Name, Format: res.Format, Config: res.Config,
		HasConfig: res.HasConfig, HashAlgo: rec.HashAlgo, HashValue: rec.HashValue, Download: rec.Size,
		MinDiskGB: rec.MinDiskGB, MinRAMMB: rec.MinRAMMB, VirtualSize: max(rec.VirtualSize, res.VirtualSize),
		Signed: signer != nil, Signer: signer, Owner: rec.Owner, Visibility: rec.Visibility, Properties: rec.Properties, LastUsed: time.Now().UTC(), Created: time.Now().UTC()}
	if base != nil {
		img.Version = deltaVersion
		img.Bases = append([]baseRef{{base.ID, base.HashAlgo, base.HashValue}}, base.Bases...)
		img.Layers, img.Joined = slices.Clone(base.Layers), slices.Clone(base.Layers)
	}
	var trees []layerTree
	for _, i := range res.Order {
		p, a := streamed[i], byIndex[i]
		if p == nil || a == nil || !validLayerID(p.ID) {
			return fmt.Errorf("publish image: the helpers disagree about layer %d", i)
		}
		t := layerTree{p: p, a: a, dir: filepath.Join(work, "layers", strconv.Itoa(i))}
		if p.Trusted {
			// The parser may have been taken over by what it read: what was not fetched is what was decided here.
			if !slices.ContainsFunc(gaps, func(g layer.IndexedLayer) bool { return g.DiffID == p.ID }) {
				return fmt.Errorf("publish image: layer %s was neither read nor allowed", p.ID)
			}
			img.Joined = append(img.Joined, p.ID)
		}
		if p.Skipped {
			if !s.has(p.ID) {
				return fmt.Errorf("publish image: layer %s is gone", p.ID)
			}
			t.stored = filepath.Join(s.layerDir(p.ID), "fs")
		}
		trees = append(trees, t)
	}
	if base != nil && len(base.Layers)+len(trees) > maxStack {
		return baseRefused(rec.ID, fmt.Sprintf("the image is a delta and has more than %d layers with those below it; boot a self-contained snapshot instead", maxStack), nil)
	}
	if len(trees) > maxStack {
		id, err := s.squash(ctx, rec.ID, trees[:len(trees)-keepAbove], work)
		if err != nil {
			return err
		}
		img.Layers, trees = []string{id}, trees[len(trees)-keepAbove:]
	}
	for _, t := range trees {
		a, tree := t.a, t.dir
		m := s.layerMetaOf(t.p, a)
		if len(a.Links) > 0 {
			// Copies of files below make the tree depend on what is below.
			if err := s.borrow(m, tree, a.Links, img.Layers); err != nil {
				return refusedOr(rec.ID, err)
			}
		}
		if err := s.publishLayer(m, tree, a.Opaque, work); err != nil {
			return err
		}
		atStage("layer published")
		img.Layers = append(img.Layers, m.ID)
	}
	img.Layers = once(img.Layers)
	s.mu.Lock()
	defer s.mu.Unlock()
	if base != nil && s.imageLocked(img) == nil {
		return fmt.Errorf("publish image: a layer of the image that it is a delta of is gone")
	}
	img.Init = s.findInit(img.Layers)
	if old := s.images[img.ID]; !img.Signed && old != nil && old.Signed && old.HashValue != "" && old.HashAlgo == img.HashAlgo && old.HashValue == img.HashValue {
		// Fetched beside this, of the same data.
		img.Signed, img.Signer = true, old.Signer
	}
	atStage("before record")
	if err := s.writeRecord(s.path("images", img.ID+".json"), img); err != nil {
		return err
	}
	atStage("record written")
	s.images[img.ID] = img
	s.syncSoonLocked()
	return nil
}

// publishLayer stores one tree under the name of its meta.
func (s *Store) publishLayer(m *layerMeta, tree string, opaque []string, work string) error {
	if s.has(m.ID) {
		return nil
	}
	out := filepath.Join(work, "out-"+strings.TrimPrefix(m.ID, "sha256:"))
	if err := os.Mkdir(out, 0o700); err != nil {
		return fmt.Errorf("publish layer: %w", err)
	}
	if err := markOpaque(tree, opaque, s.o.Unconfined); err != nil {
		return err
	}
	if err := os.Rename(tree, filepath.Join(out, "fs")); err != nil {
		return fmt.Errorf("publish layer: %w", err)
	}
	m.Written = time.Now().UTC()
	if err := writeJSON(filepath.Join(out, "meta.json"), m); err != nil {
		return err
	}
	atStage("layer complete")
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.layers[m.ID]; old != nil && old.corrupt != "" {
		return s.replaceLocked(m, out)
	}
	err := unix.Renameat2(unix.AT_FDCWD, out, unix.AT_FDCWD, s.layerDir(m.ID), unix.RENAME_NOREPLACE)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("publish layer: %w", err)
	}
	if err == nil {
		s.layers[m.ID] = m
		s.dirty = true
	}
	if s.layers[m.ID] == nil {
		return fmt.Errorf("publish layer: %s is in the way", m.ID)
	}
	return nil
}

// once leaves the topmost of equal layers: the kernel refuses a stack that holds one twice (ELOOP, ovl_setup_trap in
// fs/overlayfs/super.c). What the lower one adds, deletes and hides, the upper one does too.
func once(ids []string) []string {
	var out []string
	for i, id := range ids {
		if !slices.Contains(ids[i+1:], id) {
			out = append(out, id)
		}
	}
	return out
}

func validLayerID(id string) bool {
	hex, ok := strings.CutPrefix(id, "sha256:")
	return ok && len(hex) == 64 && strings.Trim(hex, "0123456789abcdef") == ""
}

// markOpaque sets overlayfs's mark on directories that hide what is below. The paths come from the applier, so they
// are opened without following anything.
func markOpaque(tree string, names []string, unconfined bool) error {
	if len(names) == 0 {
		return nil
	}
	root, err := unix.Open(tree, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open layer: %w", err)
	}
	defer unix.Close(root)
	attr := "trusted.overlay.opaque"
	if unconfined {
		attr = "user.overlay.opaque"
	}
	for _, n := range names {
		if n == "" {
			n = "."
		}
		fd, err := openBeneath(root, n, unix.O_RDONLY|unix.O_DIRECTORY)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue // something else took its place later in the layer
		}
		if err != nil {
			return fmt.Errorf("open opaque directory: %w", err)
		}
		err = unix.Fsetxattr(fd, attr, []byte("y"), 0)
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("mark opaque directory: %w", err)
		}
	}
	return nil
}

// openBeneath opens a path below an open directory without following symlinks or leaving the file system.
func openBeneath(root int, name string, flags uint64) (int, error) {
	for {
		fd, err := unix.Openat2(root, name, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC | unix.O_NOFOLLOW,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV})
		if err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
}

func refusedOr(imageID string, err error) error {
	var r *layer.RefusedError
	if errors.As(err, &r) {
		return refused(imageID, r.Text)
	}
	return err
}

// findInit returns the path of a machine's init in a stack of layers, "" for none. s.mu is held.
func (s *Store) findInit(ids []string) string {
	for _, p := range layer.InitPaths {
		for _, id := range ids {
			if slices.Contains(s.layers[id].Inits, p) {
				return "/" + p
			}
		}
	}
	return ""
}

// The ELF machine numbers of the architectures that Go and OCI name (elf.h).
var elfMachines = map[string]uint16{"386": 3, "arm": 40, "amd64": 62, "arm64": 183, "ppc64le": 21, "s390x": 22, "riscv64": 243}

// checkMachine refuses a tree whose programs are all for another machine, for images that do not say what they are
// for.
func checkMachine(imageID, arch string, res *layer.Result) error {
	want, ok := elfMachines[arch]
	if !ok {
		return nil
	}
	var other uint16
	most := 0
	for _, i := range res.Order {
		for _, l := range res.Layers {
			if l.Index != i {
				continue
			}
			for m, n := range l.Machines {
				if m == want {
					return nil
				}
				if n > most {
					other, most = m, n
				}
			}
		}
	}
	if most == 0 {
		return nil
	}
	name := fmt.Sprintf("machine type %d", other)
	for a, m := range elfMachines {
		if m == other {
			name = a
		}
	}
	return refused(imageID, fmt.Sprintf("the image's programs are for %s, this cloud's hosts are %s; upload it for that architecture", name, arch))
}

func removeRecord(path string) error { return statefile.Remove(path, false) }
