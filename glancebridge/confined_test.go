package glancebridge

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// buildHelper builds this test binary as the released one is built, without C: only such a program can take the rights
// of all its threads. It is built once; TestMain removes the folder.
var (
	helperDir   string
	buildHelper = sync.OnceValues(func() (string, error) {
		dir, err := os.MkdirTemp("", "novalet-helper-")
		if err != nil {
			return "", err
		}
		helperDir = dir
		// Other users must be able to run it.
		if err := os.Chmod(dir, 0o755); err != nil {
			return "", err
		}
		bin := filepath.Join(dir, "helper")
		cmd := exec.Command("go", "test", "-c", "-o", bin, ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build helper: %w\n%s", err, out)
		}
		return bin, nil
	})
)

func staticHelper(t *testing.T) []string {
	t.Helper()
	bin, err := buildHelper()
	if err != nil {
		t.Fatal(err)
	}
	return []string{bin, HelperCommand}
}

// children lists the processes whose parent this one is.
func children(t *testing.T) []int {
	t.Helper()
	var out []int
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range stats {
		b, err := os.ReadFile(p)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) && f[0] != "Z" {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, pid)
		}
	}
	return out
}

// TestHelpersHaveNoRights holds a fetch in its middle and looks at both helpers from outside.
func TestHelpersHaveNoRights(t *testing.T) {
	hosttest.RequireRoot(t)
	helper := staticHelper(t)
	images := t.TempDir()
	id := addImage(t, images, root(t, member{name: "etc/big", data: stringOf("x", 1<<20)}), nil)
	g := &halfGlance{FileGlance: NewFileGlance(images), gate: make(chan struct{})}
	s := openStore(t, images, func(o *Options) { o.Glance, o.Unconfined, o.Helper = g, false, helper })
	done := make(chan error, 1)
	go func() {
		_, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
		done <- err
	}()
	// The applier has made the first file: both have given up their rights by then.
	await(t, "the applier to write", func() bool {
		m, _ := filepath.Glob(s.path("ingest", "*", "layers", "0", "etc", "big"))
		return len(m) == 1
	})
	seen := map[string]bool{}
	for _, pid := range children(t) {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			t.Fatal(err)
		}
		args := strings.Split(string(cmdline), "\x00")
		if len(args) < 3 || args[1] != HelperCommand {
			continue
		}
		role := args[2]
		seen[role] = true
		for _, ns := range []string{"user", "mnt", "net", "pid", "ipc", "uts", "cgroup"} {
			ours, err := os.Readlink("/proc/self/ns/" + ns)
			if err != nil {
				t.Fatal(err)
			}
			its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
			if err != nil || its == ours {
				t.Errorf("%s shares the %s namespace (%v)", role, ns, err)
			}
		}
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			status := hosttest.ProcStatus(t, fmt.Sprintf("/proc/%d/task/%s/status", pid, task.Name()))
			for key, want := range map[string]string{"NoNewPrivs": "1", "Seccomp": "2", "CapInh": "0000000000000000",
				"CapAmb": "0000000000000000", "Groups": ""} {
				if status[key] != want {
					t.Errorf("thread of %s has %s %q, want %q", role, key, status[key], want)
				}
			}
			caps := map[string]string{"parse": "0000000000000000", "apply": fmt.Sprintf("%016x",
				1<<unix.CAP_CHOWN|1<<unix.CAP_DAC_OVERRIDE|1<<unix.CAP_FOWNER|1<<unix.CAP_FSETID|1<<unix.CAP_SETFCAP)}[role]
			if status["CapEff"] != caps || status["CapPrm"] != caps {
				t.Errorf("thread of %s has capabilities %s in its own namespace, want %s", role, status["CapEff"], caps)
			}
			for _, key := range []string{"Uid", "Gid"} {
				for _, n := range strings.Fields(status[key]) {
					id, err := strconv.ParseUint(n, 10, 32)
					if err != nil || uint32(id) < s.o.IDBase || uint32(id)-s.o.IDBase >= s.o.IDSize {
						t.Errorf("%s runs with the host's %s %s", role, key, n)
					}
				}
			}
		}
		if role == "apply" {
			r, err := os.Readlink(fmt.Sprintf("/proc/%d/root", pid))
			if err != nil || r == "" || !strings.HasPrefix(r, "/") {
				t.Errorf("root of the applier is %q, %v", r, err)
			}
			if names, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", pid)); err != nil || len(names) != 1 || names[0].Name() != "0" {
				t.Errorf("the applier sees %v at its root (%v)", names, err)
			}
		}
	}
	if !seen["parse"] || !seen["apply"] {
		t.Errorf("saw the helpers %v", seen)
	}
	close(g.gate)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.o.Dir, &st); err != nil || int64(st.Flags)&(unix.MS_NOSUID|unix.MS_NODEV) != unix.MS_NOSUID|unix.MS_NODEV {
		t.Errorf("the store lies on a mount with flags %#x (%v)", st.Flags, err)
	}
	if fi, err := os.Stat(s.o.Dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the store has mode %v (%v)", fi.Mode(), err)
	}
}

