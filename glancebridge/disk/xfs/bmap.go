package xfs

import (
	"sort"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

const (
	bmapV4    = 0x424D4150 // "BMAP"
	bmapV5    = 0x424D4133 // "BMA3"
	maxLevels = 16
	endOfFile = int64(1) << 46 // blocks: beyond any size in bytes that a number holds
)

// find looks up logical block b of a fork: the byte of the disk (-1: a hole) and for how many blocks that goes on,
// at least one.
func (f *FS) find(i *inode, k *fork, b int64) (phys, n int64, err error) {
	if b >= endOfFile {
		return 0, 0, broken(i)
	}
	end := endOfFile
	var recs []byte
	switch k.format {
	case formatExtents:
		if k.count > uint64(len(k.b)/16) {
			return 0, 0, broken(i)
		}
		recs = k.b[:16*k.count]
	case formatBtree:
		if recs, end, err = f.leaf(i, k, b); err != nil {
			return 0, 0, err
		}
	default:
		return 0, 0, broken(i)
	}
	count := len(recs) / 16
	next := sort.Search(count, func(n int) bool { return startOff(recs[16*n:]) > b })
	if next < count {
		end = min(end, startOff(recs[16*next:]))
	}
	if end <= b {
		return 0, 0, broken(i)
	}
	if next == 0 {
		return -1, end - b, nil
	}
	r := recs[16*(next-1):]
	l0, l1 := be.Uint64(r), be.Uint64(r[8:])
	from, length := startOff(r), int64(l1&(1<<21-1))
	if b >= from+length {
		return -1, end - b, nil
	}
	n = min(from+length, end) - b
	if l0>>63 != 0 { // allocated but not written
		return -1, n, nil
	}
	phys, err = f.linear(int64(l0&0x1FF<<43|l1>>21)+b-from, n)
	return phys, n, err
}

func broken(i *inode) error { return verdict.Damaged("xfs: inode %d has a broken map", i.no) }

func startOff(r []byte) int64 { return int64(be.Uint64(r) << 1 >> 10) }

// leaf descends a fork's tree to the records around block b. end is where the tree's next leaf begins.
func (f *FS) leaf(i *inode, k *fork, b int64) (recs []byte, end int64, err error) {
	if len(k.b) < 4+16 {
		return nil, 0, broken(i)
	}
	end = endOfFile
	level, count := int(be.Uint16(k.b)), int(be.Uint16(k.b[2:]))
	room := k.b[4:]
	if level < 1 || level > maxLevels {
		return nil, 0, broken(i)
	}
	for {
		fit := len(room) / 16
		if count == 0 || count > fit {
			return nil, 0, broken(i)
		}
		next := sort.Search(count, func(n int) bool { return int64(be.Uint64(room[8*n:])) > b })
		if next < count {
			end = min(end, int64(be.Uint64(room[8*next:])))
		}
		ptr := int64(be.Uint64(room[8*fit+8*max(0, next-1):]))
		at, err := f.linear(ptr, 1)
		if err != nil {
			return nil, 0, err
		}
		block, err := f.c.View(at, int(f.bs))
		if err != nil {
			return nil, 0, err
		}
		magic, head := uint32(bmapV4), 24
		if f.v5 {
			magic, head = bmapV5, 72
		}
		level--
		if be.Uint32(block) != magic || int(be.Uint16(block[4:])) != level {
			return nil, 0, broken(i)
		}
		if f.csum && !sumOK(block, 64) {
			return nil, 0, verdict.Damaged("xfs: the checksum of the map of inode %d is wrong", i.no)
		}
		count = int(be.Uint16(block[6:]))
		room = block[head:]
		if level == 0 {
			if count > len(room)/16 {
				return nil, 0, broken(i)
			}
			return room[:16*count], end, nil
		}
	}
}
