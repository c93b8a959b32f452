// Package scripts tests the shell scripts that newcomers meet first.
package scripts

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/novalet/novalet/internal/hosttest"
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

// TestDevStackPlugin takes the plugin through stack, unstack and clean: the program is built and installed, DevStack's own
// unit of the compute service runs it, and clean leaves nothing.
func TestDevStackPlugin(t *testing.T) {
	hosttest.RequireRoot(t)
	work := t.TempDir()
	out, err := exec.Command("bash", "devstack.sh", work).CombinedOutput()
	if err != nil {
		t.Fatalf("devstack.sh: %v\n%s", err, out)
	}
	for _, want := range []string{"VIRT_DRIVER=novalet", "n-sproxy", "novalet 0."} {
		if !strings.Contains(string(out), want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	if strings.Contains(string(out), "n-novnc") {
		t.Errorf("the display proxy is still enabled:\n%s", out)
	}
	dropin, err := os.ReadFile(filepath.Join(work, "systemd-stacked", "devstack@n-cpu.service.d", "novalet.conf"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\nExecStart=\nExecStart=" + work + "/bin/novalet agent --config-file " + work + "/nova/nova-cpu.conf\n", "\nKillMode=process\n", "\nUser=root\n"} {
		if !strings.Contains(string(dropin), want) {
			t.Errorf("the drop-in lacks %q:\n%s", want, dropin)
		}
	}
	conf, err := os.ReadFile(filepath.Join(work, "nova", "nova-cpu.conf"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "state_dir = " + work + "/data/novalet"; !strings.Contains(string(conf), want) || !strings.Contains(string(conf), "transport_url") {
		t.Errorf("nova-cpu.conf lacks %q:\n%s", want, conf)
	}
	asked, err := os.ReadFile(filepath.Join(work, "systemctl.log"))
	if err != nil {
		t.Fatal(err)
	}
	if l := string(asked); !strings.Contains(l, "daemon-reload") || strings.Index(l, "daemon-reload") > strings.Index(l, "start devstack@n-cpu.service") ||
		!strings.Contains(l, "is-active --quiet devstack@n-cpu.service") {
		t.Errorf("systemctl was asked:\n%s", l)
	}
	for _, gone := range []string{"bin/novalet", "data/novalet", "systemd/devstack@n-cpu.service.d"} {
		if _, err := os.Stat(filepath.Join(work, gone)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("clean leaves %s: %v", gone, err)
		}
	}
}
