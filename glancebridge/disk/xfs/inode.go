package xfs

import (
	"time"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
	"github.com/novalet/novalet/glancebridge/layer"
)

// Formats of a fork.
const (
	formatDev     = 0
	formatLocal   = 1
	formatExtents = 2
	formatBtree   = 3
)

const (
	inodeMagic    = 0x494E
	flagRealtime  = 0x1
	flag2Bigtime  = 0x8
	flag2BigCount = 0x10
	coreV2        = 100
	coreV3        = 176
	maxSymlink    = 1024
)

// inode is what the walker's node keeps of ours.
type inode struct {
	no   uint64
	raw  []byte
	size int64
	data fork
	attr fork
}

// fork is one of an inode's two maps.
type fork struct {
	format byte
	b      []byte
	count  uint64 // of extents
}

func (f *FS) inode(no uint64) (*inode, error) {
	log := f.agBlkLog + f.inoPerLog
	if no>>log >= uint64(f.agCount) {
		return nil, verdict.Damaged("xfs: inode %d is wanted", no)
	}
	at, err := f.linear(int64(no>>f.inoPerLog), 1)
	if err != nil {
		return nil, err
	}
	r, err := f.c.View(at+int64(no&(1<<f.inoPerLog-1))*int64(f.inodeSize), f.inodeSize)
	if err != nil {
		return nil, err
	}
	if be.Uint16(r) != inodeMagic {
		return nil, verdict.Damaged("xfs: there is no inode %d", no)
	}
	if f.csum && (!sumOK(r, 100) || be.Uint64(r[152:]) != no) {
		return nil, verdict.Damaged("xfs: the checksum of inode %d is wrong", no)
	}
	i := &inode{no: no, raw: r, size: int64(be.Uint64(r[56:]))}
	return i, i.forks(f.v5)
}

func (i *inode) forks(v5 bool) error {
	r := i.raw
	core := coreV2
	if r[4] == 3 {
		core = coreV3
	}
	if r[4] == 0 || r[4] > 3 || v5 != (r[4] == 3) || i.size < 0 {
		return verdict.Damaged("xfs: inode %d is broken", i.no)
	}
	rest := r[core:]
	i.data = fork{format: r[5], b: rest, count: uint64(be.Uint32(r[76:]))}
	i.attr = fork{format: r[83], count: uint64(be.Uint16(r[80:]))}
	if v5 && be.Uint64(r[120:])&flag2BigCount != 0 {
		i.data.count, i.attr.count = be.Uint64(r[24:]), uint64(be.Uint32(r[76:]))
	}
	if off := int(r[82]) * 8; off > 0 {
		if off >= len(rest) {
			return verdict.Damaged("xfs: inode %d is broken", i.no)
		}
		i.data.b, i.attr.b = rest[:off], rest[off:]
	}
	return nil
}

// Stat reads an inode.
func (f *FS) Stat(ref uint64) (*walk.Node, error) {
	i, err := f.inode(ref)
	if err != nil {
		return nil, err
	}
	r := i.raw
	mode := be.Uint16(r[2:])
	n := &walk.Node{Ref: ref, ID: ref, Links: be.Uint32(r[16:]), Priv: i}
	if r[4] == 1 {
		n.Links = uint32(be.Uint16(r[6:]))
	}
	n.UID, n.GID = be.Uint32(r[8:]), be.Uint32(r[12:])
	n.ModTime = i.mtime()
	if n.Links == 0 {
		return nil, verdict.Damaged("xfs: inode %d is in a directory but deleted", i.no)
	}
	if !n.SetMode(uint32(mode)) {
		return nil, verdict.Damaged("xfs: inode %d has the mode %#o", i.no, mode)
	}
	if n.Type == layer.TypeRegular {
		n.Size = i.size
	}
	if n.Type == layer.TypeCharDevice || n.Type == layer.TypeBlockDevice {
		if i.data.format != formatDev {
			return nil, verdict.Damaged("xfs: device %d is broken", i.no)
		}
		d := be.Uint32(i.data.b)
		n.Major, n.Minor = d>>18&0x1FF, d&0x3FFFF
	}
	if be.Uint16(r[90:])&flagRealtime != 0 && n.Type == layer.TypeRegular {
		return nil, verdict.Unsupported("make the file system without a realtime device", "xfs: inode %d is on another device", i.no)
	}
	return n, nil
}

func (i *inode) mtime() time.Time {
	r := i.raw
	if r[4] == 3 && be.Uint64(r[120:])&flag2Bigtime != 0 {
		t := be.Uint64(r[40:])
		return time.Unix(int64(t/1e9)-1<<31, int64(t%1e9))
	}
	return time.Unix(int64(int32(be.Uint32(r[40:]))), int64(min(be.Uint32(r[44:]), 999999999)))
}

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
	if i.size == 0 || i.size > maxSymlink {
		return verdict.Damaged("xfs: symlink %d is %d bytes long", i.no, i.size)
	}
	if i.data.format == formatLocal {
		if i.size > int64(len(i.data.b)) {
			return verdict.Damaged("xfs: symlink %d is %d bytes long", i.no, i.size)
		}
		n.Linkname = string(i.data.b[:i.size])
		return nil
	}
	b, err := f.remoteLink(i)
	n.Linkname = string(b)
	return err
}

const remoteHeader = 56

// remoteLink reads a target from blocks. In version 5 each piece of the map begins with a header.
func (f *FS) remoteLink(i *inode) ([]byte, error) {
	var out []byte
	for b := int64(0); int64(len(out)) < i.size; {
		phys, n, err := f.find(i, &i.data, b)
		if err != nil {
			return nil, err
		}
		if phys < 0 {
			return nil, verdict.Damaged("xfs: symlink %d has a hole", i.no)
		}
		n = min(n, 8) // what the longest target needs of the smallest blocks
		p, err := f.c.View(phys, int(n*f.bs))
		if err != nil {
			return nil, err
		}
		if f.v5 {
			if string(p[:4]) != "XSLM" {
				return nil, verdict.Damaged("xfs: symlink %d is broken", i.no)
			}
			p = p[remoteHeader:]
		}
		out = append(out, p[:min(int64(len(p)), i.size-int64(len(out)))]...)
		b += n
	}
	return out, nil
}

// Open gives a regular file's contents.
func (f *FS) Open(n *walk.Node) (walk.File, error) {
	i := n.Priv.(*inode)
	return walk.NewMapped(f.c.Disk(), i.size, func(off int64) (walk.Run, error) {
		b, in := off/f.bs, off%f.bs
		phys, n, err := f.find(i, &i.data, b)
		if err != nil {
			return walk.Run{}, err
		}
		r := walk.Run{Len: n*f.bs - in, Phys: walk.Hole}
		if phys >= 0 {
			r.Phys = phys + in
		}
		return r, nil
	})
}
