package glancebridge

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
)

const (
	// maxStack is how many layers the kernel stacks below one writable directory (OVL_MAX_STACK, fs/overlayfs/params.h).
	maxStack = 500
	// keepAbove is how many layers are left as they are above those that are made one: what docker itself allows, so that
	// images that share them still do, and snapshots of snapshots need not be squashed each time.
	keepAbove = 127
)

// layerTree is a layer of an image that is about to be stored.
type layerTree struct {
	p   *layer.StreamLayer
	a   *layer.Applied
	dir string // as the applier left it
	// stored, when set, is the tree in the store instead.
	stored string
}

// squash makes one layer of the bottom ones of an image that has more than the kernel stacks, stores it, and returns its
// id. The trees are read here and written by the applier in its own namespace, as those of any image.
func (s *Store) squash(ctx context.Context, imageID string, trees []layerTree, work string) (string, error) {
	h := sha256.New()
	h.Write([]byte("novalet squashed\n"))
	m := &layerMeta{Version: recordVersion, Boot: s.boot, Machines: map[uint16]int{}}
	for _, t := range trees {
		fmt.Fprintln(h, t.p.ID)
		for _, p := range t.p.Inits {
			if !slices.Contains(m.Inits, p) {
				m.Inits = append(m.Inits, p)
			}
		}
		for k, n := range t.p.Machines {
			m.Machines[k] += n
		}
	}
	m.ID = "sha256:" + hex.EncodeToString(h.Sum(nil))
	if s.has(m.ID) {
		return m.ID, nil
	}
	dir := filepath.Join(work, "squashed")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", diskError(fmt.Errorf("squash layers: %w", err))
	}
	res, err := s.applyStream(ctx, dir, &applyRequest{Limits: layer.Limits{Entries: s.o.MaxEntries, Bytes: s.o.MaxImageBytes},
		Owners: !s.o.Unconfined, MaxID: s.o.IDSize}, func(enc *layer.Encoder) error {
		if err := enc.Begin(0, layer.FlagMerge); err != nil {
			return err
		}
		for _, t := range trees {
			if err := s.sendTree(enc, &t); err != nil {
				return err
			}
		}
		if err := enc.End(); err != nil {
			return err
		}
		return enc.Finish()
	})
	switch {
	case err != nil:
		return "", fmt.Errorf("squash layers: %w", err)
	case res.Full:
		return "", diskError(unix.ENOSPC)
	case res.Refused != "":
		return "", refused(imageID, res.Refused)
	case res.Error != "":
		return "", fmt.Errorf("squash layers: %s", res.Error)
	case len(res.Layers) != 1:
		return "", fmt.Errorf("squash layers: the applier wrote %d", len(res.Layers))
	case len(res.Layers[0].Links) > 0:
		return "", refused(imageID, fmt.Sprintf("the image has a hard link to a file it does not hold: %q", cut(string(res.Layers[0].Links[0].Target))))
	}
	m.Entries, m.Devices = res.Layers[0].Entries, res.Layers[0].Devices
	tree := filepath.Join(dir, "0")
	if m.Bytes, m.Data, err = treeSize(tree); err != nil {
		return "", fmt.Errorf("squash layers: %w", err)
	}
	m.Created = time.Now().UTC()
	s.log.Info("layers squashed: the image has more than the kernel stacks", "image", imageID, "layers", len(trees), "layer", m.ID)
	return m.ID, s.publishLayer(m, tree, nil, work)
}

