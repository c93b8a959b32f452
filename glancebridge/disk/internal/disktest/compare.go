package disktest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
)

// Record is one name of a tree.
type Record struct {
	Type         layer.Type
	Mode         uint32
	UID, GID     uint32
	ModTime      time.Time
	Size         int64
	Sum          string
	Link         string // of a symlink
	Same         string // the first name, in the order of names, of the same inode
	Major, Minor uint32
	Xattrs       map[string]string
	Data         int64 // bytes outside holes; from the walk only
}

// Records is a tree as a map from paths.
type Records map[string]Record

// FromDir reads a tree through the kernel.
func FromDir(t testing.TB, dir string) Records {
	t.Helper()
	all := Records{}
	inodes := map[[2]uint64][]string{}
	err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		r, ino, err := record(p)
		if err != nil {
			return err
		}
		if r.Type != layer.TypeDirectory {
			inodes[ino] = append(inodes[ino], name)
		}
		all[name] = r
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, names := range inodes {
		same(all, names)
	}
	return all
}

func same(all Records, names []string) {
	slices.Sort(names)
	for _, n := range names {
		r := all[n]
		r.Same = names[0]
		all[n] = r
	}
}

func record(p string) (Record, [2]uint64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return Record{}, [2]uint64{}, err
	}
	r := Record{
		Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, ModTime: time.Unix(st.Mtim.Unix()),
		Type: map[uint32]layer.Type{
			unix.S_IFREG: layer.TypeRegular, unix.S_IFDIR: layer.TypeDirectory, unix.S_IFLNK: layer.TypeSymlink,
			unix.S_IFCHR: layer.TypeCharDevice, unix.S_IFBLK: layer.TypeBlockDevice, unix.S_IFIFO: layer.TypeFIFO,
			unix.S_IFSOCK: layer.TypeSocket,
		}[st.Mode&unix.S_IFMT],
	}
	switch r.Type {
	case layer.TypeRegular:
		r.Size = st.Size
		f, err := os.Open(p)
		if err != nil {
			return r, [2]uint64{}, err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return r, [2]uint64{}, err
		}
		r.Sum = hex.EncodeToString(h.Sum(nil))
	case layer.TypeSymlink:
		link, err := os.Readlink(p)
		if err != nil {
			return r, [2]uint64{}, err
		}
		r.Link = link
	case layer.TypeCharDevice, layer.TypeBlockDevice:
		r.Major, r.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	x, err := listXattrs(p)
	r.Xattrs = x
	return r, [2]uint64{st.Dev, st.Ino}, err
}

func listXattrs(p string) (map[string]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, buf)
	if err != nil || n == 0 {
		return nil, err
	}
	x := map[string]string{}
	value := make([]byte, 64<<10)
	for key := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(p, key, value)
		if err != nil {
			return nil, fmt.Errorf("%s of %s: %w", key, p, err)
		}
		x[key] = string(value[:n])
	}
	return x, nil
}

// Walker is what a test walks: an image or a file system.
type Walker func(ctx context.Context, sink layer.Sink) error

