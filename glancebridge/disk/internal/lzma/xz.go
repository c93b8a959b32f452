package lzma

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"hash/crc64"
)

// ErrFilter is for xz blocks that passed through more than LZMA2, such as a branch filter.
var ErrFilter = errors.New("lzma: unknown xz filter")

var ecma = crc64.MakeTable(crc64.ECMA)

const (
	checkCRC32 = 1
	checkCRC64 = 4
	filterLZMA = 0x21
)

// checkSizes are the lengths of the sixteen kinds of check.
var checkSizes = [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}

// XZ undoes one xz stream. It gives how much of out was filled; what follows the stream's blocks is not looked at.
func (d *Decoder) XZ(out, in []byte) (int, error) {
	if len(in) < 12 || string(in[:6]) != "\xfd7zXZ\x00" || in[6] != 0 || in[7] > 15 ||
		crc32.ChecksumIEEE(in[6:8]) != binary.LittleEndian.Uint32(in[8:]) {
		return 0, ErrCorrupt
	}
	check := in[7]
	in = in[12:]
	n := 0
	for len(in) > 0 && in[0] != 0 { // 0 begins the index
		got, used, err := d.block(out[n:], in, check)
		if err != nil {
			return n, err
		}
		n += got
		in = in[used:]
	}
	if len(in) == 0 {
		return n, ErrCorrupt
	}
	return n, nil
}

func (d *Decoder) block(out, in []byte, check byte) (n, used int, err error) {
	head := (int(in[0]) + 1) * 4
	if len(in) < head || crc32.ChecksumIEEE(in[:head-4]) != binary.LittleEndian.Uint32(in[head-4:]) {
		return 0, 0, ErrCorrupt
	}
	flags, h := in[1], in[2:head-4]
	for _, bit := range []byte{0x40, 0x80} { // sizes, which the data itself tells
		if flags&bit != 0 {
			_, k := binary.Uvarint(h)
			if k <= 0 {
				return 0, 0, ErrCorrupt
			}
			h = h[k:]
		}
	}
	if flags&3 != 0 || len(h) < 3 || h[0] != filterLZMA || h[1] != 1 {
		return 0, 0, ErrFilter
	}
	n, used, err = d.LZMA2(out, in[head:])
	if err != nil {
		return n, used, err
	}
	used = (head + used + 3) &^ 3
	size := checkSizes[check]
	if len(in) < used+size {
		return n, used, ErrCorrupt
	}
	switch sum := in[used:]; check {
	case checkCRC32:
		if crc32.ChecksumIEEE(out[:n]) != binary.LittleEndian.Uint32(sum) {
			return n, used, ErrCorrupt
		}
	case checkCRC64:
		if crc64.Checksum(out[:n], ecma) != binary.LittleEndian.Uint64(sum) {
			return n, used, ErrCorrupt
		}
	}
	return n, used + size, nil
}
