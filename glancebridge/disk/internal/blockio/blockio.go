// Package blockio gives the disk readers a checked view of bytes: a disk of known size, sections of it, and a
// bounded cache for metadata. It starts no goroutine.
package blockio

import (
	"errors"
	"io"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

// Disk is a virtual disk. ReadAt reads all of p or returns an error; a range beyond the end is an error that says the
// image is damaged or cut.
type Disk interface {
	io.ReaderAt
	Size() int64
	// Span says for how many of the n bytes at off (at least 1, when n is and off lies inside the disk) the disk either
	// stores data or is known to be zero without storing anything.
	Span(off, n int64) (length int64, data bool, err error)
}

// Inside says whether n bytes at off lie within size bytes.
func Inside(off, n, size int64) bool {
	return off >= 0 && n >= 0 && off <= size && n <= size-off
}

type raw struct {
	r    io.ReaderAt
	size int64
}

// Raw makes a disk of the first size bytes of r.
func Raw(r io.ReaderAt, size int64) Disk { return &raw{r: r, size: size} }

func (d *raw) Size() int64 { return d.size }

func (d *raw) ReadAt(p []byte, off int64) (int, error) {
	if !Inside(off, int64(len(p)), d.size) {
		return 0, verdict.Cut("%d bytes are wanted at byte %d of %d", len(p), off, d.size)
	}
	n, err := d.r.ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return n, verdict.Cut("the file ends at byte %d, not at %d", off+int64(n), d.size)
	}
	return n, err
}

func (d *raw) Span(off, n int64) (int64, bool, error) { return min(n, d.size-off), true, nil }

type section struct {
	d         Disk
	off, size int64
}

// Section is the part of d that holds n bytes at off, cut at the end of d.
func Section(d Disk, off, n int64) Disk {
	off = min(max(off, 0), d.Size())
	return &section{d: d, off: off, size: min(max(n, 0), d.Size()-off)}
}

func (s *section) Size() int64 { return s.size }

func (s *section) ReadAt(p []byte, off int64) (int, error) {
	if !Inside(off, int64(len(p)), s.size) {
		return 0, verdict.Cut("%d bytes are wanted at byte %d of a partition of %d bytes", len(p), off, s.size)
	}
	return s.d.ReadAt(p, s.off+off)
}

func (s *section) Span(off, n int64) (int64, bool, error) {
	return s.d.Span(s.off+off, min(n, s.size-off))
}
