package layer

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// applyTar writes a tar as an image layer into a folder.
func applyTar(t *testing.T, data []byte) (string, *Applied, error) {
	t.Helper()
	var stream bytes.Buffer
	enc := NewEncoder(&stream)
	if err := enc.Begin(7, FlagWhiteouts); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadTar(bytes.NewReader(data), TarOptions{}, enc.Entry); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(enc.End(), enc.Finish()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	res, err := Apply(d, NewDecoder(&stream), ApplyOptions{})
	if err != nil {
		return "", nil, err
	}
	return filepath.Join(dir, "7"), &res.Layers[0], nil
}

func kinds(t *testing.T, dir string) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		k := "f"
		switch {
		case d.IsDir():
			k = "d"
		case d.Type()&os.ModeCharDevice != 0:
			k = "w"
		case d.Type()&os.ModeSymlink != 0:
			k = "l"
		}
		if rel != "." {
			out = append(out, k+" "+rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, ", ")
}

// TestDeletionMarks: marks act on what is below, never on the layer's own entries, in either order.
func TestDeletionMarks(t *testing.T) {
	for _, c := range []struct {
		name   string
		parts  []part
		want   string
		opaque []string
	}{
		{"name", []part{{name: "a/.wh.b"}}, "d a, w a/b", nil},
		{"opaque", []part{{name: "a/.wh..wh..opq"}, {name: "a/b"}}, "d a, f a/b", []string{"a"}},
		{"opaque root", []part{{name: ".wh..wh..opq"}}, "", []string{""}},
		{"file over its mark", []part{{name: ".wh.b"}, {name: "b"}}, "f b", nil},
		{"mark over its file", []part{{name: "b"}, {name: ".wh.b"}}, "f b", nil},
		{"directory over its mark", []part{{name: ".wh.b"}, {name: "b/", typ: tar.TypeDir}}, "d b", []string{"b"}},
		{"implied directory over its mark", []part{{name: ".wh.b"}, {name: "b/c"}}, "d b, f b/c", []string{"b"}},
		{"mark over its directory", []part{{name: "b/c"}, {name: ".wh.b"}}, "d b, f b/c", []string{"b"}},
		{"aufs bookkeeping", []part{{name: ".wh..wh.plnk/x"}, {name: ".wh..wh.aufs"}}, "d .wh..wh.plnk, f .wh..wh.plnk/x", nil},
		{"mark through a symlink stays inside", []part{{name: "d/", typ: tar.TypeDir}, {name: "s", typ: tar.TypeSymlink, link: "/d"}, {name: "s/.wh.x"}},
			"d d, w d/x, l s", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, a, err := applyTar(t, tarOf(t, c.parts...))
			if err != nil {
				t.Skip("deletion marks need the right to make character devices 0:0: ", err)
			}
			if got := kinds(t, dir); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			if !slices.Equal(a.Opaque, c.opaque) {
				t.Errorf("opaque are %q, want %q", a.Opaque, c.opaque)
			}
		})
	}
}

