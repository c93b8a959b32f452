package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

func serial(l *lab) {
	l.cfg.Serial = SerialConfig{ProxyclientAddress: "127.0.0.1", PortFirst: 0, PortLast: 0}
}

func (l *lab) console(uuid string, ttl time.Duration) string {
	l.t.Helper()
	c, err := l.agent.SerialConsole(context.Background(), uuid, ttl)
	if err != nil {
		l.t.Fatal(err)
	}
	if ok, err := l.agent.ConsolePort(context.Background(), uuid, c.Port); !ok || err != nil {
		l.t.Errorf("ConsolePort: %v, %v", ok, err)
	}
	return net.JoinHostPort(c.Host, fmt.Sprint(c.Port))
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// Two viewers see what was printed before and what is printed now, and both may type.
func TestSerialConsole(t *testing.T) {
	l := newLab(t, serial)
	uuid := l.boot()
	l.world.Print(uuid, "before\n")
	addr := l.console(uuid, time.Minute)
	if again := l.console(uuid, time.Minute); again != addr {
		t.Errorf("a second request opened %s beside %s", again, addr)
	}
	one, two := dial(t, addr), dial(t, addr)
	for i, conn := range []net.Conn{one, two} {
		if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || line != "before\n" {
			t.Fatalf("viewer %d read %q, %v", i, line, err)
		}
	}
	l.world.Print(uuid, "now\n")
	for i, conn := range []net.Conn{one, two} {
		if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || line != "now\n" {
			t.Errorf("viewer %d read %q, %v", i, line, err)
		}
	}
	if _, err := fmt.Fprint(two, "typed"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the guest reads it", func() bool { return l.world.Typed(uuid) == "typed" })
	// The delete ends the viewers, the listener and the tokens.
	n := l.h.Faults.Calls("Conductor.CleanConsoleTokens")
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(uuid)
	if _, err := io.ReadAll(one); err != nil {
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			t.Error("the viewer hangs on")
		}
	}
	if conn, err := net.Dial("tcp", addr); err == nil {
		_ = conn.Close()
		t.Error("the port is still open")
	}
	if l.h.Faults.Calls("Conductor.CleanConsoleTokens") != n+1 {
		t.Error("the console tokens are left")
	}
}

// The listener closes when its time is over without a viewer, and stays while there is one.
func TestSerialConsoleEnds(t *testing.T) {
	l := newLab(t, serial)
	uuid := l.boot()
	c, err := l.agent.SerialConsole(context.Background(), uuid, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	addr := net.JoinHostPort(c.Host, fmt.Sprint(c.Port))
	eventually(t, "it closes", func() bool {
		l.agent.consoles.mu.Lock()
		defer l.agent.consoles.mu.Unlock()
		return len(l.agent.consoles.open) == 0
	})
	if conn, err := net.Dial("tcp", addr); err == nil {
		_ = conn.Close()
		t.Error("the port is still open")
	}
	if ok, err := l.agent.ConsolePort(context.Background(), uuid, 1); ok || err != nil {
		t.Errorf("ConsolePort of a closed console: %v, %v", ok, err)
	}
}

func TestSerialConsoleRefuses(t *testing.T) {
	l := newLab(t, serial, func(l *lab) { l.cfg.Serial.Allowed = []string{"192.0.2.0/24"} })
	uuid := l.boot()
	l.world.Print(uuid, "secret\n")
	conn := dial(t, l.console(uuid, time.Minute))
	if data, _ := io.ReadAll(conn); len(data) > 0 {
		t.Errorf("a peer that is not allowed read %q", data)
	}
	l.cast(uuid, novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{})
	l.await(uuid, novalet.VMStopped)
	if _, err := l.agent.SerialConsole(context.Background(), uuid, time.Minute); !errors.Is(err, novalet.ErrBusy) {
		t.Errorf("console of a stopped instance: %v", err)
	}
	if _, err := l.agent.SerialConsole(context.Background(), "none", time.Minute); !errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("console of nothing: %v", err)
	}
	off := newLab(t)
	if _, err := off.agent.SerialConsole(context.Background(), uuid, time.Minute); !errors.Is(err, novalet.ErrUnsupported) {
		t.Errorf("console where it is off: %v", err)
	}
}

func TestConsoleOutput(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	l.world.Print(uuid, "one\ntwo\nthr\u00e9e\xff\x00\n")
	for lines, want := range map[int]string{0: "", 1: "", 2: "thr?e??\n", 3: "two\nthr?e??\n", 9: "one\ntwo\nthr?e??\n", -1: "one\ntwo\nthr?e??\n"} {
		got, err := l.agent.ConsoleOutput(context.Background(), uuid, lines)
		if err != nil || got != want {
			t.Errorf("%d lines: %q, %v; want %q", lines, got, err, want)
		}
	}
	if _, err := l.agent.ConsoleOutput(context.Background(), "none", -1); !errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("output of nothing: %v", err)
	}
}

func TestDiagnostics(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	d, err := l.agent.Diagnostics(context.Background(), uuid)
	if err != nil || d.State != "running" || len(d.NICs) != 1 || d.MemoryMB != 64 {
		t.Errorf("diagnostics %+v, %v", d, err)
	}
	l.cast(uuid, novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{})
	l.await(uuid, novalet.VMStopped)
	if _, err := l.agent.Diagnostics(context.Background(), uuid); !errors.Is(err, novalet.ErrInvalidState) {
		t.Errorf("diagnostics of a stopped instance: %v", err)
	}
}

// The password goes in by standard input, and is in no argument and no error.
func TestSetAdminPassword(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	if err := l.agent.SetAdminPassword(context.Background(), uuid, "", "hunter2"); err != nil {
		t.Fatal(err)
	}
	e := l.world.Execs()[0]
	data, err := io.ReadAll(e.Stdin)
	if err != nil || string(data) != "root:hunter2\n" {
		t.Errorf("stdin %q, %v", data, err)
	}
	if strings.Contains(fmt.Sprint(e.Process.Args, e.Process.Env), "hunter2") {
		t.Error("the password is an argument")
	}
	l.world.SetExecCode(1)
	for _, bad := range []novalet.Secret{"a\nroot:x", "hunter2"} {
		if err := l.agent.SetAdminPassword(context.Background(), uuid, "", bad); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("error %v", err)
		}
	}
}

func TestResources(t *testing.T) {
	l := newLab(t)
	r, err := l.agent.Resources(context.Background())
	if err != nil || r.VCPUs < 1 || r.MemoryMB < 64 || r.Arch == "" || r.DiskGB < 0 {
		t.Errorf("resources %+v, %v", r, err)
	}
	uuid := l.boot()
	if tr := l.agent.Tracked(); len(tr) != 1 || tr[0].Instance.UUID != uuid || tr[0].Power != novalet.PowerRunning {
		t.Errorf("tracked %+v", tr)
	}
}

func TestCacheImages(t *testing.T) {
	l := newLab(t)
	got, err := l.agent.CacheImages(context.Background(), novalet.RequestContext{}, []string{appImage, "none"})
	if err != nil || got[appImage] != "cached" || got["none"] != "error" {
		t.Errorf("%v, %v", got, err)
	}
}
