package engine

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestSecurityDoc: every test that docs/security.md names exists, every row names one or says why none can, and every
// vulnerability that the engine's own tests speak of is listed.
func TestSecurityDoc(t *testing.T) {
	b, err := os.ReadFile("../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	have := map[string]bool{}
	function := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Za-z0-9_]+)\(`)
	err = filepath.WalkDir("..", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && d.Name() != ".." || d.Name() == "build" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(p, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		for _, m := range function.FindAllStringSubmatch(string(text), -1) {
			have[m[1]] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	name := regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z][A-Za-z0-9_]+`)
	named := name.FindAllString(doc, -1)
	if len(named) < 40 {
		t.Errorf("only %d tests are named", len(named))
	}
	for _, n := range named {
		if !have[n] {
			t.Errorf("%s does not exist", n)
		}
	}
	for line := range strings.SplitSeq(doc, "\n") {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || strings.Contains(line, "---") || strings.HasPrefix(line, "| class") {
			continue
		}
		if !name.MatchString(cells[3]) && !strings.Contains(cells[3], "cannot apply: ") {
			t.Errorf("no test and no reason: %s", line)
		}
	}
	suite, err := os.ReadFile("attack_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range regexp.MustCompile(`\b20[0-9]{2}-[0-9]{4,5}\b`).FindAllString(string(suite), -1) {
		if !strings.Contains(doc, "CVE-"+n) {
			t.Errorf("CVE-%s is not listed", n)
		}
	}
}
