// Package lz4 undoes LZ4 blocks (lz4_Block_format.md).
package lz4

import "errors"

// ErrCorrupt is for input that is no LZ4 block or does not fit the output.
var ErrCorrupt = errors.New("lz4: corrupt input")

// Block fills out or less, and gives how much.
func Block(out, in []byte) (int, error) {
	n := 0
	for p := 0; p < len(in); {
		token := in[p]
		p++
		lit := int(token >> 4)
		if lit == 15 {
			more, used, ok := length(in[p:])
			if !ok {
				return n, ErrCorrupt
			}
			lit += more
			p += used
		}
		if lit > len(in)-p || lit > len(out)-n {
			return n, ErrCorrupt
		}
		n += copy(out[n:], in[p:p+lit])
		if p += lit; p == len(in) {
			return n, nil
		}
		if len(in)-p < 2 {
			return n, ErrCorrupt
		}
		dist := int(in[p]) | int(in[p+1])<<8
		p += 2
		m := int(token&15) + 4
		if m == 19 {
			more, used, ok := length(in[p:])
			if !ok {
				return n, ErrCorrupt
			}
			m += more
			p += used
		}
		if dist == 0 || dist > n || m > len(out)-n {
			return n, ErrCorrupt
		}
		if dist >= m {
			n += copy(out[n:n+m], out[n-dist:])
			continue
		}
		for end := n + m; n < end; n++ {
			out[n] = out[n-dist]
		}
	}
	return n, ErrCorrupt
}

// length adds up bytes until one is not 255. The input is short enough that the sum cannot overflow.
func length(in []byte) (sum, used int, ok bool) {
	for used < len(in) {
		b := in[used]
		used++
		if sum += int(b); b != 255 {
			return sum, used, true
		}
	}
	return 0, 0, false
}
