// Package squashfs reads squashfs 4.0, as Linux fs/squashfs/squashfs_fs.h lays it out. A read of several blocks uses a
// few goroutines, which have ended when it returns.
package squashfs

import (
	"context"
	"encoding/binary"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

var le = binary.LittleEndian

const (
	magic     = 0x73717368 // "hsqs"
	superSize = 96
	metaSize  = 8192
	none64    = ^uint64(0)
	none32    = ^uint32(0)

	minBlock = 4 << 10
	maxBlock = 1 << 20
)

const pack = "make the image with: mksquashfs DIR IMAGE -comp zstd"

// FS is an open file system. It is not safe for concurrent use.
type FS struct {
	c        *blockio.Cache
	end      int64 // bytes used
	block    int64
	un       unpacker
	root     uint64
	ids      table
	frags    table
	xattrIDs table
	xattrs   int64 // byte where the attributes begin; 0: none
	inodes   int64
	dirs     int64
	meta     metaCache
	blocks   []kept // fragments that were used last
}

// table is an indexed list of fixed-size entries in metadata blocks.
type table struct {
	index int64 // byte of the list of blocks
	count int64
	size  int64 // of an entry
}

const cachePages = 64

// Detect says whether head begins a little-endian squashfs.
func Detect(head []byte) bool { return len(head) >= 4 && le.Uint32(head) == magic }

// Open reads the superblock. Errors are refusals, but for those of d and ctx.
func Open(ctx context.Context, d blockio.Disk) (*FS, error) {
	f := &FS{c: blockio.NewCache(d, cachePages)}
	f.c.Bind(ctx)
	s, err := f.c.View(0, superSize)
	if err != nil {
		return nil, err
	}
	if !Detect(s) {
		return nil, verdict.Damaged("squashfs: no superblock")
	}
	if major, minor := le.Uint16(s[28:]), le.Uint16(s[30:]); major != 4 || minor != 0 {
		return nil, verdict.Unsupported(pack, "squashfs: version %d.%d is not read", major, minor)
	}
	f.block = int64(le.Uint32(s[12:]))
	if f.block < minBlock || f.block > maxBlock || f.block&(f.block-1) != 0 || f.block != 1<<le.Uint16(s[22:]) {
		return nil, verdict.Damaged("squashfs: the block size is %d", f.block)
	}
	f.end = int64(min(le.Uint64(s[40:]), 1<<62))
	if f.end > d.Size() {
		return nil, verdict.Cut("squashfs: the file system has %d bytes, the disk %d", f.end, d.Size())
	}
	if f.un, err = newUnpacker(le.Uint16(s[20:])); err != nil {
		return nil, err
	}
	f.root = le.Uint64(s[32:])
	at := func(off int) int64 { return int64(min(le.Uint64(s[off:]), 1<<62)) }
	f.inodes, f.dirs = at(64), at(72)
	f.ids = table{index: at(48), count: int64(le.Uint16(s[26:])), size: 4}
	f.frags = table{index: at(80), count: int64(le.Uint32(s[16:])), size: 16}
	if le.Uint64(s[56:]) != none64 {
		h, err := f.c.View(at(56), 16)
		if err != nil {
			return nil, err
		}
		f.xattrs = int64(min(le.Uint64(h), 1<<62))
		f.xattrIDs = table{index: at(56) + 16, count: int64(le.Uint32(h[8:])), size: 16}
	}
	return f, nil
}

// Bind ties later reads to ctx.
func (f *FS) Bind(ctx context.Context) { f.c.Bind(ctx) }

// entry reads number n of a table.
func (f *FS) entry(t table, n int64, what string) ([]byte, error) {
	if n >= t.count {
		return nil, verdict.Damaged("squashfs: %s %d of %d is wanted", what, n, t.count)
	}
	off := n * t.size
	p, err := f.c.View(t.index+off/metaSize*8, 8)
	if err != nil {
		return nil, err
	}
	m := f.cursor(int64(min(le.Uint64(p), 1<<62)), int(off%metaSize))
	return m.next(int(t.size))
}
