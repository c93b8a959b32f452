package engine

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// shimPath is the second program and attackPath what the attack suite runs inside, built once for the tests that
// run as root.
var shimPath, attackPath string

func TestMain(m *testing.M) {
	code := func() int {
		if os.Geteuid() != 0 || os.Getenv("NOVALET_ROOT_TESTS") != "1" || os.Getenv(agentEnv) != "" {
			return m.Run()
		}
		dir, err := os.MkdirTemp("", "novalet-shim")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		shimPath, attackPath = filepath.Join(dir, "novalet-shim"), filepath.Join(dir, "attack")
		for out, pkg := range map[string]string{shimPath: "../cmd/novalet-shim", attackPath: "./testdata/attack"} {
			cmd := exec.Command("go", "build", "-o", out, pkg)
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "build %s: %v\n%s", pkg, err, out)
				return 1
			}
		}
		return m.Run()
	}()
	os.Exit(code)
}

// testEngine is an engine in directories of its own.
type testEngine struct {
	*Engine
	t    testing.TB
	opts Options
}

// newEngine opens one, and at the test's end checks that nothing of it is left.
func newEngine(t testing.TB) *testEngine {
	t.Helper()
	hosttest.RequireRoot(t)
	dir, err := os.MkdirTemp("", "novalet-engine")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	te := &testEngine{t: t, opts: Options{
		StartTimeout: hosttest.Patience(20 * time.Second), StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"),
		CgroupRoot: "novalet-test-" + filepath.Base(dir)[len("novalet-engine"):],
		ShimPath:   shimPath, KeeperCapacity: 8,
		Logger: slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}}
	te.open()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), hosttest.Patience(time.Minute))
		defer cancel()
		list, err := te.List(ctx)
		if err != nil {
			t.Error(err)
		}
		for _, s := range list {
			if err := te.Destroy(ctx, s.ID, novalet.DestroyOptions{}); err != nil {
				t.Error(err)
			}
		}
		keepers, _ := filepath.Glob(filepath.Join(te.opts.RunDir, "keepers", "*.log"))
		for _, k := range keepers {
			if b, _ := os.ReadFile(k); len(b) > 0 {
				t.Logf("%s: %s", filepath.Base(k), b)
			}
		}
		if err := te.Close(); err != nil {
			t.Error(err)
		}
		left, _ := filepath.Glob(filepath.Join(te.opts.StateDir, "[it]*", "*"))
		if len(left) > 0 {
			t.Errorf("left in the state directory: %v", left)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
		eventually(t, "nothing is left on the host", func() string {
			return strings.Join(leftovers(t, filepath.Base(dir), te.opts.CgroupRoot), "\n")
		})
	})
	return te
}

func (te *testEngine) open() {
	te.t.Helper()
	e, err := Open(te.opts)
	if err != nil {
		te.t.Fatal(err)
	}
	te.Engine = e
}

type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

// leftovers lists what an engine could leave behind, known by the names of its directory and its cgroups: mounts,
// cgroups, processes, loop devices. Other engines may run on the machine.
func leftovers(t testing.TB, dir, group string) []string {
	t.Helper()
	var out []string
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if strings.Contains(line, dir) {
			out = append(out, "mount "+line)
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + group)
	if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", group)); err == nil {
		groups = append(groups, "/sys/fs/cgroup/"+group)
	}
	out = append(out, groups...)
	procs, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, p := range procs {
		if b, _ := os.ReadFile(p); strings.Contains(string(b), "/"+group) {
			cmd, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "cmdline"))
			out = append(out, "process "+p+" "+string(cmd))
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		if b, _ := os.ReadFile(l); strings.Contains(string(b), dir) {
			out = append(out, "loop "+strings.TrimSpace(string(b)))
		}
	}
	return out
}

// eventually polls until check returns "" or more than half a minute is over.
func eventually(t testing.TB, what string, check func() string) {
	t.Helper()
	last := ""
	for deadline := time.Now().Add(hosttest.Patience(40 * time.Second)); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if last = check(); last == "" {
			return
		}
	}
	t.Fatalf("%s: not so: %s", what, last)
}

// busybox makes a layer with busybox-static and its usual names.
func busybox(t testing.TB) []novalet.Layer {
	t.Helper()
	dir, err := os.MkdirTemp("", "novalet-layer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"bin", "sbin", "etc", "proc", "sys", "dev", "tmp", "root", "usr/bin", "var"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "tmp"), os.ModeSticky|0o777); err != nil {
		t.Fatal(err)
	}
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static: ", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), bin, 0o755); err != nil {
		t.Fatal(err)
	}
	list, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range strings.Fields(string(list)) {
		if n != "busybox" {
			if err := os.Symlink("busybox", filepath.Join(dir, "bin", n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, text := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nweb:x:100:101:web:/var:/bin/sh\n",
		"etc/group":  "root:x:0:\nweb:x:101:\nextra:x:102:web\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return []novalet.Layer{{DiffID: "sha256:test", Path: dir}}
}

// app is a spec that runs a shell script.
func app(layers []novalet.Layer, script string) *novalet.ContainerSpec {
	return &novalet.ContainerSpec{Kind: novalet.KindApplication, Layers: layers,
		Process: novalet.ProcessSpec{Args: []string{"/bin/sh", "-c", script}}}
}

// run creates and starts a container.
func (te *testEngine) run(id string, l novalet.Limits, c *novalet.ContainerSpec) *novalet.ContainerStatus {
	te.t.Helper()
	ctx := te.ctx()
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: id, Hostname: id, Kind: c.Kind, Limits: l}); err != nil {
		te.t.Fatal(err)
	}
	if err := te.Start(ctx, id, c); err != nil {
		te.t.Fatal(err)
	}
	st, err := te.Status(ctx, id)
	if err != nil {
		te.t.Fatal(err)
	}
	return st
}

func (te *testEngine) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), hosttest.Patience(2*time.Minute))
	te.t.Cleanup(cancel)
	return ctx
}

// sh runs a script inside and returns its output and exit code.
func (te *testEngine) sh(id, script string) (string, int) {
	te.t.Helper()
	var out bytes.Buffer
	code, err := te.Exec(te.ctx(), id, &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: []string{"/bin/sh", "-c", script}}, Stdout: &out, Stderr: &out})
	if err != nil {
		te.t.Fatal(err)
	}
	if code > 125 {
		te.t.Logf("exec %q: exit code %d, output %q", script, code, out.String())
	}
	return out.String(), code
}

// waitLog waits until the console log holds text.
func (te *testEngine) waitLog(id, text string) {
	te.t.Helper()
	eventually(te.t, fmt.Sprintf("console log of %s has %q", id, text), func() string {
		b, err := te.ConsoleLog(te.ctx(), id, 1<<20)
		if err != nil {
			return err.Error()
		}
		if !strings.Contains(string(b), text) {
			return "log is " + string(b)
		}
		return ""
	})
}

// waitState waits for a state.
func (te *testEngine) waitState(id string, want novalet.ContainerState) *novalet.ContainerStatus {
	te.t.Helper()
	var st *novalet.ContainerStatus
	eventually(te.t, fmt.Sprintf("%s is %s", id, want), func() string {
		var err error
		if st, err = te.Status(te.ctx(), id); err != nil {
			return err.Error()
		}
		if st.State != want {
			return string(st.State)
		}
		return ""
	})
	return st
}
