package engine

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// debian returns a layer with a Debian that runs systemd, made once per machine and kept.
func debian(t testing.TB) []novalet.Layer {
	t.Helper()
	cache := os.Getenv("NOVALET_TEST_CACHE")
	if cache == "" {
		cache = "/var/tmp/novalet-testcache"
	}
	dir := filepath.Join(cache, "debian-systemd")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	// One at a time: packages are tested in parallel.
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "usr/bin/login")); err == nil {
		return []novalet.Layer{{DiffID: "sha256:debian", Path: dir}}
	}
	if _, err := os.Stat(filepath.Join(dir, "bin/login")); err == nil {
		return []novalet.Layer{{DiffID: "sha256:debian", Path: dir}}
	}
	bin, err := exec.LookPath("mmdebstrap")
	if err != nil {
		t.Skip("needs mmdebstrap to make a Debian root")
	}
	os.RemoveAll(dir)
	out, err := exec.Command(bin, "--mode=root", "--variant=minbase", "--include=systemd,systemd-sysv,login,util-linux,procps,iproute2,sudo,passwd", "bookworm", dir).CombinedOutput()
	if err != nil {
		os.RemoveAll(dir)
		t.Fatalf("mmdebstrap: %v\n%s", err, out)
	}
	return []novalet.Layer{{DiffID: "sha256:debian", Path: dir}}
}

