package walk

import (
	"context"
	"io"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/layer"
)

type empty struct{}

func (empty) Read([]byte) (int, error) { return 0, io.EOF }

// chunk is the size of reads from the disk.
const chunk = 1 << 20

// content hands a file to the sink: exactly its size, in large reads whatever the sink's own are.
type content struct {
	ctx  context.Context
	f    io.Reader
	left int64
	w    *walker
	rest []byte // read and not yet handed out; part of w.buf
}

func (c *content) fill(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	if int64(len(p)) > c.left {
		p = p[:c.left]
	}
	n, err := io.ReadFull(c.f, p)
	c.left -= int64(n)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		err = verdict.Damaged("a file ends before its size")
	}
	return n, err
}

func (c *content) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(c.rest) == 0 {
		if c.left == 0 {
			return 0, io.EOF
		}
		if len(p) >= chunk/4 || int64(len(p)) >= c.left {
			return c.fill(p)
		}
		n, err := c.fill(c.buffer())
		if err != nil {
			return 0, err
		}
		c.rest = c.w.buf[:n]
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *content) buffer() []byte {
	if c.w.buf == nil {
		c.w.buf = make([]byte, chunk)
	}
	return c.w.buf
}

// Skip goes ahead by n bytes. In holes it reads nothing.
func (c *content) Skip(n int64) error {
	k := min(n, int64(len(c.rest)))
	c.rest = c.rest[k:]
	if n -= k; n < 0 || n > c.left {
		return verdict.Damaged("a file ends before its size")
	}
	if s, ok := c.f.(skipper); ok {
		c.left -= n
		return s.Skip(n)
	}
	for n > 0 {
		b := c.buffer()
		k, err := c.fill(b[:min(n, int64(len(b)))])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

type skipper interface{ Skip(n int64) error }

// WriteTo lets io.Copy use the large reads.
func (c *content) WriteTo(out io.Writer) (int64, error) {
	var total int64
	for {
		b := c.rest
		c.rest = nil
		if len(b) == 0 {
			if c.left == 0 {
				return total, nil
			}
			n, err := c.fill(c.buffer())
			if err != nil {
				return total, err
			}
			b = c.w.buf[:n]
		}
		n, err := out.Write(b)
		total += int64(n)
		if err != nil {
			return total, err
		}
		if n < len(b) {
			return total, io.ErrShortWrite
		}
	}
}

// Run is a piece of a file: Len bytes at Phys of the disk, or a hole when Phys is negative.
type Run struct {
	Len  int64
	Phys int64
}

// Hole is the Phys of a run that holds no data.
const Hole = -1

const (
	maxRuns  = 4096    // kept between the two passes over a file; more are looked up again
	maxHoles = 1 << 15 // told to the sink; more are read as zeros
)

// Mapped is a file whose bytes lie on the disk as they are.
type Mapped struct {
	d      blockio.Disk
	size   int64
	lookup func(off int64) (Run, error)
	runs   []Run // nil: too many to keep
	holes  []layer.Extent
	data   int64
	at     int64
	cur    Run
	next   int
}

// NewMapped reads the map of a file of size bytes. lookup gives the run that begins at byte off, at least one byte of
// it; it may be longer than the file.
func NewMapped(d blockio.Disk, size int64, lookup func(off int64) (Run, error)) (*Mapped, error) {
	m := &Mapped{d: d, size: size, lookup: lookup}
	keep := true
	for off := int64(0); off < size; {
		r, err := m.find(off)
		if err != nil {
			return nil, err
		}
		if r.Phys < 0 {
			m.hole(off, r.Len)
		} else {
			m.data += r.Len
		}
		if last := len(m.runs) - 1; last >= 0 && joins(m.runs[last], r) {
			m.runs[last].Len += r.Len
		} else if keep = keep && len(m.runs) < maxRuns; keep {
			m.runs = append(m.runs, r)
		}
		off += r.Len
	}
	if !keep {
		m.runs = nil
	}
	return m, nil
}

func joins(a, b Run) bool {
	if a.Phys < 0 || b.Phys < 0 {
		return a.Phys < 0 && b.Phys < 0
	}
	return a.Phys+a.Len == b.Phys
}

// find is lookup, checked, cut at the end of the file, and told by the disk what it does not store.
func (m *Mapped) find(off int64) (Run, error) {
	r, err := m.lookup(off)
	if err != nil {
		return r, err
	}
	if r.Len <= 0 {
		return r, verdict.Damaged("a file's map has an empty piece")
	}
	r.Len = min(r.Len, m.size-off)
	if r.Phys < 0 {
		return r, nil
	}
	if !blockio.Inside(r.Phys, r.Len, m.d.Size()) {
		return r, verdict.Cut("a file has its data at byte %d of %d", r.Phys, m.d.Size())
	}
	n, data, err := m.d.Span(r.Phys, r.Len)
	if err != nil {
		return r, err
	}
	if n <= 0 || n > r.Len {
		return r, verdict.Damaged("the disk has an empty piece")
	}
	r.Len = n
	if !data {
		r.Phys = Hole
	}
	return r, nil
}

func (m *Mapped) hole(off, n int64) {
	if last := len(m.holes) - 1; last >= 0 && m.holes[last].Off+m.holes[last].Len == off {
		m.holes[last].Len += n
	} else if len(m.holes) < maxHoles {
		m.holes = append(m.holes, layer.Extent{Off: off, Len: n})
	}
}

// Holes are the parts without data, in order.
func (m *Mapped) Holes() []layer.Extent { return m.holes }

// Data is the number of bytes outside holes.
func (m *Mapped) Data() int64 { return m.data }

func (m *Mapped) Read(p []byte) (int, error) {
	if m.cur.Len == 0 {
		if m.at >= m.size {
			return 0, io.EOF
		}
		if err := m.advance(); err != nil {
			return 0, err
		}
	}
	p = p[:min(int64(len(p)), m.cur.Len)]
	if m.cur.Phys < 0 {
		clear(p)
	} else {
		if _, err := m.d.ReadAt(p, m.cur.Phys); err != nil {
			return 0, err
		}
		m.cur.Phys += int64(len(p))
	}
	m.cur.Len -= int64(len(p))
	m.at += int64(len(p))
	return len(p), nil
}

// Skip goes ahead by n bytes and reads nothing but the map.
func (m *Mapped) Skip(n int64) error {
	for n > 0 {
		if m.cur.Len == 0 {
			if m.at >= m.size {
				return io.ErrUnexpectedEOF
			}
			if err := m.advance(); err != nil {
				return err
			}
		}
		k := min(n, m.cur.Len)
		if m.cur.Phys >= 0 {
			m.cur.Phys += k
		}
		m.cur.Len -= k
		m.at += k
		n -= k
	}
	return nil
}

func (m *Mapped) advance() error {
	if m.runs != nil {
		m.cur = m.runs[m.next]
		m.next++
		return nil
	}
	r, err := m.find(m.at)
	m.cur = r
	return err
}

// Bytes is a file that is already in memory, up to a hole at its end.
type Bytes struct {
	b    []byte
	size int64 // what is left
	at   int64
}

// NewBytes makes a file of size bytes that begins with b and goes on with zeros.
func NewBytes(b []byte, size int64) *Bytes {
	return &Bytes{b: b[:min(int64(len(b)), size)], size: size}
}

// Holes is what lies behind the bytes.
func (b *Bytes) Holes() []layer.Extent {
	if n := int64(len(b.b)); n < b.size {
		return []layer.Extent{{Off: b.at + n, Len: b.size - n}}
	}
	return nil
}

// Data is the number of bytes in memory that are left to read.
func (b *Bytes) Data() int64 { return int64(len(b.b)) }

func (b *Bytes) Read(p []byte) (int, error) {
	if b.size == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.b)
	b.b = b.b[n:]
	if n == 0 {
		n = int(min(int64(len(p)), b.size))
		clear(p[:n])
	}
	b.size -= int64(n)
	b.at += int64(n)
	return n, nil
}
