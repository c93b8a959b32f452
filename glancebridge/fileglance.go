package glancebridge

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/statefile"
)

// FileGlance is an image service in a folder, for the embedded default: each image is NAME.json, an ImageRecord, and
// a data file beside it, by default of the same name without ".json". It does not check who asks.
type FileGlance struct {
	dir string
	mu  sync.Mutex // over changes of the records
}

// fileRecord is an image in the folder.
type fileRecord struct {
	ImageRecord
	// File is the data's name in the folder.
	File string `json:"file,omitempty"`
	path string
}

var _ Glance = (*FileGlance)(nil)

// NewFileGlance serves the images of a folder. The folder is read at each call: images may be added at any time.
func NewFileGlance(dir string) *FileGlance { return &FileGlance{dir: dir} }

// List reads all records.
func (g *FileGlance) List() ([]ImageRecord, error) {
	list, err := g.read()
	out := make([]ImageRecord, len(list))
	for i, r := range list {
		out[i] = r.ImageRecord
	}
	return out, err
}

// Create adds a record without data, in status queued.
func (g *FileGlance) Create(r ImageRecord) error {
	if !validID(r.ID) {
		return fmt.Errorf("create image: %q is no image id", r.ID)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	r.Status = "queued"
	if r.CreatedAt.IsZero() {
		r.CreatedAt = time.Now().UTC()
	}
	return g.write(&fileRecord{ImageRecord: r, path: filepath.Join(g.dir, r.ID+".json"), File: r.ID})
}

func (g *FileGlance) read() ([]*fileRecord, error) {
	names, err := filepath.Glob(filepath.Join(g.dir, "*.json"))
	if err != nil {
		return nil, err
	}
	var list []*fileRecord
	for _, p := range names {
		b, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read image record: %w", err)
		}
		r := &fileRecord{path: p}
		if err := json.Unmarshal(b, r); err != nil {
			return nil, fmt.Errorf("read image record %s: %w", filepath.Base(p), err)
		}
		if r.File == "" {
			r.File = strings.TrimSuffix(filepath.Base(p), ".json")
		}
		if r.File != filepath.Base(r.File) {
			return nil, fmt.Errorf("image record %s: file %q lies outside the folder", filepath.Base(p), r.File)
		}
		if r.Name == "" {
			r.Name = r.File
		}
		if r.Status == "" {
			r.Status = "active"
		}
		if st, err := os.Stat(filepath.Join(g.dir, r.File)); err == nil && r.Size == 0 && r.Status == "active" {
			r.Size = st.Size()
		}
		list = append(list, r)
	}
	return list, nil
}

func (g *FileGlance) find(id string) (*fileRecord, error) {
	list, err := g.read()
	if err != nil {
		return nil, err
	}
	for _, r := range list {
		if r.ID == id {
			return r, nil
		}
	}
	return nil, fmt.Errorf("image %s: %w", id, novalet.ErrNotFound)
}

func (g *FileGlance) write(r *fileRecord) error { return statefile.Write(r.path, r) }

// Get implements Glance.
func (g *FileGlance) Get(_ context.Context, _ novalet.RequestContext, id string) (*ImageRecord, error) {
	r, err := g.find(id)
	if err != nil {
		return nil, err
	}
	return &r.ImageRecord, nil
}

// Find implements Glance.
func (g *FileGlance) Find(_ context.Context, _ novalet.RequestContext, owner string, properties map[string]string) ([]ImageRecord, error) {
	list, err := g.List()
	return slices.DeleteFunc(list, func(r ImageRecord) bool { return !r.matches(owner, properties) }), err
}

// Download implements Glance.
func (g *FileGlance) Download(_ context.Context, _ novalet.RequestContext, id string, off int64) (io.ReadCloser, int64, error) {
	r, err := g.find(id)
	if err != nil {
		return nil, 0, err
	}
	f, err := os.Open(filepath.Join(g.dir, r.File))
	if err != nil {
		return nil, 0, fmt.Errorf("open image data: %w", err)
	}
	if _, err := f.Seek(off, io.SeekStart); err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, off, nil
}

// Range implements Glance.
func (g *FileGlance) Range(ctx context.Context, rc novalet.RequestContext, id string, off, n int64) (io.ReadCloser, error) {
	f, _, err := g.Download(ctx, rc, id, off)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(f, n), f}, nil
}

// Readable implements Glance: the folder has one user.
func (g *FileGlance) Readable(ctx context.Context, rc novalet.RequestContext, id string) (*ImageRecord, error) {
	r, err := g.Get(ctx, rc, id)
	if err == nil {
		r.Visibility = "public"
	}
	return r, err
}

// Update implements Glance.
func (g *FileGlance) Update(_ context.Context, _ novalet.RequestContext, id string, u ImageUpdate) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	r, err := g.find(id)
	if err != nil {
		return err
	}
	if u.DiskFormat != "" {
		r.DiskFormat = u.DiskFormat
	}
	if u.ContainerFormat != "" {
		r.ContainerFormat = u.ContainerFormat
	}
	if u.MinDiskGB > 0 {
		r.MinDiskGB = u.MinDiskGB
	}
	if r.Properties == nil {
		r.Properties = map[string]string{}
	}
	maps.Copy(r.Properties, u.Properties)
	return g.write(r)
}

// Upload implements Glance.
func (g *FileGlance) Upload(_ context.Context, _ novalet.RequestContext, id string, body io.Reader) (err error) {
	r, err := g.find(id)
	if err != nil {
		return err
	}
	if r.Status != "queued" {
		return &GlanceError{Verb: "upload image", Status: 409, Text: "the image has data already"}
	}
	f, err := os.CreateTemp(g.dir, ".upload-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	h := sha512.New()
	n, err := io.Copy(io.MultiWriter(f, h), body)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("store image data: %w", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if r, err = g.find(id); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(g.dir, r.File)); err != nil {
		return err
	}
	r.Status, r.Size, r.HashAlgo, r.HashValue = "active", n, "sha512", hex.EncodeToString(h.Sum(nil))
	return g.write(r)
}

// Delete implements Glance.
func (g *FileGlance) Delete(_ context.Context, _ novalet.RequestContext, id string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	r, err := g.find(id)
	if err != nil {
		return err
	}
	if err := os.Remove(r.path); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(g.dir, r.File)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