// FromWalk reads a tree from a walk, and checks the order of the entries.
func FromWalk(t testing.TB, walk Walker) Records {
	t.Helper()
	all := Records{}
	links := map[string][]string{}
	err := walk(t.Context(), func(e *layer.Entry, content io.Reader) error {
		if e.Name == "" {
			e.Name = "." // the root
		}
		if _, ok := all[e.Name]; ok {
			t.Errorf("%q comes twice", e.Name)
		}
		if e.Name != "." {
			if p, ok := all[filepath.Dir(e.Name)]; !ok || p.Type != layer.TypeDirectory {
				t.Errorf("%q comes before its parent", e.Name)
			}
		}
		r := Record{
			Type: e.Type, Mode: e.Mode, UID: e.UID, GID: e.GID, ModTime: e.ModTime, Size: e.Size, Major: e.Major, Minor: e.Minor,
			Xattrs: maps.Clone(e.Xattrs),
		}
		switch e.Type {
		case layer.TypeRegular:
			h := sha256.New()
			check := &holes{holes: e.Holes, size: e.Size}
			n, err := io.Copy(io.MultiWriter(h, check), content)
			if err != nil {
				return err
			}
			if n != e.Size {
				t.Errorf("%q has %d bytes, %d came", e.Name, e.Size, n)
			}
			if check.bad != "" {
				t.Errorf("%q: %s", e.Name, check.bad)
			}
			r.Sum = hex.EncodeToString(h.Sum(nil))
			r.Data = e.Size
			for _, x := range e.Holes {
				r.Data -= x.Len
			}
		case layer.TypeSymlink:
			r.Link = e.Linkname
		case layer.TypeHardlink:
			target, ok := all[e.Linkname]
			if !ok {
				t.Errorf("%q links to %q, which has not come", e.Name, e.Linkname)
			}
			links[e.Linkname] = append(links[e.Linkname], e.Name)
			r = target
		}
		if r.Type != layer.TypeDirectory {
			r.Same = e.Name
		}
		all[e.Name] = r
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for target, names := range links {
		same(all, append(names, target))
	}
	return all
}

// holes checks that holes are in order, within the file, and zero.
type holes struct {
	holes []layer.Extent
	size  int64
	at    int64
	bad   string
}

func (h *holes) Write(p []byte) (int, error) {
	for off := h.at; off < h.at+int64(len(p)) && len(h.holes) > 0; {
		x := h.holes[0]
		if x.Len <= 0 || x.Off+x.Len > h.size {
			h.bad = fmt.Sprintf("has the hole %v", x)
		}
		from, to := max(off, x.Off), min(h.at+int64(len(p)), x.Off+x.Len)
		if from < to && len(bytes.TrimLeft(p[from-h.at:to-h.at], "\x00")) > 0 {
			h.bad = fmt.Sprintf("has data in the hole %v", x)
		}
		if off = to; x.Off+x.Len > h.at+int64(len(p)) {
			break
		}
		h.holes = h.holes[1:]
	}
	h.at += int64(len(p))
	return len(p), nil
}

// Ignore says what a comparison leaves out.
type Ignore struct {
	Nanoseconds bool
	Times       func(name string) bool
	Xattrs      func(name, key string) bool
	Names       func(name string) bool
	Root        bool
}

// Compare reports each difference.
func Compare(t testing.TB, want, got Records, ig Ignore) {
	t.Helper()
	names := map[string]bool{}
	for n := range want {
		names[n] = true
	}
	for n := range got {
		names[n] = true
	}
	bad := 0
	for _, n := range slices.Sorted(maps.Keys(names)) {
		if ig.Names != nil && ig.Names(n) || n == "." && ig.Root {
			continue
		}
		w, ok := want[n]
		g, ok2 := got[n]
		w, g = ig.reduce(n, w), ig.reduce(n, g)
		if ok && ok2 && w.equal(g) {
			continue
		}
		if bad++; bad > 10 {
			t.Fatal("and more")
		}
		switch {
		case !ok:
			t.Errorf("%q should not be there", n)
		case !ok2:
			t.Errorf("%q is missing", n)
		default:
			t.Errorf("%q\n got %+v\nwant %+v", n, g, w)
		}
	}
}

func (ig Ignore) reduce(name string, r Record) Record {
	r.Data = 0
	if ig.Nanoseconds {
		r.ModTime = time.Unix(r.ModTime.Unix(), 0)
	}
	if ig.Times != nil && ig.Times(name) {
		r.ModTime = time.Time{}
	}
	x := map[string]string{}
	for k, v := range r.Xattrs {
		if ig.Xattrs == nil || !ig.Xattrs(name, k) {
			x[k] = v
		}
	}
	r.Xattrs = x
	return r
}

func (r Record) equal(o Record) bool {
	return r.Type == o.Type && r.Mode == o.Mode && r.UID == o.UID && r.GID == o.GID && r.ModTime.Equal(o.ModTime) &&
		r.Size == o.Size && r.Sum == o.Sum && r.Link == o.Link && r.Same == o.Same && r.Major == o.Major && r.Minor == o.Minor &&
		maps.Equal(r.Xattrs, o.Xattrs)
}

// Sum is the sum of a file's contents as a Record has it.
func Sum(content []byte) string {
	h := sha256.Sum256(content)
	return hex.EncodeToString(h[:])
}

// Listing writes records as text, one a line, to keep and compare.
func (rs Records) Listing() string {
	var b strings.Builder
	for _, n := range slices.Sorted(maps.Keys(rs)) {
		r := rs[n]
		fmt.Fprintf(&b, "%q type %d mode %o owner %d:%d time %d", n, r.Type, r.Mode, r.UID, r.GID, r.ModTime.UnixNano())
		if r.Type == layer.TypeRegular {
			fmt.Fprintf(&b, " size %d sum %.16s", r.Size, r.Sum)
		}
		if r.Link != "" {
			fmt.Fprintf(&b, " to %q", r.Link)
		}
		if r.Same != "" && r.Same != n {
			fmt.Fprintf(&b, " same as %q", r.Same)
		}
		if r.Major != 0 || r.Minor != 0 {
			fmt.Fprintf(&b, " device %d:%d", r.Major, r.Minor)
		}
		for _, k := range slices.Sorted(maps.Keys(r.Xattrs)) {
			fmt.Fprintf(&b, " %s=%q", k, r.Xattrs[k])
		}
		b.WriteByte('\n')
	}
	return b.String()
}
