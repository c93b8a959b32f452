package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// agentEnv makes the test binary an agent that creates, starts and destroys containers until it is killed.
const agentEnv = "NOVALET_ENGINE_TEST_AGENT"

// TestAgentProcess is not a test: it is the agent that TestKilledAgent kills.
func TestAgentProcess(t *testing.T) {
	dir := os.Getenv(agentEnv)
	if dir == "" {
		t.Skip("run by TestKilledAgent only")
	}
	hosttest.RequireRoot(t)
	e, err := Open(Options{StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"), CgroupRoot: "novalet-test-" + filepath.Base(dir)[len("novalet-engine"):],
		ShimPath: os.Getenv(agentEnv + "_SHIM"), KeeperCapacity: 8})
	if err != nil {
		t.Fatal(err)
	}
	layers := []novalet.Layer{{DiffID: "sha256:test", Path: os.Getenv(agentEnv + "_LAYER")}}
	rootBytes, _ := strconv.ParseInt(os.Getenv(agentEnv+"_ROOT"), 10, 64)
	ctx := context.Background()
	fmt.Println("agent works")
	for i := 0; ; i++ {
		id := fmt.Sprintf("victim-%d", i%3)
		_, err := e.Create(ctx, &novalet.SandboxSpec{ID: id, Limits: novalet.Limits{MemoryBytes: 32 << 20, RootBytes: rootBytes}})
		if err == nil {
			err = e.Start(ctx, id, app(layers, "sleep 1000"))
		}
		if err == nil {
			err = e.Destroy(ctx, id, novalet.DestroyOptions{})
		}
		if err != nil {
			fmt.Println("agent:", err)
			os.Exit(3)
		}
	}
}

// TestKilledAgent kills agents at random points of their work: what ran before goes on untouched, what was under way
// can be finished or removed, and nothing is left (the end of the test compares the host).
func TestKilledAgent(t *testing.T) { killAgents(t, newEngine(t), 0) }

func killAgents(t *testing.T, te *testEngine, rootBytes int64) {
	ctx := te.ctx()
	layers := busybox(t)
	before := te.run("stays", novalet.Limits{RootBytes: rootBytes}, app(layers, "i=0; while :; do echo tick $i; i=$((i+1)); sleep 0.05; done"))
	dir := filepath.Dir(te.opts.StateDir)
	for round := range 5 {
		if err := te.Close(); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestAgentProcess$")
		cmd.Env = append(os.Environ(), agentEnv+"="+dir, agentEnv+"_SHIM="+shimPath, agentEnv+"_LAYER="+layers[0].Path, fmt.Sprintf("%s_ROOT=%d", agentEnv, rootBytes))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 4096)
		if n, err := out.Read(buf); err != nil || !strings.Contains(string(buf[:n]), "agent works") {
			t.Fatalf("agent said %q, %v", buf[:n], err)
		}
		// Any point will do; these are spread over a creation.
		time.Sleep(time.Duration(9*round+3) * time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
			t.Fatalf("the agent ended before it was killed: %v", err)
		}
		te.open()
		st, err := te.Status(ctx, "stays")
		if err != nil || st.PID != before.PID || st.State != novalet.ContainerRunning {
			t.Fatalf("round %d: %+v %v", round, st, err)
		}
		list, err := te.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range list {
			if s.ID == "stays" {
				continue
			}
			// Odd rounds finish what was begun, even ones remove it.
			if round%2 == 1 {
				te.run(s.ID, novalet.Limits{MemoryBytes: 32 << 20, RootBytes: rootBytes}, app(layers, "sleep 1000"))
			}
			if err := te.Destroy(ctx, s.ID, novalet.DestroyOptions{}); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
		}
	}
	log, err := te.ConsoleLog(ctx, "stays", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for i, line := range strings.Split(strings.TrimSpace(string(log)), "\r\n") {
		if line != "tick "+strconv.Itoa(i) {
			t.Fatalf("line %d of the console log is %q", i, line)
		}
	}
}

