package glancebridge

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge/layer"
	"github.com/novalet/novalet/internal/statefile"
)

// Snapshot implements novalet.ImageStore. The image is a container archive that holds both a docker manifest and an OCI
// layout, with all its layers: docker, other hosts and this store read it without anything else. With DeltaSnapshots it has
// the topmost layer alone, which novalet alone reads. A request that is
// repeated after a restart ends well at once when the earlier try had come to its end.
func (s *Store) Snapshot(ctx context.Context, r *novalet.SnapshotRequest) (err error) {
	if !validID(r.ImageID) {
		return fmt.Errorf("snapshot instance: %q is no image id", r.ImageID)
	}
	start := time.Now()
	log := s.log.With("instance", r.InstanceUUID, "image", r.ImageID, "request_id", r.Context.RequestID)
	defer func() { s.endUpload(ctx, r, err) }()
	rec, done, err := s.uploadedBefore(ctx, r)
	if done || err != nil {
		return err
	}
	spool, err := unlinkedFile(s.path("ingest"))
	if err != nil {
		return diskError(fmt.Errorf("snapshot instance: %w", err))
	}
	defer spool.Close()
	root, err := unix.Open(r.Root.Upper, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("snapshot instance: open root: %w", err)
	}
	defer unix.Close(root)
	var frozen, thawed time.Time
	freeze := r.Freeze
	if freeze != nil {
		freeze = func(ctx context.Context) (func(), error) {
			thaw, err := r.Freeze(ctx)
			frozen = time.Now()
			return func() { thaw(); thawed = time.Now() }, err
		}
	}
	c, err := captureTree(ctx, root, shift{r.Root.UIDBase, r.Root.UIDSize}, spool, freeze)
	if err != nil {
		return diskError(fmt.Errorf("snapshot instance: %w", err))
	}
	log.Info("instance captured", "files", len(c.entries), "bytes", c.off, "stood_still", thawed.Sub(frozen).Round(time.Millisecond),
		"duration", time.Since(start).Round(time.Millisecond))
	base := s.deltaBase(ctx, r, rec)
	a, err := s.snapshotArchive(r, c, base)
	if err != nil {
		return fmt.Errorf("snapshot instance: %w", err)
	}
	if r.Captured != nil {
		if err := r.Captured(ctx); err != nil {
			return fmt.Errorf("snapshot instance: %w", err)
		}
	}
	props := maps.Clone(r.Properties)
	if props == nil {
		props = map[string]string{}
	}
	if r.Base != nil && r.Base.Kind != "" {
		props[propKind] = string(r.Base.Kind)
	}
	switch {
	case base != nil:
		props[propDelta] = base.Image
	case rec.Properties[propDelta] != "":
		props[propDelta] = "" // inherited from the image
	}
	if err := s.o.Glance.Update(ctx, r.Context, r.ImageID, ImageUpdate{DiskFormat: "raw", ContainerFormat: "docker", Properties: props}); err != nil {
		return fmt.Errorf("snapshot instance: %w", err)
	}
	if err := s.upload(ctx, r, a); err != nil {
		return fmt.Errorf("snapshot instance: %w", err)
	}
	log.Info("snapshot uploaded", "bytes", a.size, "delta", base != nil, "duration", time.Since(start).Round(time.Millisecond))
	return nil
}

// archive is a container archive that can be written any number of times with the same bytes.
type archive struct {
	size  int64
	write func(io.Writer) error
}

// archiveLayer is one layer of an archive to be.
type archiveLayer struct {
	size   int64
	hex    string
	write  func(io.Writer) error
	origin string
}

// snapshotArchive plans the archive of an instance: the layers of its image, unless it is a delta of that, and what it wrote
// itself on top.
func (s *Store) snapshotArchive(r *novalet.SnapshotRequest, c *capture, base *layer.Base) (*archive, error) {
	var layers []archiveLayer
	below := r.Root.Layers
	if len(below) == 0 && r.Base != nil {
		below = r.Base.Layers
	}
	var left []string
	if base != nil {
		for _, l := range below {
			left = append(left, l.DiffID)
		}
		below = nil
	}
	for _, l := range below {
		s.mu.Lock()
		m := s.layers[l.DiffID]
		s.mu.Unlock()
		layers = append(layers, archiveLayer{write: func(w io.Writer) error { return tarLayer(w, l.Path, m, nil) }, origin: "base image"})
	}
	layers = append(layers, archiveLayer{write: c.write, origin: "instance " + r.InstanceUUID})
	for i := range layers {
		var err error
		id := ""
		if i < len(below) {
			id = below[i].DiffID
		}
		if layers[i].size, layers[i].hex, err = s.measureLayer(id, layers[i].write); err != nil {
			return nil, err
		}
	}
	var cfg novalet.ImageConfig
	if r.Base != nil {
		cfg = r.Base.Config
	}
	if cfg.Architecture == "" || !strings.EqualFold(cfg.Architecture, s.o.Arch) {
		cfg.Architecture = s.o.Arch
	}
	return planArchive(layers, cfg, time.Now().UTC(), base, left)
}

// tarSum is what a stored layer comes to as a tar of ours.
type tarSum struct {
	Size int64  `json:"size"`
	Hex  string `json:"sha256"`
}