func TestLifeOfAMachine(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	events := te.Events(ctx)
	spec := &novalet.ContainerSpec{Kind: novalet.KindMachine, Layers: debian(t),
		Files: []novalet.File{{Path: "/etc/hostname", Data: []byte("deb\n")}, {Path: "/etc/machine-id", Data: []byte("")}}}
	st := te.run("deb", novalet.Limits{MemoryBytes: 512 << 20, PIDs: 500, VCPUs: 1}, spec)
	te.waitLog("deb", "deb login:")

	for script, want := range map[string]string{
		"systemctl is-system-running --wait":                     "running\n",
		"cat /proc/1/comm":                                       "systemd\n",
		"systemd-detect-virt --container":                        "container-other\n",
		"stat -fc %T /sys/fs/cgroup":                             "cgroup2fs\n",
		"test -s /etc/machine-id && echo fresh":                  "fresh\n",
		"test $(cut -d. -f1 /proc/uptime) -lt 120 && echo young": "young\n",
		"readlink /proc/self/exe | grep -c memfd; true":          "0\n",
		"nproc":                        "1\n",
		"findmnt -t cgroup -n | wc -l": "0\n",
		"findmnt -no OPTIONS /sys | grep -o '^ro'":                                 "ro\n",
		"mkdir /sys/fs/cgroup/mine && rmdir /sys/fs/cgroup/mine && echo delegated": "delegated\n",
	} {
		if out, _ := te.sh("deb", script); out != want {
			t.Errorf("%s: %q, want %q", script, out, want)
		}
	}
	if t.Failed() {
		out, _ := te.sh("deb", "systemctl --failed; journalctl -b -p warning --no-pager | tail -30")
		t.Log(out)
	}

	// A reboot from inside: another init, the same network namespace.
	netns, err := os.Readlink(st.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	if out, code := te.sh("deb", "touch /before; systemctl reboot"); code != 0 {
		t.Fatal(out)
	}
	wantEvent(t, events, novalet.EventRebooted)
	eventually(t, "the second login prompt", func() string {
		b, err := te.ConsoleLog(ctx, "deb", 1<<20)
		if err != nil || strings.Count(string(b), "deb login:") < 2 {
			return "one prompt"
		}
		return ""
	})
	again := te.waitState("deb", novalet.ContainerRunning)
	if ns, err := os.Readlink(again.NetNS); err != nil || ns != netns || again.PID == st.PID {
		t.Fatalf("after the reboot: %+v %s %v; before %+v %s", again, ns, err, st, netns)
	}
	if out, _ := te.sh("deb", "ls /before; test $(cut -d. -f1 /proc/uptime) -lt 60 && echo young"); out != "/before\nyoung\n" {
		t.Fatalf("after the reboot: %q", out)
	}

	// Powered off from inside it is stopped, with an event.
	te.sh("deb", "systemctl poweroff")
	if ev := wantEvent(t, events, novalet.EventExited); ev.ExitCode != 0 {
		t.Fatalf("poweroff: %+v", ev)
	}
	te.waitState("deb", novalet.ContainerStopped)

	// Stop asks systemd to shut down.
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "deb", Hostname: "deb", Limits: novalet.Limits{MemoryBytes: 512 << 20}}); err != nil {
		t.Fatal(err)
	}
	if err := te.Start(ctx, "deb", nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "systemd runs", func() string {
		out, _ := te.sh("deb", "systemctl is-system-running --wait")
		return strings.TrimPrefix(out, "running\n")
	})
	began := time.Now()
	if err := te.Stop(ctx, "deb", novalet.StopOptions{Timeout: hosttest.Patience(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	t.Log("stop took", time.Since(began))
	if st := te.waitState("deb", novalet.ContainerStopped); st.ExitCode != 0 {
		t.Fatalf("after stop: %+v", st)
	}
	te.waitLog("deb", "Halting system")
}

// wantEvent waits for an event of a type; others are skipped.
func wantEvent(t *testing.T, c <-chan novalet.ContainerEvent, want novalet.ContainerEventType) novalet.ContainerEvent {
	t.Helper()
	timeout := time.After(hosttest.Patience(time.Minute))
	for {
		select {
		case ev := <-c:
			if ev.Type == want {
				return ev
			}
		case <-timeout:
			t.Fatalf("no event %s", want)
		}
	}
}

// TestBusyboxInit boots a machine without systemd: its init is told to shut down in its own way, and its reboot and
// power-off are noticed.
func TestBusyboxInit(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	events := te.Events(ctx)
	layers := busybox(t)
	for name, text := range map[string]string{
		"etc/inittab": "::sysinit:/bin/echo booted\n::respawn:/bin/sleep 1000\n::shutdown:/bin/echo shutting down\n",
	} {
		if err := os.WriteFile(filepath.Join(layers[0].Path, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../bin/busybox", filepath.Join(layers[0].Path, "sbin/init")); err != nil {
		t.Fatal(err)
	}
	te.run("m", novalet.Limits{}, &novalet.ContainerSpec{Kind: novalet.KindMachine, Layers: layers, Process: novalet.ProcessSpec{StopSignal: "SIGTERM"}})
	te.waitLog("m", "booted")
	te.sh("m", "reboot")
	wantEvent(t, events, novalet.EventRebooted)
	te.waitState("m", novalet.ContainerRunning)
	if err := te.Stop(ctx, "m", novalet.StopOptions{Timeout: hosttest.Patience(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	te.waitLog("m", "shutting down")
	if st := te.waitState("m", novalet.ContainerStopped); st.ExitCode != 0 {
		t.Fatalf("%+v", st)
	}
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "m"}); err != nil {
		t.Fatal(err)
	}
	if err := te.Start(ctx, "m", nil); err != nil {
		t.Fatal(err)
	}
	te.sh("m", "poweroff")
	wantEvent(t, events, novalet.EventExited)
	te.waitState("m", novalet.ContainerStopped)
}

// TestRescue starts another system that sees the instance's own root, and the instance again after it.
func TestRescue(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	layers := busybox(t)
	te.run("r", novalet.Limits{RootBytes: 64 << 20}, app(layers, "sleep 1000"))
	te.sh("r", "echo broken >/etc/config")
	again := func(c *novalet.ContainerSpec) {
		t.Helper()
		if err := te.Stop(ctx, "r", novalet.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "r"}); err != nil {
			t.Fatal(err)
		}
		if err := te.Start(ctx, "r", c); err != nil {
			t.Fatal(err)
		}
	}
	rescue := app(busybox(t), "sleep 1000")
	rescue.Rescue = "/mnt/instance"
	again(rescue)
	if out, code := te.sh("r", "cat /mnt/instance/etc/config && echo mended >/mnt/instance/etc/config && touch /rescued"); out != "broken\n" || code != 0 {
		t.Fatalf("%q %d", out, code)
	}
	again(nil)
	if out, _ := te.sh("r", "cat /etc/config; ls /rescued 2>&1"); !strings.HasPrefix(out, "mended\n") || !strings.Contains(out, "No such file") {
		t.Fatalf("%q", out)
	}
}

func TestImageWithoutInit(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "x"}); err != nil {
		t.Fatal(err)
	}
	layers := busybox(t)
	if err := os.Remove(filepath.Join(layers[0].Path, "bin/init")); err != nil {
		t.Fatal(err)
	}
	err := te.Start(ctx, "x", &novalet.ContainerSpec{Kind: novalet.KindMachine, Layers: layers})
	if !errors.Is(err, novalet.ErrAbort) || !strings.Contains(novalet.FaultText(err), "/sbin/init") {
		t.Fatal(err)
	}
}
