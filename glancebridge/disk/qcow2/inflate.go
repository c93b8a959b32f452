package qcow2

import (
	"bytes"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/cluster"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

// inflater undoes the compression of clusters. It is safe for concurrent use.
type inflater struct {
	file    blockio.Disk
	cluster int64
	zdec    *zstd.Decoder
	pool    sync.Pool
}

type scratch struct {
	in   []byte
	r    bytes.Reader
	flat io.ReadCloser
}

func newInflater(file blockio.Disk, size int64, zst bool) (*inflater, error) {
	f := &inflater{file: file, cluster: size}
	if zst {
		dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(cluster.Workers()),
			zstd.WithDecoderMaxMemory(uint64(max(size, 64<<10))), zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, err
		}
		f.zdec = dec
	}
	return f, nil
}

// load inflates a cluster into dst, which it fills.
func (f *inflater) load(c cluster.Cell, dst []byte) error {
	s, _ := f.pool.Get().(*scratch)
	if s == nil {
		s = &scratch{}
	}
	defer f.pool.Put(s)
	if int64(cap(s.in)) < c.Length {
		s.in = make([]byte, max(c.Length, f.cluster))
	}
	in := s.in[:c.Length]
	if _, err := f.file.ReadAt(in, c.At); err != nil {
		return err
	}
	if f.zdec != nil {
		return f.zstd(c, in, dst)
	}
	s.r.Reset(in)
	if s.flat == nil {
		s.flat = flate.NewReader(&s.r)
	} else if err := s.flat.(flate.Resetter).Reset(&s.r, nil); err != nil {
		return err
	}
	if _, err := io.ReadFull(s.flat, dst); err != nil {
		return broken(c)
	}
	return nil
}

func broken(c cluster.Cell) error {
	return verdict.Damaged("qcow2: the compressed data at byte %d does not unpack", c.At)
}

// zstd undoes as many frames as fill dst. What follows them is the next cluster's.
func (f *inflater) zstd(c cluster.Cell, in, dst []byte) error {
	for done := 0; done < len(dst); {
		n := frame(in)
		if n <= 0 {
			return broken(c)
		}
		out, err := f.zdec.DecodeAll(in[:n], dst[done:done:len(dst)])
		if err != nil || len(out) == 0 || len(out) > len(dst)-done {
			return broken(c)
		}
		done += len(out)
		in = in[n:]
	}
	return nil
}

// frame is the length of the zstd frame that in begins with; 0 when it has none (RFC 8878, section 3.1.1).
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
