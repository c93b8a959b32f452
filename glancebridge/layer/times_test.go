package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDirectoryTimes: a directory gets its time when it is closed, which is long before the layer is whole, and has it also
// when something is made in it later, by whatever name.
func TestDirectoryTimes(t *testing.T) {
	at := func(n int) time.Time { return time.Unix(int64(1_000_000_000+n*1000), 0) }
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	want := map[string]time.Time{}
	put := func(h *tar.Header) {
		t.Helper()
		body := []byte("x")
		if h.Typeflag == tar.TypeReg {
			h.Size = 1
		} else {
			body = nil
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	dir := func(name string, n int) {
		want[name] = at(n)
		put(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: at(n)})
	}
	file := func(name string) { put(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: at(0)}) }
	round := 0
	// Enough directories to have all others closed.
	others := func() {
		round++
		for i := range 3 * maxDirs {
			d := fmt.Sprintf("other/%d-%d", round, i)
			dir(d, 100+i)
			file(d + "/f")
		}
	}
	dir("other", 1)
	for i, name := range []string{"usr", "usr/lib", "again", "late", "links", "setgid", "parent", "parent/child", "replaced", "replaced/it"} {
		dir(name, 10+i)
		file(name + "/first")
	}
	put(&tar.Header{Typeflag: tar.TypeSymlink, Name: "lib", Linkname: "usr/lib", ModTime: at(0)})
	others()
	file("lib/by-another-name")
	file("late/second")
	put(&tar.Header{Typeflag: tar.TypeLink, Name: "links/hard", Linkname: "late/first", ModTime: at(0)})
	put(&tar.Header{Typeflag: tar.TypeSymlink, Name: "parent/child/soft", Linkname: "x", ModTime: at(0)})
	dir("again", 50)
	want["setgid"] = at(51)
	put(&tar.Header{Typeflag: tar.TypeDir, Name: "setgid/", Mode: 0o2755, ModTime: at(51)})
	delete(want, "replaced/it")
	file("replaced/it")
	others()
	dir("parent/child2", 60)
	// A directory that is closed and described anew while files of it are still to be written.
	for i := range 10 {
		d := fmt.Sprintf("quick-%d", i)
		dir(d, 200+i)
		for k := range maxJobs - 1 {
			file(fmt.Sprintf("%s/%d", d, k))
		}
		for k := range 2 * maxDirs {
			dir(fmt.Sprintf("%s-%d", d, k), 300+k)
		}
		dir(d, 400+i)
	}
	// Two names of one directory are open at a time.
	file("usr/lib/open")
	others()
	file("lib/open-too")
	file("usr/lib/last")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	root, _, err := applyTar(t, buf.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open, before %d", after, before)
	}
	for name, mtime := range want {
		if st, err := os.Lstat(filepath.Join(root, name)); err != nil || !st.ModTime().Equal(mtime) {
			t.Errorf("%s: %v, %v, want %v", name, st.ModTime().Unix(), err, mtime.Unix())
		}
	}
	if st, err := os.Lstat(filepath.Join(root, "setgid")); err != nil || st.Mode() != os.ModeDir|os.ModeSetgid|0o755 {
		t.Errorf("setgid: %v, %v", st.Mode(), err)
	}
	if st, err := os.Lstat(filepath.Join(root, "replaced/it")); err != nil || !st.Mode().IsRegular() {
		t.Errorf("replaced/it: %v", err)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// TestImpliedDirectoryTime: a directory that no entry describes does not get the time of one that had its inode and is gone.
func TestImpliedDirectoryTime(t *testing.T) {
	dir := t.TempDir()
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := errors.Join(unix.Mkdirat(root, "before", 0o755), unix.Fstatat(root, "before", &st, 0)); err != nil {
		t.Fatal(err)
	}
	a := &applier{root: root, open: true, made: map[string]struct{}{}, timeOf: map[uint64]int{}, dirTimes: []dirTime{{name: "gone"}}}
	const near = 50_000
	for i := range uint64(2 * near) {
		a.timeOf[st.Ino-near+i] = 0
	}
	a.dirs, a.w = newDirCache(a), newWriters(true, func(int) {})
	d, err := a.dirs.get("implied")
	if err != nil {
		t.Fatal(err)
	}
	if d.ino < st.Ino-near || d.ino >= st.Ino+near {
		t.Skipf("inode %d comes after %d here", d.ino, st.Ino)
	}
	a.close()
	if got, err := os.Stat(filepath.Join(dir, "implied")); err != nil || got.ModTime().Unix() == 0 {
		t.Errorf("the directory is of %v, %v", got.ModTime(), err)
	}
}
