package glancebridge

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge/layer"
	"github.com/novalet/novalet/internal/statefile"
)

// recordVersion is written into every record; a reader refuses a later one.
const recordVersion = 1

// deltaVersion is that of an imageRecord with Bases: who does not know that they have to be asked for must not use it.
const deltaVersion = 2

// layerMeta is meta.json of a layer.
type layerMeta struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	DiffID  string `json:"diff_id,omitempty"`
	// Bytes is the sum of the file sizes, Data what was written.
	Bytes    int64          `json:"bytes"`
	Data     int64          `json:"data"`
	Entries  int64          `json:"entries"`
	Inits    []string       `json:"inits,omitempty"`
	Machines map[uint16]int `json:"machines,omitempty"`
	Devices  []layer.Device `json:"devices,omitempty"`
	// Below names the layers this one depends on, when it holds copies of their files.
	Below []string `json:"below,omitempty"`
	// Boot is the boot of the host in which it was written: after another one, only a durable layer is trusted.
	Boot    string    `json:"boot"`
	Created time.Time `json:"created"`
	// Written is when the tree was whole: what has a later change time (ctime) was altered since.
	Written time.Time `json:"written,omitzero"`

	// corrupt, when set, says how the tree differs from what was stored. Under Store.mu.
	corrupt string
}

// imageRecord is one file in images/.
type imageRecord struct {
	Version   int                 `json:"version"`
	ID        string              `json:"id"`
	Name      string              `json:"name"`
	Format    string              `json:"format"`
	Layers    []string            `json:"layers"` // ids, base first
	Config    novalet.ImageConfig `json:"config"`
	HasConfig bool                `json:"has_config"`
	Init      string              `json:"init,omitempty"`
	HashAlgo  string              `json:"os_hash_algo,omitempty"`
	HashValue string              `json:"os_hash_value,omitempty"`
	Download  int64               `json:"download"` // bytes
	// MinDiskGB and MinRAMMB are Glance's at the time; VirtualSize is that of the disk which the image is of, in bytes.
	MinDiskGB   int64 `json:"min_disk,omitempty"`
	MinRAMMB    int64 `json:"min_ram,omitempty"`
	VirtualSize int64 `json:"virtual_size,omitempty"`
	// Signed: the signature of the data was verified, with the key of the certificate Signer (DER).
	Signed bool   `json:"signed,omitempty"`
	Signer []byte `json:"signer,omitempty"`
	// Owner and Visibility are Glance's at the time.
	Owner      string `json:"owner,omitempty"`
	Visibility string `json:"visibility,omitempty"`
	// Bases are the images that this one is a delta of, the nearest first: Glance is asked for them at every use.
	Bases []baseRef `json:"bases,omitempty"`
	// Joined are the layers taken from the store without this image's own bytes for them: it proves nobody's right to them.
	Joined []string `json:"joined,omitempty"`
	// Properties are Glance's at the time, for requests that bring none.
	Properties map[string]string `json:"properties,omitempty"`
	LastUsed   time.Time         `json:"last_used"`
	Created    time.Time         `json:"created"`
}

// leaseRecord is one file in leases/.
type leaseRecord struct {
	Version  int      `json:"version"`
	Instance string   `json:"instance"`
	Images   []string `json:"images"`
	Layers   []string `json:"layers"`
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.o.Dir}, elem...)...)
}

// layerDir is the folder of a layer; an id is "sha256:" and hex.
func (s *Store) layerDir(id string) string {
	return s.path("layers", strings.TrimPrefix(id, "sha256:"))
}

// has reports whether the store holds a layer that can be used.
func (s *Store) has(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.layers[id]
	return m != nil && m.corrupt == ""
}

// imageLocked builds the contract's Image from a record; nil when a layer is missing or corrupt. s.mu is held.
func (s *Store) imageLocked(rec *imageRecord) *novalet.Image {
	img := &novalet.Image{ID: rec.ID, Config: rec.Config, Format: rec.Format, Init: rec.Init}
	for _, id := range rec.Layers {
		m := s.layers[id]
		if m == nil || m.corrupt != "" {
			return nil
		}
		img.Layers = append(img.Layers, novalet.Layer{DiffID: m.ID, Path: filepath.Join(s.layerDir(id), "fs"), Size: m.Bytes})
		img.Size += m.Bytes
	}
	return img
}

// leaseLocked notes that an instance uses an image. s.mu is held.
func (s *Store) leaseLocked(instance string, rec *imageRecord) error {
	rec.LastUsed = time.Now()
	if instance == "" {
		return nil
	}
	l := s.leases[instance]
	if l == nil {
		l = &leaseRecord{Version: recordVersion, Instance: instance}
	}
	next := *l
	if !slices.Contains(l.Images, rec.ID) {
		next.Images = append(slices.Clone(l.Images), rec.ID)
	}
	next.Layers = slices.Clone(l.Layers)
	for _, id := range rec.Layers {
		if !slices.Contains(next.Layers, id) {
			next.Layers = append(next.Layers, id)
		}
	}
	if s.leases[instance] != nil && len(next.Images) == len(l.Images) && len(next.Layers) == len(l.Layers) {
		return nil
	}
	if err := s.writeRecord(s.path("leases", instance+".json"), &next); err != nil {
		return err
	}
	s.leases[instance] = &next
	return nil
}

