package layer

import (
	"encoding/binary"
	"io"
)

// read sends size bytes of content as data or as runs of zero bytes.
func (e *Encoder) read(r io.Reader, size int64) error {
	var zeros int64
	for size > 0 {
		chunk, err := e.room(int(min(size, MaxChunk)))
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(r, chunk.data); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		size -= int64(len(chunk.data))
		stored := false
		for p := chunk; len(p.data) > 0; {
			var data piece
			if z := zeroPrefix(p.data); z > 0 {
				zeros += int64(z)
				_, p = p.cut(z)
				continue
			}
			data, p = p.cut(dataPrefix(p.data))
			if err := e.segment(data, zeros); err != nil {
				return err
			}
			zeros, stored = 0, true
		}
		if stored && chunk.block != nil {
			e.shared.used += len(chunk.data)
		}
	}
	return e.segment(piece{}, zeros)
}

// room gives n bytes, at most MaxChunk, to read content into.
func (e *Encoder) room(n int) (piece, error) {
	l := e.shared
	if l == nil {
		return piece{data: e.seg[:n]}, nil
	}
	if l.cur != nil && l.used+n > SharedBlock {
		if err := e.done(l.cur); err != nil {
			return piece{}, err
		}
		l.cur = nil
	}
	if l.cur == nil {
		var err error
		if l.cur, err = l.take(e.w.Flush); err != nil {
			return piece{}, err
		}
		l.used = 0
	}
	return piece{l.cur.data[l.used : l.used+n], l.cur, l.used}, nil
}

// done lends a block to the applier for good: no more of it will be named.
func (e *Encoder) done(b *block) error {
	e.buf = binary.AppendUvarint(append(e.buf[:0], frameFree), uint64(b.no))
	if _, err := e.w.Write(e.buf); err != nil {
		return err
	}
	// The applier has something to do now.
	return e.w.Flush()
}

// pieces sends size bytes of a member of a tar from where they lie.
func (e *Encoder) pieces(c *tarContent, size int64) error {
	var off, zeros int64
	for off < size {
		p, err := c.next()
		if err != nil {
			return err
		}
		for len(p.data) > 0 {
			var run piece
			n, zero := runOf(p.data, off, zeros > 0)
			run, p = p.cut(n)
			off += int64(n)
			if zero {
				zeros += int64(n)
				continue
			}
			if err := e.segment(run, zeros); err != nil {
				return err
			}
			zeros = 0
		}
	}
	return e.segment(piece{}, zeros)
}

// runOf measures what b, which lies at byte off of a file, begins with: whole blocks of zero bytes, or anything else. A part
// of a block counts as zero only after others that are.
func runOf(b []byte, off int64, zeros bool) (n int, zero bool) {
	n = min(len(b), zeroBlock-int(off%zeroBlock))
	zero = (n == zeroBlock || zeros) && allZero(b[:n])
	for n < len(b) {
		k := min(zeroBlock, len(b)-n)
		if allZero(b[n:n+k]) != zero && (zero || k == zeroBlock) {
			break
		}
		n += k
	}
	return n, zero
}

// segment sends zeros that need not be stored, then data; either may be none.
func (e *Encoder) segment(p piece, zeros int64) error {
	if zeros > 0 {
		if err := e.write(binary.AppendUvarint(append(e.buf[:0], frameZero), uint64(zeros))); err != nil {
			return err
		}
	}
	if len(p.data) == 0 {
		return nil
	}
	b := binary.AppendUvarint(append(e.buf[:0], frameData), uint64(len(p.data)))
	if e.sum != nil {
		// The name of a tree does not depend on how its content goes.
		e.sum.Write(b)
		e.sum.Write(p.data)
	}
	if p.block != nil {
		b = binary.AppendUvarint(append(b[:0], frameShared), uint64(p.block.no))
		b = binary.AppendUvarint(b, uint64(p.off))
		b = binary.AppendUvarint(b, uint64(len(p.data)))
	}
	e.buf = b[:0]
	if _, err := e.w.Write(b); err != nil || p.block != nil {
		return err
	}
	if len(p.data) < directWrite {
		_, err := e.w.Write(p.data)
		return err
	}
	if err := e.w.Flush(); err != nil {
		return err
	}
	_, err := e.out.Write(p.data)
	return err
}

// directWrite is the content in bytes that is written from where it lies: to copy it costs more than a system call.
const directWrite = 64 << 10

// zeroPrefix counts the bytes of leading whole zero blocks.
func zeroPrefix(b []byte) int {
	n := 0
	for len(b)-n >= zeroBlock && allZero(b[n:n+zeroBlock]) {
		n += zeroBlock
	}
	return n
}

// dataPrefix counts the bytes before the first whole zero block.
func dataPrefix(b []byte) int {
	n := min(zeroBlock, len(b))
	for len(b)-n >= zeroBlock && !allZero(b[n:n+zeroBlock]) {
		n += zeroBlock
	}
	if len(b)-n < zeroBlock {
		return len(b)
	}
	return n
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
