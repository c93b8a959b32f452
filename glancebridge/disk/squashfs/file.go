package squashfs

import (
	"io"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/cluster"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
	"github.com/novalet/novalet/glancebridge/layer"
)

const (
	stored    = 1 << 24 // a block that is not compressed
	maxHoles  = 1 << 15
	keepFrags = 4
)

// kept is an unpacked fragment block: the tails of many files share one.
type kept struct {
	no   uint32
	data []byte
}

// file reads the blocks of a file in order, then its tail in a fragment.
type file struct {
	f      *FS
	i      *inode
	size   int64
	blocks int64 // in the list
	holes  []layer.Extent
	data   int64

	list cursor
	at   int64 // byte of the disk of the next block
	no   int64
	rest []byte // of a block that was read for less than its size
	buf  []byte
}

// Open reads a file's list of blocks.
func (f *FS) Open(n *walk.Node) (walk.File, error) {
	i := n.Priv.(*inode)
	o := &file{f: f, i: i, size: n.Size, list: i.list, at: i.start}
	o.blocks = n.Size / f.block
	if i.fragment == none32 && n.Size%f.block != 0 {
		o.blocks++
	}
	c := i.list
	for k := range o.blocks {
		b, err := c.next(4)
		if err != nil {
			return nil, err
		}
		size := min(f.block, n.Size-k*f.block)
		if le.Uint32(b) != 0 {
			o.data += size
		} else if last := len(o.holes) - 1; last >= 0 && o.holes[last].Off+o.holes[last].Len == k*f.block {
			o.holes[last].Len += size
		} else if len(o.holes) < maxHoles {
			o.holes = append(o.holes, layer.Extent{Off: k * f.block, Len: size})
		}
	}
	o.data += n.Size - min(n.Size, o.blocks*f.block)
	return o, nil
}

func (o *file) Holes() []layer.Extent { return o.holes }
func (o *file) Data() int64           { return o.data }

// work is a block to unpack into dst.
type work struct {
	at  int64
	in  []byte
	raw bool
	dst []byte
	err error
}

func (o *file) Read(p []byte) (int, error) {
	if len(o.rest) > 0 {
		n := copy(p, o.rest)
		o.rest = o.rest[n:]
		return n, nil
	}
	if o.no*o.f.block >= o.size {
		return 0, io.EOF
	}
	if o.no == o.blocks {
		return o.tail(p)
	}
	if want := min(o.f.block, o.size-o.no*o.f.block); int64(len(p)) < want {
		if o.buf == nil {
			o.buf = make([]byte, o.f.block)
		}
		n, err := o.read(o.buf[:want])
		o.rest = o.buf[:n]
		if err != nil {
			return 0, err
		}
		n = copy(p, o.rest)
		o.rest = o.rest[n:]
		return n, nil
	}
	return o.read(p)
}

// read fills p with as many whole blocks as fit.
func (o *file) read(p []byte) (int, error) {
	var all []*work
	n := 0
	for o.no < o.blocks {
		size := min(o.f.block, o.size-o.no*o.f.block)
		if int64(len(p)-n) < size {
			break
		}
		w, err := o.next(p[n : n+int(size)])
		if err != nil {
			return 0, err
		}
		if w != nil {
			all = append(all, w)
		}
		n += int(size)
	}
	o.f.unpack(all)
	for _, w := range all {
		if w.err != nil {
			return 0, w.err
		}
	}
	return n, nil
}

// next takes the next block of the list and reads it from the disk; nil for a hole.
func (o *file) next(dst []byte) (*work, error) {
	b, err := o.list.next(4)
	if err != nil {
		return nil, err
	}
	o.no++
	entry := le.Uint32(b)
	if entry == 0 {
		clear(dst)
		return nil, nil
	}
	w, err := o.f.load(o.at, entry, dst)
	o.at += int64(entry &^ stored)
	return w, err
}

// load reads the block at a byte of the disk. Stored blocks are read in place.
func (f *FS) load(at int64, entry uint32, dst []byte) (*work, error) {
	n := int64(entry &^ stored)
	if n > f.block || n == 0 || !blockio.Inside(at, n, f.end) {
		return nil, verdict.Damaged("squashfs: a block at byte %d has %d bytes", at, n)
	}
	w := &work{at: at, dst: dst, raw: entry&stored != 0}
	if w.raw {
		if n != int64(len(dst)) {
			return nil, verdict.Damaged("squashfs: the block at byte %d has %d bytes, not %d", at, n, len(dst))
		}
		_, err := f.c.Disk().ReadAt(dst, at)
		return w, err
	}
	w.in = make([]byte, n)
	_, err := f.c.Disk().ReadAt(w.in, at)
	return w, err
}

func (f *FS) unpack(all []*work) {
	do := func(w *work) {
		if w.raw {
			return
		}
		if n, err := f.un.unpack(w.dst, w.in); err != nil || n != len(w.dst) {
			w.err = unpackError(err, w.at)
		}
	}
	cluster.Each(len(all), func(k int) { do(all[k]) })
}

// tail reads what a fragment holds of the file.
func (o *file) tail(p []byte) (int, error) {
	b, err := o.f.fragment(o.i.fragment)
	if err != nil {
		return 0, err
	}
	from, n := int64(o.i.fragOff), o.size-o.blocks*o.f.block
	if from+n > int64(len(b)) {
		return 0, verdict.Damaged("squashfs: a file's tail lies outside fragment %d", o.i.fragment)
	}
	o.no = o.blocks + 1
	o.size = min(o.size, o.no*o.f.block) // nothing follows
	o.rest = b[from : from+n]
	k := copy(p, o.rest)
	o.rest = o.rest[k:]
	return k, nil
}

// fragment unpacks a fragment block, unless it is among those used last.
func (f *FS) fragment(no uint32) ([]byte, error) {
	for k, b := range f.blocks {
		if b.no == no {
			copy(f.blocks[1:k+1], f.blocks[:k])
			f.blocks[0] = b
			return b.data, nil
		}
	}
	e, err := f.entry(f.frags, int64(no), "fragment")
	if err != nil {
		return nil, err
	}
	at, entry := int64(min(le.Uint64(e), 1<<62)), le.Uint32(e[8:])
	dst := make([]byte, f.block)
	if entry&stored != 0 {
		dst = dst[:min(int64(entry&^stored), f.block)]
	}
	w, err := f.load(at, entry, dst)
	if err != nil {
		return nil, err
	}
	if !w.raw {
		// The last fragment block may be short.
		n, err := f.un.unpack(dst, w.in)
		if err != nil {
			return nil, unpackError(err, at)
		}
		dst = dst[:n]
	}
	if len(f.blocks) < keepFrags {
		f.blocks = append(f.blocks, kept{})
	}
	copy(f.blocks[1:], f.blocks)
	f.blocks[0] = kept{no: no, data: dst}
	return dst, nil
}
