package layer

import (
	"crypto/sha256"
	"hash"
	"io"
	"sync/atomic"
)

// hashReader hashes what it reads, in large pieces: archive/tar reads headers 512 bytes at a time. What is read into shared
// memory is hashed beside the reading; a block is lent for good once that has come past it.
type hashReader struct {
	r    io.Reader
	h    hash.Hash
	n    atomic.Int64 // bytes read so far; decompressors read ahead on goroutines of their own
	buf  []byte
	have []byte // read and hashed, not yet given; of block, or buf
	err  error

	enc   *Encoder // nil unless it is to read into memory that enc shares
	block *block   // which is being read into
	used  int      // bytes of block

	behind *behind // nil unless enc is set
	hashed int     // bytes of block that were given to it
	full   *block  // the one before, which may be altered once summed is closed
	summed <-chan struct{}

	given int64 // bytes handed on
}

// hashPiece is how many bytes are read and hashed at a time: they are still in the processor's cache then.
const hashPiece = 256 << 10

func newHashReader(r io.Reader) *hashReader { return &hashReader{r: r, h: sha256.New()} }

// share has it read into the memory that enc shares. It is to be stopped then.
func (h *hashReader) share(enc *Encoder) { h.enc, h.behind = enc, hashBehind(h.h) }

// stop ends what share began; nothing can be read any more, and the sum is whole.
func (h *hashReader) stop() {
	if h.behind != nil {
		h.behind.stop()
		h.behind = nil
	}
}

func (h *hashReader) Read(p []byte) (int, error) {
	if err := h.fill(); err != nil {
		return 0, err
	}
	n := copy(p, h.have)
	h.advance(n)
	return n, nil
}

func (h *hashReader) advance(n int) {
	h.have = h.have[n:]
	h.given += int64(n)
}

// fill sees to it that there is something to give.
func (h *hashReader) fill() error {
	if len(h.have) > 0 {
		return nil
	}
	if h.enc == nil {
		if h.buf == nil {
			h.buf = make([]byte, hashPiece)
		}
		n, err := h.read(h.buf)
		h.have = h.buf[:n]
		return err
	}
	if h.block != nil && h.used == SharedBlock {
		if err := h.close(); err != nil {
			return err
		}
	}
	if h.block == nil {
		var err error
		if h.block, err = h.enc.shared.take(h.enc.w.Flush); err != nil {
			return err
		}
		h.used = 0
	}
	from := h.used
	err := h.more()
	h.have = h.block.data[from:h.used]
	return err
}

// more reads on into the block.
func (h *hashReader) more() error {
	n, err := h.read(h.block.data[h.used:min(h.used+hashPiece, SharedBlock)])
	if h.used += n; h.used-h.hashed >= hashPiece {
		h.hashRest()
	}
	return err
}

// hashRest gives what was read into the block to the goroutine that hashes.
func (h *hashReader) hashRest() {
	if p := h.block.data[h.hashed:h.used]; len(p) > 0 {
		h.behind.hash(p)
	}
	h.hashed = h.used
}

// read reads at least one byte, or says why there is none.
func (h *hashReader) read(p []byte) (n int, err error) {
	for n == 0 && h.err == nil {
		n, h.err = h.r.Read(p)
	}
	if h.behind == nil {
		h.h.Write(p[:n])
	}
	h.n.Add(int64(n))
	if n == 0 {
		return 0, h.err
	}
	return n, nil
}

