package engine

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/internal/hosttest"
)

// defences are attacks of the suite, each with the one defence that stops it.
var defences = []struct {
	hole    string
	machine bool
	attack  string
	user    string
	limits  novalet.Limits
	// off are the limits when the limit itself is the defence; then no program is changed.
	off *novalet.Limits
	// seen looks from the host for what the attack cannot see itself.
	seen func(te *testEngine) bool
}{
	{hole: holes.Masks, attack: "blocks"},
	{hole: holes.UserNS, machine: true, attack: "sysctl"},
	{hole: holes.Seccomp, attack: "classes"},
	{hole: holes.Seccomp, machine: true, attack: "classes"},
	{hole: holes.Devices, attack: "devices"},
	{hole: holes.NoNewPrivs, attack: "euid", user: "web"},
	{hole: holes.Caps, attack: "netadmin"},
	{hole: holes.Memory, attack: "hog 96", limits: novalet.Limits{MemoryBytes: 48 << 20}},
	{hole: holes.PIDs, attack: "forks 100", limits: novalet.Limits{PIDs: 40}},
	{hole: holes.View, attack: "memtotal HOST", limits: novalet.Limits{MemoryBytes: 64 << 20}},
	{hole: holes.Sysinfo, attack: "totalram HOST", limits: novalet.Limits{MemoryBytes: 64 << 20}},
	{hole: holes.Descriptors, attack: "fds"},
	{hole: holes.Trace, attack: "trace 10"},
	{hole: holes.Trace, attack: "first"},
	{hole: holes.CgroupNS, attack: "cgroupns"},
	{hole: holes.Propagation, machine: true, attack: "propagate novalet-propagates",
		limits: novalet.Limits{EphemeralBytes: []int64{32 << 20}}, seen: propagated},
	{attack: "fill 48", limits: novalet.Limits{RootBytes: 32 << 20}, off: &novalet.Limits{}},
}

// propagated looks for the attack's mount where it must not appear: on the host and in the keepers.
func propagated(te *testEngine) bool {
	files := []string{"/proc/self/mountinfo"}
	te.mu.Lock()
	for _, k := range te.keepers {
		files = append(files, fmt.Sprintf("/proc/%d/mountinfo", k.pid))
	}
	te.mu.Unlock()
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte("novalet-propagates")) {
			return true
		}
	}
	return false
}

// TestEachDefence runs attacks with all defences and with the one that stops them switched off: then they succeed. So the
// attacks are real, and each defence does the work that is said of it.
func TestEachDefence(t *testing.T) {
	hosttest.RequireRoot(t)
	open := filepath.Join(t.TempDir(), "novalet-shim")
	cmd := exec.Command("go", "build", "-tags", "novalet_holes", "-o", open, "../cmd/novalet-shim")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	var host unix.Sysinfo_t
	if err := unix.Sysinfo(&host); err != nil {
		t.Fatal(err)
	}
	kib := fmt.Sprint(uint64(host.Totalram) * uint64(host.Unit) / 1024)
	layers := attacker(t)
	for _, d := range []string{"run", "mnt"} {
		if err := os.MkdirAll(filepath.Join(layers[0].Path, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(attackPath)
	if err != nil {
		t.Fatal(err)
	}
	suid := filepath.Join(layers[0].Path, "bin/suid")
	if err := os.WriteFile(suid, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(suid, os.ModeSetuid|0o755); err != nil {
		t.Fatal(err)
	}
	for i, d := range defences {
		name := d.hole + " " + d.attack
		if d.machine {
			name += " machine"
		}
		t.Run(strings.TrimPrefix(strings.ReplaceAll(name, " ", "-"), "novalet-hole-"), func(t *testing.T) {
			if _, err := os.Stat("/dev/net/tun"); err != nil && d.hole == holes.Devices {
				t.Skip("needs a device that every user of the host may open: ", err)
			}
			te := newEngine(t)
			try := func(l novalet.Limits) bool {
				t.Helper()
				id := fmt.Sprintf("d%d", i)
				spec := app(layers, "sleep 10000")
				if d.machine {
					spec = machineOf(layers)
				}
				te.run(id, l, spec)
				args := strings.Fields(strings.ReplaceAll(d.attack, "HOST", kib))
				program := "/bin/attack"
				if d.user != "" {
					program = "/bin/suid"
				}
				var out bytes.Buffer
				_, err := te.Exec(te.ctx(), id, &novalet.ExecSpec{Stdout: &out, Stderr: &out,
					Process: novalet.ProcessSpec{Args: append([]string{program}, args...), Env: []string{"ATTACK_SAYS=1"}, User: d.user}})
				if err != nil || !strings.HasPrefix(out.String(), "trying\n") {
					t.Fatalf("the attack did not run: %v %q", err, out.String())
				}
				escaped := strings.Contains(out.String(), "ESCAPE")
				if d.seen != nil {
					escaped = d.seen(te)
				}
				if escaped {
					t.Logf("%s", strings.TrimSpace(out.String()))
				}
				if err := te.Destroy(te.ctx(), id, novalet.DestroyOptions{}); err != nil {
					t.Fatal(err)
				}
				return escaped
			}
			if try(d.limits) {
				t.Error("it succeeds against all defences")
			}
			off := d.limits
			if d.off != nil {
				off = *d.off
			} else {
				te.Close()
				te.opts.ShimPath = open
				if err := os.WriteFile(filepath.Join(te.opts.RunDir, "holes"), []byte(d.hole), 0o600); err != nil {
					t.Fatal(err)
				}
				te.open()
			}
			if !try(off) {
				t.Error("it fails with the defence off: it shows nothing")
			}
		})
	}
	// Nothing of it is in the program that is shipped; the same look finds it in the other.
	for _, c := range []struct {
		path string
		want bool
	}{{shimPath, false}, {open, true}} {
		b, err := os.ReadFile(c.path)
		if err != nil {
			t.Fatal(err)
		}
		if got := bytes.Contains(b, []byte("novalet-hole-")) || bytes.Contains(b, []byte("NOVALET_HOLES")); got != c.want {
			t.Errorf("%s: a switch is in it: %v, want %v", filepath.Base(c.path), got, c.want)
		}
	}
}
