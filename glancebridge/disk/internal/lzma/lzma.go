// Package lzma undoes LZMA, LZMA2 and xz for blocks whose unpacked size is known and small: the output buffer is the
// dictionary, so nothing is allocated on the word of the input. The formats are those of the LZMA SDK's specification
// and of xz-file-format.txt.
package lzma

import "errors"

// ErrCorrupt is for input that is not what its format asks for, or does not fit the output.
var ErrCorrupt = errors.New("lzma: corrupt input")

const (
	states    = 12
	probInit  = 1024
	topBits   = 24
	modelBits = 11
	moveBits  = 5
	minMatch  = 2
	maxLitPos = 4 // of lc + lp, as in LZMA2
)

// Decoder is the state of the model. The zero value is ready; it may be used again for other inputs.
type Decoder struct {
	// The range decoder. After the end of in it reads zeros and counts them.
	in   []byte
	pos  int
	rng  uint32
	code uint32

	lc, lp, pb uint
	state      int
	rep        [4]uint32

	isMatch    [states << 4]uint16
	isRep      [states]uint16
	isRepG0    [states]uint16
	isRepG1    [states]uint16
	isRepG2    [states]uint16
	isRep0Long [states << 4]uint16
	slots      [4][64]uint16
	special    [128]uint16
	align      [16]uint16
	match      lengths
	repLen     lengths
	lit        [0x300 << maxLitPos]uint16
}

type lengths struct {
	choice [2]uint16
	low    [16][8]uint16
	mid    [16][8]uint16
	high   [256]uint16
}

func fill(p []uint16) {
	for i := range p {
		p[i] = probInit
	}
}

func (l *lengths) reset() {
	fill(l.choice[:])
	for i := range l.low {
		fill(l.low[i][:])
		fill(l.mid[i][:])
	}
	fill(l.high[:])
}

func (d *Decoder) props(b byte) bool {
	if b >= 9*5*5 {
		return false
	}
	d.lc = uint(b % 9)
	d.lp = uint(b / 9 % 5)
	d.pb = uint(b / 45)
	return d.lc+d.lp <= maxLitPos
}

func (d *Decoder) reset() {
	d.state = 0
	d.rep = [4]uint32{}
	fill(d.isMatch[:])
	fill(d.isRep[:])
	fill(d.isRepG0[:])
	fill(d.isRepG1[:])
	fill(d.isRepG2[:])
	fill(d.isRep0Long[:])
	for i := range d.slots {
		fill(d.slots[i][:])
	}
	fill(d.special[:])
	fill(d.align[:])
	d.match.reset()
	d.repLen.reset()
	fill(d.lit[:0x300<<(d.lc+d.lp)])
}

func (d *Decoder) start(in []byte) bool {
	if len(in) < 5 || in[0] != 0 {
		return false
	}
	d.in, d.pos = in, 5
	d.rng = 0xFFFFFFFF
	d.code = uint32(in[1])<<24 | uint32(in[2])<<16 | uint32(in[3])<<8 | uint32(in[4])
	return true
}

func (d *Decoder) normalize() {
	d.rng <<= 8
	d.code <<= 8
	if d.pos < len(d.in) {
		d.code |= uint32(d.in[d.pos])
	}
	d.pos++
}

func (d *Decoder) bit(p *uint16) uint32 {
	if d.rng < 1<<topBits {
		d.normalize()
	}
	v := *p
	bound := d.rng >> modelBits * uint32(v)
	if d.code < bound {
		d.rng = bound
		*p = v + (1<<modelBits-v)>>moveBits
		return 0
	}
	d.rng -= bound
	d.code -= bound
	*p = v - v>>moveBits
	return 1
}

// tree reads n bits, the highest first, each with its own model in p[1:].
func (d *Decoder) tree(p []uint16, n uint) uint32 {
	m := uint32(1)
	for range n {
		m = m<<1 | d.bit(&p[m])
	}
	return m - 1<<n
}

// reverse reads n bits, the lowest first.
func (d *Decoder) reverse(p []uint16, n uint) uint32 {
	m, v := uint32(1), uint32(0)
	for i := range n {
		b := d.bit(&p[m])
		m = m<<1 | b
		v |= b << i
	}
	return v
}

func (d *Decoder) directBits(n uint) uint32 {
	var v uint32
	for range n {
		if d.rng < 1<<topBits {
			d.normalize()
		}
		d.rng >>= 1
		d.code -= d.rng
		t := 0 - d.code>>31
		d.code += d.rng & t
		v = v<<1 + t + 1
	}
	return v
}

func (d *Decoder) length(l *lengths, posState int) int {
	if d.bit(&l.choice[0]) == 0 {
		return int(d.tree(l.low[posState][:], 3)) + minMatch
	}
	if d.bit(&l.choice[1]) == 0 {
		return int(d.tree(l.mid[posState][:], 3)) + minMatch + 8
	}
	return int(d.tree(l.high[:], 8)) + minMatch + 16
}

func (d *Decoder) distance(length int) uint32 {
	slot := d.tree(d.slots[min(length-minMatch, 3)][:], 6)
	if slot < 4 {
		return slot
	}
	n := uint(slot>>1 - 1)
	dist := (2 | slot&1) << n
	if slot < 14 {
		return dist + d.reverse(d.special[dist-slot:], n)
	}
	dist += d.directBits(n-4) << 4
	return dist + d.reverse(d.align[:], 4)
}

