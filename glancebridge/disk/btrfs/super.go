// Package btrfs reads btrfs on one device, as Linux include/uapi/linux/btrfs_tree.h and fs/btrfs lay it out. The tree
// it gives is what a boot would see: the default subvolume, or a well-known root subvolume when the default is the
// top level; the subvolumes that its /etc/fstab mounts; and subvolumes nested in them. Snapshots are left out.
package btrfs

import (
	"context"
	"encoding/binary"
	"hash/crc32"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
	"github.com/novalet/novalet/glancebridge/disk/internal/zst"
)

var le = binary.LittleEndian

const (
	superOff  = 64 << 10
	superSize = 4096
	magic     = "_BHRfS_M"
	arrayOff  = 811 // of the chunks that hold the chunk tree
	arraySize = 2048
)

// mixed backrefs, default subvolume, mixed groups, lzo, zstd, big metadata, extended references, raid56 (a single
// device has none), skinny metadata, no holes, metadata UUID, raid1c34, simple quotas.
const incompatKnown = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800 | 0x10000

const (
	csumCRC32C  = 0
	minNode     = 4 << 10
	maxNode     = 64 << 10
	maxLevel    = 7
	maxChunks   = 1 << 16
	maxTrees    = 1 << 12
	cachePages  = 128
	plainBackup = "balance it to one device, or copy the system to a plain ext4 or XFS disk"
)

// FS is an open file system. It is not safe for concurrent use.
type FS struct {
	c      *blockio.Cache
	d      blockio.Disk
	node   int
	sector int64
	devid  uint64
	sum    bool
	chunks []chunk // by logical address
	rootAt pointer // of the tree of trees
	trees  []tree
	byID   map[uint64]int
	grafts map[uint64]uint64 // directory to the root of what is mounted there
	bound  map[int]bool      // trees that are mounted somewhere
	stubs  []*walk.Node
	stubAt map[stubKey]uint64
	zdec   *zst.Decoder
	last   unpacked
}

// Options change how Open reads.
type Options struct {
	// IgnoreChecksums reads on where a checksum is wrong: a fuzzer would get nowhere else.
	IgnoreChecksums bool
}

// pointer is where a tree's root node is.
type pointer struct {
	at    uint64
	level int
}

// tree is a subvolume. Its place in FS.trees is a part of each ref.
type tree struct {
	id   uint64
	root pointer
	dir  uint64 // inode of the root directory
}

// Detect says whether head, the first 68 KiB of a disk, looks like btrfs.
func Detect(head []byte) bool {
	return len(head) >= superOff+72 && string(head[superOff+64:superOff+72]) == magic
}

// Open reads the superblock and the chunk map, and finds the root subvolume. Errors are refusals, but for those of d
// and ctx.
func Open(ctx context.Context, d blockio.Disk, o Options) (*FS, error) {
	f := &FS{
		c: blockio.NewCache(d, cachePages), d: d, byID: map[uint64]int{}, grafts: map[uint64]uint64{}, bound: map[int]bool{},
		stubAt: map[stubKey]uint64{},
	}
	f.c.Bind(ctx)
	s, err := f.c.View(superOff, superSize)
	if err != nil {
		return nil, err
	}
	if string(s[64:72]) != magic {
		return nil, verdict.Damaged("btrfs: no superblock")
	}
	if le.Uint16(s[196:]) == csumCRC32C && !o.IgnoreChecksums {
		f.sum = true
		if !sumOK(s) {
			return nil, verdict.Damaged("btrfs: the superblock's checksum is wrong")
		}
	}
	if err := f.super(s); err != nil {
		return nil, err
	}
	if f.zdec, err = zst.New(maxExtent); err != nil {
		return nil, err
	}
	if err := f.readChunks(s); err != nil {
		return nil, err
	}
	f.rootAt = pointer{at: le.Uint64(s[80:]), level: int(s[198])}
	return f, f.pickRoot(le.Uint64(s[128:]))
}

func (f *FS) super(s []byte) error {
	f.node, f.sector, f.devid = int(min(le.Uint32(s[148:]), 1<<20)), int64(le.Uint32(s[144:])), le.Uint64(s[201:])
	in := le.Uint64(s[188:])
	switch {
	case in&^incompatKnown != 0:
		return verdict.Unsupported("make the file system with the distribution's default features",
			"btrfs: the file system needs unknown features (%#x)", in&^incompatKnown)
	case le.Uint64(s[136:]) != 1:
		return verdict.Unsupported(plainBackup, "btrfs: the file system is spread over %d devices", le.Uint64(s[136:]))
	case le.Uint64(s[96:]) != 0:
		return verdict.Unsupported("shut the machine down cleanly before taking its disk, or mount the file system once and unmount it",
			"btrfs: the disk was in use and its log holds changes")
	case f.node < minNode || f.node > maxNode || f.node&(f.node-1) != 0:
		return verdict.Damaged("btrfs: a node has %d bytes", f.node)
	case f.sector < 4096 || f.sector > maxNode || f.sector&(f.sector-1) != 0:
		return verdict.Damaged("btrfs: a sector has %d bytes", f.sector)
	case le.Uint64(s[112:]) > uint64(f.d.Size()):
		return verdict.Cut("btrfs: the file system has %d bytes, the disk %d", le.Uint64(s[112:]), f.d.Size())
	}
	return nil
}

// Bind ties later reads to ctx.
func (f *FS) Bind(ctx context.Context) { f.c.Bind(ctx) }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sumOK checks a block whose first 32 bytes are the checksum of the rest.
func sumOK(b []byte) bool { return crc32.Checksum(b[32:], castagnoli) == le.Uint32(b) }
