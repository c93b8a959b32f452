package ext4

import (
	"time"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
	"github.com/novalet/novalet/glancebridge/layer"
)

const rootIno = 2

const (
	flagCompressed = 0x4
	flagEncrypt    = 0x800
	flagExtents    = 0x80000
	flagEAInode    = 0x200000
	flagInline     = 0x10000000
)

// inode is what the walker's node keeps of ours.
type inode struct {
	no    uint32
	flags uint32
	size  int64
	raw   []byte // of inodeSize bytes
	acl   int64  // block of extended attributes
}

func (i *inode) block() []byte { return i.raw[40:100] }

// extra is the length of the fields beyond the first 128 bytes.
func (i *inode) extra() int {
	if len(i.raw) < 130 {
		return 0
	}
	return int(le.Uint16(i.raw[128:]))
}

// Root is the root directory.
func (f *FS) Root() uint64 { return rootIno }

func (f *FS) inode(no uint32) (*inode, error) {
	if no == 0 || no > f.inodes {
		return nil, verdict.Damaged("ext4: inode %d of %d is wanted", no, f.inodes)
	}
	t, err := f.inodeTable(int64((no - 1) / f.perGroup))
	if err != nil {
		return nil, err
	}
	raw, err := f.c.View(t+int64((no-1)%f.perGroup)*int64(f.inodeSize), f.inodeSize)
	if err != nil {
		return nil, err
	}
	i := &inode{no: no, raw: raw, flags: le.Uint32(raw[32:]), size: int64(le.Uint32(raw[4:]))}
	if e := i.extra(); e > len(raw)-128 || e&3 != 0 {
		return nil, verdict.Damaged("ext4: inode %d has %d extra bytes", no, e)
	}
	i.acl = int64(le.Uint32(raw[104:])) | int64(le.Uint16(raw[118:]))<<32
	if f.csum && !f.sumOK(i) {
		return nil, verdict.Damaged("ext4: the checksum of inode %d is wrong", no)
	}
	return i, nil
}

func (f *FS) sumOK(i *inode) bool {
	var b [4]byte
	le.PutUint32(b[:], i.no)
	sum := csum(f.seed, b[:])
	sum = csum(sum, i.raw[100:104]) // generation
	sum = csum(sum, i.raw[:124])
	sum = csum(sum, []byte{0, 0})
	want := uint32(le.Uint16(i.raw[124:]))
	if len(i.raw) == 128 {
		return (csum(sum, i.raw[126:128]))&0xFFFF == want
	}
	sum = csum(sum, i.raw[126:128])
	if i.extra() < 4 {
		return csum(sum, i.raw[128:])&0xFFFF == want
	}
	sum = csum(sum, i.raw[128:130])
	sum = csum(sum, []byte{0, 0})
	sum = csum(sum, i.raw[132:])
	return sum == want|uint32(le.Uint16(i.raw[130:]))<<16
}

