package btrfs

import (
	"io"
	"strings"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
	"github.com/novalet/novalet/glancebridge/layer"
)

const (
	fsTree       = 5
	firstFree    = 256
	rootItem     = 239
	rootItemUUID = 279 // with the UUIDs of later versions
	maxFstab     = 64 << 10
)

// wellKnown are the names that installers give to the root subvolume when they leave the default at the top level and
// name the subvolume on the kernel's command line: Fedora, Ubuntu and openSUSE, Debian.
var wellKnown = []string{"root", "@", "@rootfs"}

// tree finds the tree of a subvolume, and whether it is a snapshot of another.
func (f *FS) tree(id uint64) (n int, snapshot bool, err error) {
	if id != fsTree && (id < firstFree || id > 1<<63) {
		return 0, false, verdict.Damaged("btrfs: subvolume %d is wanted", id)
	}
	var item []byte
	err = f.each(f.rootAt, id, kindRoot, func(_ key, data []byte) error {
		item = data
		return nil
	})
	if err != nil {
		return 0, false, err
	}
	if len(item) < rootItem {
		return 0, false, verdict.Damaged("btrfs: there is no subvolume %d", id)
	}
	if len(item) >= rootItemUUID {
		for _, c := range item[263:279] { // the parent's UUID
			snapshot = snapshot || c != 0
		}
	}
	if n, ok := f.byID[id]; ok {
		return n, snapshot, nil
	}
	if len(f.trees) == maxTrees {
		return 0, false, verdict.Limit("btrfs: there are more than %d subvolumes", maxTrees)
	}
	t := tree{id: id, root: pointer{at: le.Uint64(item[176:]), level: int(item[238])}}
	if t.dir, err = ref(len(f.trees), le.Uint64(item[168:])); err != nil {
		return 0, false, err
	}
	f.byID[id] = len(f.trees)
	f.trees = append(f.trees, t)
	return f.byID[id], snapshot, nil
}

// linked says whether a directory's entry is where the subvolume it names belongs: in a snapshot of a subvolume that has
// others in it, the entries are there and the subvolumes are not (fixup_tree_root_location in fs/btrfs/inode.c).
func (f *FS) linked(i *inode, e dirEntry) (bool, error) {
	b, err := f.get(f.rootAt, key{objectid: f.trees[i.tree].id, kind: kindRootRef, offset: e.at.objectid})
	if err != nil || len(b) < 18 {
		return false, err
	}
	return le.Uint64(b) == i.no && string(b[18:]) == string(e.name), nil
}

// stubTree is the tree in the refs of directories that stand for subvolumes which are not there.
const stubTree = 1<<(64-inodeBits) - 1

// stub makes the empty directory that the kernel shows in place of a subvolume that is not there.
func (f *FS) stub(parent *walk.Node, i *inode, name []byte) (uint64, error) {
	at := stubKey{tree: i.tree, dir: i.no, name: string(name)}
	if r, ok := f.stubAt[at]; ok {
		return r, nil
	}
	if len(f.stubs) == maxTrees {
		return 0, verdict.Limit("btrfs: there are more than %d subvolumes", maxTrees)
	}
	r, err := ref(stubTree, uint64(len(f.stubs)))
	if err != nil {
		return 0, err
	}
	n := &walk.Node{Ref: r, ID: r, Links: 1, Priv: &inode{tree: stubTree}}
	n.Type, n.Mode = layer.TypeDirectory, 0o755
	n.UID, n.GID, n.ModTime = parent.UID, parent.GID, parent.ModTime
	f.stubs = append(f.stubs, n)
	f.stubAt[at] = r
	return r, nil
}

// stubKey is the directory entry that a stub stands for.
type stubKey struct {
	tree int
	dir  uint64
	name string
}

