// Package lzo undoes LZO1X, as Linux Documentation/staging/lzo.rst describes it, without the run-length extension.
package lzo

import "errors"

// ErrCorrupt is for input that is no LZO1X or does not fit the output.
var ErrCorrupt = errors.New("lzo: corrupt input")

type decoder struct {
	in, out []byte
	p, n    int
	bad     bool
}

func (d *decoder) byte() int {
	if d.p >= len(d.in) {
		d.bad = true
		return 0
	}
	b := d.in[d.p]
	d.p++
	return int(b)
}

// long adds up the bytes of a length that did not fit its field.
func (d *decoder) long(base int) int {
	for !d.bad {
		b := d.byte()
		if b != 0 {
			return base + b
		}
		base += 255
	}
	return 0
}

func (d *decoder) literals(n int) {
	if d.bad || n > len(d.in)-d.p || n > len(d.out)-d.n {
		d.bad = true
		return
	}
	copy(d.out[d.n:], d.in[d.p:d.p+n])
	d.p += n
	d.n += n
}

func (d *decoder) match(dist, n int) {
	if d.bad || dist <= 0 || dist > d.n || n > len(d.out)-d.n {
		d.bad = true
		return
	}
	for end := d.n + n; d.n < end; d.n++ {
		d.out[d.n] = d.out[d.n-dist]
	}
}

// Block fills out or less, and gives how much.
func Block(out, in []byte) (int, error) {
	d := &decoder{in: in, out: out}
	state := 0 // literals since the last match: 0, 1 to 3, or 4 for more
	if len(in) > 0 && in[0] > 17 {
		n := d.byte() - 17
		d.literals(n)
		state = min(n, 4)
	}
	for !d.bad {
		c := d.byte()
		trailing := 0
		switch {
		case c < 16 && state == 0:
			if c == 0 {
				c = d.long(15)
			}
			d.literals(c + 3)
			state = 4
			continue
		case c < 16 && state == 4:
			trailing = c & 3
			d.match(1+0x800+c>>2+d.byte()<<2, 3)
		case c < 16:
			trailing = c & 3
			d.match(1+c>>2+d.byte()<<2, 2)
		case c < 64:
			stop := false
			if trailing, stop = d.far(c); stop {
				if d.bad {
					return d.n, ErrCorrupt
				}
				return d.n, nil
			}
		default:
			trailing = c & 3
			d.match(1+c>>2&7+d.byte()<<3, c>>5+1)
		}
		d.literals(trailing)
		state = trailing
	}
	return d.n, ErrCorrupt
}

// far undoes a match with a distance of 14 bits or more. stop is the mark of the end.
func (d *decoder) far(c int) (trailing int, stop bool) {
	n, dist := 0, 0
	if c >= 32 {
		if n = c & 31; n == 0 {
			n = d.long(31)
		}
		dist = 1
	} else {
		if n = c & 7; n == 0 {
			n = d.long(7)
		}
		dist = 0x4000 + c&8<<11
	}
	low := d.byte()
	v := low | d.byte()<<8
	dist += v >> 2
	if c < 32 && dist == 0x4000 {
		return 0, true
	}
	d.match(dist, n+2)
	return v & 3, false
}
