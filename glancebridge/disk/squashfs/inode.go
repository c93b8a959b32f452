package squashfs

import (
	"time"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
	"github.com/novalet/novalet/glancebridge/layer"
)

// Kinds of inode; the extended ones are these plus 7.
const (
	kindDir     = 1
	kindFile    = 2
	kindSymlink = 3
	kindBlock   = 4
	kindChar    = 5
	kindFIFO    = 6
	kindSocket  = 7
	extended    = 7
)

const maxSymlink = 4095

// inode is what the walker's node keeps of ours.
type inode struct {
	xattr uint32
	link  string

	// Of a directory.
	block  uint32
	offset uint16
	length int64

	// Of a file.
	start    int64
	fragment uint32
	fragOff  uint32
	list     cursor // of the sizes of its blocks
}

// Root is the root directory.
func (f *FS) Root() uint64 { return f.root }

// Stat reads the inode at a reference.
func (f *FS) Stat(ref uint64) (*walk.Node, error) {
	c := f.ref(f.inodes, ref)
	b, err := c.next(16)
	if err != nil {
		return nil, err
	}
	kind := le.Uint16(b)
	n := &walk.Node{Ref: ref, ID: uint64(le.Uint32(b[12:])), Links: 1}
	n.Mode = uint32(le.Uint16(b[2:]) & 0o7777)
	// The kernel takes the seconds as unsigned.
	n.ModTime = time.Unix(int64(le.Uint32(b[8:])), 0)
	if n.UID, err = f.id(le.Uint16(b[4:])); err != nil {
		return nil, err
	}
	if n.GID, err = f.id(le.Uint16(b[6:])); err != nil {
		return nil, err
	}
	i := &inode{xattr: none32}
	n.Priv = i
	ext := kind > extended
	if ext {
		kind -= extended
	}
	switch kind {
	case kindDir:
		n.Type = layer.TypeDirectory
		err = i.dir(c, ext)
	case kindFile:
		n.Type = layer.TypeRegular
		err = i.file(n, c, ext)
	case kindSymlink:
		n.Type = layer.TypeSymlink
		err = i.symlink(n, c, ext)
	case kindBlock, kindChar, kindFIFO, kindSocket:
		n.Type = map[uint16]layer.Type{
			kindBlock: layer.TypeBlockDevice, kindChar: layer.TypeCharDevice, kindFIFO: layer.TypeFIFO, kindSocket: layer.TypeSocket,
		}[kind]
		err = i.special(n, c, ext)
	default:
		err = verdict.Damaged("squashfs: inode %d has the kind %d", n.ID, kind)
	}
	return n, err
}

func (f *FS) id(n uint16) (uint32, error) {
	b, err := f.entry(f.ids, int64(n), "id")
	if err != nil {
		return 0, err
	}
	return le.Uint32(b), nil
}

func (i *inode) dir(c *cursor, ext bool) error {
	if !ext {
		b, err := c.next(16)
		if err != nil {
			return err
		}
		i.block, i.length, i.offset = le.Uint32(b), int64(le.Uint16(b[8:])), le.Uint16(b[10:])
		return nil
	}
	b, err := c.next(24)
	if err != nil {
		return err
	}
	i.length, i.block, i.offset, i.xattr = int64(le.Uint32(b[4:])), le.Uint32(b[8:]), le.Uint16(b[18:]), le.Uint32(b[20:])
	return nil
}

func (i *inode) file(n *walk.Node, c *cursor, ext bool) error {
	if !ext {
		b, err := c.next(16)
		if err != nil {
			return err
		}
		i.start, i.fragment, i.fragOff = int64(le.Uint32(b)), le.Uint32(b[4:]), le.Uint32(b[8:])
		n.Size = int64(le.Uint32(b[12:]))
	} else {
		b, err := c.next(40)
		if err != nil {
			return err
		}
		i.start, n.Size = int64(min(le.Uint64(b), 1<<62)), int64(min(le.Uint64(b[8:]), 1<<62))
		n.Links, i.fragment, i.fragOff, i.xattr = le.Uint32(b[24:]), le.Uint32(b[28:]), le.Uint32(b[32:]), le.Uint32(b[36:])
	}
	i.list = *c
	return nil
}

func (i *inode) symlink(n *walk.Node, c *cursor, ext bool) error {
	b, err := c.next(8)
	if err != nil {
		return err
	}
	n.Links = le.Uint32(b)
	size := le.Uint32(b[4:])
	if size == 0 || size > maxSymlink {
		return verdict.Damaged("squashfs: symlink %d is %d bytes long", n.ID, size)
	}
	if b, err = c.next(int(size)); err != nil {
		return err
	}
	i.link = string(b)
	if !ext {
		return nil
	}
	if b, err = c.next(4); err != nil {
		return err
	}
	i.xattr = le.Uint32(b)
	return nil
}

