package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/seccomp"
)

// The attack suite: at least one attempt for every class of past escapes that reaches the engine. Each runs real
// code inside real instances, of both kinds where the kinds differ. Classes that cannot apply:
//
//   - configuration parsed by C before the runtime starts (CVE-2021-43784): the init takes JSON over a socket,
//     parsed by Go, and there is no C.
//   - files copied in and out of a running container by the host (CVE-2018-15664, 2019-14271, 2026-41567,
//     2026-41568): the engine has no such operation. Files are written before anything of the tenant runs, by
//     a process with the tenant's own rights.
//   - volumes shared between instances (CVE-2021-30465, 2024-45310): there are none.
//   - host binaries found through the container's libraries (CVE-2019-14271): the helpers are static and run no
//     other program of the host.
//   - a shim that listens on an abstract socket (CVE-2020-15257): keepers listen in a directory of mode 0700 and
//     ask the kernel for the peer's user id.

// attacker makes a layer with the attack program.
func attacker(t testing.TB) []novalet.Layer {
	layers := busybox(t)
	b, err := os.ReadFile(attackPath)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(layers[0].Path, "bin/attack"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	return layers
}

// machineOf runs a sleeping machine: everything that a machine's root may do is done through exec.
func machineOf(layers []novalet.Layer) *novalet.ContainerSpec {
	return &novalet.ContainerSpec{Kind: novalet.KindMachine, Layers: layers,
		Process: novalet.ProcessSpec{Args: []string{"/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"}}}
}

// canary is a file of the host that no instance may read or change.
func canary(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "novalet-canary")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(dir, "canary")
	if err := os.WriteFile(p, []byte("host secret"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(p, 0o666); err != nil {
		t.Fatal(err)
	}
	return p
}

// bothKinds runs an attack in an application and in a machine.
func bothKinds(t *testing.T, attack func(t *testing.T, te *testEngine, id string)) {
	te := newEngine(t)
	layers := attacker(t)
	te.run("app", novalet.Limits{}, app(layers, "sleep 10000"))
	te.run("machine", novalet.Limits{}, machineOf(layers))
	for _, id := range []string{"app", "machine"} {
		t.Run(id, func(t *testing.T) { attack(t, te, id) })
	}
}

// try runs a verb of the attack program inside and fails on each escape.
func (te *testEngine) try(t *testing.T, id, line string) string {
	t.Helper()
	out, code := te.sh(id, "attack "+line)
	if code != 0 || !strings.Contains(out, "done\n") {
		t.Errorf("attack %s did not run: %d %s", line, code, out)
	}
	for l := range strings.SplitSeq(out, "\n") {
		if strings.HasPrefix(l, "ESCAPE") {
			t.Error(l)
		}
	}
	return out
}

// TestAttackHostBinary: CVE-2019-5736. The program of init and exec helpers is written to while helpers run.
func TestAttackHostBinary(t *testing.T) {
	bothKinds(t, func(t *testing.T, te *testEngine, id string) {
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					te.sh(id, "true")
				}
			}
		})
		te.try(t, id, "exe 1500")
		close(stop)
		wg.Wait()
	})
}

// TestAttackLeakedDescriptors: CVE-2024-21626, 2016-9962. Neither the first process nor an exec has a descriptor
// but its standard streams; a working directory below /proc/self/fd is refused.
func TestAttackLeakedDescriptors(t *testing.T) {
	te := newEngine(t)
	layers := attacker(t)
	te.run("first", novalet.Limits{}, &novalet.ContainerSpec{Kind: novalet.KindApplication, Layers: layers, Process: novalet.ProcessSpec{Args: []string{"/bin/attack", "fds"}}})
	te.waitLog("first", "done")
	if b, _ := te.ConsoleLog(te.ctx(), "first", 1<<16); bytes.Contains(b, []byte("ESCAPE")) {
		t.Errorf("first process of an application: %s", b)
	}
	te.run("init", novalet.Limits{}, &novalet.ContainerSpec{Kind: novalet.KindMachine, Layers: layers, Process: novalet.ProcessSpec{Args: []string{"/bin/attack", "fds"}}})
	te.waitLog("init", "done")
	if b, _ := te.ConsoleLog(te.ctx(), "init", 1<<16); bytes.Contains(b, []byte("ESCAPE")) {
		t.Errorf("init of a machine: %s", b)
	}
	te.run("app", novalet.Limits{}, app(layers, "sleep 10000"))
	te.run("machine", novalet.Limits{}, machineOf(layers))
	file := canary(t)
	for _, id := range []string{"app", "machine"} {
		te.try(t, id, "fds")
		for _, fd := range []int{3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 31, 64} {
			for _, dir := range []string{"/proc/self/fd/%d", "/proc/1/fd/%d", "/proc/self/fd/%d/../.."} {
				var out bytes.Buffer
				code, err := te.Exec(te.ctx(), id, &novalet.ExecSpec{Stdout: &out, Process: novalet.ProcessSpec{
					Args: []string{"/bin/sh", "-c", "cat ." + file + " ../../../../.." + file}, Cwd: fmt.Sprintf(dir, fd)}})
				if err == nil && code == 0 || strings.Contains(out.String(), "host secret") {
					t.Errorf("%s: working directory "+dir+": %q", id, fd, out.String())
				}
			}
		}
	}
}

// TestAttackHelperOnItsWay: CVE-2016-9962, 2022-29162. While the host starts processes inside, a root inside traces
// them and looks through everything that /proc shows of them.
func TestAttackHelperOnItsWay(t *testing.T) {
	file := canary(t)
	bothKinds(t, func(t *testing.T, te *testEngine, id string) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			for ctx.Err() == nil {
				// A helper that is traced stops: it must not hang the host for longer than it wants to wait.
				c, done := context.WithTimeout(ctx, 300*time.Millisecond)
				_, _ = te.Exec(c, id, &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: []string{"true"}}})
				done()
			}
		})
		te.try(t, id, "scan 2000 "+file)
		cancel()
		wg.Wait()
	})
}

// TestAttackFirstProcess: an application's first process has more than the program where that runs as a user. A root inside cannot
// trace it, read it or take its descriptors.
func TestAttackFirstProcess(t *testing.T) {
	te := newEngine(t)
	te.run("app", novalet.Limits{}, app(attacker(t), "sleep 10000"))
	te.try(t, "app", "first")
}

// TestAttackLinksInTheImage: CVE-2025-31133, 2025-52565, 2026-41579, 2026-47766, 2019-19921, 2019-16884. An image
// whose mount points are links to the host either does not start, with a text that says why, or starts with
// nothing of the host touched.
func TestAttackLinksInTheImage(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	file := canary(t)
	dir := filepath.Dir(file)
	layers := busybox(t)
	for _, kind := range []novalet.Kind{novalet.KindApplication, novalet.KindMachine} {
		for _, name := range []string{"dev", "proc", "sys", "run", "etc", "tmp", "config"} {
			for _, target := range []string{dir, "/proc/1/root" + dir, "../../../../../../" + dir, "/proc/self/cwd", "/"} {
				top := t.TempDir()
				if err := errors.Join(os.Chmod(top, 0o755), os.Symlink(target, filepath.Join(top, name))); err != nil {
					t.Fatal(err)
				}
				spec := app(append(layers[:1:1], novalet.Layer{DiffID: "sha256:link", Path: top}), "echo changed >"+file+"; echo changed >/"+name+"/canary; sleep 1000")
				spec.Kind = kind
				spec.Files = []novalet.File{{Path: "/etc/hosts", Data: []byte("x")}, {Path: "/etc/canary", Data: []byte("changed")}, {Path: "/tmp/canary", Data: []byte("changed")}}
				spec.Trees = []novalet.Tree{{Path: "/config", Files: []novalet.File{{Path: "canary", Data: []byte("changed")}}}}
				if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "link"}); err != nil {
					t.Fatal(err)
				}
				err := te.Start(ctx, "link", spec)
				mountPoint := name == "dev" || name == "proc" || name == "sys" || name == "config" || name == "run" && kind == novalet.KindMachine
				if mountPoint && (!errors.Is(err, novalet.ErrAbort) || novalet.FaultText(err) == "") {
					t.Errorf("%s: /%s -> %s: %v", kind, name, target, err)
				}
				if err := te.Destroy(ctx, "link", novalet.DestroyOptions{}); err != nil {
					t.Fatal(err)
				}
				if b, err := os.ReadFile(file); err != nil || string(b) != "host secret" {
					t.Fatalf("%s: /%s -> %s changed the host: %q %v", kind, name, target, b, err)
				}
				if es, _ := os.ReadDir(dir); len(es) != 1 {
					t.Fatalf("%s: /%s -> %s wrote to the host: %v", kind, name, target, es)
				}
			}
		}
	}
}

// TestAttackLinkAfterStart: the tenant itself prepares the links for the next start, in the writable root.
func TestAttackLinkAfterStart(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	file := canary(t)
	spec := app(busybox(t), "sleep 1000")
	spec.Files = []novalet.File{{Path: "/etc/injected", Data: []byte("changed")}, {Path: "/root/.ssh/authorized_keys", Data: []byte("changed"), Append: true}}
	te.run("a", novalet.Limits{}, spec)
	te.sh("a", fmt.Sprintf("rm -rf /etc /root; ln -s %s /etc; mkdir /root; ln -s %s /root/.ssh; ln -s %s /injected; mkfifo /pipe", filepath.Dir(file), filepath.Dir(file), file))
	if err := te.Stop(ctx, "a", novalet.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "a"}); err != nil {
		t.Fatal(err)
	}
	spec.Files = append(spec.Files, novalet.File{Path: "/injected", Data: []byte("changed")}, novalet.File{Path: "/pipe", Data: []byte("x"), Append: true})
	if err := te.Start(ctx, "a", spec); !errors.Is(err, novalet.ErrAbort) || novalet.FaultText(err) == "" {
		t.Errorf("start: %v", err)
	}
	if es, _ := os.ReadDir(filepath.Dir(file)); len(es) != 1 {
		t.Fatalf("written to the host: %v", es)
	}
	if b, _ := os.ReadFile(file); string(b) != "host secret" {
		t.Fatalf("changed on the host: %q", b)
	}
}

// TestAttackMounts: CVE-2022-0492 and the like. No v1 hierarchy, no device's file system, no kernel file system can
// be mounted, and the delegated cgroup ends at its root.
func TestAttackMounts(t *testing.T) {
	bothKinds(t, func(t *testing.T, te *testEngine, id string) { te.try(t, id, "mounts") })
}

// TestAttackDevices: nodes of the host's devices cannot be made, and none are there.
func TestAttackDevices(t *testing.T) {
	bothKinds(t, func(t *testing.T, te *testEngine, id string) { te.try(t, id, "devices") })
}

// TestAttackKernelFiles: core_pattern, modprobe, uevent_helper, sysrq and others, and what tells about the host.
func TestAttackKernelFiles(t *testing.T) {
	bothKinds(t, func(t *testing.T, te *testEngine, id string) { te.try(t, id, "gadgets") })
}

// TestAttackChroot: walking up from an open directory ends at the instance's own root.
func TestAttackChroot(t *testing.T) {
	file := canary(t)
	bothKinds(t, func(t *testing.T, te *testEngine, id string) { te.try(t, id, "chroot "+file) })
}

// TestAttackIDs: ids outside the range are nobody's.
func TestAttackIDs(t *testing.T) {
	bothKinds(t, func(t *testing.T, te *testEngine, id string) { te.try(t, id, "ids") })
}

// TestAttackCapabilities: CVE-2022-29162, 2022-27650, 2026-30892. No process has an inheritable or ambient
// capability; an application has no more than its profile and no way to more.
func TestAttackCapabilities(t *testing.T) {
	te := newEngine(t)
	layers := attacker(t)
	te.run("first", novalet.Limits{}, &novalet.ContainerSpec{Kind: novalet.KindApplication, Layers: layers, Process: novalet.ProcessSpec{Args: []string{"/bin/attack", "status"}}})
	te.waitLog("first", "done")
	te.run("user", novalet.Limits{}, &novalet.ContainerSpec{Kind: novalet.KindApplication, Layers: layers, Process: novalet.ProcessSpec{Args: []string{"/bin/attack", "status"}, User: "web"}})
	te.waitLog("user", "done")
	te.run("app", novalet.Limits{}, app(layers, "sleep 10000"))
	te.run("machine", novalet.Limits{}, machineOf(layers))
	mask := confineOf(novalet.KindApplication).Bounding
	full := confineOf(novalet.KindMachine).Bounding
	last, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		t.Fatal(err)
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(last)))
	full &= 1<<(n+1) - 1
	check := func(what, out string, eff, bound uint64, nnp string) {
		t.Helper()
		for _, want := range []string{"CapInh:\t0000000000000000", "CapAmb:\t0000000000000000", fmt.Sprintf("CapEff:\t%016x", eff),
			fmt.Sprintf("CapPrm:\t%016x", eff), fmt.Sprintf("CapBnd:\t%016x", bound), "NoNewPrivs:\t" + nnp, "Seccomp:\t2"} {
			if !strings.Contains(out, want) {
				t.Errorf("%s: no %q in\n%s", what, want, out)
			}
		}
	}
	for id, eff := range map[string]uint64{"first": mask, "user": 0} {
		b, err := te.ConsoleLog(te.ctx(), id, 1<<16)
		if err != nil {
			t.Fatal(err)
		}
		check(id, string(b), eff, mask, "1")
	}
	for user, root := range map[string]bool{"": true, "0": true, "root": true, "web": false, "1000": false, "1000:0": false} {
		for id, m := range map[string]uint64{"app": mask, "machine": full} {
			var out bytes.Buffer
			if _, err := te.Exec(te.ctx(), id, &novalet.ExecSpec{Stdout: &out, Process: novalet.ProcessSpec{Args: []string{"/bin/attack", "status"}, User: user}}); err != nil {
				t.Fatal(err)
			}
			eff, nnp := m, "0"
			if !root {
				eff = 0
			}
			if id == "app" {
				nnp = "1"
			}
			check(id+" exec as "+strconv.Quote(user), out.String(), eff, m, nnp)
		}
	}
	te.try(t, "app", "userns")
}

