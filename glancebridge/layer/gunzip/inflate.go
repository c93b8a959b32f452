package gunzip

import (
	"encoding/binary"
	"errors"
	"io"
)

// errDamaged says that the data is no DEFLATE stream (RFC 1951).
var errDamaged = errors.New("damaged data")

const (
	window   = 32 << 10 // how far back a copy may reach, bytes
	outBytes = 256 << 10
	maxMatch = 258
	slack    = 8 // a copy writes in words, over its end
	inBytes  = 64 << 10
)

// inflater undoes DEFLATE. It looks at its input eight bytes at a time and decodes up to three literals, or a copy, for each
// look, by tables that give a code's whole meaning: nothing is asked byte by byte.
type inflater struct {
	r        io.Reader
	rerr     error
	in       []byte
	pos, end int // what is left of in

	bits uint64
	n    uint // bits that are valid

	out  []byte // what was given lately, then what was not
	w    int    // where the next byte goes
	from int    // what is not given yet begins here

	lit   litTable
	dist  distTable
	lens  [288 + 32]uint8
	state int
	left  int  // bytes of a stored block
	last  bool // the block at hand is the last one
}

const (
	stateHeader = iota
	stateStored
	stateCodes
	stateEnd
)

func newInflater(r io.Reader) *inflater {
	return &inflater{r: r, in: make([]byte, inBytes), out: newOut()}
}

func newOut() []byte { return make([]byte, window+outBytes+maxMatch+slack) }

// begin prepares for a stream that begins where the last one ended.
func (f *inflater) begin() { f.w, f.from, f.state, f.last = 0, 0, stateHeader, false }

// more reads on; false is the end of the input.
func (f *inflater) more() bool {
	if f.rerr != nil {
		return false
	}
	f.end = copy(f.in, f.in[f.pos:f.end])
	f.pos = 0
	for range 100 {
		n, err := f.r.Read(f.in[f.end:])
		f.end += n
		f.rerr = err
		if n > 0 || err != nil {
			return n > 0
		}
	}
	f.rerr = io.ErrNoProgress
	return false
}

// refill sees to it that there are at least 48 bits, or all that are left: what a copy takes at most.
func (f *inflater) refill() {
	for f.n <= 56 {
		if f.pos == f.end && !f.more() {
			return
		}
		f.bits |= uint64(f.in[f.pos]) << f.n
		f.pos++
		f.n += 8
	}
}

// take takes n bits, at most 16.
func (f *inflater) take(n uint) (uint, error) {
	if f.n < n {
		if f.refill(); f.n < n {
			return 0, f.cut()
		}
	}
	v := uint(f.bits) & (1<<n - 1)
	f.bits >>= n
	f.n -= n
	return v, nil
}

// cut is why there is no more input.
func (f *inflater) cut() error {
	if f.rerr == nil || f.rerr == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return f.rerr
}

// align drops the rest of the byte at hand and gives the whole bytes back to the input.
func (f *inflater) align() {
	f.bits &= 1<<f.n - 1 // a look at eight bytes may leave more
	f.bits >>= f.n & 7
	f.n &^= 7
	for f.n > 0 {
		// They are still there, unless more has moved what follows over them.
		if f.pos == 0 {
			break
		}
		f.pos--
		f.n -= 8
		f.bits &= 1<<f.n - 1
	}
}

// byte takes a whole byte after align.
func (f *inflater) byte() (byte, error) {
	if f.n == 0 {
		if f.pos == f.end && !f.more() {
			if f.rerr == nil {
				return 0, io.EOF
			}
			return 0, f.rerr
		}
		f.pos++
		return f.in[f.pos-1], nil
	}
	b := byte(f.bits)
	f.bits >>= 8
	f.n -= 8
	return b, nil
}

// next gives the next bytes of the stream, about as many as fit; io.EOF is its end. They lie in out, which goes on with a copy
// of the end of what was used before.
func (f *inflater) next(out []byte) ([]byte, error) {
	f.w = copy(out, f.out[max(0, f.w-window):f.w])
	f.out, f.from = out, f.w
	for f.w < window+outBytes {
		var err error
		switch f.state {
		case stateHeader:
			if f.last {
				f.state = stateEnd
				f.align()
				continue
			}
			err = f.header()
		case stateStored:
			err = f.stored()
		case stateCodes:
			err = f.codes()
		case stateEnd:
			if f.w > f.from {
				return f.out[f.from:f.w], nil
			}
			return nil, io.EOF
		}
		if err != nil {
			return nil, err
		}
	}
	return f.out[f.from:f.w], nil
}

func (f *inflater) header() error {
	v, err := f.take(3)
	if err != nil {
		return err
	}
	f.last = v&1 != 0
	switch v >> 1 {
	case 0:
		f.align()
		var b [4]byte
		for i := range b {
			if b[i], err = f.byte(); err != nil {
				return f.cut()
			}
		}
		f.left = int(binary.LittleEndian.Uint16(b[:]))
		if uint16(f.left) != ^binary.LittleEndian.Uint16(b[2:]) {
			return errDamaged
		}
		f.state = stateStored
		return nil
	case 1:
		for i := range f.lens {
			switch {
			case i < 144:
				f.lens[i] = 8
			case i < 256:
				f.lens[i] = 9
			case i < 280:
				f.lens[i] = 7
			case i < 288:
				f.lens[i] = 8
			default:
				f.lens[i] = 5
			}
		}
		return f.tables(288, 32)
	case 2:
		return f.dynamic()
	}
	return errDamaged
}