func (i *inode) special(n *walk.Node, c *cursor, ext bool) error {
	b, err := c.next(4)
	if err != nil {
		return err
	}
	n.Links = le.Uint32(b)
	if n.Type == layer.TypeBlockDevice || n.Type == layer.TypeCharDevice {
		if b, err = c.next(4); err != nil {
			return err
		}
		d := le.Uint32(b)
		n.Major, n.Minor = d>>8&0xFFF, d&0xFF|d>>12&0xFFF00
	}
	if !ext {
		return nil
	}
	if b, err = c.next(4); err != nil {
		return err
	}
	i.xattr = le.Uint32(b)
	return nil
}

// ReadDir gives the entries of a directory: runs of them, each run's inodes in one metadata block.
func (f *FS) ReadDir(n *walk.Node, emit func(name []byte, ref uint64) error) error {
	i := n.Priv.(*inode)
	// The size counts 3 bytes for "." and "..", which are not stored.
	left := i.length - 3
	c := f.cursor(f.dirs+int64(i.block), int(i.offset))
	for left > 0 {
		h, err := c.next(12)
		if err != nil {
			return err
		}
		count, block := int(le.Uint32(h))+1, uint64(le.Uint32(h[4:]))
		if count > 256 || count <= 0 {
			return verdict.Damaged("squashfs: directory %d has a run of %d entries", n.ID, count)
		}
		left -= 12
		for range count {
			e, err := c.next(8)
			if err != nil {
				return err
			}
			ref := block<<16 | uint64(le.Uint16(e))
			name, err := c.next(int(le.Uint16(e[6:])) + 1)
			if err != nil {
				return err
			}
			if left -= 8 + int64(len(name)); left < 0 {
				return verdict.Damaged("squashfs: directory %d is broken", n.ID)
			}
			if err := emit(name, ref); err != nil {
				return err
			}
		}
	}
	return nil
}

// Finish reads the extended attributes and a symlink's target.
func (f *FS) Finish(n *walk.Node) error {
	i := n.Priv.(*inode)
	n.Linkname = i.link
	if i.xattr == none32 || f.xattrs == 0 {
		return nil
	}
	x, err := f.attributes(n, i.xattr)
	n.Xattrs = x
	return err
}

const (
	maxValue  = 64 << 10
	maxAll    = 256 << 10
	outOfLine = 0x100
)

var prefixes = [...]string{"user.", "trusted.", "security."}

func (f *FS) attributes(n *walk.Node, id uint32) (map[string]string, error) {
	e, err := f.entry(f.xattrIDs, int64(id), "attribute list")
	if err != nil {
		return nil, err
	}
	c := f.ref(f.xattrs, le.Uint64(e))
	count := le.Uint32(e[8:])
	all := make(map[string]string)
	size := 0
	for range count {
		b, err := c.next(4)
		if err != nil {
			return nil, err
		}
		kind := le.Uint16(b)
		name, err := c.next(int(le.Uint16(b[2:])))
		if err != nil {
			return nil, err
		}
		if int(kind&0xFF) >= len(prefixes) {
			return nil, verdict.Damaged("squashfs: inode %d has an attribute of the kind %d", n.ID, kind)
		}
		value, err := f.value(n, c, kind&outOfLine != 0)
		if err != nil {
			return nil, err
		}
		key := prefixes[kind&0xFF] + string(name)
		if size += len(key) + len(value) + 1; size > maxAll {
			return nil, verdict.Limit("squashfs: inode %d has more than %d bytes of extended attributes", n.ID, maxAll)
		}
		all[key] = string(value)
	}
	return all, nil
}

func (f *FS) value(n *walk.Node, c *cursor, elsewhere bool) ([]byte, error) {
	b, err := c.next(4)
	if err != nil {
		return nil, err
	}
	size := le.Uint32(b)
	if elsewhere {
		if b, err = c.next(8); err != nil {
			return nil, err
		}
		c = f.ref(f.xattrs, le.Uint64(b))
		if b, err = c.next(4); err != nil {
			return nil, err
		}
		size = le.Uint32(b)
	}
	if size > maxValue {
		return nil, verdict.Damaged("squashfs: inode %d has an attribute of %d bytes", n.ID, size)
	}
	if size == 0 {
		return nil, nil
	}
	return c.next(int(size))
}
