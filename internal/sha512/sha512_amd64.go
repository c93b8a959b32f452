package sha512

import (
	"crypto/sha512"
	"encoding/binary"
	"hash"
	"unsafe"

	"golang.org/x/sys/cpu"
)

// usable is more than the code asks for (AVX512F, AVX512BW, BMI2): processors before those with VBMI2 lower their clock for
// a while after such instructions.
var usable = cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW && cpu.X86.HasAVX512VBMI2 && cpu.X86.HasBMI2

func newHash() hash.Hash {
	if !usable {
		return sha512.New()
	}
	d := &digest{}
	work := make([]byte, workBytes+63)
	d.work = &work[-uintptr(unsafe.Pointer(&work[0]))&63]
	d.Reset()
	return d
}

const (
	// groupBytes are hashed side by side as far as that goes: eight blocks.
	groupBytes = 8 * BlockSize
	// workBytes is what the code needs beside, aligned to 64 bytes.
	workBytes = 4 * 80 * 64
)

// blocks hashes n blocks, at least one. p is read in whole groups.
//
//go:noescape
func blocks(h *[8]uint64, p *byte, n int, work *byte)

type digest struct {
	h    [8]uint64
	x    [groupBytes]byte
	nx   int    // bytes of x
	n    uint64 // bytes in all
	work *byte
}

// Reset implements hash.Hash. The values are from FIPS 180-4, 5.3.5.
func (d *digest) Reset() {
	d.h = [8]uint64{
		0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
		0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
	}
	d.nx, d.n = 0, 0
}

// Size implements hash.Hash.
func (d *digest) Size() int { return Size }

// BlockSize implements hash.Hash.
func (d *digest) BlockSize() int { return BlockSize }

// Write implements hash.Hash.
func (d *digest) Write(p []byte) (int, error) {
	all := len(p)
	d.n += uint64(all)
	if d.nx > 0 {
		n := copy(d.x[d.nx:], p)
		p = p[n:]
		if d.nx += n; d.nx < groupBytes {
			return all, nil
		}
		blocks(&d.h, &d.x[0], groupBytes/BlockSize, d.work)
	}
	if n := len(p) / groupBytes * groupBytes; n > 0 {
		blocks(&d.h, &p[0], n/BlockSize, d.work)
		p = p[n:]
	}
	d.nx = copy(d.x[:], p)
	return all, nil
}

// Sum implements hash.Hash.
func (d *digest) Sum(b []byte) []byte {
	h := d.h
	var end [2 * groupBytes]byte
	n := copy(end[:], d.x[:d.nx])
	end[n] = 0x80
	// The length in bits has 128 bits, at the end of the last block.
	n = (n + 1 + 16 + BlockSize - 1) / BlockSize * BlockSize
	binary.BigEndian.PutUint64(end[n-16:], d.n>>61)
	binary.BigEndian.PutUint64(end[n-8:], d.n<<3)
	blocks(&h, &end[0], n/BlockSize, d.work)
	for _, v := range h {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}
