package main

import (
	"errors"
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
