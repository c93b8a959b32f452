package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/novalet/novalet/internal/hosttest"
)

// TestKernelFeatureMissing: on a host without a feature that every instance needs, agent and doctor end at once, with
// one line that names it. Such a host is this one with a file of /proc covered, in a mount namespace of its own.
func TestKernelFeatureMissing(t *testing.T) {
	hosttest.RequireRoot(t)
	real, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, file, text string
		want             string
		doctor           []string
	}{
		{"overlayfs", "/proc/filesystems", strings.ReplaceAll(string(real), "\toverlay\n", "\n"), "lacks overlayfs", []string{"MISSING  overlayfs"}},
		{"user namespaces", "/proc/sys/user/max_user_namespaces", "0\n", "lacks user namespaces", []string{"MISSING  user namespaces", "user.max_user_namespaces"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cover := filepath.Join(t.TempDir(), "cover")
			if err := os.WriteFile(cover, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			without := func(args ...string) (code int, stdout, stderr string) {
				t.Helper()
				argv := append([]string{"-m", "sh", "-c", `mount --bind "$1" "$2" && shift 2 && exec "$@"`, "sh", cover, c.file, os.Args[0]}, args...)
				cmd := exec.Command("unshare", argv...)
				var out, errOut strings.Builder
				cmd.Stdout, cmd.Stderr = &out, &errOut
				cmd.Env = append(os.Environ(), asProgram+"=1")
				err := cmd.Run()
				var exit *exec.ExitError
				if err != nil && !errors.As(err, &exit) {
					t.Fatal(err)
				}
				return cmd.ProcessState.ExitCode(), out.String(), errOut.String()
			}
			conf := writeConfig(t, strings.Replace(minimal, "host = c1", "host = c1\nstate_path = "+t.TempDir(), 1))
			code, _, stderr := without("agent", "--config-file", conf)
			if code != exitUnsupported || !strings.Contains(stderr, c.want) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("agent: exit code %d, %q; want %d and one line with %q", code, stderr, exitUnsupported, c.want)
			}
			code, stdout, stderr := without("doctor")
			if code != exitUnsupported || !strings.Contains(stderr, c.want) {
				t.Errorf("doctor: exit code %d, %q", code, stderr)
			}
			for _, w := range c.doctor {
				if !strings.Contains(stdout, w) {
					t.Errorf("doctor does not say %q:\n%s", w, stdout)
				}
			}
		})
	}
	if code, out, stderr := cli(t, "doctor"); code != exitOK {
		t.Errorf("doctor on this host: exit code %d, %s\n%s", code, stderr, out)
	}
}

// TestDoctorFix: doctor names the devices of an agent that does not run which no instance needs, --fix removes them, and
// those of an instance, of another agent and of anybody else stay.
func TestDoctorFix(t *testing.T) {
	hosttest.RequireRoot(t)
	state := filepath.Join(t.TempDir(), "state")
	shim := filepath.Join(t.TempDir(), "shim")
	if out, err := exec.Command("go", "build", "-o", shim, "../novalet-shim").CombinedOutput(); err != nil {
		t.Fatalf("build the shim: %v: %s", err, out)
	}
	conf := writeConfig(t, strings.Replace(minimal, "host = c1", "host = c1\nstate_path = "+state, 1)+"[novalet]\nshim_path = "+shim+"\n")
	s, err := readSettings([]string{conf}, nil)
	if err != nil {
		t.Fatal(err)
	}
	const gone, alive = "11111111-aaaa-4bbb-8ccc-000000000001", "11111111-aaaa-4bbb-8ccc-000000000002"
	if err := os.MkdirAll(filepath.Join(s.stateDir, "records"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.stateDir, "records", alive+".json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	port := func(n int) string { return fmt.Sprintf("22222222-aaaa-4bbb-8ccc-00000000000%d", n) }
	links := map[string]string{
		"nvtgone":  "novalet:" + gone + ":" + port(1) + ":" + owner(s.stateDir),
		"nvtalive": "novalet:" + alive + ":" + port(2) + ":" + owner(s.stateDir),
		"nvtother": "novalet:" + gone + ":" + port(3) + ":another",
		"nvtalien": "nobody's",
	}
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	for name, alias := range links {
		ip("link", "add", name, "type", "bridge")
		t.Cleanup(func() { _ = exec.Command("ip", "link", "del", name).Run() })
		ip("link", "set", name, "alias", alias)
	}
	doctor := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(os.Args[0], append([]string{"doctor", "--config-file", conf}, args...)...)
		cmd.Env = append(os.Environ(), asProgram+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("doctor %v: %v: %s", args, err, out)
		}
		l := strings.Split(strings.TrimSpace(string(out)), "\n")
		return l[len(l)-1]
	}
	if got := doctor(); !strings.Contains(got, "LEFT") || !strings.Contains(got, "nvtgone") || strings.Contains(got, "nvtalive") ||
		strings.Contains(got, "nvtother") || strings.Contains(got, "nvtalien") {
		t.Errorf("doctor says %q", got)
	}
	if !exists("/sys/class/net/nvtgone") {
		t.Error("doctor without --fix removed a device")
	}
	lock, err := lockState(s.stateDir)
	if err != nil {
		t.Fatal(err)
	}
	if got := doctor("--fix"); !strings.Contains(got, "an agent runs") || !exists("/sys/class/net/nvtgone") {
		t.Errorf("beside a running agent doctor --fix says %q", got)
	}
	lock.Close()
	if got := doctor("--fix"); !strings.Contains(got, "removed nvtgone") {
		t.Errorf("doctor --fix says %q", got)
	}
	for name := range links {
		if exists("/sys/class/net/"+name) != (name != "nvtgone") {
			t.Errorf("device %s: there %v", name, name == "nvtgone")
		}
	}
	if got := doctor(); !strings.Contains(got, "nothing") {
		t.Errorf("afterwards doctor says %q", got)
	}
	if code, _, stderr := cli(t, "doctor", "--fix", "--config-file", "/nonexistent/nova.conf"); code != exitConfig {
		t.Errorf("without a configuration: %d, %s", code, stderr)
	}
}
