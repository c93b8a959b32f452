// Package zst undoes zstd (RFC 8878) for blocks whose unpacked size is known and small.
package zst

import (
	"errors"

	"github.com/klauspost/compress/zstd"

	"github.com/novalet/novalet/glancebridge/disk/internal/cluster"
)

// ErrCorrupt is for input that is not zstd or does not fit the output.
var ErrCorrupt = errors.New("zst: corrupt input")

// Decoder is safe for concurrent use.
type Decoder struct{ dec *zstd.Decoder }

// New makes a decoder for blocks of up to size bytes.
func New(size int) (*Decoder, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(cluster.Workers()),
		zstd.WithDecoderMaxMemory(uint64(max(size, 64<<10))), zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecoderLowmem(true))
	return &Decoder{dec: dec}, err
}

// Fill undoes frames until dst is full or no frame follows, and gives how much was filled. What follows the frames is
// not looked at.
func (d *Decoder) Fill(dst, in []byte) (int, error) {
	done := 0
	for done < len(dst) {
		n := frame(in)
		if n <= 0 && done > 0 {
			return done, nil
		}
		if n <= 0 {
			return 0, ErrCorrupt
		}
		out, err := d.dec.DecodeAll(in[:n], dst[done:done:len(dst)])
		if err != nil || len(out) == 0 || len(out) > len(dst)-done {
			return done, ErrCorrupt
		}
		done += len(out)
		in = in[n:]
	}
	return done, nil
}

// All undoes all of in. It gives how much of dst was filled.
func (d *Decoder) All(dst, in []byte) (int, error) {
	out, err := d.dec.DecodeAll(in, dst[:0:len(dst)])
	if err != nil || len(out) > len(dst) {
		return 0, ErrCorrupt
	}
	return len(out), nil
}

// frame is the length of the frame that in begins with; 0 when it has none (section 3.1.1).
func frame(in []byte) int {
	var h zstd.Header
	if err := h.Decode(in); err != nil || h.Skippable {
		return 0
	}
	at := h.HeaderSize
	for {
		if at+3 > len(in) {
			return 0
		}
		b := int(in[at]) | int(in[at+1])<<8 | int(in[at+2])<<16
		at += 3
		if b>>1&3 == 1 {
			at++ // one byte, repeated
		} else {
			at += b >> 3
		}
		if b&1 != 0 {
			break
		}
	}
	if h.HasCheckSum {
		at += 4
	}
	if at > len(in) {
		return 0
	}
	return at
}
