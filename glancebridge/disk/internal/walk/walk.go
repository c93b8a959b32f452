// Package walk turns a read-only file system into a stream of layer entries: parents before children, hard links
// after the name that carries the contents, in the order of the inodes on disk. It keeps neither goroutines nor files.
package walk

import (
	"cmp"
	"context"
	"io"
	"slices"
	"strings"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/layer"
)

// Limits bound what one walk may give. All must be set.
type Limits struct {
	Entries   int64 // names in the tree
	Depth     int   // elements of a path
	Held      int64 // bytes of names and links kept at a time
	DataBytes int64 // contents of all files, holes left out
	FileBytes int64 // contents of all files, holes counted
}

// The kernel's own bounds on what can be created.
const (
	maxName    = 255
	maxPath    = 4095
	maxSymlink = 4095
	maxKey     = 255
)

// Node is an inode. The embedded entry's Name and Holes are the walker's; Xattrs and a symlink's Linkname are there
// after FS.Finish.
type Node struct {
	layer.Entry
	Ref   uint64 // what a directory entry names
	ID    uint64 // equal for two names of one inode
	Links uint32
	Priv  any // the reader's own
}

// SetMode takes the permissions and the kind of file from an inode's mode (inode(7)). False: there is no such kind.
func (n *Node) SetMode(mode uint32) bool {
	n.Mode = mode & 0o7777
	switch mode & 0xF000 {
	case 0x1000:
		n.Type = layer.TypeFIFO
	case 0x2000:
		n.Type = layer.TypeCharDevice
	case 0x4000:
		n.Type = layer.TypeDirectory
	case 0x6000:
		n.Type = layer.TypeBlockDevice
	case 0x8000:
		n.Type = layer.TypeRegular
	case 0xA000:
		n.Type = layer.TypeSymlink
	case 0xC000:
		n.Type = layer.TypeSocket
	default:
		return false
	}
	return true
}

// File is the contents of a regular file, read from start to end.
type File interface {
	io.Reader
	Holes() []layer.Extent
	Data() int64 // bytes outside holes
}

// FS is a file system to walk. Refs order inodes as they lie on disk. ReadDir's emit may call back into the others;
// it is not told about "." and "..".
type FS interface {
	Bind(ctx context.Context)
	Root() uint64
	Stat(ref uint64) (*Node, error)
	Finish(n *Node) error
	ReadDir(n *Node, emit func(name []byte, ref uint64) error) error
	Open(n *Node) (File, error)
}

type dir struct {
	parent *dir
	name   string
	ref    uint64
	depth  int
	length int // of the path
	pinned bool
}

func (d *dir) path(name string) string {
	if d.parent == nil {
		return name
	}
	var b strings.Builder
	b.Grow(d.length + 1 + len(name))
	d.write(&b)
	b.WriteByte('/')
	b.WriteString(name)
	return b.String()
}

func (d *dir) write(b *strings.Builder) {
	if d.parent.parent != nil {
		d.parent.write(b)
		b.WriteByte('/')
	}
	b.WriteString(d.name)
}

type link struct {
	dir  *dir
	name string
	left uint32
}

type dirent struct {
	name string
	ref  uint64
}

type walker struct {
	ctx     context.Context
	fs      FS
	lim     Limits
	sink    layer.Sink
	entries int64
	held    int64
	data    int64
	bytes   int64
	links   map[uint64]link
	seen    map[uint64]struct{} // directories
	stack   []*dir
	buf     []byte
}

// Walk gives the whole tree to sink; the root comes first, with an empty name. It returns the first error of the sink,
// the context or the file system.
func Walk(ctx context.Context, fs FS, lim Limits, sink layer.Sink) error {
	fs.Bind(ctx)
	w := &walker{ctx: ctx, fs: fs, lim: lim, sink: sink, links: map[uint64]link{}, seen: map[uint64]struct{}{}}
	root, err := fs.Stat(fs.Root())
	if err != nil {
		return err
	}
	if root.Type != layer.TypeDirectory {
		return verdict.Damaged("the root is not a directory")
	}
	if err := w.finish(root); err != nil {
		return err
	}
	if err := w.hold(held); err != nil {
		return err
	}
	w.seen[root.ID] = struct{}{}
	if err := sink(&root.Entry, empty{}); err != nil {
		return err
	}
	w.stack = append(w.stack, &dir{ref: root.Ref})
	for len(w.stack) > 0 {
		d := w.stack[len(w.stack)-1]
		w.stack = w.stack[:len(w.stack)-1]
		w.held -= held + int64(len(d.name))
		if err := w.dir(d); err != nil {
			return err
		}
	}
	return nil
}

const (
	held      = 96 // a held name costs about this in maps and pointers
	batchLen  = 16 << 10
	batchSize = 1 << 20
)

func (w *walker) hold(n int64) error {
	w.held += n
	if w.held > w.lim.Held {
		return verdict.Limit("it holds more hard links and directories than fit in %d bytes", w.lim.Held)
	}
	return nil
}