func (t *tarSum) encode() []byte {
	b, _ := json.Marshal(t)
	return b
}

// measureLayer is measure, remembered beside a stored layer: its tree does not change. id is "" for what is not stored.
func (s *Store) measureLayer(id string, write func(io.Writer) error) (int64, string, error) {
	s.mu.Lock()
	m := s.layers[id]
	s.mu.Unlock()
	if m == nil {
		return measure(write)
	}
	path := filepath.Join(s.layerDir(id), sumName)
	var sum tarSum
	if err := statefile.Read(path, &sum); err == nil && sum.Size > 0 && validLayerID("sha256:"+sum.Hex) {
		return sum.Size, sum.Hex, nil
	}
	got, newest, err := s.sumLayer(s.ctx, m)
	if err == nil && (m.Written.IsZero() || !newest.After(m.Written)) {
		err = statefile.WriteBytes(path, got.encode(), false)
	}
	if err != nil {
		return 0, "", err
	}
	return got.Size, got.Hex, nil
}

// planArchive lays out an archive that is a docker save archive and an OCI layout at once; or a delta on the layers below of
// another image.
func planArchive(layers []archiveLayer, cfg novalet.ImageConfig, created time.Time, base *layer.Base, below []string) (*archive, error) {
	type object map[string]any
	ids, history, paths, descs := []string{}, []object{}, []string{}, []object{}
	for _, id := range below {
		ids = append(ids, id)
		history = append(history, object{"created": created, "created_by": "base image"})
	}
	for _, l := range layers {
		ids = append(ids, "sha256:"+l.hex)
		history = append(history, object{"created": created, "created_by": l.origin})
		paths = append(paths, "blobs/sha256/"+l.hex)
		descs = append(descs, object{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + l.hex, "size": l.size})
	}
	volumes := map[string]struct{}{}
	for _, v := range cfg.Volumes {
		volumes[v] = struct{}{}
	}
	blob := func(v any) ([]byte, string, error) {
		b, err := json.Marshal(v)
		h := sha256.Sum256(b)
		return b, hex.EncodeToString(h[:]), err
	}
	config, configHex, err := blob(object{
		"created": created, "architecture": cfg.Architecture, "os": "linux",
		"config": object{"Entrypoint": cfg.Entrypoint, "Cmd": cfg.Cmd, "Env": cfg.Env, "WorkingDir": cfg.WorkingDir,
			"User": cfg.User, "StopSignal": cfg.StopSignal, "Labels": cfg.Labels, "Volumes": volumes},
		"rootfs":  object{"type": "layers", "diff_ids": ids},
		"history": history,
	})
	if err != nil {
		return nil, err
	}
	manifest, manifestHex, err := blob(object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": object{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": "sha256:" + configHex, "size": len(config)},
		"layers": descs})
	if err != nil {
		return nil, err
	}
	index, _, err := blob(object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
		"manifests": []object{{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:" + manifestHex,
			"size": len(manifest), "platform": object{"architecture": cfg.Architecture, "os": "linux"}}}})
	if err != nil {
		return nil, err
	}
	docker, _, err := blob([]object{{"Config": "blobs/sha256/" + configHex, "RepoTags": nil, "Layers": paths}})
	if err != nil {
		return nil, err
	}
	type document struct {
		name string
		data []byte
	}
	docs := []document{{"blobs/sha256/" + configHex, config}}
	if base == nil {
		docs = append(docs, document{"blobs/sha256/" + manifestHex, manifest}, document{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
			document{"index.json", index})
	} else {
		delta, _, err := blob(base)
		if err != nil {
			return nil, err
		}
		docs = append(docs, document{layer.DeltaName, delta})
	}
	docs = append(docs, document{"manifest.json", docker})
	write := func(w io.Writer, contents bool) error {
		tw := tar.NewWriter(w)
		file := func(name string, b []byte) error {
			if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b)), ModTime: created.Truncate(time.Second)}); err != nil {
				return err
			}
			_, err := tw.Write(b)
			return err
		}
		written := map[string]bool{}
		for _, l := range layers {
			if written[l.hex] {
				continue
			}
			written[l.hex] = true
			if err := tw.WriteHeader(&tar.Header{Name: "blobs/sha256/" + l.hex, Mode: 0o644, Size: l.size, ModTime: created.Truncate(time.Second)}); err != nil {
				return err
			}
			if !contents {
				// Only the length is wanted.
				if _, err := io.CopyN(tw, zeroReader{}, l.size); err != nil {
					return err
				}
				continue
			}
			h := sha256.New()
			if err := l.write(io.MultiWriter(tw, h)); err != nil {
				return err
			}
			if got := hex.EncodeToString(h.Sum(nil)); got != l.hex {
				return fmt.Errorf("write archive: layer %s reads as %s now", l.hex, got)
			}
		}
		for _, f := range docs {
			if err := file(f.name, f.data); err != nil {
				return err
			}
		}
		return tw.Close()
	}
	c := &countWriter{w: io.Discard}
	if err := write(c, false); err != nil {
		return nil, err
	}
	return &archive{size: c.n, write: func(w io.Writer) error { return write(w, true) }}, nil
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }
