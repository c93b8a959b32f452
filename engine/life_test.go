package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

func TestLifeOfAnApplication(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	layers := busybox(t)
	st, err := te.Create(ctx, &novalet.SandboxSpec{ID: "one", Hostname: "first", Limits: novalet.Limits{MemoryBytes: 64 << 20, PIDs: 50, VCPUs: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if st.State != novalet.ContainerCreated || st.PID == 0 || st.NetNS == "" {
		t.Fatalf("after create: %+v", st)
	}
	if _, err := os.Stat(st.NetNS); err != nil {
		t.Fatal(err)
	}
	spec := app(layers, `trap 'echo bye; exit 7' TERM; echo "hello from $(hostname) as $(id -u)"; while :; do sleep 0.05; done`)
	spec.Files = []novalet.File{{Path: "/etc/motd", Data: []byte("welcome\n")}}
	if err := te.Start(ctx, "one", spec); err != nil {
		t.Fatal(err)
	}
	te.waitLog("one", "hello from first as 0")
	if out, code := te.sh("one", "cat /etc/motd; stat -c %u /etc/motd; exit 3"); out != "welcome\n0\n" || code != 3 {
		t.Fatalf("exec: %q %d", out, code)
	}
	before := te.waitState("one", novalet.ContainerRunning)

	// A new agent finds it as it was.
	if err := te.Close(); err != nil {
		t.Fatal(err)
	}
	te.open()
	after := te.waitState("one", novalet.ContainerRunning)
	if after.PID != before.PID || !after.StartedAt.Equal(before.StartedAt) {
		t.Fatalf("after reopening: %+v, before %+v", after, before)
	}
	if err := te.Stop(ctx, "one", novalet.StopOptions{Timeout: hosttest.Patience(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	st = te.waitState("one", novalet.ContainerStopped)
	if st.ExitCode != 7 || st.PID != 0 || st.NetNS != "" {
		t.Fatalf("after stop: %+v", st)
	}
	te.waitLog("one", "bye")

	// A second start with what is recorded keeps the root and the log.
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "one", Hostname: "first"}); err != nil {
		t.Fatal(err)
	}
	if err := te.Start(ctx, "one", nil); err != nil {
		t.Fatal(err)
	}
	if out, _ := te.sh("one", "cat /etc/motd"); out != "welcome\n" {
		t.Fatalf("after the second start: %q", out)
	}
	te.waitLog("one", "bye")
	if err := te.Destroy(ctx, "one", novalet.DestroyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := te.Destroy(ctx, "one", novalet.DestroyOptions{}); err != nil {
		t.Fatal("second destroy:", err)
	}
	if _, err := te.Status(ctx, "one"); !errors.Is(err, novalet.ErrNotFound) {
		t.Fatal("after destroy:", err)
	}
}

func TestMissingCommandIsTheImagesFault(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "x"}); err != nil {
		t.Fatal(err)
	}
	err := te.Start(ctx, "x", &novalet.ContainerSpec{Kind: novalet.KindApplication, Layers: busybox(t), Process: novalet.ProcessSpec{Args: []string{"nginx"}}})
	if !errors.Is(err, novalet.ErrAbort) || !strings.Contains(novalet.FaultText(err), `no command "nginx"`) || !strings.Contains(novalet.FaultText(err), "os_command_line") {
		t.Fatalf("start: %v", err)
	}
	te.waitState("x", novalet.ContainerStopped)
}

func TestExecStreamsAndUsers(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	te.run("m", novalet.Limits{}, app(busybox(t), "sleep 1000"))
	// Many, so that a race between the end of the process and its output shows.
	for i := range 40 {
		if out, code := te.sh("m", "echo out; echo err >&2; exit 5"); out != "out\nerr\n" || code != 5 {
			t.Fatalf("round %d: %q %d", i, out, code)
		}
	}
	for user, want := range map[string]string{
		"":        "uid=0(root) gid=0(root)",
		"0":       "uid=0(root) gid=0(root)",
		"web":     "uid=100(web) gid=101(web) groups=102(extra)",
		"100":     "uid=100(web) gid=101(web) groups=102(extra)",
		"web:102": "uid=100(web) gid=102(extra)",
		"4000:7":  "uid=4000 gid=7",
	} {
		var out strings.Builder
		code, err := te.Exec(ctx, "m", &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: []string{"id"}, User: user}, Stdout: &out})
		if err != nil || code != 0 || strings.TrimSpace(out.String()) != want {
			t.Errorf("user %q: %q %d %v, want %q", user, out.String(), code, err, want)
		}
	}
	for _, user := range []string{"+1000", "-1", " 0", "0x10", "65536", "4294967295", "nobody", "web:nogroup", "0:0:0", "web:+5"} {
		_, err := te.Exec(ctx, "m", &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: []string{"id"}, User: user}})
		if !errors.Is(err, novalet.ErrAbort) {
			t.Errorf("user %q: %v", user, err)
		}
	}
	// What goes in comes out, through a pipe and through a terminal.
	var out strings.Builder
	in := strings.Repeat("0123456789abcdef", 1<<14)
	if code, err := te.Exec(ctx, "m", &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: []string{"cat"}}, Stdin: strings.NewReader(in), Stdout: &out}); err != nil || code != 0 || out.String() != in {
		t.Fatalf("cat: %d bytes, %d %v", out.Len(), code, err)
	}
	out.Reset()
	code, err := te.Exec(ctx, "m", &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: []string{"sh", "-c", "tty; echo 1 >/dev/tty; test -t 0"}}, TTY: true, Stdout: &out})
	if err != nil || code != 0 || !strings.HasPrefix(out.String(), "/dev/pts/") || !strings.HasSuffix(out.String(), "1\r\n") {
		t.Fatalf("terminal: %q %d %v", out.String(), code, err)
	}
	// A caller that goes away takes its process along.
	short, cancel := context.WithCancel(ctx)
	time.AfterFunc(200*time.Millisecond, cancel)
	if _, err := te.Exec(short, "m", &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: []string{"sleep", "4321"}}}); err == nil {
		t.Fatal("exec went on without its caller")
	}
	eventually(t, "the abandoned process is gone", func() string {
		out, _ := te.sh("m", "ps | grep '[s]leep 4321'")
		return out
	})
}

func TestRootLimit(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	layers := busybox(t)
	te.run("small", novalet.Limits{RootBytes: 64 << 20, RootInodes: 1000}, app(layers, "sleep 1000"))
	te.run("other", novalet.Limits{RootBytes: 64 << 20}, app(layers, "sleep 1000"))
	if out, code := te.sh("small", "dd if=/dev/zero of=/fill bs=1M count=200 2>&1"); code == 0 || !strings.Contains(out, "No space left") {
		t.Fatalf("fill: %q %d", out, code)
	}
	st, err := te.Stats(ctx, "small")
	if err != nil || st.RootBytes < 40<<20 || st.RootBytes > 64<<20 {
		t.Fatalf("stats: %+v %v", st, err)
	}
	if out, code := te.sh("other", "dd if=/dev/zero of=/fill bs=1M count=20 2>&1 && sync"); code != 0 {
		t.Fatalf("the neighbour: %q", out)
	}
	te.sh("small", "rm /fill")
	if out, code := te.sh("small", "i=0; while [ $i -lt 2000 ]; do : >/tmp/f$i || exit 9; i=$((i+1)); done"); code == 0 {
		t.Fatalf("2000 files fit into 1000 inodes: %q", out)
	}
	te.sh("small", "rm -rf /tmp/f*; echo kept >/kept")
	// The disk is there again after a stop, and full disks do not hinder a start.
	te.sh("small", "dd if=/dev/zero of=/fill bs=1M count=200 2>&1")
	if err := te.Stop(ctx, "small", novalet.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "small", Limits: novalet.Limits{RootBytes: 64 << 20}}); err != nil {
		t.Fatal(err)
	}
	if err := te.Start(ctx, "small", nil); err != nil {
		t.Fatal(err)
	}
	if out, _ := te.sh("small", "cat /kept"); out != "kept\n" {
		t.Fatalf("after the stop: %q", out)
	}
}

// TestSharedLayersAreNotWritten starts two instances from the same layer: neither sees what the other writes, and
// the layer stays as it was.
func TestSharedLayersAreNotWritten(t *testing.T) {
	te := newEngine(t)
	layers := busybox(t)
	te.run("a", novalet.Limits{}, app(layers, "sleep 1000"))
	te.run("b", novalet.Limits{}, app(layers, "sleep 1000"))
	te.sh("a", "echo mine >/etc/passwd; echo x >/only-a; rm /bin/cat")
	if out, _ := te.sh("b", "head -1 /etc/passwd; ls /only-a /bin/cat 2>&1"); !strings.HasPrefix(out, "root:x:0:0") || strings.Contains(out, "only-a\n") && !strings.Contains(out, "No such") || !strings.Contains(out, "/bin/cat\n") {
		t.Fatalf("b sees %q", out)
	}
	b, err := os.ReadFile(layers[0].Path + "/etc/passwd")
	if err != nil || !strings.HasPrefix(string(b), "root:x:0:0") {
		t.Fatalf("layer: %q %v", b, err)
	}
	ra, err := te.Root(te.ctx(), "a")
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(ra.Upper+"/only-a", &st); err != nil || st.Uid != ra.UIDBase {
		t.Fatalf("upper: uid %d, base %d, %v", st.Uid, ra.UIDBase, err)
	}
	rb, err := te.Root(te.ctx(), "b")
	if err != nil || rb.UIDBase == ra.UIDBase {
		t.Fatalf("both have ids from %d", ra.UIDBase)
	}
}