// TestAttackSystemCalls makes every system call inside each kind and compares the refusals with the profile.
func TestAttackSystemCalls(t *testing.T) {
	kinds := map[string]seccomp.Kind{"app": seccomp.Application, "machine": seccomp.Machine}
	bothKinds(t, func(t *testing.T, te *testEngine, id string) {
		want, err := seccomp.Refused(kinds[id])
		if err != nil {
			t.Fatal(err)
		}
		got := map[int]string{}
		probe := func(patience time.Duration, calls string) {
			out := te.try(t, id, fmt.Sprintf("probe %d %s", patience.Milliseconds(), calls))
			for l := range strings.SplitSeq(out, "\n") {
				if f := strings.Fields(l); len(f) == 3 && f[0] == "call" {
					nr, _ := strconv.Atoi(f[1])
					got[nr] = f[2]
				}
			}
		}
		probe(500*time.Millisecond, fmt.Sprintf("0-%d", len(want)+9))
		// A refusal cannot block: on a slow machine the process was not at its call yet.
		var again []string
		for nr, s := range got {
			if w, known := want[nr]; s == "blocks" && (w != 0 || !known) {
				again = append(again, strconv.Itoa(nr))
			}
		}
		if len(again) > 0 {
			probe(10*time.Second, strings.Join(again, " "))
		}
		for nr := range len(want) + 10 {
			w, known := want[nr]
			if !known {
				w = int(unix.ENOSYS)
			}
			if nr == 335 || nr == 336 || nr == unix.SYS_SYNC {
				// The probe leaves sync out. uretprobe and uprobe: the kernel keeps them out of filters; they end in the kernel's own trampoline.
				continue
			}
			if w != 0 && got[nr] != strconv.Itoa(w) {
				t.Errorf("call %d: %q, want errno %d", nr, got[nr], w)
			}
		}
	})
}

// TestAttackNeighbour: two instances on one host cannot see, signal or trace each other, nor the host's processes,
// sockets and queues.
func TestAttackNeighbour(t *testing.T) {
	te := newEngine(t)
	layers := attacker(t)
	victim := te.run("victim", novalet.Limits{}, app(layers, "sleep 10000"))
	te.sh("victim", "hostname victim-name 2>/dev/null; echo secret >/tmp/secret; mkfifo /dev/shm/p; echo")
	te.run("app", novalet.Limits{}, app(layers, "sleep 10000"))
	te.run("machine", novalet.Limits{}, machineOf(layers))
	pids := fmt.Sprintf("%d %d %d", victim.PID, os.Getpid(), os.Getppid())
	for _, id := range []string{"app", "machine"} {
		te.try(t, id, "kill "+pids)
		te.try(t, id, "sockets")
		if out, _ := te.sh(id, "ls /dev/shm /tmp; ps"); strings.Contains(out, "secret") || strings.Contains(out, "keeper") {
			t.Errorf("%s sees %s", id, out)
		}
	}
	if st := te.waitState("victim", novalet.ContainerRunning); st.PID != victim.PID {
		t.Fatal("the victim was restarted")
	}
}

// TestAttackProcessorTime: an instance with one processor's worth that burns many leaves the others theirs.
func TestAttackProcessorTime(t *testing.T) {
	te := newEngine(t)
	layers := attacker(t)
	te.run("burner", novalet.Limits{CPUQuota: 20000, CPUPeriod: 100000}, app(layers, "sleep 10000"))
	before, err := te.Stats(te.ctx(), "burner")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	te.try(t, "burner", "burn 2000 4")
	took := time.Since(began)
	after, err := te.Stats(te.ctx(), "burner")
	if err != nil {
		t.Fatal(err)
	}
	// A fifth of a processor; the quota is refilled per period, so allow twice that.
	if used := after.CPU - before.CPU; used > took*2/5+200*time.Millisecond {
		t.Fatalf("used %v of processor time in %v", used, took)
	}
}