// join has the next n bytes lie side by side, if there are so many and they fit into the block at hand.
func (h *hashReader) join(n int) error {
	if err := h.fill(); err != nil || h.enc == nil {
		return err
	}
	for len(h.have) < n && h.used < SharedBlock {
		from := h.used - len(h.have)
		err := h.more()
		h.have = h.block.data[from:h.used]
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// close gives up the block: the one before it is lent for good, since its hashing has come to an end, or soon will.
func (h *hashReader) close() error {
	if h.block == nil {
		return nil
	}
	h.hashRest()
	full, summed := h.full, h.summed
	h.full, h.summed = h.block, h.behind.mark()
	h.block, h.have, h.hashed = nil, nil, 0
	if full == nil {
		// The applier is to hear of what was sent so far all the same.
		return h.enc.w.Flush()
	}
	<-summed
	return h.enc.done(full)
}

// finish gives up all blocks.
func (h *hashReader) finish() error {
	if err := h.close(); err != nil || h.full == nil {
		return err
	}
	b := h.full
	h.full = nil
	<-h.summed
	return h.enc.done(b)
}

func (h *hashReader) sum() []byte { return h.h.Sum(nil) }

// tarSource is what archive/tar reads from: content that was taken past it is given to it as if it were still there,
// since it goes over what its caller did not ask for.
type tarSource struct {
	h     *hashReader
	taken int64 // bytes
}

func (s *tarSource) Read(p []byte) (int, error) {
	if s.taken == 0 {
		return s.h.Read(p)
	}
	n := int(min(s.taken, int64(len(p))))
	s.taken -= int64(n)
	return n, nil
}

// Seek implements io.Seeker as far as archive/tar uses it, to go over content.
func (s *tarSource) Seek(off int64, _ int) (int64, error) {
	for left := off; left > 0; {
		n := min(left, s.taken)
		if s.taken -= n; n == 0 {
			if err := s.h.fill(); err == io.EOF {
				return 0, io.ErrUnexpectedEOF
			} else if err != nil {
				return 0, err
			}
			n = min(left, int64(len(s.h.have)))
			s.h.advance(int(n))
		}
		left -= n
	}
	return off, nil
}

// tarContent is the content of a member as it lies in what was read.
type tarContent struct {
	src  *tarSource
	left int64
}

// joined is the content in bytes up to which a file is written in one go.
const joined = 256 << 10

// next gives a piece of the content; it is valid until the block is given up.
func (c *tarContent) next() (piece, error) {
	h := c.src.h
	if c.left <= 0 {
		return piece{}, io.EOF
	}
	if err := h.join(int(min(c.left, joined))); err == io.EOF {
		return piece{}, io.ErrUnexpectedEOF
	} else if err != nil {
		return piece{}, err
	}
	p := piece{data: h.have[:min(c.left, int64(len(h.have)))], block: h.block}
	if p.block != nil {
		p.off = h.used - len(h.have)
	}
	c.take(len(p.data))
	return p, nil
}

func (c *tarContent) take(n int) {
	c.src.h.advance(n)
	c.src.taken += int64(n)
	c.left -= int64(n)
}

// Read implements io.Reader.
func (c *tarContent) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, io.EOF
	}
	h := c.src.h
	if err := h.fill(); err == io.EOF {
		return 0, io.ErrUnexpectedEOF
	} else if err != nil {
		return 0, err
	}
	n := copy(p[:min(c.left, int64(len(p)))], h.have)
	c.take(n)
	return n, nil
}

// skip goes to the end of the content.
func (c *tarContent) skip() error {
	for c.left > 0 {
		if err := c.src.h.fill(); err == io.EOF {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
		c.take(int(min(c.left, int64(len(c.src.h.have)))))
	}
	return nil
}

// peek gives the next n bytes without taking them, or none when they do not lie side by side.
func (c *tarContent) peek(n int) []byte {
	if c.left < int64(n) || c.src.h.join(n) != nil || len(c.src.h.have) < n {
		return nil
	}
	return c.src.h.have[:n]
}

// peeker gives the beginning of a member without consuming it.
type peeker struct {
	r   io.Reader
	buf []byte
	arr [512]byte
}

func (p *peeker) reset(r io.Reader) { p.r, p.buf = r, nil }

func (p *peeker) peek(n int) []byte {
	if len(p.buf) < n {
		have := copy(p.arr[:], p.buf)
		m, _ := io.ReadFull(p.r, p.arr[have:min(n, len(p.arr))])
		p.buf = p.arr[:have+m]
	}
	return p.buf
}

func (p *peeker) Read(b []byte) (int, error) {
	if len(p.buf) > 0 {
		n := copy(b, p.buf)
		p.buf = p.buf[n:]
		return n, nil
	}
	return p.r.Read(b)
}