func (d *Decoder) literal(out []byte, at int) byte {
	prev := byte(0)
	if at > 0 {
		prev = out[at-1]
	}
	ctx := (uint(at)&(1<<d.lp-1))<<d.lc + uint(prev)>>(8-d.lc)
	p := d.lit[0x300*ctx:][:0x300]
	m := uint32(1)
	if d.state >= 7 {
		mb := uint32(out[at-1-int(d.rep[0])])
		for m < 0x100 {
			b := mb >> 7 & 1
			mb <<= 1
			got := d.bit(&p[(1+b)<<8+m])
			m = m<<1 | got
			if got != b {
				break
			}
		}
	}
	for m < 0x100 {
		m = m<<1 | d.bit(&p[m&0xFF])
	}
	return byte(m)
}

// run decodes into out[at:end], with out[:at] as the dictionary. It is false for corrupt input. The end marker is
// told by a returned position before end.
func (d *Decoder) run(out []byte, at, end int) (int, bool) {
	for at < end {
		if d.pos > len(d.in)+8 {
			return at, false
		}
		posState := at & (1<<d.pb - 1)
		if d.bit(&d.isMatch[d.state<<4+posState]) == 0 {
			if d.state >= 7 && int(d.rep[0]) >= at {
				return at, false
			}
			out[at] = d.literal(out, at)
			at++
			switch {
			case d.state < 4:
				d.state = 0
			case d.state < 10:
				d.state -= 3
			default:
				d.state -= 6
			}
			continue
		}
		n := 0
		if d.bit(&d.isRep[d.state]) == 0 {
			d.rep[3], d.rep[2], d.rep[1] = d.rep[2], d.rep[1], d.rep[0]
			n = d.length(&d.match, posState)
			d.rep[0] = d.distance(n)
			d.state = after(d.state, 7, 10)
			if d.rep[0] == 0xFFFFFFFF {
				return at, true
			}
		} else if n = d.repeat(posState); n == 0 {
			n = 1
		}
		dist := int(d.rep[0]) + 1
		if dist > at || n > end-at {
			return at, false
		}
		if dist >= n {
			copy(out[at:at+n], out[at-dist:])
		} else {
			for i := range n {
				out[at+i] = out[at+i-dist]
			}
		}
		at += n
	}
	return at, true
}

// repeat picks one of the last distances and gives the length; 0 is a single byte.
func (d *Decoder) repeat(posState int) int {
	s := d.state
	if d.bit(&d.isRepG0[s]) == 0 {
		if d.bit(&d.isRep0Long[s<<4+posState]) == 0 {
			d.state = after(s, 9, 11)
			return 0
		}
	} else {
		var dist uint32
		if d.bit(&d.isRepG1[s]) == 0 {
			dist = d.rep[1]
		} else {
			if d.bit(&d.isRepG2[s]) == 0 {
				dist = d.rep[2]
			} else {
				dist, d.rep[3] = d.rep[3], d.rep[2]
			}
			d.rep[2] = d.rep[1]
		}
		d.rep[1], d.rep[0] = d.rep[0], dist
	}
	d.state = after(s, 8, 11)
	return d.length(&d.repLen, posState)
}

func after(state, literal, other int) int {
	if state < 7 {
		return literal
	}
	return other
}

// Alone undoes the .lzma format: properties, sizes, data. It fills out or less, and gives how much.
func (d *Decoder) Alone(out, in []byte) (int, error) {
	if len(in) < 13 || !d.props(in[0]) {
		return 0, ErrCorrupt
	}
	d.reset()
	if !d.start(in[13:]) {
		return 0, ErrCorrupt
	}
	size := uint64(0)
	for i := range 8 {
		size |= uint64(in[5+i]) << (8 * i)
	}
	end := len(out)
	if size < uint64(end) {
		end = int(size)
	}
	n, ok := d.run(out, 0, end)
	if !ok || size != ^uint64(0) && uint64(n) != size {
		return n, ErrCorrupt
	}
	return n, nil
}

// LZMA2 undoes a sequence of LZMA2 chunks. It gives how much of out was filled, and how much of in was used.
func (d *Decoder) LZMA2(out, in []byte) (n, used int, err error) {
	ready := false
	for {
		if used >= len(in) {
			return n, used, ErrCorrupt
		}
		control := in[used]
		used++
		if control == 0 {
			return n, used, nil
		}
		rest := in[used:]
		if control < 0x80 {
			if control > 2 || len(rest) < 2 {
				return n, used, ErrCorrupt
			}
			size := (int(rest[0])<<8 | int(rest[1])) + 1
			if size > len(rest)-2 || size > len(out)-n {
				return n, used, ErrCorrupt
			}
			n += copy(out[n:], rest[2:2+size])
			used += 2 + size
			continue
		}
		if len(rest) < 5 {
			return n, used, ErrCorrupt
		}
		size := (int(control&0x1F)<<16 | int(rest[0])<<8 | int(rest[1])) + 1
		packed := (int(rest[2])<<8 | int(rest[3])) + 1
		used += 4
		if control >= 0xC0 {
			if !d.props(rest[4]) {
				return n, used, ErrCorrupt
			}
			used++
		} else if !ready {
			return n, used, ErrCorrupt
		}
		ready = true
		if control >= 0xA0 {
			d.reset()
		}
		if packed > len(in)-used || size > len(out)-n || !d.start(in[used:used+packed]) {
			return n, used, ErrCorrupt
		}
		got, ok := d.run(out, n, n+size)
		if !ok || got != n+size {
			return n, used, ErrCorrupt
		}
		n = got
		used += packed
	}
}
