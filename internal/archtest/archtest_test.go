// Package archtest keeps the direction of imports true: cmd → parts → root → standard library; every part may use
// internal, and no part imports another.
package archtest

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/novalet/novalet"

// parts are the top-level packages that meet only in the root's contracts.
var parts = []string{"agent", "novadriver", "glancebridge", "engine", "network"}

// part returns the part an import path or a directory below the module belongs to, or "".
func part(rel string) string {
	first, _, _ := strings.Cut(rel, "/")
	for _, p := range parts {
		if first == p {
			return p
		}
	}
	return ""
}

// wrong says why a file in directory dir (relative to the module) may not import path, or "".
func wrong(dir, path string, test bool) string {
	inModule := path == module || strings.HasPrefix(path, module+"/")
	rel := strings.TrimPrefix(strings.TrimPrefix(path, module), "/")
	first, _, _ := strings.Cut(dir, "/")
	switch {
	case dir == ".":
		if strings.Contains(path, ".") && !test {
			return "the root package imports the standard library alone"
		}
	case !inModule:
		return ""
	case first == "cmd" || first == "tests":
		return ""
	case strings.HasPrefix(rel, "cmd/"):
		return "only cmd imports cmd"
	case rel == "internal/minicloud" || strings.HasPrefix(rel, "internal/minicloud/"):
		if dir != "internal/minicloud" && !strings.HasPrefix(dir, "internal/minicloud/") {
			return "only cmd imports internal/minicloud"
		}
	case part(rel) != "":
		if part(dir) == part(rel) {
			return ""
		}
		if first == "internal" && (strings.HasPrefix(dir, "internal/minicloud") || test) {
			// The embedded controller speaks through the bus part's encoders; tests may put parts together.
			return ""
		}
		return "parts meet in the root's contracts; cmd joins them"
	}
	return ""
}

func TestArrows(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	files := 0
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			switch d.Name() {
			case ".git", "testdata", "build", "bin":
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		// The imports are parsed here because the test cache does not see what a `go list` child reads.
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		files++
		rel, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		for _, imp := range f.Imports {
			p, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				return err
			}
			if why := wrong(filepath.ToSlash(rel), p, strings.HasSuffix(path, "_test.go")); why != "" {
				t.Errorf("%s imports %s: %s", filepath.Join(rel, filepath.Base(path)), p, why)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 10 {
		t.Fatalf("looked at %d files only: not the module's root?", files)
	}
}

func TestWrong(t *testing.T) {
	for _, c := range []struct {
		dir, path string
		test, bad bool
	}{
		{"agent", module, false, false},
		{"agent", module + "/internal/statefile", false, false},
		{"agent", module + "/engine", false, true},
		{"network/neutron", module + "/network", false, false},
		{"network/neutron", module + "/agent", false, true},
		{"engine", module + "/cmd/novalet", false, true},
		{"cmd/novalet", module + "/engine", false, false},
		{"internal/fake", module + "/agent", false, true},
		{"agent", module + "/internal/minicloud", false, true},
		{"cmd/novalet", module + "/internal/minicloud", false, false},
		{".", "golang.org/x/sys/unix", false, true},
		{".", "encoding/json", false, false},
	} {
		if got := wrong(c.dir, c.path, c.test) != ""; got != c.bad {
			t.Errorf("%s imports %s: refused %v, want %v", c.dir, c.path, got, c.bad)
		}
	}
}
