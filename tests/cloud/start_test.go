package cloud_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// lockedBuffer collects what a process prints.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// secondAgent starts another agent with the cloud's configuration changed by edit, and a host and state of its own.
func secondAgent(t *testing.T, edit func(string) string) (*exec.Cmd, *lockedBuffer) {
	t.Helper()
	conf, err := os.ReadFile(filepath.Join(state(t), "etc", "nova-compute.conf"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	text := strings.ReplaceAll(string(conf), filepath.Join(state(t), "novalet"), filepath.Join(dir, "state"))
	text = edit(strings.Replace(text, "host = "+computeHost(), "host = second", 1))
	path := filepath.Join(dir, "nova.conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(novaletBin(), "agent", "--config-file", path)
	out := new(lockedBuffer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("SIGTERM while waiting: %v: %s", err, tail(out.String(), 500))
			}
		case <-time.After(long):
			_ = cmd.Process.Kill()
			<-done
			t.Errorf("the agent does not end at SIGTERM: %s", tail(out.String(), 1000))
		}
	})
	return cmd, out
}

// saysOnce waits for a line and checks that it is not repeated each second.
func saysOnce(t *testing.T, out *lockedBuffer, want string) {
	t.Helper()
	eventually(t, long, "the agent says "+want, func() error {
		if !strings.Contains(out.String(), want) {
			return fmt.Errorf("it says %q", tail(out.String(), 500))
		}
		return nil
	})
	time.Sleep(8 * time.Second)
	if n := strings.Count(out.String(), want); n != 1 {
		t.Errorf("said %d times: %s", n, out.String())
	}
}

// TestWrongBrokerPassword: one line names user and broker, never the password, and the agent goes on trying.
func TestWrongBrokerPassword(t *testing.T) {
	_, out := secondAgent(t, func(s string) string {
		lines := strings.Split(s, "\n")
		for i, l := range lines {
			if strings.HasPrefix(l, "transport_url") {
				lines[i] = "transport_url = rabbit://openstack:not-the-password@127.0.0.1:5672/"
			}
		}
		return strings.Join(lines, "\n")
	})
	saysOnce(t, out, "refuses user openstack")
	if strings.Contains(out.String(), "not-the-password") {
		t.Error("the log shows the password")
	}
}

// TestNoBroker: started before the broker is there, the agent waits and says so once.
func TestNoBroker(t *testing.T) {
	_, out := secondAgent(t, func(s string) string { return strings.Replace(s, "@127.0.0.1:5672", "@127.0.0.1:5699", 1) })
	saysOnce(t, out, "127.0.0.1:5699")
}

// TestNoConductor: started before the conductor is there, the agent waits, and is up once it is.
func TestNoConductor(t *testing.T) {
	dir := state(t)
	devstack(t, "compute.sh", "stop", "novalet")
	script := `. ../../devstack/vars.sh; . ../../devstack/lib.sh; stop nova-conductor`
	if out, err := sh(t.Context(), "bash", "-c", script); err != nil {
		t.Fatalf("stop the conductor: %v: %s", err, out)
	}
	restored := false
	restore := func() {
		if restored {
			return
		}
		restored = true
		if out, err := sh(t.Context(), "env", "NO_COMPUTE=1", "bash", "../../devstack/up.sh"); err != nil {
			t.Fatalf("start the conductor again: %v: %s", err, out)
		}
	}
	defer restore()
	logPath := filepath.Join(dir, "log", "novalet.log")
	before, err := os.ReadFile(logPath)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := sh(t.Context(), "env", "NOWAIT=1", "bash", "../../devstack/compute.sh", "start", "novalet"); err != nil {
		t.Fatalf("start the agent: %v: %s", err, out)
	}
	since := func() string {
		now, err := os.ReadFile(logPath)
		if err != nil {
			t.Fatal(err)
		}
		return string(now[len(before):])
	}
	eventually(t, long, "the agent says that it waits", func() error {
		if !strings.Contains(since(), "the conductor does not answer; waiting") {
			return fmt.Errorf("it says %q", tail(since(), 500))
		}
		return nil
	})
	if out, err := novalet("health"); err == nil || !strings.Contains(out, "degraded") {
		t.Errorf("health: %v: %s", err, out)
	}
	restore()
	eventually(t, long, "the agent is up", func() error {
		out, err := novalet("health")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if state, _ := serviceState(t); state != "up" {
			return fmt.Errorf("state %q", state)
		}
		return nil
	})
	if n := strings.Count(since(), "the conductor does not answer; waiting"); n != 1 {
		t.Errorf("said %d times that the conductor is away", n)
	}
}

// TestNotRoot: a user without rights is told so in one line.
func TestNotRoot(t *testing.T) {
	state(t)
	bin := os.Getenv("NOVALET_BIN")
	if bin == "" {
		bin = filepath.Join("..", "..", "bin", "novalet")
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	// Where the caller's folders are closed to others, they must not be the reason.
	dir, err := os.MkdirTemp("", "novalet-not-root")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(dir, "novalet")
	if err := os.WriteFile(copied, program, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(copied, "demo")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 6 || !strings.Contains(string(out), "must run as root") || strings.Count(string(out), "\n") != 1 {
		t.Errorf("%v: %s", err, out)
	}
}
