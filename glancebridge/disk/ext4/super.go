// Package ext4 reads ext2, ext3 and ext4 file systems. The layout is that of Linux fs/ext4/ext4.h and the kernel's
// Documentation/filesystems/ext4. It never writes; a journal that was left unfinished is replayed in memory.
package ext4

import (
	"context"
	"encoding/binary"
	"hash/crc32"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

var le = binary.LittleEndian

const (
	superOff  = 1024
	superSize = 1024
)

// Incompatible features.
const (
	incompatFiletype   = 0x2
	incompatRecover    = 0x4
	incompatJournalDev = 0x8
	incompatMetaBG     = 0x10
	incompat64bit      = 0x80
	incompatEAInode    = 0x400
	incompatCsumSeed   = 0x2000
	incompatLargedir   = 0x4000
	incompatCasefold   = 0x20000
	incompatEncrypt    = 0x10000

	// filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir, inline_data, encrypt
	// (each encrypted inode is refused), casefold.
	incompatKnown = incompatFiletype | incompatRecover | incompatMetaBG | 0x40 | incompat64bit | 0x100 | 0x200 |
		incompatEAInode | incompatCsumSeed | incompatLargedir | 0x8000 | incompatEncrypt | incompatCasefold
)

const (
	compatJournal        = 0x4
	compatSparseSuper2   = 0x200
	roCompatSparseSuper  = 0x1
	roCompatMetadataCsum = 0x400
)

// FS is an open file system. It is not safe for concurrent use.
type FS struct {
	c         *blockio.Cache
	bs        int64
	blocks    int64
	inodes    uint32
	perGroup  uint32 // inodes
	blkGroup  uint32 // blocks
	first     uint32
	firstIno  uint32
	inodeSize int
	descSize  int
	groups    int64
	metaFirst uint32
	backups   [2]uint32
	compat    uint32
	incompat  uint32
	roCompat  uint32
	csum      bool
	blind     bool // to wrong checksums
	seed      uint32
	replayed  int
}

// Options change how Open reads.
type Options struct {
	// IgnoreChecksums reads on where a checksum is wrong: a fuzzer would get nowhere else.
	IgnoreChecksums bool
}

// cachePages is the cache of inodes, directories and maps: 8 MiB.
const cachePages = 128

// Detect says whether head, the first bytes of a disk (at least 2 KiB), looks like this file system.
func Detect(head []byte) bool {
	return len(head) >= superOff+58 && le.Uint16(head[superOff+56:]) == 0xEF53
}

// Open reads the superblock and, when the file system was not unmounted, its journal. Errors are refusals, but for
// those of d and ctx.
func Open(ctx context.Context, d blockio.Disk, o Options) (*FS, error) {
	f := &FS{c: blockio.NewCache(d, cachePages)}
	f.c.Bind(ctx)
	if err := f.super(o); err != nil {
		return nil, err
	}
	if f.incompat&incompatRecover == 0 {
		return f, nil
	}
	over, err := f.replay()
	if err != nil {
		return nil, err
	}
	if over == nil {
		return f, nil
	}
	n := over.count
	f = &FS{c: blockio.NewCache(over, cachePages), replayed: n}
	f.c.Bind(ctx)
	return f, f.super(o)
}

// Bind ties later reads to ctx.
func (f *FS) Bind(ctx context.Context) { f.c.Bind(ctx) }

// Replayed is the number of blocks that were taken from the journal.
func (f *FS) Replayed() int { return f.replayed }

// Name tells the generation apart as blkid does.
func (f *FS) Name() string {
	switch {
	case f.incompat&^(incompatFiletype|incompatRecover|incompatMetaBG) != 0 || f.roCompat&^0x7 != 0:
		return "ext4"
	case f.compat&compatJournal != 0:
		return "ext3"
	}
	return "ext2"
}

func (f *FS) super(o Options) error {
	s, err := f.c.View(superOff, superSize)
	if err != nil {
		return err
	}
	if le.Uint16(s[56:]) != 0xEF53 {
		return verdict.Damaged("ext4: no superblock")
	}
	f.blind = o.IgnoreChecksums
	f.compat, f.incompat, f.roCompat = le.Uint32(s[92:]), le.Uint32(s[96:]), le.Uint32(s[100:])
	f.firstIno, f.inodeSize = le.Uint32(s[84:]), int(le.Uint16(s[88:]))
	if le.Uint32(s[76:]) == 0 { // revision 0 has fixed sizes and no feature words
		f.compat, f.incompat, f.roCompat, f.firstIno, f.inodeSize = 0, 0, 0, 11, 128
	}
	if f.incompat&incompatJournalDev != 0 {
		return verdict.Unsupported("upload the disk that holds the file system itself", "ext4: this is an external journal")
	}
	if bad := f.incompat &^ incompatKnown; bad != 0 {
		return verdict.Unsupported("make the file system with the distribution's default features",
			"ext4: the file system needs unknown features (%#x)", bad)
	}
	if f.roCompat&roCompatMetadataCsum != 0 && !f.blind {
		if sum := csum(^uint32(0), s[:1020]); s[373] == 1 && sum != le.Uint32(s[1020:]) {
			return verdict.Damaged("ext4: the superblock's checksum is wrong")
		}
		f.csum = s[373] == 1
	}
	f.seed = csum(^uint32(0), s[104:120])
	if f.incompat&incompatCsumSeed != 0 {
		f.seed = le.Uint32(s[624:])
	}
	return f.geometry(s)
}

func (f *FS) geometry(s []byte) error {
	log := le.Uint32(s[24:])
	if log > 6 {
		return verdict.Damaged("ext4: the block size is 1024 << %d", log)
	}
	f.bs = 1024 << log
	f.blocks = int64(le.Uint32(s[4:]))
	if f.incompat&incompat64bit != 0 {
		f.blocks |= int64(le.Uint32(s[336:])) << 32
	}
	f.inodes, f.perGroup, f.blkGroup = le.Uint32(s[0:]), le.Uint32(s[40:]), le.Uint32(s[32:])
	f.first = le.Uint32(s[20:])
	f.metaFirst = le.Uint32(s[260:])
	f.backups = [2]uint32{le.Uint32(s[588:]), le.Uint32(s[592:])}
	f.descSize = 32
	if f.incompat&incompat64bit != 0 {
		f.descSize = int(le.Uint16(s[254:]))
	}
	switch {
	case f.blocks <= 0 || f.blocks > f.c.Size()/f.bs:
		return verdict.Cut("ext4: the file system has %d blocks of %d bytes, the disk %d bytes", f.blocks, f.bs, f.c.Size())
	case f.inodeSize < 128 || int64(f.inodeSize) > f.bs || f.inodeSize&(f.inodeSize-1) != 0:
		return verdict.Damaged("ext4: the inode size is %d", f.inodeSize)
	case f.descSize < 32 || int64(f.descSize) > f.bs || f.descSize&(f.descSize-1) != 0:
		return verdict.Damaged("ext4: the group descriptor size is %d", f.descSize)
	case f.perGroup == 0 || f.blkGroup == 0 || f.inodes == 0 || int64(f.first) >= f.blocks || f.first > 1:
		return verdict.Damaged("ext4: the superblock's counts make no sense")
	}
	f.groups = (f.blocks - int64(f.first) + int64(f.blkGroup) - 1) / int64(f.blkGroup)
	return nil
}

// hasSuper says whether a group begins with a copy of the superblock.
func (f *FS) hasSuper(g int64) bool {
	if f.compat&compatSparseSuper2 != 0 {
		return g == 0 || g == int64(f.backups[0]) || g == int64(f.backups[1])
	}
	if g <= 1 || f.roCompat&roCompatSparseSuper == 0 {
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		n := base
		for n < g {
			n *= base
		}
		if n == g {
			return true
		}
	}
	return false
}

// inodeTable is the byte where the inodes of a group begin.
func (f *FS) inodeTable(g int64) (int64, error) {
	if g >= f.groups {
		return 0, verdict.Damaged("ext4: group %d of %d is wanted", g, f.groups)
	}
	per := f.bs / int64(f.descSize)
	nr := g / per
	block := superOff/f.bs + 1 + nr
	if f.incompat&incompatMetaBG != 0 && nr >= int64(f.metaFirst) {
		bg := per * nr
		block = bg*int64(f.blkGroup) + int64(f.first)
		if f.hasSuper(bg) {
			block++
		}
		if f.bs == 1024 && nr == 0 && f.first == 0 {
			block++
		}
	}
	d, err := f.c.View(block*f.bs+g%per*int64(f.descSize), f.descSize)
	if err != nil {
		return 0, err
	}
	t := int64(le.Uint32(d[8:]))
	if f.descSize >= 64 {
		t |= int64(le.Uint32(d[40:])) << 32
	}
	if t <= 0 || t >= f.blocks {
		return 0, verdict.Damaged("ext4: the inodes of group %d are at block %d of %d", g, t, f.blocks)
	}
	return t * f.bs, nil
}

func (f *FS) block(n int64) ([]byte, error) {
	if n <= 0 || n >= f.blocks {
		return nil, verdict.Damaged("ext4: block %d of %d is wanted", n, f.blocks)
	}
	return f.c.View(n*f.bs, int(f.bs))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// csum is ext4_chksum: CRC-32C without the inversions at both ends.
func csum(seed uint32, b []byte) uint32 { return ^crc32.Update(^seed, castagnoli, b) }