// writeRecord replaces a record so that a crash of the process leaves the old or the new one; that it survives a
// loss of power is left to the sync that follows. s.mu is held.
func (s *Store) writeRecord(path string, v any) error {
	s.dirty = true
	return writeJSON(path, v)
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := statefile.WriteBytes(path, b, false); err != nil {
		return diskError(err)
	}
	return nil
}

// diskError marks errors that another host may not have.
func diskError(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		f := novalet.Faultf(novalet.ErrReschedule, "", "this host has no disk space left for the image")
		f.Err = err
		return f
	}
	return err
}

// repair reads the store and removes what a crash left half done.
func (s *Store) repair() error {
	if err := s.clearIngest(); err != nil {
		return err
	}
	if err := s.cleanNotes(); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.path("layers"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := s.path("layers", e.Name())
		m, durable := s.readLayer(p, e.Name())
		if m == nil || !durable && m.Boot != s.boot {
			s.log.Warn("removing a layer that is not whole", "layer", e.Name())
			if err := removeTree(p); err != nil {
				return fmt.Errorf("remove unfinished layer: %w", err)
			}
			continue
		}
		s.layers[m.ID] = m
		s.dirty = s.dirty || !durable
	}
	if err := readRecords(s.path("images"), func(name string, r *imageRecord) bool {
		if r.Version > deltaVersion || r.ID+".json" != name || !validID(r.ID) ||
			slices.ContainsFunc(r.Layers, func(id string) bool { return s.layers[id] == nil }) {
			return false
		}
		s.images[r.ID] = r
		return true
	}, s.dropRecord); err != nil {
		return err
	}
	return readRecords(s.path("leases"), func(name string, r *leaseRecord) bool {
		if r.Version > recordVersion || r.Instance+".json" != name || !validID(r.Instance) {
			return false
		}
		s.leases[r.Instance] = r
		return true
	}, s.dropRecord)
}

func (s *Store) dropRecord(path string) {
	s.log.Warn("removing a record that is damaged or whose layers are gone", "record", filepath.Base(path))
	_ = os.Remove(path)
}

// readLayer reads a layer's meta.json; nil when it is not a whole layer.
func (s *Store) readLayer(dir, name string) (m *layerMeta, durable bool) {
	b, err := os.ReadFile(filepath.Join(dir, "meta.json"))
	if err != nil {
		return nil, false
	}
	m = &layerMeta{}
	if json.Unmarshal(b, m) != nil || m.Version > recordVersion || m.ID != "sha256:"+name {
		return nil, false
	}
	if st, err := os.Lstat(filepath.Join(dir, "fs")); err != nil || !st.IsDir() {
		return nil, false
	}
	if b, err := os.ReadFile(filepath.Join(dir, corruptName)); err == nil {
		m.corrupt = string(b)
	}
	_, err = os.Lstat(filepath.Join(dir, "durable"))
	return m, err == nil
}

// readRecords decodes every record of a folder; those that take refuses go to drop.
func readRecords[T any](dir string, take func(name string, r *T) bool, drop func(path string)) error {
	if err := statefile.Clean(dir); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		r := new(T)
		if json.Unmarshal(b, r) != nil || !take(e.Name(), r) {
			drop(p)
		}
	}
	return nil
}

func (s *Store) clearIngest() error {
	entries, err := os.ReadDir(s.path("ingest"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := s.path("ingest", e.Name())
		err := removeTree(p)
		// The helpers of an agent that was killed end with it, but perhaps a moment later.
		for try := 0; err != nil && try < 250; try++ {
			time.Sleep(20 * time.Millisecond)
			err = removeTree(p)
		}
		if err != nil {
			return fmt.Errorf("clear ingest: %w", err)
		}
	}
	return nil
}

// removeTree removes a tree written from an image. os.RemoveAll follows no symlink.
func removeTree(path string) error { return os.RemoveAll(path) }

// layerMetaOf joins what the two helpers reported of one layer.
func (s *Store) layerMetaOf(p *layer.StreamLayer, a *layer.Applied) *layerMeta {
	return &layerMeta{
		Version: recordVersion, ID: p.ID, DiffID: p.DiffID, Bytes: p.Bytes, Data: a.Bytes, Entries: a.Entries,
		Inits: p.Inits, Machines: p.Machines, Devices: a.Devices, Boot: s.boot, Created: time.Now().UTC(),
	}
}
