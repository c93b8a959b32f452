package pid1

import (
	"bufio"
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/internal/hosttest"
)

// scriptEnv is the variable by which the test's own program becomes a process that starts a script and goes on to the
// program of this package, as an init does.
const scriptEnv = "NOVALET_PID1_SCRIPT"

func TestMain(m *testing.M) {
	if s := os.Getenv(scriptEnv); s != "" {
		fmt.Fprintln(os.Stderr, become(s))
		os.Exit(99)
	}
	os.Exit(m.Run())
}

func become(script string) error {
	runtime.LockOSThread()
	f, err := Open()
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	all := unix.Sigset_t{}
	all.Val[0] = ^all.Val[0]
	pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	if err != nil {
		return err
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, nil); err != nil {
		return err
	}
	return Exec(int(f.Fd()), pid)
}

// started is a process that runs the program, and what its script says.
type started struct {
	*exec.Cmd
	t   *testing.T
	out *bufio.Reader
}

func run(t *testing.T, script string) *started {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{scriptEnv + "=" + script}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := out.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL); _ = cmd.Wait(); out.Close() })
	return &started{Cmd: cmd, t: t, out: bufio.NewReader(out)}
}

func (s *started) expect(line string) {
	s.t.Helper()
	got, err := s.out.ReadString('\n')
	if err != nil || got != line+"\n" {
		s.t.Fatalf("the script says %q (%v), want %q", got, err, line)
	}
}

// is waits until the process has become the program.
func (s *started) is() {
	s.t.Helper()
	s.until("it runs", func() bool { return s.status("Name") == "init" })
}

func (s *started) until(what string, is func() bool) {
	s.t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.Process.Pid))
			s.t.Fatalf("%s: not so:\n%s", what, b)
		}
	}
}

// status is a line of the process's /proc/PID/status.
func (s *started) status(key string) string {
	s.t.Helper()
	return hosttest.ProcStatus(s.t, fmt.Sprintf("/proc/%d/status", s.Process.Pid))[key]
}

func (s *started) code() int {
	s.t.Helper()
	_ = s.Wait()
	return s.ProcessState.ExitCode()
}

// TestImage: a segment that is read and run, a stack that is not run, and the whole of the code, to the system call that ends it.
func TestImage(t *testing.T) {
	c := code()
	last := map[string][]byte{"amd64": {0x0f, 0x05}, "arm64": {0x01, 0x00, 0x00, 0xd4}}[runtime.GOARCH]
	if len(c) < 100 || len(c) > 512 || !bytes.HasSuffix(c, last) {
		t.Errorf("code is %d bytes: %x", len(c), c)
	}
	b := image()
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Progs) != 2 || f.Type != elf.ET_DYN {
		t.Fatalf("file: %+v", f)
	}
	load, stack := f.Progs[0].ProgHeader, f.Progs[1].ProgHeader
	if load.Type != elf.PT_LOAD || load.Flags != elf.PF_R|elf.PF_X || load.Off != 0 || load.Filesz != uint64(len(b)) || load.Memsz != load.Filesz {
		t.Errorf("segment: %+v", load)
	}
	if stack.Type != elf.PT_GNU_STACK || stack.Flags != elf.PF_R|elf.PF_W {
		t.Errorf("stack: %+v", stack)
	}
	if !bytes.Equal(b[f.Entry:], c) {
		t.Errorf("entry is %d", f.Entry)
	}
}

// TestOpen: the program can be run by its descriptor and not read, and not changed.
func TestOpen(t *testing.T) {
	f, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Read(make([]byte, 1)); err == nil {
		t.Error("read")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&0o777 != 0o111 {
		t.Errorf("mode %o, %v", st.Mode, err)
	}
	path := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	if os.Geteuid() != 0 {
		if _, err := os.Open(path); err == nil {
			t.Error("opened for reading")
		}
		return
	}
	w, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer w.Close()
	if _, err := w.WriteAt([]byte("x"), 0); err == nil {
		t.Error("written")
	}
}

func TestExitCodes(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "exit 255": 255, "kill -9 $$": 137, "kill -6 $$": 134, "kill -64 $$": 192} {
		if got := run(t, script).code(); got != want {
			t.Errorf("%s: code %d, want %d", script, got, want)
		}
	}
}

func TestSignalsArePassedOn(t *testing.T) {
	var traps strings.Builder
	passed := []int{1, 2, 3, 6, 10, 12, 13, 14, 15, 20, 21, 22, 24, 25, 26, 27, 28, 29, 30, 34, 35, 50, 64}
	for _, n := range passed {
		fmt.Fprintf(&traps, "trap 'echo got %d' %d;", n, n)
	}
	s := run(t, traps.String()+"echo ready; while :; do sleep 0.02; done")
	s.is()
	s.expect("ready")
	for _, n := range passed {
		if err := unix.Kill(s.Process.Pid, unix.Signal(n)); err != nil {
			t.Fatal(err)
		}
		s.expect(fmt.Sprintf("got %d", n))
	}
	_ = unix.Kill(s.Process.Pid, unix.SIGCHLD)
	for range 20000 {
		_ = unix.Kill(s.Process.Pid, unix.SIGURG)
	}
	// What stops and goes on again loses nothing.
	_ = unix.Kill(s.Process.Pid, unix.SIGSTOP)
	s.until("it stops", func() bool { return strings.HasPrefix(s.status("State"), "T") })
	_ = unix.Kill(s.Process.Pid, unix.SIGUSR1)
	_ = unix.Kill(s.Process.Pid, unix.SIGCONT)
	s.expect("got 10")
}

// TestSmall: one thread, a few pages, a name of its own, and its own program not among what it has open.
func TestSmall(t *testing.T) {
	s := run(t, "echo ready; sleep 1000")
	s.is()
	s.expect("ready")
	if n := s.status("Threads"); n != "1" {
		t.Errorf("%s threads", n)
	}
	var rss, ptes int
	fmt.Sscan(s.status("RssAnon"), &rss)
	fmt.Sscan(s.status("VmPTE"), &ptes)
	if rss > 16 || ptes > 64 {
		t.Errorf("%d KiB of memory and %d KiB of page tables", rss, ptes)
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.Process.Pid)); err != nil || string(b) != "init\x00" {
		t.Errorf("command line %q, %v", b, err)
	}
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", s.Process.Pid))
	for _, fd := range fds {
		if l, _ := os.Readlink(fd); strings.Contains(l, "memfd") {
			t.Errorf("it has the program open: %s", l)
		}
	}
}

// TestOrphansAreReaped: all of them, though many ends may be one signal: here it is stopped meanwhile.
func TestOrphansAreReaped(t *testing.T) {
	s := run(t, "for i in 1 2 3 4 5 6 7 8 9; do (sleep 1000 & exec true); done; echo ready; while :; do sleep 1000; done")
	s.is()
	s.expect("ready")
	children := func() []string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", s.Process.Pid, s.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(b))
	}
	s.until("the orphans are its children", func() bool { return len(children()) == 10 })
	_ = unix.Kill(s.Process.Pid, unix.SIGSTOP)
	s.until("it stops", func() bool { return strings.HasPrefix(s.status("State"), "T") })
	for _, c := range children()[1:] {
		pid, _ := strconv.Atoi(c)
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	_ = unix.Kill(s.Process.Pid, unix.SIGCONT)
	s.until("one child is left", func() bool { return len(children()) == 1 })
}
