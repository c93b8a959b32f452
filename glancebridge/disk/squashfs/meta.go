package squashfs

import (
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

// maxMeta is the number of unpacked metadata blocks that are kept: 4 MiB.
const maxMeta = 512

// metaCache keeps unpacked metadata blocks in two generations: when the young one is full it becomes the old one.
type metaCache struct {
	young, old map[int64]*metaBlock
}

type metaBlock struct {
	data []byte
	next int64 // byte where the block after it begins
}

// metadata gives the block that begins at a byte of the disk.
func (f *FS) metadata(at int64) (*metaBlock, error) {
	if b, ok := f.meta.young[at]; ok {
		return b, nil
	}
	b, ok := f.meta.old[at]
	if !ok {
		var err error
		if b, err = f.readMeta(at); err != nil {
			return nil, err
		}
	}
	if f.meta.young == nil || len(f.meta.young) >= maxMeta/2 {
		f.meta.old, f.meta.young = f.meta.young, make(map[int64]*metaBlock)
	}
	f.meta.young[at] = b
	return b, nil
}

func (f *FS) readMeta(at int64) (*metaBlock, error) {
	h, err := f.c.View(at, 2)
	if err != nil {
		return nil, err
	}
	head := le.Uint16(h)
	n := int(head & 0x7FFF)
	if n == 0 || n > metaSize {
		return nil, verdict.Damaged("squashfs: a metadata block at byte %d has %d bytes", at, n)
	}
	in, err := f.c.View(at+2, n)
	if err != nil {
		return nil, err
	}
	b := &metaBlock{data: in, next: at + 2 + int64(n)}
	if head&0x8000 != 0 {
		return b, nil
	}
	b.data = make([]byte, metaSize)
	got, err := f.un.unpack(b.data, in)
	if err != nil || got == 0 {
		return nil, unpackError(err, at)
	}
	b.data = b.data[:got]
	return b, nil
}

// cursor reads metadata from a place on, across blocks.
type cursor struct {
	f   *FS
	at  int64 // byte of the block
	off int   // in the unpacked block
}

func (f *FS) cursor(at int64, off int) *cursor { return &cursor{f: f, at: at, off: off} }

// ref is a cursor for a reference: the block's offset to base, and the place in the unpacked block.
func (f *FS) ref(base int64, ref uint64) *cursor {
	return f.cursor(base+int64(ref>>16&(1<<46-1)), int(ref&0xFFFF))
}

// next gives n bytes, to be read only. They are copied when they lie in several blocks.
func (c *cursor) next(n int) ([]byte, error) {
	b, err := c.block()
	if err != nil {
		return nil, err
	}
	if n <= len(b.data)-c.off {
		p := b.data[c.off : c.off+n : c.off+n]
		c.off += n
		return p, nil
	}
	p := make([]byte, 0, n)
	for len(p) < n {
		if b, err = c.block(); err != nil {
			return nil, err
		}
		k := min(n-len(p), len(b.data)-c.off)
		p = append(p, b.data[c.off:c.off+k]...)
		c.off += k
	}
	return p, nil
}

// block is the block with the next byte.
func (c *cursor) block() (*metaBlock, error) {
	for {
		b, err := c.f.metadata(c.at)
		if err != nil {
			return nil, err
		}
		if c.off < len(b.data) {
			return b, nil
		}
		if c.off > len(b.data) {
			return nil, verdict.Damaged("squashfs: byte %d of a metadata block of %d is wanted", c.off, len(b.data))
		}
		c.at, c.off = b.next, 0
	}
}
