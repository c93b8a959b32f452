package btrfs

import (
	"cmp"
	"sort"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

const (
	headerSize = 101
	keySize    = 17
	itemSize   = keySize + 8
	ptrSize    = keySize + 16
)

// Kinds of item.
const (
	kindInode    = 1
	kindXattr    = 24
	kindDirItem  = 84
	kindDirIndex = 96
	kindExtent   = 108
	kindRoot     = 132
	kindRootRef  = 156
	kindChunk    = 228
)

const chunkTreeObject = 256

// key orders the items of a tree.
type key struct {
	objectid uint64
	kind     byte
	offset   uint64
}

func parseKey(b []byte) key {
	return key{objectid: le.Uint64(b), kind: b[8], offset: le.Uint64(b[9:])}
}

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.objectid, o.objectid), cmp.Compare(k.kind, o.kind), cmp.Compare(k.offset, o.offset))
}

// cursor goes through the items of a tree in the order of their keys. key and data are those of the item it is at; data
// must not be written to.
type cursor struct {
	f     *FS
	root  pointer
	nodes [maxLevel + 1][]byte
	slots [maxLevel + 1]int
	key   key
	data  []byte
}

func (f *FS) cursor(root pointer) *cursor { return &cursor{f: f, root: root} }

// readNode reads a node and checks that its list of items fits.
func (f *FS) readNode(at uint64, level int) ([]byte, error) {
	phys, err := f.physical(at, int64(f.node))
	if err != nil {
		return nil, err
	}
	b, err := f.c.View(phys, f.node)
	if err != nil {
		return nil, err
	}
	size := ptrSize
	if level == 0 {
		size = itemSize
	}
	if le.Uint64(b[48:]) != at || int(b[100]) != level || int64(le.Uint32(b[96:])) > int64(f.node-headerSize)/int64(size) {
		return nil, verdict.Damaged("btrfs: the node at the address %d is broken", at)
	}
	if f.sum && !sumOK(b) {
		return nil, verdict.Damaged("btrfs: the checksum of the node at the address %d is wrong", at)
	}
	return b, nil
}

func count(node []byte) int { return int(le.Uint32(node[96:])) }

func entry(node []byte, level, slot int) []byte {
	if level == 0 {
		return node[headerSize+slot*itemSize:]
	}
	return node[headerSize+slot*ptrSize:]
}

// seek goes to the first item whose key is k or more; false when there is none.
func (c *cursor) seek(k key) (bool, error) {
	if c.root.level > maxLevel {
		return false, verdict.Damaged("btrfs: a tree has %d levels", c.root.level)
	}
	at := c.root.at
	for level := c.root.level; ; level-- {
		node, err := c.f.readNode(at, level)
		if err != nil {
			return false, err
		}
		n := count(node)
		slot := sort.Search(n, func(s int) bool { return parseKey(entry(node, level, s)).compare(k) >= 0 })
		c.nodes[level] = node
		if level == 0 {
			c.slots[0] = slot
			if slot < n {
				return c.load()
			}
			c.slots[0] = n - 1
			return c.step(key{})
		}
		if slot == n || parseKey(entry(node, level, slot)).compare(k) > 0 {
			slot = max(0, slot-1)
		}
		if n == 0 {
			return false, verdict.Damaged("btrfs: the node at the address %d is empty", at)
		}
		c.slots[level] = slot
		at = le.Uint64(entry(node, level, slot)[keySize:])
	}
}

// next goes to the item after the one the cursor is at. Keys must rise, so that a walk ends whatever the nodes hold.
func (c *cursor) next() (bool, error) { return c.step(c.key) }

func (c *cursor) step(last key) (bool, error) {
	level := 0
	for c.slots[level]+1 >= count(c.nodes[level]) {
		if level++; level > c.root.level {
			return false, nil
		}
	}
	c.slots[level]++
	for ; level > 0; level-- {
		at := le.Uint64(entry(c.nodes[level], level, c.slots[level])[keySize:])
		node, err := c.f.readNode(at, level-1)
		if err != nil {
			return false, err
		}
		if count(node) == 0 {
			return false, verdict.Damaged("btrfs: the node at the address %d is empty", at)
		}
		c.nodes[level-1], c.slots[level-1] = node, 0
	}
	ok, err := c.load()
	if ok && c.key.compare(last) <= 0 {
		return false, verdict.Damaged("btrfs: the items of a tree are out of order")
	}
	return ok, err
}

// load reads the item that the cursor is at.
func (c *cursor) load() (bool, error) {
	node := c.nodes[0]
	e := entry(node, 0, c.slots[0])
	from, size := int64(le.Uint32(e[keySize:])), int64(le.Uint32(e[keySize+4:]))
	if from+size > int64(len(node)-headerSize) {
		return false, verdict.Damaged("btrfs: an item lies outside its node")
	}
	c.key = parseKey(e)
	c.data = node[headerSize+from : headerSize+from+size]
	return true, nil
}

// get finds the item with exactly the key k; nil when there is none.
func (f *FS) get(root pointer, k key) ([]byte, error) {
	c := f.cursor(root)
	ok, err := c.seek(k)
	if err != nil || !ok || c.key != k {
		return nil, err
	}
	return c.data, nil
}

// each calls do for the items with one object and kind, in order.
func (f *FS) each(root pointer, object uint64, kind byte, do func(k key, data []byte) error) error {
	c := f.cursor(root)
	for ok, err := c.seek(key{objectid: object, kind: kind}); ; ok, err = c.next() {
		if err != nil || !ok || c.key.objectid != object || c.key.kind != kind {
			return err
		}
		if err := do(c.key, c.data); err != nil {
			return err
		}
	}
}
