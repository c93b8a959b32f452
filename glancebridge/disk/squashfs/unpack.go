package squashfs

import (
	"bytes"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/zlib"

	"github.com/novalet/novalet/glancebridge/disk/internal/lz4"
	"github.com/novalet/novalet/glancebridge/disk/internal/lzma"
	"github.com/novalet/novalet/glancebridge/disk/internal/lzo"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/zst"
)

// unpacker undoes the compression of one block: it fills out or less, and never needs more. It is safe for concurrent
// use.
type unpacker interface {
	unpack(out, in []byte) (int, error)
}

func newUnpacker(kind uint16) (unpacker, error) {
	switch kind {
	case 1:
		return &gzip{}, nil
	case 2:
		return &xz{alone: true}, nil
	case 3:
		return lz{lzo.Block}, nil
	case 4:
		return &xz{}, nil
	case 5:
		return lz{lz4.Block}, nil
	case 6:
		dec, err := zst.New(maxBlock)
		if err != nil {
			return nil, err
		}
		return &zstd{dec: dec}, nil
	}
	return nil, verdict.Unsupported(pack, "squashfs: the kind of compression (%d) is not known", kind)
}

// unpackError is the refusal for a block at a byte of the disk.
func unpackError(err error, at int64) error {
	if errors.Is(err, lzma.ErrFilter) {
		return verdict.Unsupported("make the image with mksquashfs without -Xbcj", "squashfs: xz branch filters are not read")
	}
	return verdict.Damaged("squashfs: the block at byte %d does not unpack", at)
}

type gzip struct{ pool sync.Pool }

type zlibReader struct {
	r bytes.Reader
	z io.ReadCloser
}

func (g *gzip) unpack(out, in []byte) (int, error) {
	s, _ := g.pool.Get().(*zlibReader)
	if s == nil {
		s = &zlibReader{}
	}
	defer g.pool.Put(s)
	s.r.Reset(in)
	var err error
	if s.z == nil {
		s.z, err = zlib.NewReader(&s.r)
	} else {
		err = s.z.(zlib.Resetter).Reset(&s.r, nil)
	}
	n := 0
	for err == nil && n < len(out) {
		var k int
		k, err = s.z.Read(out[n:])
		n += k
	}
	if err == io.EOF {
		err = nil
	}
	return n, err
}

type xz struct {
	alone bool
	pool  sync.Pool
}

func (x *xz) unpack(out, in []byte) (int, error) {
	d, _ := x.pool.Get().(*lzma.Decoder)
	if d == nil {
		d = &lzma.Decoder{}
	}
	defer x.pool.Put(d)
	if x.alone {
		return d.Alone(out, in)
	}
	return d.XZ(out, in)
}

type lz struct {
	block func(out, in []byte) (int, error)
}

func (l lz) unpack(out, in []byte) (int, error) { return l.block(out, in) }

type zstd struct{ dec *zst.Decoder }

func (z *zstd) unpack(out, in []byte) (int, error) { return z.dec.All(out, in) }