// sendTree gives a layer to the encoder of a merged stream: what it deletes first, then what it holds.
func (s *Store) sendTree(enc *layer.Encoder, t *layerTree) error {
	hides := func(dir string) error {
		return enc.Entry(&layer.Entry{Name: filepath.Join(dir, ".wh..wh..opq"), Type: layer.TypeRegular}, nil)
	}
	dir := t.stored
	var devices []layer.Device
	if dir == "" {
		dir, devices = t.dir, t.a.Devices
		// The marks are not in the tree yet.
		for _, name := range t.a.Opaque {
			if err := hides(name); err != nil {
				return err
			}
		}
	} else {
		s.mu.Lock()
		devices = s.layers[t.p.ID].Devices
		s.mu.Unlock()
	}
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open layer: %w", err)
	}
	defer unix.Close(root)
	err = walkTree(root, shift{}, func(e *walkEntry) error {
		switch {
		case e.whiteout:
			d, base := filepath.Split(e.Name)
			return enc.Entry(&layer.Entry{Name: d + ".wh." + base, Type: layer.TypeRegular}, nil)
		case e.opaque, s.o.Unconfined && e.Xattrs["user.overlay.opaque"] == "y":
			return hides(e.Name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	links := map[[2]uint64]string{}
	err = walkTree(root, shift{}, func(e *walkEntry) error {
		if e.whiteout {
			return nil
		}
		if e.Type != layer.TypeRegular {
			return enc.Entry(&e.Entry, nil)
		}
		if e.st.Nlink > 1 {
			key := [2]uint64{uint64(e.st.Dev), e.st.Ino}
			if first, ok := links[key]; ok {
				return enc.Entry(&layer.Entry{Name: e.Name, Type: layer.TypeHardlink, Linkname: first, ModTime: e.ModTime}, nil)
			}
			links[key] = e.Name
		}
		f, err := e.open()
		if err != nil {
			return err
		}
		return enc.Entry(&e.Entry, f)
	})
	if err != nil {
		return err
	}
	if t.stored == "" {
		for _, l := range t.a.Links {
			if err := enc.Entry(&layer.Entry{Name: string(l.Name), Type: layer.TypeHardlink, Linkname: string(l.Target)}, nil); err != nil {
				return err
			}
		}
	}
	for _, d := range devices {
		name, err := strconv.Unquote(d.Name)
		if err != nil {
			continue
		}
		e := &layer.Entry{Name: name, Type: layer.TypeCharDevice, Mode: d.Mode, Major: d.Major, Minor: d.Minor}
		if d.Block {
			e.Type = layer.TypeBlockDevice
		}
		if err := enc.Entry(e, nil); err != nil {
			return err
		}
	}
	return nil
}

// treeSize gives the sum of the file sizes of a tree, and what of it is data.
func treeSize(dir string) (size, data int64, err error) {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, 0, fmt.Errorf("open layer: %w", err)
	}
	defer unix.Close(root)
	seen := map[uint64]bool{}
	err = walkTree(root, shift{}, func(e *walkEntry) error {
		if e.Type == layer.TypeRegular && !seen[e.st.Ino] {
			if e.st.Nlink > 1 {
				seen[e.st.Ino] = true
			}
			size += e.Size
			data += min(e.Size, e.st.Blocks*512)
		}
		return nil
	})
	return size, data, err
}

var errEnded = errors.New("the applier has ended")

// applyStream runs the applier alone, over entries of our own.
func (s *Store) applyStream(ctx context.Context, dir string, aq *applyRequest, write func(*layer.Encoder) error) (*layer.ApplyResult, error) {
	if s.o.Unconfined {
		target, err := os.Open(dir)
		if err != nil {
			return nil, err
		}
		defer target.Close()
		pr, pw := io.Pipe()
		sent := make(chan error, 1)
		go func() {
			err := write(layer.NewEncoder(pw))
			pw.CloseWithError(err)
			sent <- err
		}()
		res := apply(layer.NewDecoder(pr), target, aq, false)
		pr.CloseWithError(errEnded)
		if err := <-sent; err != nil && !errors.Is(err, errEnded) {
			return nil, err
		}
		return res, nil
	}
	var files openFiles
	defer files.close()
	entriesR, entriesW, err := files.pipe(0)
	if err != nil {
		return nil, err
	}
	reportR, reportW, err := files.pipe(0)
	if err != nil {
		return nil, err
	}
	target, err := s.idmap.open(s, dir)
	if err != nil {
		return nil, err
	}
	files = append(files, target)
	cmd, err := s.helper(ctx, "apply", aq, []*os.File{entriesR, target, reportW}, s.applierAttr())
	if err != nil {
		return nil, err
	}
	entriesR.Close()
	reportW.Close()
	sent := make(chan error, 1)
	go func() {
		err := write(layer.NewEncoder(entriesW))
		entriesW.Close()
		sent <- err
	}()
	res := &layer.ApplyResult{}
	err = errors.Join(readReport(reportR, res), ignoreExit(cmd.Wait()))
	wrote := <-sent
	switch {
	case context.Cause(ctx) != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, fmt.Errorf("the applier gave no report: %w", err)
	case wrote != nil && !errors.Is(wrote, unix.EPIPE):
		// What the applier says of it is a consequence.
		return nil, wrote
	}
	return res, nil
}
