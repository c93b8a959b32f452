package statefile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

type doc struct {
	Name string `json:"name"`
}

func TestWriteReadRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.json")
	for _, name := range []string{"first", "second"} {
		if err := Write(path, doc{name}); err != nil {
			t.Fatal(err)
		}
		var got doc
		if err := Read(path, &got); err != nil {
			t.Fatal(err)
		}
		if got.Name != name {
			t.Errorf("read %q, wrote %q", got.Name, name)
		}
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600", st.Mode().Perm())
	}
	for range 2 {
		if err := Remove(path, true); err != nil {
			t.Fatal(err)
		}
	}
	if err := Read(path, &doc{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("read a removed file: %v, want fs.ErrNotExist", err)
	}
}

func TestFailedWriteLeavesTheOldDocument(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.json")
	if err := Write(path, doc{"old"}); err != nil {
		t.Fatal(err)
	}
	// The target turned into a directory: the rename fails.
	busy := filepath.Join(dir, "b.json")
	if err := os.MkdirAll(filepath.Join(busy, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Write(busy, doc{"new"}); err == nil {
		t.Fatal("writing over a directory worked")
	}
	if err := Write(path, func() {}); err == nil {
		t.Fatal("encoding a function worked")
	}
	var got doc
	if err := Read(path, &got); err != nil || got.Name != "old" {
		t.Errorf("read %q, %v; want the old document", got.Name, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.Contains(e.Name(), tmpMark) {
			t.Errorf("temporary file %s left behind", e.Name())
		}
	}
}

func TestCleanRemovesLeftoversOnly(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a.json", ".a.json" + tmpMark + "123", ".keep"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := Clean(dir); err != nil {
		t.Fatal(err)
	}
	var names []string
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != ".keep a.json" {
		t.Errorf("left %q, want %q", got, ".keep a.json")
	}
}

func TestReadRefusesDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.json")
	if err := os.WriteFile(path, []byte(`{"name":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Read(path, &doc{}); err == nil {
		t.Error("a cut document was accepted")
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(MaxBytes+1), f.Close()); err != nil {
		t.Fatal(err)
	}
	if err := Read(path, &doc{}); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("reading an overlong document: %v", err)
	}
}
