package xfs

import (
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
)

const (
	dirBlockV4 = 0x58443242 // "XD2B": entries and their index in one block
	dirBlockV5 = 0x58444233 // "XDB3"
	dirDataV4  = 0x58443244 // "XD2D"
	dirDataV5  = 0x58444433 // "XDD3"

	leafOffset = 32 << 30 // bytes: where a directory's index begins
	maxDir     = 1 << 30
)

// ReadDir gives the entries of a directory, whose index is not looked at.
func (f *FS) ReadDir(n *walk.Node, emit func(name []byte, ref uint64) error) error {
	i := n.Priv.(*inode)
	if i.data.format == formatLocal {
		return f.shortDir(i, emit)
	}
	if i.size > maxDir {
		return verdict.Limit("xfs: directory %d has %d bytes", i.no, i.size)
	}
	per := f.dirBlock / f.bs
	for b := int64(0); b*f.bs < min(i.size, leafOffset); {
		phys, n, err := f.find(i, &i.data, b)
		if err != nil {
			return err
		}
		if phys < 0 {
			b += n
			continue
		}
		block, err := f.dirData(i, b, per)
		if err != nil {
			return err
		}
		if err := f.dirents(i, block, emit); err != nil {
			return err
		}
		b += per
	}
	return nil
}

// dirData reads a directory block, which may lie in several places.
func (f *FS) dirData(i *inode, b, per int64) ([]byte, error) {
	var out []byte
	for left := per; left > 0; {
		phys, n, err := f.find(i, &i.data, b)
		if err != nil {
			return nil, err
		}
		if phys < 0 {
			return nil, verdict.Damaged("xfs: directory %d has a hole", i.no)
		}
		n = min(n, left)
		p, err := f.c.View(phys, int(n*f.bs))
		if err != nil {
			return nil, err
		}
		if n == per {
			return p, nil
		}
		out = append(out, p...)
		b, left = b+n, left-n
	}
	return out, nil
}

func badDir(i *inode) error { return verdict.Damaged("xfs: directory %d is broken", i.no) }

func (f *FS) dirents(i *inode, b []byte, emit func([]byte, uint64) error) error {
	p, end := 16, len(b)
	block, data := uint32(dirBlockV4), uint32(dirDataV4)
	if f.v5 {
		p, block, data = 64, dirBlockV5, dirDataV5
	}
	switch be.Uint32(b) {
	case block:
		count := int64(be.Uint32(b[end-8:]))
		if count > int64(end-8-p)/8 {
			return badDir(i)
		}
		end -= 8 + 8*int(count)
	case data:
	default:
		return badDir(i)
	}
	if f.csum && !sumOK(b, 4) {
		return verdict.Damaged("xfs: the checksum of directory %d is wrong", i.no)
	}
	for p < end {
		if end-p < 8 {
			return badDir(i)
		}
		if be.Uint16(b[p:]) == 0xFFFF {
			n := int(be.Uint16(b[p+2:]))
			if n == 0 || n&7 != 0 || n > end-p {
				return badDir(i)
			}
			p += n
			continue
		}
		if end-p < 16 {
			return badDir(i)
		}
		length := int(b[p+8])
		size := 8 + 1 + length + 2
		if f.ftype {
			size++
		}
		if size = (size + 7) &^ 7; size > end-p {
			return badDir(i)
		}
		name := b[p+9 : p+9+length]
		ino := be.Uint64(b[p:])
		p += size
		if string(name) == "." || string(name) == ".." {
			continue
		}
		if err := emit(name, ino); err != nil {
			return err
		}
	}
	return nil
}

// shortDir reads a directory kept in its inode.
func (f *FS) shortDir(i *inode, emit func([]byte, uint64) error) error {
	b := i.data.b
	if i.size < int64(len(b)) {
		b = b[:i.size]
	}
	if len(b) < 6 {
		return badDir(i)
	}
	count, wide := int(b[0]), 4
	if b[1] > 0 {
		count, wide = max(count, int(b[1])), 8
	}
	if len(b) < 2+wide {
		return badDir(i)
	}
	for b = b[2+wide:]; count > 0; count-- {
		if len(b) < 3 {
			return badDir(i)
		}
		length := int(b[0])
		size := 3 + length + wide
		if f.ftype {
			size++
		}
		if size > len(b) {
			return badDir(i)
		}
		name, num := b[3:3+length], b[size-wide:size]
		b = b[size:]
		ino := uint64(be.Uint32(num))
		if wide == 8 {
			ino = be.Uint64(num)
		}
		if err := emit(name, ino); err != nil {
			return err
		}
	}
	return nil
}
