package ext4

import (
	"sort"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
)

// lookup gives the piece of a file that begins at byte off, a whole number of blocks but for the first.
func (f *FS) lookup(i *inode, off int64) (walk.Run, error) {
	b, in := off/f.bs, off%f.bs
	find := f.mapped
	if i.flags&flagExtents != 0 {
		find = f.extent
	}
	phys, n, err := find(i, b)
	if err != nil {
		return walk.Run{}, err
	}
	r := walk.Run{Len: n*f.bs - in, Phys: walk.Hole}
	if phys > 0 {
		if phys >= f.blocks || n > f.blocks-phys {
			return r, verdict.Damaged("ext4: inode %d has data at block %d of %d", i.no, phys, f.blocks)
		}
		r.Phys = phys*f.bs + in
	}
	return r, nil
}

const (
	extentMagic = 0xF30A
	maxDepth    = 5
	endOfFile   = int64(1) << 32 // logical blocks have 32 bits
)

// extent finds logical block b: its disk block (0: a hole) and for how many blocks that goes on. Every answer is at
// least one block long, so that a reader always gets ahead whatever the tree holds.
func (f *FS) extent(i *inode, b int64) (phys, n int64, err error) {
	if b >= endOfFile {
		return 0, 0, verdict.Damaged("ext4: inode %d is larger than its map can be", i.no)
	}
	node := i.block()
	end := endOfFile
	depth := -1
	for {
		count := int(le.Uint16(node[2:]))
		d := int(le.Uint16(node[6:]))
		if le.Uint16(node) != extentMagic || count > (len(node)-12)/12 || d > maxDepth || depth >= 0 && d != depth-1 {
			return 0, 0, verdict.Damaged("ext4: inode %d has a broken extent tree", i.no)
		}
		depth = d
		// The first entry beyond b; the one before it is b's.
		k := sort.Search(count, func(k int) bool { return int64(le.Uint32(node[12+12*k:])) > b })
		if k < count {
			end = min(end, int64(le.Uint32(node[12+12*k:])))
		}
		if end <= b {
			return 0, 0, verdict.Damaged("ext4: inode %d has a broken extent tree", i.no)
		}
		if k == 0 {
			return 0, end - b, nil
		}
		e := node[12+12*(k-1):][:12]
		if depth == 0 {
			phys, n = leaf(e, b, end)
			return phys, n, nil
		}
		next := int64(le.Uint32(e[4:])) | int64(le.Uint16(e[8:]))<<32
		if node, err = f.extentBlock(i, next); err != nil {
			return 0, 0, err
		}
	}
}

// leaf is the part of extent e from b on, or the hole behind it.
func leaf(e []byte, b, end int64) (phys, n int64) {
	from := int64(le.Uint32(e))
	length := int64(le.Uint16(e[4:]))
	unwritten := length > 32768
	if unwritten {
		length -= 32768
	}
	if b >= from+length {
		return 0, end - b
	}
	n = min(from+length, end) - b
	if unwritten {
		return 0, n
	}
	return int64(le.Uint32(e[8:])) | int64(le.Uint16(e[6:]))<<32 + b - from, n
}

func (f *FS) extentBlock(i *inode, no int64) ([]byte, error) {
	node, err := f.block(no)
	if err != nil || !f.csum {
		return node, err
	}
	// The checksum follows the last entry that fits.
	at := 12 + 12*int(le.Uint16(node[4:]))
	if at+4 > len(node) {
		return nil, verdict.Damaged("ext4: inode %d has a broken extent tree", i.no)
	}
	if csum(f.inodeSeed(i), node[:at]) != le.Uint32(node[at:]) {
		return nil, verdict.Damaged("ext4: the checksum of the extents of inode %d is wrong", i.no)
	}
	return node, nil
}

func (f *FS) inodeSeed(i *inode) uint32 {
	var b [4]byte
	le.PutUint32(b[:], i.no)
	return csum(csum(f.seed, b[:]), i.raw[100:104])
}

const direct = 12

// mapped is extent for the block maps of ext2 and ext3.
func (f *FS) mapped(i *inode, b int64) (phys, n int64, err error) {
	per := f.bs / 4
	if b < direct {
		phys, n = run(i.block()[:4*direct], b)
		return phys, n, nil
	}
	b -= direct
	span := int64(1) // blocks below one pointer
	for level := 1; level <= 3; level++ {
		if b < span*per {
			return f.indirect(i, int64(le.Uint32(i.block()[4*(direct+level-1):])), span, b)
		}
		b -= span * per
		span *= per
	}
	return 0, 0, verdict.Damaged("ext4: inode %d is larger than its map can be", i.no)
}

func (f *FS) indirect(i *inode, at, span, b int64) (phys, n int64, err error) {
	per := f.bs / 4
	for {
		if at == 0 {
			return 0, span*per - b, nil
		}
		ptrs, err := f.block(at)
		if err != nil {
			return 0, 0, err
		}
		if span == 1 {
			phys, n = run(ptrs, b)
			return phys, n, nil
		}
		at = int64(le.Uint32(ptrs[4*(b/span):]))
		if at == 0 {
			// All zero pointers that follow are one hole.
			_, zeros := run(ptrs, b/span)
			return 0, zeros*span - b%span, nil
		}
		b, span = b%span, span/per
	}
}

// run is the pointer k of a block of pointers, and how many follow it without a break.
func run(ptrs []byte, k int64) (phys, n int64) {
	first := int64(le.Uint32(ptrs[4*k:]))
	n = 1
	for j := k + 1; j < int64(len(ptrs)/4); j++ {
		next := int64(le.Uint32(ptrs[4*j:]))
		if first == 0 && next != 0 || first != 0 && next != first+n {
			break
		}
		n++
	}
	return first, n
}
