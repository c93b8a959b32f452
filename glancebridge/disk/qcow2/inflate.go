package qcow2

import (
	"bytes"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/cluster"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/zst"
)

// inflater undoes the compression of clusters. It is safe for concurrent use.
type inflater struct {
	file    blockio.Disk
	cluster int64
	zdec    *zst.Decoder
	pool    sync.Pool
}

type scratch struct {
	in   []byte
	r    bytes.Reader
	flat io.ReadCloser
}

func newInflater(file blockio.Disk, size int64, useZstd bool) (*inflater, error) {
	f := &inflater{file: file, cluster: size}
	if useZstd {
		dec, err := zst.New(int(size))
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
		if n, err := f.zdec.Fill(dst, in); err != nil || n < len(dst) {
			return broken(c)
		}
		return nil
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