// Stat reads an inode.
func (f *FS) Stat(ref uint64) (*walk.Node, error) {
	if ref > uint64(f.inodes) {
		return nil, verdict.Damaged("ext4: inode %d of %d is wanted", ref, f.inodes)
	}
	i, err := f.inode(uint32(ref))
	if err != nil {
		return nil, err
	}
	r := i.raw
	mode := le.Uint16(r)
	n := &walk.Node{Ref: ref, ID: ref, Links: uint32(le.Uint16(r[26:])), Priv: i}
	n.UID = uint32(le.Uint16(r[2:])) | uint32(le.Uint16(r[120:]))<<16
	n.GID = uint32(le.Uint16(r[24:])) | uint32(le.Uint16(r[122:]))<<16
	n.ModTime = i.mtime()
	if n.Links == 0 {
		return nil, verdict.Damaged("ext4: inode %d is in a directory but deleted", i.no)
	}
	if !n.SetMode(uint32(mode)) {
		return nil, verdict.Damaged("ext4: inode %d has the mode %#o", i.no, mode)
	}
	switch n.Type {
	case layer.TypeRegular:
		i.size |= int64(le.Uint32(r[108:])) << 32
		n.Size = i.size
	case layer.TypeDirectory:
		if f.incompat&incompatLargedir != 0 {
			i.size |= int64(le.Uint32(r[108:])) << 32
		}
	case layer.TypeCharDevice, layer.TypeBlockDevice:
		n.Major, n.Minor = device(i.block())
	}
	if i.size < 0 {
		return nil, verdict.Damaged("ext4: inode %d has a negative size", i.no)
	}
	if i.flags&flagEncrypt != 0 {
		return nil, verdict.Unsupported("make the image from a system without fscrypt directories",
			"ext4: inode %d is encrypted", i.no)
	}
	if i.flags&flagCompressed != 0 && f.Name() != "ext4" && n.Type == layer.TypeRegular && le.Uint32(r[32:])&0x200 != 0 {
		return nil, verdict.Unsupported("make the image with plain ext4", "ext2: inode %d is compressed", i.no)
	}
	return n, nil
}

// mtime has 34 bits of seconds and the nanoseconds where the inode is large enough.
func (i *inode) mtime() time.Time {
	sec := int64(int32(le.Uint32(i.raw[16:])))
	if i.extra() < 12 {
		return time.Unix(sec, 0)
	}
	x := le.Uint32(i.raw[136:])
	return time.Unix(sec+int64(x&3)<<32, int64(min(x>>2, 999999999)))
}

// device decodes both of the kernel's forms (old_decode_dev, new_decode_dev).
func device(b []byte) (major, minor uint32) {
	if d := le.Uint32(b); d != 0 {
		return d >> 8 & 0xFF, d & 0xFF
	}
	d := le.Uint32(b[4:])
	return d >> 8 & 0xFFF, d&0xFF | d>>12&0xFFF00
}

const maxSymlink = 4095

// Finish reads the extended attributes and a symlink's target.
func (f *FS) Finish(n *walk.Node) error {
	i := n.Priv.(*inode)
	x, err := f.xattrs(i)
	if err != nil {
		return err
	}
	n.Xattrs = x
	if n.Type != layer.TypeSymlink {
		return nil
	}
	if i.size <= 0 || i.size > maxSymlink {
		return verdict.Damaged("ext4: symlink %d is %d bytes long", i.no, i.size)
	}
	var b []byte
	switch {
	case i.flags&flagInline != 0:
		if b, err = f.inline(i); err == nil && int64(len(b)) < i.size {
			err = verdict.Damaged("ext4: symlink %d is cut", i.no)
		}
	case i.size < 60 && i.flags&flagExtents == 0:
		b = i.block()[:i.size]
	default:
		b, err = f.contents(i)
	}
	if err != nil {
		return err
	}
	n.Linkname = string(b)
	return nil
}

// contents reads a short file whole.
func (f *FS) contents(i *inode) ([]byte, error) {
	m, err := walk.NewMapped(f.c.Disk(), i.size, func(off int64) (walk.Run, error) { return f.lookup(i, off) })
	if err != nil {
		return nil, err
	}
	b := make([]byte, i.size)
	for done := 0; done < len(b); {
		n, err := m.Read(b[done:])
		if err != nil {
			return nil, err
		}
		done += n
	}
	return b, nil
}

// Open gives a regular file's contents.
func (f *FS) Open(n *walk.Node) (walk.File, error) {
	i := n.Priv.(*inode)
	if i.flags&flagInline != 0 {
		// mke2fs makes inline files of nothing but a hole; like the kernel, what is not there reads as zeros.
		b, err := f.inline(i)
		if err != nil {
			return nil, err
		}
		return walk.NewBytes(b, i.size), nil
	}
	return walk.NewMapped(f.c.Disk(), i.size, func(off int64) (walk.Run, error) { return f.lookup(i, off) })
}