// tables makes both tables of the lengths of lits and dists codes, one after the other in lens.
func (f *inflater) tables(lits, dists int) error {
	if !build(f.lit[:], litBits, f.lens[:lits], litMeaning[:]) || !build(f.dist[:], distBits, f.lens[lits:lits+dists], distMeaning[:]) {
		return errDamaged
	}
	f.state = stateCodes
	return nil
}

var lensOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// dynamic reads the codes of a block.
func (f *inflater) dynamic() error {
	v, err := f.take(14)
	if err != nil {
		return err
	}
	lits, dists, count := int(v&31)+257, int(v>>5&31)+1, int(v>>10)+4
	if lits > 286 || dists > 30 {
		return errDamaged
	}
	var lens [19]uint8
	for i := range count {
		if v, err = f.take(3); err != nil {
			return err
		}
		lens[lensOrder[i]] = uint8(v)
	}
	var table [1 << 7]uint32
	if !build(table[:], 7, lens[:], lenMeaning[:]) {
		return errDamaged
	}
	for i := 0; i < lits+dists; {
		f.refill()
		e := table[f.bits&(1<<7-1)]
		if e&flagEnd != 0 {
			return errDamaged
		}
		if _, err := f.take(uint(e & 63)); err != nil {
			return err
		}
		sym := e >> 16
		if sym < 16 {
			f.lens[i] = uint8(sym)
			i++
			continue
		}
		prev, extra, least := uint8(0), uint(7), 11
		switch sym {
		case 16:
			if i == 0 {
				return errDamaged
			}
			prev, extra, least = f.lens[i-1], 2, 3
		case 17:
			extra, least = 3, 3
		}
		v, err := f.take(extra)
		if err != nil {
			return err
		}
		n := least + int(v)
		if i+n > lits+dists {
			return errDamaged
		}
		for range n {
			f.lens[i] = prev
			i++
		}
	}
	return f.tables(lits, dists)
}

// stored copies a block that is not compressed, as far as there is room.
func (f *inflater) stored() error {
	for f.left > 0 && f.w < window+outBytes {
		if f.n > 0 {
			b, err := f.byte()
			if err != nil {
				return err
			}
			f.out[f.w] = b
			f.w++
			f.left--
			continue
		}
		if f.pos == f.end && !f.more() {
			return f.cut()
		}
		n := copy(f.out[f.w:window+outBytes], f.in[f.pos:min(f.end, f.pos+f.left)])
		f.w += n
		f.pos += n
		f.left -= n
	}
	if f.left == 0 {
		f.state = stateHeader
	}
	return nil
}

// codes decodes a block, as far as there is room.
func (f *inflater) codes() error {
	out, w := f.out, f.w
	bits, n, in, pos, end := f.bits, f.n, f.in, f.pos, f.end
	var err error
	for w < window+outBytes {
		if end-pos < 8 {
			// Near the end of what was read, or of all: the same, with care.
			f.bits, f.n, f.pos = bits, n, pos
			f.refill()
			bits, n, pos, end = f.bits, f.n, f.pos, f.end
		} else {
			bits |= binary.LittleEndian.Uint64(in[pos:]) << (n & 63)
			pos += int((63 - n) >> 3)
			n |= 56
		}
		e := f.lit[bits&(1<<litBits-1)]
		if e&flagLiteral != 0 && n >= 48 {
			// Three codes of at most litBits bits are there.
			for range 3 {
				out[w] = byte(e >> 16)
				w++
				bits >>= e & 63
				n -= uint(e & 63)
				if e = f.lit[bits&(1<<litBits-1)]; e&flagLiteral == 0 {
					break
				}
			}
			continue
		}
		if e&flagSub != 0 {
			e = f.lit[(e>>16+uint32(bits>>litBits)&(1<<(e>>8&15)-1))&uint32(len(f.lit)-1)]
		}
		used := uint(e & 63)
		if used > n {
			err = f.cut()
			break
		}
		saved := bits
		bits >>= used & 63
		n -= used
		if e&flagLiteral != 0 {
			out[w] = byte(e >> 16)
			w++
			continue
		}
		if e&flagEnd != 0 {
			if e>>16 == 0 {
				f.state = stateHeader
			} else {
				err = errDamaged
			}
			break
		}
		length := int(e>>16) + int(saved&(1<<(used&63)-1)>>(e>>8&15))
		e = f.dist[bits&(1<<distBits-1)]
		if e&flagSub != 0 {
			e = f.dist[(e>>16+uint32(bits>>distBits)&(1<<(e>>8&15)-1))&uint32(len(f.dist)-1)]
		}
		used = uint(e & 63)
		if e&flagEnd != 0 {
			err = errDamaged
			break
		}
		if used > n {
			err = f.cut()
			break
		}
		dist := int(e>>16&0x7fff) + int(bits&(1<<(used&63)-1)>>(e>>8&15))
		bits >>= used & 63
		n -= used
		if dist > w {
			err = errDamaged
			break
		}
		to := w + length
		switch {
		case dist >= 8:
			for at := w - dist; w < to; w, at = w+8, at+8 {
				binary.LittleEndian.PutUint64(out[w:], binary.LittleEndian.Uint64(out[at:]))
			}
		case dist == 1:
			b := out[w-1]
			for i := range out[w:to] {
				out[w+i] = b
			}
		default:
			for ; w < to; w++ {
				out[w] = out[w-dist]
			}
		}
		w = to
	}
	f.w, f.bits, f.n, f.pos = w, bits, n, pos
	return err
}