// TestReplacing: later entries of an archive take the place of earlier ones, whatever they are.
func TestReplacing(t *testing.T) {
	for _, c := range []struct {
		name  string
		parts []part
		want  string
	}{
		{"file by directory", []part{{name: "a"}, {name: "a/", typ: tar.TypeDir}, {name: "a/b"}}, "d a, f a/b"},
		{"tree by file", []part{{name: "a/b/c"}, {name: "a/b/d"}, {name: "a", data: "x"}}, "f a"},
		{"symlink by file, target untouched", []part{{name: "t"}, {name: "a", typ: tar.TypeSymlink, link: "t"}, {name: "a", data: "x"}}, "f a, f t"},
		{"symlink by directory", []part{{name: "t/", typ: tar.TypeDir}, {name: "a", typ: tar.TypeSymlink, link: "t"}, {name: "a/x"}, {name: "a/", typ: tar.TypeDir}, {name: "a/y"}},
			"d a, f a/y, d t, f t/x"},
		{"symlink on its own path", []part{{name: "x", typ: tar.TypeSymlink, link: "."}, {name: "x/x", data: "1"}, {name: "x", data: "2"}}, "f x"},
		{"links in any order", []part{{name: "b", typ: tar.TypeLink, link: "c"}, {name: "c", typ: tar.TypeLink, link: "a"}, {name: "a", data: "x"}}, "f a, f b, f c"},
		{"link by itself", []part{{name: "a", data: "x"}, {name: "b", typ: tar.TypeLink, link: "a"}, {name: "b", typ: tar.TypeLink, link: "a"}}, "f a, f b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, _, err := applyTar(t, tarOf(t, c.parts...))
			if err != nil {
				t.Fatal(err)
			}
			if got := kinds(t, dir); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

func TestStreamIsBounded(t *testing.T) {
	var whole bytes.Buffer
	enc := NewEncoder(&whole)
	_ = enc.Begin(0, 0)
	content := append(append([]byte("start"), make([]byte, 3*zeroBlock)...), bytes.Repeat([]byte("e"), 200<<10)...)
	e := &Entry{Name: "f", Type: TypeRegular, Size: int64(len(content)), Xattrs: map[string]string{"user.a": "b"}}
	if err := errors.Join(enc.Entry(e, bytes.NewReader(content)), enc.End(), enc.Finish()); err != nil {
		t.Fatal(err)
	}
	// Every cut is seen.
	for n := 0; n < whole.Len(); n += 97 {
		d, err := os.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		_, err = Apply(d, NewDecoder(bytes.NewReader(whole.Bytes()[:n])), ApplyOptions{})
		d.Close()
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
	d, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := Apply(d, NewDecoder(bytes.NewReader(whole.Bytes())), ApplyOptions{Limits: Limits{Bytes: 1000}}); !errors.As(err, new(*TooLargeError)) {
		t.Errorf("beyond the limit: %v", err)
	}
	short := &Entry{Name: "f", Type: TypeRegular, Size: 10}
	if err := enc.Entry(short, strings.NewReader("only five")); err == nil {
		t.Error("content that ends early was accepted")
	}
}

func TestACLText(t *testing.T) {
	for _, c := range []struct {
		text string
		def  bool
		want string
	}{
		{"user::rwx,group::r-x,other::---", false, ""},
		{"user::rw-\nuser:1000:r--\ngroup::r--\nmask::r--\nother::---\n", false,
			"02000000" + "01000600ffffffff" + "02000400e8030000" + "04000400ffffffff" + "10000400ffffffff" + "20000000ffffffff"},
		{"user::rw-,user:lisa:r--:1000,group::r--,mask::r--,other::---", false,
			"02000000" + "01000600ffffffff" + "02000400e8030000" + "04000400ffffffff" + "10000400ffffffff" + "20000000ffffffff"},
		{"user::rwx,group::r-x,other::---", true, "02000000" + "01000700ffffffff" + "04000500ffffffff" + "20000000ffffffff"},
	} {
		got, err := parseACL(c.text, c.def)
		if err != nil || hex.EncodeToString([]byte(got)) != c.want {
			t.Errorf("%q gives %x, %v", c.text, got, err)
		}
	}
	if _, err := parseACL("nonsense", false); err == nil {
		t.Error("nonsense was accepted")
	}
}

func TestTarNames(t *testing.T) {
	for in, want := range map[string]string{"./": "", "/": "", "./a": "a", "/a//b/./c/": "a/b/c", "a/b": "a/b", "": "", "..a/b..": "..a/b.."} {
		if got, err := CleanName(in); err != nil || got != want {
			t.Errorf("%q gives %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"..", "a/..", "../a", "a/../b", "a\x00b", strings.Repeat("x", 256), strings.Repeat("a/", 513) + "b", strings.Repeat("x/", 2100)} {
		if got, err := CleanName(in); err == nil {
			t.Errorf("%q was accepted as %q", short(in), got)
		}
	}
}