// TestAttackHangingFileSystem: a machine that mounts a file system that never answers over the files that the exec
// helper reads hangs that helper, and nothing of the host: the caller goes on, and stop and destroy work.
func TestAttackHangingFileSystem(t *testing.T) {
	te := newEngine(t)
	te.run("m", novalet.Limits{}, machineOf(attacker(t)))
	te.run("other", novalet.Limits{}, app(busybox(t), "sleep 1000"))
	end := te.hang("fuse", "/etc")
	short, done := context.WithTimeout(te.ctx(), time.Second)
	defer done()
	if _, err := te.Exec(short, "m", &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: []string{"true"}}}); err == nil {
		t.Error("the helper did not look at /etc")
	}
	if out, code := te.sh("other", "echo fine"); code != 0 || out != "fine\n" {
		t.Errorf("the neighbour: %q", out)
	}
	if _, err := te.List(te.ctx()); err != nil {
		t.Error(err)
	}
	if err := te.Stop(te.ctx(), "m", novalet.StopOptions{}); err != nil {
		t.Error(err)
	}
	end()
}

// hang has "m" mount a file system that never answers, by one of the attacks, and goes on when it is there. The function it
// returns waits for the end of the attack and tells all that it said.
func (te *testEngine) hang(attack ...string) (end func() string) {
	te.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		te.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(te.ctx())
	var wg sync.WaitGroup
	wg.Go(func() {
		defer w.Close()
		_, _ = te.Exec(ctx, "m", &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: append([]string{"attack"}, attack...)}, Stdout: w})
	})
	te.t.Cleanup(func() {
		cancel()
		wg.Wait()
		r.Close()
	})
	said := make([]byte, 256)
	n, err := r.Read(said)
	if err != nil || !strings.HasPrefix(string(said[:n]), "hanging") {
		te.t.Skipf("this host lets no instance mount a fuse: %q %v", said[:n], err)
	}
	return func() string {
		wg.Wait()
		rest, _ := io.ReadAll(r)
		return string(said[:n]) + string(rest)
	}
}

// TestAttackFileMode: the host's own files are not readable by any instance's ids, nor by other users.
func TestAttackFileMode(t *testing.T) {
	te := newEngine(t)
	spec := app(busybox(t), "sleep 1000")
	spec.Files = []novalet.File{{Path: "/etc/secret", Data: []byte("password"), Mode: 0o600}}
	te.run("a", novalet.Limits{}, spec)
	var bad []string
	for _, root := range []string{te.opts.StateDir, te.opts.RunDir} {
		err := filepath.Walk(root, func(p string, i os.FileInfo, err error) error {
			if err != nil {
				return err
			}
			if strings.HasSuffix(p, "/upper") || strings.HasSuffix(p, "/work") {
				return filepath.SkipDir
			}
			if !i.IsDir() && i.Mode().Perm()&0o077 != 0 || i.IsDir() && i.Mode().Perm()&0o066 != 0 {
				bad = append(bad, fmt.Sprint(p, " ", i.Mode()))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(bad) > 0 {
		t.Fatalf("open to others: %v", bad)
	}
}

// TestAttackMountTable: what an instance reads of its mounts tells nothing of where things are on the host.
func TestAttackMountTable(t *testing.T) {
	te := newEngine(t)
	spec := app(busybox(t), "sleep 1000")
	spec.Files = []novalet.File{{Path: "/etc/secret", Data: []byte("password"), Mode: 0o600}}
	te.run("app", novalet.Limits{RootBytes: 64 << 20, EphemeralBytes: []int64{16 << 20}}, spec)
	te.run("deb", novalet.Limits{}, machineOf(debian(t)))
	for _, id := range []string{"app", "deb"} {
		out, code := te.sh(id, "cat /proc/self/mountinfo /proc/self/mountstats /proc/mounts")
		if code != 0 || !strings.Contains(out, "overlay") {
			t.Fatalf("%s: exit code %d: %s", id, code, out)
		}
		for _, secret := range []string{te.opts.StateDir, te.opts.RunDir, filepath.Base(te.opts.StateDir), "upperdir=/var", "/upper"} {
			if strings.Contains(out, secret) {
				t.Errorf("%s: the mounts name %s:\n%s", id, secret, out)
			}
		}
	}
}