func TestFreeze(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	te.run("f", novalet.Limits{}, app(busybox(t), "trap 'exit 0' TERM; i=0; while :; do echo tick $i; i=$((i+1)); sleep 0.02; done"))
	te.waitLog("f", "tick 3")
	if err := te.Freeze(ctx, "f"); err != nil {
		t.Fatal(err)
	}
	te.waitState("f", novalet.ContainerPaused)
	if err := te.Freeze(ctx, "f"); err != nil {
		t.Fatal("second freeze:", err)
	}
	before, err := te.Stats(ctx, "f")
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	after, err := te.Stats(ctx, "f")
	if err != nil || after.CPU != before.CPU {
		t.Fatalf("it used processor time while paused: %v, %v, %v", before.CPU, after.CPU, err)
	}
	if err := te.Thaw(ctx, "f"); err != nil {
		t.Fatal(err)
	}
	te.waitState("f", novalet.ContainerRunning)
	// A paused one can be stopped.
	if err := te.Freeze(ctx, "f"); err != nil {
		t.Fatal(err)
	}
	if err := te.Stop(ctx, "f", novalet.StopOptions{Timeout: hosttest.Patience(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	if st := te.waitState("f", novalet.ContainerStopped); st.ExitCode != 0 {
		t.Fatalf("%+v", st)
	}
}

func TestMemoryAndProcessLimits(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	events := te.Events(ctx)
	layers := busybox(t)
	te.run("hog", novalet.Limits{MemoryBytes: 32 << 20, PIDs: 30}, app(layers, "sleep 1000"))
	te.run("calm", novalet.Limits{MemoryBytes: 32 << 20}, app(layers, "sleep 1000"))
	// With the keeper's own score, init would be killed in its place.
	if out, _ := te.sh("hog", "cat /proc/self/oom_score_adj /proc/1/oom_score_adj"); out != "0\n0\n" {
		t.Errorf("scores of the out-of-memory killer: %q", out)
	}
	if _, code := te.sh("hog", "tail /dev/zero"); code != 137 {
		t.Fatalf("it took more memory than it has: exit code %d", code)
	}
	if ev := wantEvent(t, events, novalet.EventOOM); ev.ID != "hog" {
		t.Fatalf("%+v", ev)
	}
	if st := te.waitState("hog", novalet.ContainerRunning); st.OOMKills < 1 {
		t.Fatalf("%+v", st)
	}
	if out, _ := te.sh("hog", "i=0; while [ $i -lt 100 ]; do sleep 100 & i=$((i+1)); done 2>&1; echo end"); !strings.Contains(out, "can't fork") {
		t.Fatalf("100 processes in a limit of 30: %q", out)
	}
	if out, code := te.sh("calm", "echo fine"); out != "fine\n" || code != 0 {
		t.Fatalf("the neighbour: %q %d", out, code)
	}
	if err := te.Update(ctx, "hog", novalet.Limits{MemoryBytes: 48 << 20, PIDs: 60, CPUShares: 512}); err != nil {
		t.Fatal(err)
	}
	if err := te.Update(ctx, "hog", novalet.Limits{MemoryBytes: 24 << 20, PIDs: 60}); err != nil {
		t.Fatal(err)
	}
}

func TestConsole(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	te.run("c", novalet.Limits{}, app(busybox(t), "echo ready; while read l; do echo \"got $l $(stty size)\"; done"))
	te.waitLog("c", "ready")
	first, err := te.Console(ctx, "c")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second, err := te.Console(ctx, "c")
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := first.Resize(50, 132); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Write([]byte("abc\n")); err != nil {
		t.Fatal(err)
	}
	for _, term := range []novalet.Terminal{first, second} {
		var all []byte
		buf := make([]byte, 4096)
		for !strings.Contains(string(all), "got abc 50 132") {
			n, err := term.Read(buf)
			if err != nil {
				t.Fatalf("%v after %q", err, all)
			}
			all = append(all, buf[:n]...)
		}
		if !strings.Contains(string(all), "ready") {
			t.Fatalf("a viewer does not see the past: %q", all)
		}
	}
	if err := te.Stop(ctx, "c", novalet.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := te.Console(ctx, "c"); !errors.Is(err, novalet.ErrInvalidState) {
		t.Fatal(err)
	}
}

func TestConsoleLogIsBounded(t *testing.T) {
	te := newEngine(t)
	te.opts.ConsoleLogBytes = 64 << 10
	te.Close()
	te.open()
	te.run("c", novalet.Limits{}, app(busybox(t), "seq 1 60000; echo the end"))
	te.waitLog("c", "the end")
	b, err := te.ConsoleLog(te.ctx(), "c", 1<<20)
	if err != nil || len(b) > 64<<10 || len(b) < 16<<10 || !strings.Contains(string(b), "60000\r\n") {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if b, err := te.ConsoleLog(te.ctx(), "c", 10); err != nil || string(b) != "the end\r\n" && len(b) != 10 {
		t.Fatalf("%q %v", b, err)
	}
	te.waitState("c", novalet.ContainerStopped)
}

// TestOwnMachine asks the usual programs what machine they are on: it is the flavor's, not the host's.
func TestOwnMachine(t *testing.T) {
	te := newEngine(t)
	te.run("app", novalet.Limits{MemoryBytes: 128 << 20, VCPUs: 1}, app(busybox(t), "sleep 1000"))
	spec := machineOf(debian(t))
	te.run("deb", novalet.Limits{MemoryBytes: 128 << 20, VCPUs: 1}, spec)
	for _, c := range [][3]string{
		{"app", "nproc", "1"},
		{"app", "grep -c ^processor /proc/cpuinfo", "1"},
		{"app", "cat /sys/devices/system/cpu/online", "0"},
		{"app", "grep MemTotal /proc/meminfo", "MemTotal:         131072 kB"},
		{"app", "grep -c ^cpu[0-9] /proc/stat", "1"},
		{"app", "wc -l </proc/swaps", "1"},
		{"app", "ls /sys/block | wc -l", "0"},
		{"app", "cat /proc/partitions /proc/diskstats | wc -l", "0"},
		{"app", "test $(cut -d. -f1 /proc/uptime) -lt 100 && echo young", "young"},
		{"deb", "nproc", "1"},
		{"deb", "free -k | awk '/^Mem/{print $2}'", "131072"},
		{"deb", "lsblk -n 2>/dev/null | wc -l", "0"},
		{"deb", "test $(($(date +%s) - $(date -d \"$(uptime -s)\" +%s))) -lt 100 && echo young", "young"},
		{"deb", "vmstat 1 2 | wc -l", "4"},
		{"deb", "top -bn1 | awk '/%Cpu/{n++} END{print n}'", "1"},
	} {
		if out, _ := te.sh(c[0], c[1]); strings.TrimSpace(out) != c[2] {
			t.Errorf("%s: %s: %q, want %q", c[0], c[1], out, c[2])
		}
	}
	// It follows a change of the limits.
	if err := te.Update(te.ctx(), "app", novalet.Limits{MemoryBytes: 256 << 20, VCPUs: 1}); err != nil {
		t.Fatal(err)
	}
	if out, _ := te.sh("app", "grep MemTotal /proc/meminfo"); strings.TrimSpace(out) != "MemTotal:         262144 kB" {
		t.Error(out)
	}
}

// TestTooLittleMemory: an instance whose memory does not do for its own start fails alone. Its first process shares the
// keeper's memory for a while, and the kernel kills all that share memory with one that it kills for want of it.
func TestTooLittleMemory(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	te.run("other", novalet.Limits{}, app(busybox(t), "sleep 1000"))
	before := te.waitState("other", novalet.ContainerRunning)
	failed := 0
	for _, kib := range []int64{4, 16, 64, 256, 1024} {
		for range 3 {
			_, err := te.Create(ctx, &novalet.SandboxSpec{ID: "small", Limits: novalet.Limits{MemoryBytes: kib << 10}})
			if err == nil {
				err = te.Start(ctx, "small", app(busybox(t), "sleep 1000"))
			}
			if err != nil {
				failed++
			}
			if err := te.Destroy(ctx, "small", novalet.DestroyOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if failed == 0 {
		t.Error("none was too small")
	}
	if after := te.waitState("other", novalet.ContainerRunning); after.PID != before.PID {
		t.Errorf("the other one was pid %d and is %d", before.PID, after.PID)
	}
	if out, code := te.sh("other", "echo alive"); out != "alive\n" || code != 0 {
		t.Errorf("the other one answers %q, %d", out, code)
	}
}

// TestClosedWhilePreparing: an agent that ends while it prepares sandboxes leaves none, whenever it is.
func TestClosedWhilePreparing(t *testing.T) {
	te := newEngine(t)
	for i := range 60 {
		if err := te.Close(); err != nil {
			t.Fatal(err)
		}
		if left, _ := filepath.Glob(filepath.Join(te.opts.RunDir, "keepers", "*.sock")); len(left) > 0 {
			t.Fatalf("close %d left %v", i, left)
		}
		te.open()
		time.Sleep(time.Duration(i) * 200 * time.Microsecond)
	}
}
