package layer

import (
	"bufio"
	"fmt"
	"io"

	"github.com/novalet/novalet"
)

// StreamLayer is one layer that went through the encoder.
type StreamLayer struct {
	// Index is the one given to Encoder.Begin.
	Index int `json:"index"`
	// ID names the tree: the diffID, or a digest derived from it when the tar was read by other rules than those of
	// image layers.
	ID string `json:"id"`
	// DiffID is the sha256 of the uncompressed tar, "" for trees that came from none.
	DiffID string `json:"diff_id,omitempty"`
	// Blob is the sha256 of the bytes as they lay in the archive.
	Blob string `json:"blob,omitempty"`
	// Skipped: the store has the layer already, its entries were not sent. Trusted: nor were its bytes read.
	Skipped bool `json:"skipped,omitempty"`
	Trusted bool `json:"trusted,omitempty"`
	Observed
}

// Result is what reading an image found out.
type Result struct {
	// Format names what the bytes were, such as "docker-archive", "root-tar.gz" or "qcow2".
	Format string              `json:"format"`
	Config novalet.ImageConfig `json:"config"`
	// HasConfig reports whether the image itself says what to run.
	HasConfig bool          `json:"has_config"`
	Layers    []StreamLayer `json:"layers"` // all that were streamed
	// Order lists the indexes of the image's layers, base first. A layer may occur twice.
	Order []int `json:"order"`
	// VirtualSize is the size of the disk that the image is of, in bytes, 0 for an archive.
	VirtualSize int64 `json:"virtual_size,omitempty"`
	// Base is the image that a delta lies on; Order then has the delta's own layers.
	Base *Base `json:"base,omitempty"`
	// Index is what IndexArchive found.
	Index []IndexedLayer `json:"index,omitempty"`
	// Warnings are for the log.
	Warnings []string `json:"warnings,omitempty"`
	// Refused, when set, is why the image is at fault.
	Refused string `json:"refused,omitempty"`
	// Error, when set, is any other failure. Full: the file system was.
	Error string `json:"error,omitempty"`
	Full  bool   `json:"full,omitempty"`
}

// OK reports whether the image was read to a good end.
func (r *Result) OK() bool { return r.Refused == "" && r.Error == "" }

// ArchiveOptions say how an archive is read.
type ArchiveOptions struct {
	// Arch is the architecture to run on, in OCI's words.
	Arch string
	// Ref picks one of several images in one archive: a tag as the archive has it.
	Ref string
	// Limits bound the whole.
	Limits Limits
	// Spool gives a file for archives whose kind cannot be told from their beginning.
	Spool func() (io.ReadWriteSeeker, error)
	// Known reports whether a layer of this diffID ("sha256:…") is stored already: its bytes are read and verified
	// all the same, but its entries are not sent again.
	Known func(diffID string) bool
	// Trusted are layers of the store that stand for members of the archive, whose bytes may be anything.
	Trusted []IndexedLayer
}

// ReadArchive reads an uncompressed tar that is an image of one of the kinds: container archive, unified
// incus image, or root file system. The image's layers go to enc; the stream is not finished. r is read to its end.
func ReadArchive(r io.Reader, enc *Encoder, o ArchiveOptions) (*Result, error) {
	o.Limits = o.Limits.withDefaults()
	br := bufio.NewReaderSize(r, 256<<10)
	head, err := br.Peek(256 << 10)
	if err != nil && err != io.EOF {
		return nil, err
	}
	kind := classify(head)
	if kind == kindUnknown {
		f, err := o.Spool()
		if err != nil {
			return nil, err
		}
		if _, err := io.Copy(f, br); err != nil {
			return nil, fmt.Errorf("spool archive: %w", err)
		}
		if kind, err = classifyAll(f); err != nil {
			return nil, err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		br.Reset(f)
	}
	if kind == kindContainer {
		return readContainer(br, enc, o)
	}
	return readRoot(br, enc, o, kind)
}
