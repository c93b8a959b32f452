package glancebridge

import (
	"encoding/binary"
	"errors"
	"io"
	"slices"

	"github.com/novalet/novalet/glancebridge/layer"
)

// The parser reads the parts of an image that it names: a question is an offset and a length, the answer so many bytes.
const (
	askLen    = 12
	minWindow = 4 << 10 // a header, the end of the member before it, and most documents
	maxWindow = 64 << 10
)

// index is the parser's side of a partial fetch.
func index(answers io.Reader, questions io.Writer, q *parseRequest) *layer.Result {
	list, err := layer.IndexArchive(&asker{ask: questions, answer: answers, size: q.Size},
		layer.ArchiveOptions{Arch: q.Arch, Ref: q.Ref, Limits: q.Limits})
	if err != nil {
		return failed(err)
	}
	return &layer.Result{Index: list}
}

// asker reads an image through questions. Reading on in one place widens the window.
type asker struct {
	ask    io.Writer
	answer io.Reader
	size   int64
	pos    int64
	off    int64 // of win
	win    []byte
	width  int64
}

// Read implements io.Reader.
func (a *asker) Read(p []byte) (int, error) {
	if a.pos >= a.size {
		return 0, io.EOF
	}
	if a.pos < a.off || a.pos >= a.off+int64(len(a.win)) {
		width := int64(minWindow)
		if a.pos == a.off+int64(len(a.win)) && len(a.win) > 0 {
			width = min(2*a.width, maxWindow)
		}
		a.width = width
		n := min(width, a.size-a.pos)
		b := binary.BigEndian.AppendUint64(nil, uint64(a.pos))
		if _, err := a.ask.Write(binary.BigEndian.AppendUint32(b, uint32(n))); err != nil {
			return 0, err
		}
		win := make([]byte, n)
		if _, err := io.ReadFull(a.answer, win); err != nil {
			return 0, err
		}
		a.off, a.win = a.pos, win
	}
	n := copy(p, a.win[a.pos-a.off:])
	a.pos += int64(n)
	return n, nil
}

// Seek implements io.Seeker.
func (a *asker) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += a.pos
	case io.SeekEnd:
		off += a.size
	}
	if off < 0 {
		return 0, errors.New("seek before the beginning")
	}
	a.pos = off
	return off, nil
}

// gapReader puts zeros where parts of an image have been left out of what it reads.
type gapReader struct {
	r    io.Reader
	gaps []layer.IndexedLayer
	pos  int64
}

// Read implements io.Reader.
func (g *gapReader) Read(p []byte) (int, error) {
	next := int64(-1)
	for _, gap := range g.gaps {
		if g.pos >= gap.Off && g.pos < gap.Off+gap.Size {
			n := int(min(int64(len(p)), gap.Off+gap.Size-g.pos))
			clear(p[:n])
			g.pos += int64(n)
			return n, nil
		}
		if gap.Off > g.pos && (next < 0 || gap.Off < next) {
			next = gap.Off
		}
	}
	if next >= 0 {
		p = p[:min(int64(len(p)), next-g.pos)]
	}
	n, err := g.r.Read(p)
	g.pos += int64(n)
	return n, err
}

// byPlace sorts layers by where they lie and reports whether they are apart.
func byPlace(list []layer.IndexedLayer, size int64) bool {
	slices.SortFunc(list, func(a, b layer.IndexedLayer) int { return int(min(max(a.Off-b.Off, -1), 1)) })
	end := int64(0)
	for _, l := range list {
		if l.Off < end || l.Size < 0 || l.Off > size || l.Size > size-l.Off {
			return false
		}
		end = l.Off + l.Size
	}
	return true
}
