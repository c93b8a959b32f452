package ext4

import (
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
)

// maxDir is the size in bytes of the largest directory that is read.
const maxDir = 1 << 30

// ReadDir gives the entries of a directory. The blocks of a hashed directory's index look like empty ones, so every
// directory reads as a list.
func (f *FS) ReadDir(n *walk.Node, emit func(name []byte, ref uint64) error) error {
	i := n.Priv.(*inode)
	if i.flags&flagInline != 0 {
		return f.inlineDir(i, emit)
	}
	if i.size > maxDir {
		return verdict.Limit("ext4: directory %d has %d bytes", i.no, i.size)
	}
	for off := int64(0); off < i.size; {
		r, err := f.lookup(i, off)
		if err != nil {
			return err
		}
		if r.Phys < 0 {
			return verdict.Damaged("ext4: directory %d has a hole", i.no)
		}
		for end := min(off+r.Len, i.size); off < end; off += f.bs {
			b, err := f.c.View(r.Phys, int(f.bs))
			if err != nil {
				return err
			}
			if err := f.dirents(i, b, emit); err != nil {
				return err
			}
			r.Phys += f.bs
		}
	}
	return nil
}

func (f *FS) dirents(i *inode, b []byte, emit func([]byte, uint64) error) error {
	for len(b) > 0 {
		if len(b) < 8 {
			return verdict.Damaged("ext4: directory %d has a broken entry", i.no)
		}
		ino := le.Uint32(b)
		rec := int(le.Uint16(b[4:]))
		if f.bs == 65536 && (rec == 65535 || rec == 0) {
			rec = 65536
		} else if f.bs == 65536 {
			rec = rec&65532 | rec&3<<16
		}
		length := int(b[6])
		if f.incompat&incompatFiletype == 0 {
			length = int(le.Uint16(b[6:]))
		}
		if rec < 8 || rec > len(b) || rec&3 != 0 || ino != 0 && length > rec-8 {
			return verdict.Damaged("ext4: directory %d has a broken entry", i.no)
		}
		name := b[8:rec]
		b = b[rec:]
		if ino == 0 {
			continue
		}
		name = name[:length]
		if string(name) == "." || string(name) == ".." {
			continue
		}
		if err := emit(name, uint64(ino)); err != nil {
			return err
		}
	}
	return nil
}

// inlineDir reads a directory kept in its inode: the parent's number, entries to the end of the block map's room, then
// further entries in an attribute.
func (f *FS) inlineDir(i *inode, emit func([]byte, uint64) error) error {
	if err := f.dirents(i, i.block()[4:min(60, max(4, i.size))], emit); err != nil {
		return err
	}
	rest, err := f.inlineRest(i)
	if err != nil {
		return err
	}
	if i.size-60 < int64(len(rest)) {
		rest = rest[:max(0, i.size-60)]
	}
	return f.dirents(i, rest, emit)
}

// inline is what a file keeps in its inode, its whole size at most.
func (f *FS) inline(i *inode) ([]byte, error) {
	if i.size <= 60 {
		return i.block()[:i.size], nil
	}
	rest, err := f.inlineRest(i)
	if err != nil {
		return nil, err
	}
	rest = rest[:min(int64(len(rest)), i.size-60)]
	return append(append(make([]byte, 0, 60+len(rest)), i.block()...), rest...), nil
}

func (f *FS) inlineRest(i *inode) ([]byte, error) {
	var rest []byte
	err := f.eachInner(i, func(index byte, name []byte, value []byte) error {
		if index == indexSystem && string(name) == "data" {
			rest = value
		}
		return nil
	})
	return rest, err
}
