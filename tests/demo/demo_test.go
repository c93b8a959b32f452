// Package demo_test runs `make demo` as a newcomer does and looks at what it says and what it leaves.
package demo_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/novalet/novalet/internal/hosttest"
)

const (
	root  = "../.."
	state = "/var/lib/novalet-demo"
)

// long is how long anything may take on a slow machine that makes the images first.
var long = hosttest.Patience(12 * time.Minute)

// ours are the lines of the trace that a demo can be behind: its bridge and namespaces, its state, its cgroups, its rules.
// A tap names no owner, so each is looked at, but those of a cloud on the same machine.
var ours = regexp.MustCompile(`novalet-demo|novalet0|novalet-84b71a86|memfd:novalet|^(link: (tap|nv)|setting: /proc/sys/net/ipv4/ip_forward)`)

// trace is what a demo could leave on the host, one fact a line.
func trace(t *testing.T) []string {
	t.Helper()
	out, err := exec.Command(root + "/devstack/trace.sh").Output()
	if err != nil {
		t.Fatalf("devstack/trace.sh: %v", err)
	}
	_, noCloud := os.Stat("/run/lock/novalet-cloud.lock")
	return slices.DeleteFunc(strings.Split(string(out), "\n"), func(l string) bool {
		return !ours.MatchString(l) || noCloud == nil && strings.HasPrefix(l, "link: tap")
	})
}

// sameHost checks, at the end, that the host is as it was. The kernel frees links and namespaces in its own time.
func sameHost(t *testing.T) {
	t.Helper()
	before := trace(t)
	t.Cleanup(func() {
		var left, gone []string
		for range 60 {
			after := trace(t)
			left = slices.DeleteFunc(slices.Clone(after), func(l string) bool { return slices.Contains(before, l) })
			gone = slices.DeleteFunc(slices.Clone(before), func(l string) bool { return slices.Contains(after, l) })
			if len(left)+len(gone) == 0 {
				break
			}
			time.Sleep(500 * time.Millisecond)
		}
		if len(left)+len(gone) > 0 {
			t.Errorf("the demo left %q, and these are gone: %q", left[:min(len(left), 10)], gone[:min(len(gone), 10)])
		}
		if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", state, err)
		}
	})
}

// demo is the command that a newcomer types; NOVALET_DEMO is another one, for a machine that has nothing to build with.
func demo(args ...string) []string {
	if c := os.Getenv("NOVALET_DEMO"); c != "" {
		for i, a := range args {
			args[i] = map[string]string{"KEEP=1": "--keep"}[a]
		}
		return append(strings.Fields(c), args...)
	}
	return append([]string{"make", "demo"}, args...)
}

// running is a demo that was started.
type running struct {
	cmd  *exec.Cmd
	done chan error
	keys io.Writer // what is typed, for one that has a terminal

	mu  sync.Mutex
	out bytes.Buffer
}

func (r *running) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.out.Write(p)
}

func (r *running) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.out.String()
}

// start runs a command in a process group of its own.
func start(t *testing.T, command []string) *running {
	t.Helper()
	return run(t, &running{cmd: exec.Command(command[0], command[1:]...)})
}

// terminal runs a command on a terminal.
func terminal(t *testing.T, args []string) *running {
	t.Helper()
	r := &running{cmd: exec.Command("script", "--quiet", "--return", "--command", strings.Join(args, " "), "/dev/null")}
	in, err := r.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.keys = in
	return run(t, r)
}

// types presses keys.
func (r *running) types(t *testing.T, keys string) {
	t.Helper()
	if _, err := io.WriteString(r.keys, keys); err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, r *running) *running {
	t.Helper()
	r.done = make(chan error, 1)
	r.cmd.Dir = root
	r.cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=")
	r.cmd.Stdout, r.cmd.Stderr = r, r
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.done <- r.cmd.Wait() }()
	t.Cleanup(func() {
		if r.cmd.ProcessState == nil {
			_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
		}
	})
	return r
}

// wait waits for the end.
func (r *running) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.done:
		return err
	case <-time.After(long):
		_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
		<-r.done
		t.Fatalf("not done after %v:\n%s", long, r.text())
		return nil
	}
}

