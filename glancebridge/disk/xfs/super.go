// Package xfs reads XFS file systems of the versions 4 and 5, as Linux fs/xfs/libxfs/xfs_format.h and xfs_da_format.h
// lay them out. A file system whose log holds changes is refused: nothing is replayed.
package xfs

import (
	"context"
	"encoding/binary"
	"hash/crc32"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

var be = binary.BigEndian

const (
	magic     = 0x58465342 // "XFSB"
	superSize = 264
)

const (
	versionMask    = 0x000F
	versionDirV2   = 0x2000
	versionMore    = 0x8000
	features2FType = 0x200

	incompatFType       = 0x1
	incompatNeedsRepair = 0x10

	// ftype, sparse inodes, metadata UUID, bigtime, 64-bit extent counts, exchanged ranges, parent pointers.
	incompatKnown = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80
)

// FS is an open file system. It is not safe for concurrent use.
type FS struct {
	c         *blockio.Cache
	bs        int64
	blocks    int64
	agBlocks  int64
	agCount   int64
	agBlkLog  uint
	inoPerLog uint
	inodeSize int
	dirBlock  int64
	root      uint64
	v5        bool
	ftype     bool
	csum      bool
}

// Options change how Open reads.
type Options struct {
	// IgnoreChecksums reads on where a checksum is wrong: a fuzzer would get nowhere else.
	IgnoreChecksums bool
}

const cachePages = 128

const repair = "mount the file system once and unmount it (or run xfs_repair), then upload the disk again"

// Detect says whether head begins an XFS.
func Detect(head []byte) bool { return len(head) >= 4 && be.Uint32(head) == magic }

// Open reads the superblock and looks for an unfinished log. Errors are refusals, but for those of d and ctx.
func Open(ctx context.Context, d blockio.Disk, o Options) (*FS, error) {
	f := &FS{c: blockio.NewCache(d, cachePages)}
	f.c.Bind(ctx)
	s, err := f.c.View(0, superSize)
	if err != nil {
		return nil, err
	}
	if !Detect(s) {
		return nil, verdict.Damaged("xfs: no superblock")
	}
	if err := f.features(s); err != nil {
		return nil, err
	}
	if err := f.geometry(s); err != nil {
		return nil, err
	}
	if f.v5 && !o.IgnoreChecksums {
		f.csum = true
		sector := int(be.Uint16(s[102:]))
		if sector < 512 || sector > 32768 {
			return nil, verdict.Damaged("xfs: a sector has %d bytes", sector)
		}
		if s, err = f.c.View(0, sector); err != nil {
			return nil, err
		}
		if !sumOK(s, 224) {
			return nil, verdict.Damaged("xfs: the superblock's checksum is wrong")
		}
	}
	return f, f.log(ctx, s)
}

// Bind ties later reads to ctx.
func (f *FS) Bind(ctx context.Context) { f.c.Bind(ctx) }

// Root is the root directory.
func (f *FS) Root() uint64 { return f.root }

func (f *FS) features(s []byte) error {
	version := be.Uint16(s[100:])
	switch version & versionMask {
	case 4:
		f.ftype = version&versionMore != 0 && be.Uint32(s[200:])&features2FType != 0
	case 5:
		f.v5 = true
		in := be.Uint32(s[216:])
		f.ftype = in&incompatFType != 0
		if in&incompatNeedsRepair != 0 {
			return verdict.Unsupported(repair, "xfs: the file system is marked as in need of repair")
		}
		if bad := in &^ incompatKnown; bad != 0 {
			return verdict.Unsupported("make the file system with the distribution's default features",
				"xfs: the file system needs unknown features (%#x)", bad)
		}
	default:
		return verdict.Unsupported("make the file system anew", "xfs: version %d is not read", version&versionMask)
	}
	if version&versionDirV2 == 0 {
		return verdict.Unsupported("make the file system anew", "xfs: its directories are of the first version")
	}
	if s[126] != 0 {
		return verdict.Damaged("xfs: the file system was not made to the end")
	}
	return nil
}

func (f *FS) geometry(s []byte) error {
	f.bs, f.blocks = int64(be.Uint32(s[4:])), int64(min(be.Uint64(s[8:]), 1<<60))
	f.root = be.Uint64(s[56:])
	f.agBlocks, f.agCount = int64(be.Uint32(s[84:])), int64(be.Uint32(s[88:]))
	f.inodeSize = int(be.Uint16(s[104:]))
	f.inoPerLog, f.agBlkLog = uint(s[123]), uint(s[124])
	switch {
	case f.bs < 512 || f.bs > 65536 || f.bs != 1<<s[120]:
		return verdict.Damaged("xfs: the block size is %d", f.bs)
	case f.blocks <= 0 || f.blocks > f.c.Size()/f.bs:
		return verdict.Cut("xfs: the file system has %d blocks of %d bytes, the disk %d bytes", f.blocks, f.bs, f.c.Size())
	case f.inodeSize < 256 || f.inodeSize > 2048 || f.inodeSize != 1<<s[122] || int64(f.inodeSize)<<f.inoPerLog != f.bs:
		return verdict.Damaged("xfs: the inode size is %d", f.inodeSize)
	case f.agBlocks <= 0 || f.agCount <= 0 || f.agBlkLog > 31 || f.agBlocks > 1<<f.agBlkLog ||
		f.agCount > f.blocks/f.agBlocks+1:
		return verdict.Damaged("xfs: the superblock's counts make no sense")
	case s[192] > 16 || f.bs<<s[192] > 65536:
		return verdict.Damaged("xfs: the size of directory blocks is %d << %d", f.bs, s[192])
	}
	f.dirBlock = f.bs << s[192]
	return nil
}

// linear turns a block's number, which holds that of its allocation group, into a byte of the disk. n blocks must lie
// in the group.
func (f *FS) linear(b, n int64) (int64, error) {
	ag, in := b>>f.agBlkLog, b&(1<<f.agBlkLog-1)
	if b < 0 || ag >= f.agCount || in >= f.agBlocks || n > f.agBlocks-in || ag*f.agBlocks+in+n > f.blocks {
		return 0, verdict.Damaged("xfs: %d blocks at %d of group %d are wanted", n, in, ag)
	}
	return (ag*f.agBlocks + in) * f.bs, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sumOK checks the CRC-32C of b, which is kept at byte at, where zeros are summed.
func sumOK(b []byte, at int) bool {
	sum := crc32.Update(0, castagnoli, b[:at])
	sum = crc32.Update(sum, castagnoli, []byte{0, 0, 0, 0})
	return crc32.Update(sum, castagnoli, b[at+4:]) == binary.LittleEndian.Uint32(b[at:])
}