// dir emits the entries of a directory in batches, each in the order of the inodes, then stacks its subdirectories.
func (w *walker) dir(d *dir) error {
	n, err := w.fs.Stat(d.ref)
	if err != nil {
		return err
	}
	var batch []dirent
	var size int
	var subs []*dir
	flush := func() error {
		slices.SortFunc(batch, func(a, b dirent) int { return cmp.Compare(a.ref, b.ref) })
		for _, e := range batch {
			if err := w.ctx.Err(); err != nil {
				return context.Cause(w.ctx)
			}
			sub, err := w.entry(d, e)
			if err != nil {
				return err
			}
			if sub != nil {
				subs = append(subs, sub)
			}
		}
		batch, size = batch[:0], 0
		return nil
	}
	err = w.fs.ReadDir(n, func(name []byte, ref uint64) error {
		if err := checkName(name); err != nil {
			return err
		}
		if w.entries++; w.entries > w.lim.Entries {
			return verdict.Limit("it holds more than %d files", w.lim.Entries)
		}
		batch = append(batch, dirent{name: string(name), ref: ref})
		size += len(name)
		if len(batch) >= batchLen || size >= batchSize {
			return flush()
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := flush(); err != nil {
		return err
	}
	slices.SortFunc(subs, func(a, b *dir) int { return cmp.Compare(b.ref, a.ref) })
	w.stack = append(w.stack, subs...)
	return nil
}

func checkName(name []byte) error {
	if len(name) == 0 || len(name) > maxName || string(name) == "." || string(name) == ".." {
		return verdict.Damaged("a directory holds the name %q", name)
	}
	for _, c := range name {
		if c == 0 || c == '/' {
			return verdict.Damaged("a directory holds the name %q", name)
		}
	}
	return nil
}

func (w *walker) entry(d *dir, e dirent) (*dir, error) {
	if d.length+1+len(e.name) > maxPath {
		return nil, verdict.Limit("a path is longer than %d bytes", maxPath)
	}
	if d.depth+1 > w.lim.Depth {
		return nil, verdict.Limit("files are nested deeper than %d", w.lim.Depth)
	}
	n, err := w.fs.Stat(e.ref)
	if err != nil {
		return nil, err
	}
	n.Name = d.path(e.name)
	if n.Type == layer.TypeDirectory {
		return w.directory(d, e, n)
	}
	if n.Links > 1 {
		done, err := w.link(d, e, n)
		if done || err != nil {
			return nil, err
		}
	}
	if err := w.finish(n); err != nil {
		return nil, err
	}
	if n.Type != layer.TypeRegular {
		return nil, w.sink(&n.Entry, empty{})
	}
	// The size is looked at first: it bounds the work on the map.
	if w.bytes += n.Size; n.Size < 0 || w.bytes > w.lim.FileBytes || w.bytes < 0 {
		return nil, verdict.Limit("its files, holes included, are larger than %d bytes", w.lim.FileBytes)
	}
	f, err := w.fs.Open(n)
	if err != nil {
		return nil, err
	}
	if w.data += f.Data(); w.data > w.lim.DataBytes || w.data < 0 {
		return nil, verdict.Limit("its files hold more than %d bytes", w.lim.DataBytes)
	}
	n.Holes = f.Holes()
	return nil, w.sink(&n.Entry, &content{ctx: w.ctx, f: f, left: n.Size, w: w})
}

// finish has the reader complete an entry, and refuses what the kernel could not have made.
func (w *walker) finish(n *Node) error {
	if err := w.fs.Finish(n); err != nil {
		return err
	}
	if n.Type == layer.TypeSymlink && (n.Linkname == "" || len(n.Linkname) > maxSymlink || strings.IndexByte(n.Linkname, 0) >= 0) {
		return verdict.Damaged("the symlink %q has a target of %d bytes that is none", n.Name, len(n.Linkname))
	}
	for k := range n.Xattrs {
		if len(k) > maxKey || strings.IndexByte(k, 0) >= 0 {
			return verdict.Damaged("%q has the extended attribute %q", n.Name, k)
		}
	}
	return nil
}

func (w *walker) directory(d *dir, e dirent, n *Node) (*dir, error) {
	if _, ok := w.seen[n.ID]; ok {
		return nil, verdict.Damaged("directory %q is found twice in the tree", n.Name)
	}
	// The mark stays for good, the stacked directory until it is read.
	if err := w.hold(held/2 + held + int64(len(e.name))); err != nil {
		return nil, err
	}
	w.seen[n.ID] = struct{}{}
	if err := w.finish(n); err != nil {
		return nil, err
	}
	if err := w.sink(&n.Entry, empty{}); err != nil {
		return nil, err
	}
	return &dir{parent: d, name: e.name, ref: e.ref, depth: d.depth + 1, length: len(n.Name)}, nil
}

// link emits n as a hard link when the inode was emitted before, and remembers it else.
func (w *walker) link(d *dir, e dirent, n *Node) (bool, error) {
	if l, ok := w.links[n.ID]; ok {
		n.Linkname = l.dir.path(l.name)
		n.Type = layer.TypeHardlink
		n.Size = 0
		if l.left--; l.left > 0 {
			w.links[n.ID] = l
		} else {
			delete(w.links, n.ID)
			w.held -= held + int64(len(l.name))
		}
		return true, w.sink(&n.Entry, empty{})
	}
	need := held + int64(len(e.name))
	for p := d; p != nil && !p.pinned; p = p.parent {
		p.pinned = true
		need += held + int64(len(p.name))
	}
	if err := w.hold(need); err != nil {
		return false, err
	}
	w.links[n.ID] = link{dir: d, name: e.name, left: n.Links - 1}
	return false, nil
}