// probeCommand makes the test binary a process that confines itself and then tries what it must not.
const probeCommand = "probe-confined"

// TestForbiddenCalls tries the ways out from inside.
func TestForbiddenCalls(t *testing.T) {
	hosttest.RequireRoot(t)
	bin := staticHelper(t)[0]
	s := &Store{o: Options{IDBase: 0xB0000000, IDSize: 0x10000000}}
	for _, role := range []string{"parse", "apply"} {
		for _, what := range []string{"socket", "exec", "open-passwd", "open-up", "mmap-exec", "unshare", "kill-parent", "mknod-device", "none"} {
			attr := s.parserAttr()
			if role == "apply" {
				attr = s.applierAttr()
			}
			dir := t.TempDir()
			if err := os.Chown(dir, int(s.o.IDBase), int(s.o.IDBase)); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(bin, probeCommand, role, what)
			cmd.SysProcAttr, cmd.ExtraFiles, cmd.Env = attr, []*os.File{f}, []string{"GOTRACEBACK=none"}
			out, err := cmd.CombinedOutput()
			f.Close()
			got := strings.TrimSpace(string(out))
			if what == "none" {
				if got != "done" {
					t.Errorf("%s without a forbidden call: %q, %v", role, got, err)
				}
				continue
			}
			if got == "done" || got == "" && err == nil {
				t.Errorf("%s could do %s: %q, %v", role, what, got, err)
			}
			if slices.Contains([]string{"socket", "exec", "unshare"}, what) && (err == nil || !strings.Contains(err.Error(), "bad system call")) {
				t.Errorf("%s was not stopped at %s: %q, %v", role, what, got, err)
			}
		}
	}
}

// TestHelpersEndWithTheAgent kills an agent in the middle of a fetch: its helpers go, and the next one finds a store it
// can clear.
func TestHelpersEndWithTheAgent(t *testing.T) {
	hosttest.RequireRoot(t)
	images := t.TempDir()
	id := addImage(t, images, root(t, member{name: "etc/big", data: stringOf("x", 1<<20)}), nil)
	dir := filepath.Join(t.TempDir(), "store")
	cmd := exec.Command(os.Args[0], stallCommand, dir, images, id)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	written := func() bool {
		m, _ := filepath.Glob(filepath.Join(dir, "ingest", "*", "layers", "0", "etc", "big"))
		return len(m) == 1
	}
	await(t, "the applier to write", written)
	helpers := func() (n int) {
		all, _ := filepath.Glob("/proc/[0-9]*/status")
		for _, p := range all {
			b, _ := os.ReadFile(p)
			if strings.Contains(string(b), fmt.Sprintf("\nPPid:\t%d\n", cmd.Process.Pid)) {
				n++
			}
		}
		return n
	}
	if helpers() != 2 {
		t.Errorf("%d helpers", helpers())
	}
	var pids []string
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		if b, _ := os.ReadFile(p); strings.Contains(string(b), HelperCommand+"\x00apply") || strings.Contains(string(b), HelperCommand+"\x00parse") {
			if st, _ := os.ReadFile(filepath.Dir(p) + "/status"); strings.Contains(string(st), fmt.Sprintf("\nPPid:\t%d\n", cmd.Process.Pid)) {
				pids = append(pids, filepath.Base(filepath.Dir(p)))
			}
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	await(t, "the helpers to end", func() bool {
		for _, pid := range pids {
			if b, err := os.ReadFile("/proc/" + pid + "/cmdline"); err == nil && strings.Contains(string(b), HelperCommand) {
				return false
			}
		}
		return true
	})
	s := openStore(t, images, func(o *Options) { o.Dir, o.Unconfined = dir, false })
	checkEmpty(t, s)
	if _, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"}); err != nil {
		t.Fatal(err)
	}
}
