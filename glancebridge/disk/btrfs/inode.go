package btrfs

import (
	"time"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
	"github.com/novalet/novalet/glancebridge/layer"
)

const (
	inodeBits  = 48
	inodeItem  = 160
	dirHead    = 30
	maxSymlink = 4095
	maxValue   = 64 << 10
	maxAll     = 256 << 10
)

// inode is what the walker's node keeps of ours.
type inode struct {
	tree int
	no   uint64
	size int64
}

func ref(tree int, no uint64) (uint64, error) {
	if no >= 1<<inodeBits {
		return 0, verdict.Damaged("btrfs: inode %d is wanted", no)
	}
	return uint64(tree)<<inodeBits | no, nil
}

func split(ref uint64) (tree int, no uint64) {
	return int(ref >> inodeBits), ref & (1<<inodeBits - 1)
}

// Root is the root directory of the root subvolume.
func (f *FS) Root() uint64 { return f.trees[0].dir }

// Stat reads an inode. In place of a directory that something is mounted on it gives the root of that.
func (f *FS) Stat(r uint64) (*walk.Node, error) {
	if g, ok := f.grafts[r]; ok {
		r = g
	}
	t, no := split(r)
	if t == stubTree && no < uint64(len(f.stubs)) {
		n := *f.stubs[no]
		return &n, nil
	}
	if t >= len(f.trees) {
		return nil, verdict.Damaged("btrfs: tree %d is wanted", t)
	}
	b, err := f.get(f.trees[t].root, key{objectid: no, kind: kindInode})
	if err != nil {
		return nil, err
	}
	if len(b) < inodeItem {
		return nil, verdict.Damaged("btrfs: there is no inode %d", no)
	}
	i := &inode{tree: t, no: no, size: int64(le.Uint64(b[16:]))}
	mode := le.Uint32(b[52:])
	n := &walk.Node{Ref: r, ID: r, Links: le.Uint32(b[40:]), Priv: i}
	n.UID, n.GID = le.Uint32(b[44:]), le.Uint32(b[48:])
	n.ModTime = time.Unix(int64(le.Uint64(b[136:])), int64(min(le.Uint32(b[144:]), 999999999)))
	if i.size < 0 || n.Links == 0 {
		return nil, verdict.Damaged("btrfs: inode %d is broken", no)
	}
	if !n.SetMode(mode) {
		return nil, verdict.Damaged("btrfs: inode %d has the mode %#o", no, mode)
	}
	if n.Type == layer.TypeRegular {
		n.Size = i.size
	}
	if n.Type == layer.TypeCharDevice || n.Type == layer.TypeBlockDevice {
		d := le.Uint64(b[56:]) // the kernel's own dev_t
		n.Major, n.Minor = uint32(d>>20&0xFFF), uint32(d&0xFFFFF)
	}
	return n, nil
}

// dirEntry is an item of a directory or an extended attribute.
type dirEntry struct {
	at   key
	name []byte
	data []byte
}

// dirEntries takes an item apart, which holds several when their hashes are equal.
func dirEntries(b []byte, do func(e dirEntry) error) error {
	for len(b) > 0 {
		if len(b) < dirHead {
			return verdict.Damaged("btrfs: a directory entry is broken")
		}
		data, name := int(le.Uint16(b[25:])), int(le.Uint16(b[27:]))
		if len(b) < dirHead+data+name {
			return verdict.Damaged("btrfs: a directory entry is broken")
		}
		e := dirEntry{at: parseKey(b), name: b[dirHead : dirHead+name], data: b[dirHead+name : dirHead+name+data]}
		if err := do(e); err != nil {
			return err
		}
		b = b[dirHead+name+data:]
	}
	return nil
}

// ReadDir gives the entries of a directory. Subvolumes are entered unless they are snapshots or mounted elsewhere.
func (f *FS) ReadDir(n *walk.Node, emit func(name []byte, ref uint64) error) error {
	return f.readDir(n, func(tree int, snapshot bool) bool { return !snapshot && !f.bound[tree] }, emit)
}

// readDir enters the subvolumes that enter says.
func (f *FS) readDir(n *walk.Node, enter func(tree int, snapshot bool) bool, emit func(name []byte, ref uint64) error) error {
	i := n.Priv.(*inode)
	if i.tree == stubTree {
		return nil
	}
	return f.each(f.trees[i.tree].root, i.no, kindDirIndex, func(_ key, data []byte) error {
		return dirEntries(data, func(e dirEntry) error {
			switch e.at.kind {
			case kindInode:
				r, err := ref(i.tree, e.at.objectid)
				if err != nil {
					return err
				}
				return emit(e.name, r)
			case kindRoot:
				linked, err := f.linked(i, e)
				if err != nil {
					return err
				}
				if !linked {
					r, err := f.stub(n, i, e.name)
					if err != nil {
						return err
					}
					return emit(e.name, r)
				}
				t, snapshot, err := f.tree(e.at.objectid)
				if err != nil {
					return err
				}
				if !enter(t, snapshot) {
					return nil
				}
				return emit(e.name, f.trees[t].dir)
			}
			return verdict.Damaged("btrfs: a directory entry names an item of the kind %d", e.at.kind)
		})
	})
}

// Finish reads the extended attributes and a symlink's target.
func (f *FS) Finish(n *walk.Node) error {
	i := n.Priv.(*inode)
	if i.tree == stubTree {
		return nil
	}
	root := f.trees[i.tree].root
	size := 0
	err := f.each(root, i.no, kindXattr, func(_ key, data []byte) error {
		return dirEntries(data, func(e dirEntry) error {
			if size += len(e.name) + len(e.data); size > maxAll || len(e.data) > maxValue {
				return verdict.Limit("btrfs: inode %d has more than %d bytes of extended attributes", i.no, maxAll)
			}
			if n.Xattrs == nil {
				n.Xattrs = make(map[string]string)
			}
			if !hidden(string(e.name)) {
				n.Xattrs[string(e.name)] = string(e.data)
			}
			return nil
		})
	})
	if err != nil || n.Type != layer.TypeSymlink {
		return err
	}
	if i.size == 0 || i.size > maxSymlink {
		return verdict.Damaged("btrfs: symlink %d is %d bytes long", i.no, i.size)
	}
	o, err := f.open(i)
	if err != nil {
		return err
	}
	b := make([]byte, i.size)
	for done := 0; done < len(b); {
		k, err := o.Read(b[done:])
		if err != nil {
			return verdict.Damaged("btrfs: symlink %d is broken", i.no)
		}
		done += k
	}
	n.Linkname = string(b)
	return nil
}

// hidden are the attributes that stand for inode properties and name a behaviour of btrfs only.
func hidden(name string) bool { return len(name) >= 6 && name[:6] == "btrfs." }
