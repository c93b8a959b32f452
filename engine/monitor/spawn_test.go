package monitor

import (
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// child starts a program as an init is started, or, forked, as one that joins namespaces, and returns what it printed and its
// status.
func child(t *testing.T, forked bool, path string, change func(*spawnSpec), argv ...string) (string, unix.WaitStatus, error) {
	t.Helper()
	prog, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(prog)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// Its input ends when the child is known: one that has ended before is an error.
	in, hold, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s := &spawnSpec{groups: groups{v2: -1}, files: []int{int(in.Fd()), int(w.Fd()), int(w.Fd())}, prog: prog, argv: argv,
		env: []string{"PATH=/usr/bin:/bin"}, attach: func(int) error { return nil }}
	joins(t, forked)(s)
	if change != nil {
		change(s)
	}
	pids := newReaper()
	defer pids.stop()
	_, pidfd, done, err := pids.spawn(s)
	w.Close()
	in.Close()
	hold.Close()
	if err != nil {
		return "", 0, err
	}
	defer pidfd.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(out), <-done, nil
}

// joins makes a child one that joins a namespace, if it is to be forked.
func joins(t *testing.T, forked bool) func(*spawnSpec) {
	t.Helper()
	if !forked {
		return func(*spawnSpec) {}
	}
	uts, err := unix.Open("/proc/self/ns/uts", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(uts) })
	var none uintptr
	return func(s *spawnSpec) {
		s.join, s.fork = []call{{nr: unix.SYS_SETNS, a: [5]uintptr{uintptr(uts), unix.CLONE_NEWUTS}}}, &none
	}
}

// shapes runs a test for both ways to make a child. To join a namespace needs root.
func shapes(t *testing.T, f func(t *testing.T, forked bool)) {
	t.Run("shared", func(t *testing.T) { f(t, false) })
	t.Run("forked", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("needs root")
		}
		f(t, true)
	})
}

// TestChild: the program runs with its arguments and descriptors and no signal blocked, and its status comes back.
func TestChild(t *testing.T) {
	shapes(t, func(t *testing.T, forked bool) {
		// Not by a shell, which unblocks all signals itself.
		out, _, err := child(t, forked, "/bin/grep", nil, "grep", "-h", "^SigBlk", "/proc/self/status", "-")
		if f := strings.Fields(out); err != nil || len(f) != 2 || strings.Trim(f[1], "0") != "" {
			t.Errorf("%v, printed %q", err, out)
		}
		out, ws, err := child(t, forked, "/bin/sh", nil, "sh", "-c", "ls /proc/self/fd; read x; exit 7")
		// ls has its own directory open.
		if err != nil || out != "0\n1\n2\n3\n" || ws.ExitStatus() != 7 {
			t.Errorf("%v, status %d, printed %q", err, ws.ExitStatus(), out)
		}
	})
}

// TestChildFails: each step that can go wrong is told, and nothing stays.
func TestChildFails(t *testing.T) {
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	text := t.TempDir() + "/text"
	if err := os.WriteFile(text, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	shapes(t, func(t *testing.T, forked bool) {
		tries := []struct {
			name, path string
			change     func(*spawnSpec)
			want       string
		}{
			{"a group", "/bin/true", func(s *spawnSpec) {
				fd, _ := unix.Dup(null)
				s.groups = groups{v2: -1, tasks: []int{fd}, names: []string{"v1 pids"}}
			}, "join cgroup v1 pids: bad file descriptor"},
			{"the attaching", "/bin/true", func(s *spawnSpec) { s.attach = func(int) error { return errors.New("no maps") } }, "no maps"},
			{"the program", text, nil, "exec format error"},
			{"a descriptor", "/bin/true", func(s *spawnSpec) { s.files = []int{1 << 20} }, "bad file descriptor"},
			{"the clone", "/bin/true", func(s *spawnSpec) { s.groups.v2 = null }, "clone: "},
		}
		for _, try := range tries {
			if _, _, err := child(t, forked, try.path, try.change, "x"); err == nil || !strings.Contains(err.Error(), try.want) {
				t.Errorf("%s: %v, want %q", try.name, err, try.want)
			}
		}
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
			t.Errorf("a child is left: %d, %v", pid, err)
		}
	})
}

// TestChildren: many at once, while the runtime stops the world and moves stacks.
func TestChildren(t *testing.T) {
	shapes(t, func(t *testing.T, forked bool) {
		stop := make(chan struct{})
		var busy, all sync.WaitGroup
		busy.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					runtime.GC()
				}
			}
		})
		pids := newReaper()
		defer pids.stop()
		prog, err := unix.Open("/bin/sleep", unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(prog)
		join := joins(t, forked)
		for range 8 {
			all.Go(func() {
				for range 25 {
					s := &spawnSpec{groups: groups{v2: -1}, prog: prog, argv: []string{"sleep", "1000"}, attach: func(int) error { runtime.Gosched(); return nil }}
					join(s)
					_, pidfd, done, err := pids.spawn(s)
					if err != nil {
						t.Error(err)
						return
					}
					if err := unix.PidfdSendSignal(int(pidfd.Fd()), unix.SIGKILL, nil, 0); err != nil {
						t.Error(err)
					}
					pidfd.Close()
					if ws := <-done; ws.Signal() != unix.SIGKILL {
						t.Errorf("status %#x", ws)
					}
				}
			})
		}
		all.Wait()
		close(stop)
		busy.Wait()
	})
}