// says waits for a text.
func (r *running) says(t *testing.T, want string) {
	t.Helper()
	for deadline := time.Now().Add(long); !strings.Contains(r.text(), want); time.Sleep(50 * time.Millisecond) {
		select {
		case err := <-r.done:
			t.Fatalf("ended (%v) before it said %q:\n%s", err, want, r.text())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("does not say %q:\n%s", want, r.text())
		}
	}
}

// TestDemo: `make demo` boots both instances, pings one from the other, shows state, addresses, console logs and where
// the time went, and leaves nothing.
func TestDemo(t *testing.T) {
	hosttest.RequireRoot(t)
	sameHost(t)
	r := start(t, demo())
	if err := r.wait(t); err != nil {
		t.Fatalf("make demo: %v\n%s", err, r.text())
	}
	for _, want := range []string{
		`web is ACTIVE, \d+\.\d+\.\d+\.\d+`,
		`machine is ACTIVE, \d+\.\d+\.\d+\.\d+`,
		`(?s)web is ACTIVE[^\n]*\n[^\n]*\d+ ms from the request: .*machine is ACTIVE[^\n]*\n[^\n]*\d+ ms from the request: `,
		`machine\$ ping .*\d`,
		`3 packets transmitted, 3 (packets )?received`,
		`Hello from an application instance\.`,
		`(?s)console log of web:.*serves port 80`,
		`(?s)console log of machine:.*login:`,
		`both deleted, nothing left`,
	} {
		if !regexp.MustCompile(want).MatchString(r.text()) {
			t.Errorf("it does not say %s:\n%s", want, r.text())
		}
	}
}

// hint is a line that KEEP=1 prints to go on with.
var hint = regexp.MustCompile(`(?m)^ +(bin/novalet .*)$`)

// TestDemoKept: KEEP=1 leaves both running, the commands it names work as they are typed, and Ctrl-C removes all.
func TestDemoKept(t *testing.T) {
	hosttest.RequireRoot(t)
	sameHost(t)
	r := start(t, demo("KEEP=1"))
	r.says(t, "Ctrl-C ends it")
	want := map[string]string{"ps": "machine", "logs": "serves port 80", "exec": "inside-42", "console": "login:", "images": "web", "health": "novalet_"}
	for _, m := range hint.FindAllStringSubmatch(r.text(), -1) {
		args := strings.Fields(m[1])
		verb := args[1]
		says, known := want[verb]
		if !known {
			t.Errorf("no check for the hint %q", m[1])
			continue
		}
		delete(want, verb)
		h := terminal(t, args)
		switch verb {
		case "exec": // a shell
			h.types(t, "echo inside-$((6*7)); exit\r")
		case "console": // Enter brings a new prompt of the login
			h.types(t, "\r")
		}
		h.says(t, says)
		var err error
		switch verb {
		case "logs": // follows until it is ended
			h.types(t, "\x03")
			_ = h.wait(t)
		case "console":
			h.types(t, "\x1d")
			err = h.wait(t)
		default:
			err = h.wait(t)
		}
		if err != nil {
			t.Errorf("%s: %v\n%s", m[1], err, h.text())
		}
	}
	if len(want) > 0 {
		t.Errorf("no hint for %v:\n%s", want, r.text())
	}
	// A terminal sends the signal to the whole group.
	if err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = r.wait(t)
	if !strings.Contains(r.text(), "both deleted, nothing left") {
		t.Errorf("after Ctrl-C:\n%s", r.text())
	}
}

// TestDemoKilled: what a killed demo left is removed by the next one.
func TestDemoKilled(t *testing.T) {
	hosttest.RequireRoot(t)
	sameHost(t)
	r := start(t, demo("KEEP=1"))
	r.says(t, "Ctrl-C ends it")
	if err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-r.done
	again := start(t, demo())
	if err := again.wait(t); err != nil || !strings.Contains(again.text(), "both deleted, nothing left") {
		t.Errorf("the next demo: %v\n%s", err, again.text())
	}
}