// pickRoot takes the default subvolume; when that is the top level and holds no system, a subvolume of it that does.
func (f *FS) pickRoot(dir uint64) error {
	id := uint64(fsTree)
	err := f.each(f.rootAt, dir, kindDirItem, func(_ key, data []byte) error {
		return dirEntries(data, func(e dirEntry) error {
			if string(e.name) == "default" && e.at.kind == kindRoot {
				id = e.at.objectid
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	if id == fsTree {
		if id, err = f.systemIn(); err != nil {
			return err
		}
	}
	f.reset()
	if _, _, err := f.tree(id); err != nil {
		return err
	}
	f.bound[0] = true
	return f.mounts()
}

// reset forgets the trees: the root's must be the first.
func (f *FS) reset() {
	f.trees, f.stubs = nil, nil
	clear(f.byID)
	clear(f.stubAt)
}

// systemIn is the subvolume of the top level to boot from; the top level itself when none looks like one.
func (f *FS) systemIn() (uint64, error) {
	for _, name := range append([]string{""}, wellKnown...) {
		f.reset()
		if _, _, err := f.tree(fsTree); err != nil {
			return 0, err
		}
		id := uint64(fsTree)
		if name != "" {
			n, err := walk.Lookup(f, name)
			if err != nil {
				return 0, err
			}
			if n == nil || n.Type != layer.TypeDirectory {
				continue
			}
			id = f.trees[n.Priv.(*inode).tree].id
			f.reset()
			if _, _, err := f.tree(id); err != nil {
				return 0, err
			}
		}
		for _, m := range []string{"etc/fstab", "etc/os-release", "usr/lib/os-release", "sbin/init"} {
			ok, err := walk.Exists(f, m)
			if err != nil {
				return 0, err
			}
			if ok {
				return id, nil
			}
		}
	}
	return fsTree, nil
}

// mounts reads /etc/fstab and grafts the subvolumes of this file system that it mounts: without them /home or /var
// would be empty.
func (f *FS) mounts() error {
	n, err := walk.Lookup(f, "etc/fstab")
	if err != nil || n == nil || n.Type != layer.TypeRegular || n.Size > maxFstab {
		return err
	}
	o, err := f.Open(n)
	if err != nil {
		return err
	}
	b := make([]byte, n.Size)
	if _, err := io.ReadFull(o, b); err != nil {
		return err
	}
	var lines [][]string
	device := ""
	for line := range strings.Lines(string(b)) {
		w := strings.Fields(line)
		if len(w) < 4 || strings.HasPrefix(w[0], "#") || w[2] != "btrfs" {
			continue
		}
		if w[1] == "/" {
			device = w[0]
		}
		lines = append(lines, w)
	}
	for _, w := range lines {
		if w[1] == "/" || w[0] != device {
			continue
		}
		for opt := range strings.SplitSeq(w[3], ",") {
			if path, ok := strings.CutPrefix(opt, "subvol="); ok {
				if err := f.graft(strings.Trim(w[1], "/"), strings.Trim(path, "/")); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// graft puts the subvolume at a path of the top level in place of a directory. What is not there is left out, as a
// boot would leave it out.
func (f *FS) graft(dir, path string) error {
	at, err := walk.Lookup(f, dir)
	if err != nil || at == nil || at.Type != layer.TypeDirectory {
		return err
	}
	top, _, err := f.tree(fsTree)
	if err != nil {
		return err
	}
	sub, err := walk.Lookup(from{f, f.trees[top].dir}, path)
	if err != nil || sub == nil || sub.Type != layer.TypeDirectory {
		return err
	}
	t := sub.Priv.(*inode).tree
	if sub.Ref != f.trees[t].dir || f.bound[t] {
		return nil
	}
	f.bound[t] = true
	f.grafts[at.Ref] = sub.Ref
	return nil
}

// from is the file system seen from another root.
type from struct {
	*FS
	root uint64
}

func (f from) Root() uint64 { return f.root }

// ReadDir enters every subvolume.
func (f from) ReadDir(n *walk.Node, emit func(name []byte, ref uint64) error) error {
	return f.readDir(n, func(int, bool) bool { return true }, emit)
}
