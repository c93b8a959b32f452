// Package scripts tests the shell scripts that newcomers meet first.
package scripts

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestTooOldGo: one line with the command to type, for any Go that cannot build this.
func TestTooOldGo(t *testing.T) {
	for version, ok := range map[string]bool{"go1.19.8": false, "go1.22.1": true, "go1.99.0": true, "": false} {
		dir := t.TempDir()
		fake := filepath.Join(dir, "go")
		script := "#!/bin/sh\ncase $2 in GOVERSION) echo " + version + ";; GOTOOLCHAIN) echo auto;; esac\n"
		if err := os.WriteFile(fake, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "tests/need-go.sh", fake)
		cmd.Dir = filepath.Join("..", "..")
		cmd.Env = append(os.Environ(), "MAKECMDGOALS=demo")
		out, err := cmd.CombinedOutput()
		if (err == nil) != ok {
			t.Errorf("%q: %v: %s", version, err, out)
		}
		if !ok && (strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), "type: ") || !strings.Contains(string(out), " demo\n")) {
			t.Errorf("%q: it prints %q", version, out)
		}
	}
}