// TestKilledKeeper ends the containers of a keeper that dies, and says so: nothing runs on without being looked
// after.
func TestKilledKeeper(t *testing.T) {
	te := newEngine(t)
	events := te.Events(te.ctx())
	layers := busybox(t)
	st := te.run("one", novalet.Limits{}, app(layers, "sleep 1000"))
	te.mu.Lock()
	for _, k := range te.keepers {
		if err := unix.Kill(k.pid, unix.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	te.mu.Unlock()
	if ev := wantEvent(t, events, novalet.EventExited); ev.ID != "one" {
		t.Fatalf("%+v", ev)
	}
	te.waitState("one", novalet.ContainerStopped)
	eventually(t, "its init is gone", func() string {
		if err := unix.Kill(st.PID, 0); err == nil {
			return "it runs"
		}
		return ""
	})
	te.run("one", novalet.Limits{}, app(layers, "sleep 1000"))
}

// TestAbandonedKeeper: an agent is killed and its run folder removed. The keeper ends what only waited, keeps what runs, and
// goes when that has ended.
func TestAbandonedKeeper(t *testing.T) {
	te := newEngine(t)
	live := te.run("live", novalet.Limits{}, app(busybox(t), "sleep 1000"))
	eventually(t, "a sandbox waits", func() string {
		te.mu.Lock()
		defer te.mu.Unlock()
		if te.warming || len(te.warm) == 0 || len(te.keepers) != 1 {
			return fmt.Sprint(te.warming, len(te.warm), len(te.keepers))
		}
		return ""
	})
	te.mu.Lock()
	var k *keeper
	for _, k = range te.keepers {
	}
	te.mu.Unlock()
	children := func() string {
		var all []string
		stats, _ := filepath.Glob("/proc/[0-9]*/stat")
		for _, p := range stats {
			b, _ := os.ReadFile(p)
			// PID (NAME) STATE PARENT
			if _, rest, ok := strings.Cut(string(b), ") "); ok {
				if f := strings.Fields(rest); len(f) > 1 && f[0] != "Z" && f[1] == strconv.Itoa(k.pid) {
					all = append(all, filepath.Base(filepath.Dir(p)))
				}
			}
		}
		return strings.Join(all, " ")
	}
	// As far as the host can see, that is a kill.
	te.cancel(errClosed)
	te.wg.Wait()
	if err := os.RemoveAll(te.opts.RunDir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what waited is gone, what runs is not", func() string {
		if all := children(); all != strconv.Itoa(live.PID) {
			return all
		}
		return ""
	})
	if pid, err := unix.Wait4(k.pid, nil, unix.WNOHANG, nil); pid != 0 || err != nil {
		t.Fatalf("the keeper of what runs: %d %v", pid, err)
	}
	if err := unix.Kill(live.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the keeper ends", func() string {
		if pid, err := unix.Wait4(k.pid, nil, unix.WNOHANG, nil); pid != k.pid {
			return fmt.Sprint(pid, err, children())
		}
		return ""
	})
	te.prog.Close()
	te.open()
	te.waitState("live", novalet.ContainerStopped)
}

func TestUnreadableRecordStopsNothing(t *testing.T) {
	te := newEngine(t)
	te.run("good", novalet.Limits{}, app(busybox(t), "sleep 1000"))
	bad := filepath.Join(te.opts.StateDir, "instances", "bad")
	if err := os.MkdirAll(bad, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bad, recordName), []byte(`{"version":99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	te.Close()
	te.open()
	te.waitState("good", novalet.ContainerRunning)
	if _, err := te.Status(te.ctx(), "bad"); !errors.Is(err, novalet.ErrNotFound) {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(bad, recordName)); err != nil {
		t.Fatal("the record was not left alone:", err)
	}
	os.RemoveAll(bad)
}
