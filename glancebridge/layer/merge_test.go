package layer

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// merged applies entries as one merged stream and returns the folder; content is that of every regular file with a size.
func merged(t *testing.T, entries ...Entry) (string, error) {
	t.Helper()
	var b bytes.Buffer
	enc := NewEncoder(&b)
	if err := enc.Begin(0, FlagMerge); err != nil {
		t.Fatal(err)
	}
	for i := range entries {
		e := &entries[i]
		if e.Type == 0 {
			e.Type = TypeRegular
		}
		if e.ModTime.IsZero() {
			e.ModTime = time.Unix(1000, 0)
		}
		if err := enc.Entry(e, strings.NewReader(strings.Repeat("x", int(e.Size)))); err != nil {
			t.Fatal(err)
		}
	}
	if err := enc.End(); err != nil {
		t.Fatal(err)
	}
	if err := enc.Finish(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = Apply(f, NewDecoder(&b), ApplyOptions{})
	return filepath.Join(dir, "0"), err
}

func TestMergeDirectoryAgain(t *testing.T) {
	d := func(mode uint32, xattrs map[string]string) Entry {
		return Entry{Name: "d", Type: TypeDirectory, Mode: mode, Xattrs: xattrs}
	}
	dir, err := merged(t, d(0o2775, map[string]string{"user.old": "1", "user.both": "1"}), Entry{Name: "d/f", Size: 3},
		d(0o711, map[string]string{"user.both": "2"}))
	if err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(dir, "d")
	st, err := os.Stat(p)
	if err != nil || st.Mode()&(os.ModePerm|os.ModeSetgid) != 0o711 || st.ModTime().Unix() != 1000 {
		t.Errorf("got %v, %v", st, err)
	}
	buf := make([]byte, 1024)
	n, err := unix.Llistxattr(p, buf)
	if err != nil || strings.Contains(string(buf[:n]), "user.old") {
		t.Errorf("attributes %q, %v", buf[:n], err)
	}
	if n, err = unix.Lgetxattr(p, "user.both", buf); err != nil || string(buf[:n]) != "2" {
		t.Errorf("user.both is %q, %v", buf[:n], err)
	}
	if _, err := os.Stat(filepath.Join(p, "f")); err != nil {
		t.Error(err)
	}
}

// TestMergeDeletes: a deletion follows no symlink, and one of nothing is no error.
func TestMergeDeletes(t *testing.T) {
	dir, err := merged(t, Entry{Name: "real", Type: TypeDirectory, Mode: 0o755}, Entry{Name: "real/f"}, Entry{Name: "real/g"},
		Entry{Name: "link", Type: TypeSymlink, Linkname: "real"}, Entry{Name: "file"},
		Entry{Name: "tree", Type: TypeDirectory, Mode: 0o755}, Entry{Name: "tree/sub", Type: TypeDirectory, Mode: 0o755}, Entry{Name: "tree/sub/f"},
		Entry{Name: "link/.wh.f"}, Entry{Name: "file/.wh.x"}, Entry{Name: "missing/.wh.x"}, Entry{Name: ".wh.nothing"},
		Entry{Name: "real/.wh.g"}, Entry{Name: "tree/.wh..wh..opq"}, Entry{Name: "link/.wh..wh..opq"})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"real", "tree"} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.ModTime().Unix() != 1000 {
			t.Errorf("%s, in which something was deleted: %v, %v", name, st.ModTime(), err)
		}
	}
	for name, want := range map[string]bool{"real/f": true, "real/g": false, "link": true, "file": true, "tree": true, "tree/sub": false, "missing": false} {
		if _, err := os.Lstat(filepath.Join(dir, name)); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, bad := range []string{".wh.", ".wh..", ".wh..."} {
		if _, err := merged(t, Entry{Name: "f"}, Entry{Name: bad}); err == nil {
			t.Errorf("the deletion %q is taken", bad)
		}
	}
}
