package engine

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// TestInitOfAnApplication: what it is sent before there is a program ends neither it nor the program; then it is one thread of a
// few pages, as confined as the program, without a descriptor, in the instance's time, and its file cannot be read inside.
func TestInitOfAnApplication(t *testing.T) {
	te := newEngine(t)
	st, err := te.Create(te.ctx(), &novalet.SandboxSpec{ID: "i", Hostname: "i"})
	if err != nil {
		t.Fatal(err)
	}
	dir := fmt.Sprintf("/proc/%d", st.PID)
	early := []unix.Signal{unix.SIGHUP, unix.SIGTERM, unix.SIGUSR1, unix.SIGQUIT, unix.SIGABRT, 35}
	eventually(t, "it waits", func() string {
		if s := hosttest.ProcStatus(t, dir+"/status"); s["SigCgt"] != "0000000000000000" {
			return "it catches " + s["SigCgt"]
		}
		return ""
	})
	for _, sig := range early {
		if err := unix.Kill(st.PID, sig); err != nil {
			t.Fatal(err)
		}
	}
	if err := te.Start(te.ctx(), "i", app(busybox(t), "trap 'echo got it' HUP TERM USR1 QUIT ABRT 35; echo ready; while :; do sleep 0.05; done")); err != nil {
		t.Fatal(err)
	}
	te.waitLog("i", "ready")
	time.Sleep(200 * time.Millisecond)
	if b, err := te.ConsoleLog(te.ctx(), "i", 1<<16); err != nil || strings.Contains(string(b), "got it") {
		t.Errorf("console: %q, %v", b, err)
	}
	if now := te.waitState("i", novalet.ContainerRunning); now.PID != st.PID {
		t.Errorf("init is %d, was %d", now.PID, st.PID)
	}

	s := hosttest.ProcStatus(t, dir+"/status")
	kib := func(key string) (n int) {
		fmt.Sscan(s[key], &n)
		return n
	}
	if s["Name"] != "init" || s["Threads"] != "1" || kib("RssAnon") > 16 || kib("VmPTE") > 64 {
		t.Errorf("it is no small process: %v", s)
	}
	children, err := os.ReadFile(fmt.Sprintf("%s/task/%d/children", dir, st.PID))
	if err != nil {
		t.Fatal(err)
	}
	program := "/proc/" + strings.Fields(string(children))[0]
	p := hosttest.ProcStatus(t, program+"/status")
	for _, k := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters"} {
		if s[k] != p[k] {
			t.Errorf("%s of init is %q, of the program %q", k, s[k], p[k])
		}
	}
	for _, ns := range []string{"user", "mnt", "pid", "net", "uts", "ipc", "cgroup", "time"} {
		a, _ := os.Readlink(dir + "/ns/" + ns)
		b, _ := os.Readlink(program + "/ns/" + ns)
		if a != b || a == "" {
			t.Errorf("%s namespace of init is %q, of the program %q", ns, a, b)
		}
	}
	if fds, err := os.ReadDir(dir + "/fd"); err != nil || len(fds) > 0 {
		t.Errorf("descriptors %v, %v", fds, err)
	}
	if b, err := os.ReadFile(dir + "/cmdline"); err != nil || string(b) != "init\x00" {
		t.Errorf("command line %q, %v", b, err)
	}
	var file unix.Stat_t
	if err := unix.Stat(dir+"/exe", &file); err != nil || file.Mode&0o777 != 0o111 || file.Uid != 0 {
		t.Errorf("its file has mode %o and owner %d, %v", file.Mode, file.Uid, err)
	}
}

// TestEndOfAnApplication: init ends with the program's code, or with 128 and the signal that ended it, whatever else runs.
func TestEndOfAnApplication(t *testing.T) {
	te := newEngine(t)
	layers := busybox(t)
	for script, want := range map[string]int{"exit 0": 0, "sleep 1000 & exit 42": 42, "(sleep 0.01; true) & exit 255": 255, "kill -9 $$": 137, "kill -15 $$": 143} {
		id := fmt.Sprint("e", want)
		te.run(id, novalet.Limits{}, app(layers, script))
		if st := te.waitState(id, novalet.ContainerStopped); st.ExitCode != want {
			t.Errorf("%s: code %d, want %d", script, st.ExitCode, want)
		}
	}
}
