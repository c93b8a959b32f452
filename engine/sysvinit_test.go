package engine

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// packaged returns the Debian of the other tests with files of more packages over it, and files of the test's own.
func packaged(t testing.TB, files map[string]string, packages ...string) []novalet.Layer {
	t.Helper()
	layers := debian(t)
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	get := exec.CommandContext(ctx, "apt-get", append([]string{"-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "download"}, packages...)...)
	get.WaitDelay = time.Second
	get.Dir = dir
	if out, err := get.CombinedOutput(); err != nil {
		t.Skipf("needs the packages %v: %v %s", packages, err, out)
	}
	top, err := os.MkdirTemp("", "novalet-layer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	// The Debian below has links where the packages have /bin, /sbin and /lib.
	script := `for p in *.deb; do dpkg-deb -x "$p" x; done
mkdir -p "$1/usr"
for d in bin sbin lib; do [ ! -d x/$d ] || { mkdir -p "$1/usr/$d"; cp -a x/$d/. "$1/usr/$d/"; }; done
[ ! -d x/etc ] || cp -a x/etc "$1/"
chmod 755 "$1"`
	unpack := exec.Command("sh", "-ec", script, "sh", top)
	unpack.Dir = dir
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("unpack: %v %s", err, out)
	}
	for name, text := range files {
		path := filepath.Join(top, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return append(layers, novalet.Layer{DiffID: "sha256:" + packages[0], Path: top})
}

// sysvinit returns a Debian whose init is sysvinit instead of systemd, with an inittab as Debian's.
func sysvinit(t testing.TB) []novalet.Layer {
	t.Helper()
	return packaged(t, map[string]string{"etc/inittab": `id:2:initdefault:
si::sysinit:/bin/echo booted
l0:0:wait:/sbin/halt -d -f -p
l2:2:wait:/bin/echo in runlevel 2
l6:6:wait:/sbin/reboot -d -f
ca:12345:ctrlaltdel:/sbin/shutdown -t1 -a -r now
1:2345:respawn:/sbin/getty --noclear 38400 tty1
`}, "sysvinit-core")
}

// TestSysvinit boots a machine with sysvinit to its login prompt; it reboots and powers off from inside, and stops in
// order from outside.
func TestSysvinit(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	events := te.Events(ctx)
	start := func(c *novalet.ContainerSpec) {
		t.Helper()
		if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "m", Hostname: "sysv"}); err != nil {
			t.Fatal(err)
		}
		if err := te.Start(ctx, "m", c); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is in runlevel 2", func() string {
			out, _ := te.sh("m", "cat /proc/1/cmdline")
			if !strings.HasPrefix(out, "init [2]") {
				return out
			}
			return ""
		})
	}
	start(&novalet.ContainerSpec{Kind: novalet.KindMachine, Layers: sysvinit(t)})
	te.waitLog("m", "sysv login:")
	if out, code := te.sh("m", "touch /before; telinit 6"); code != 0 {
		t.Fatal(out)
	}
	wantEvent(t, events, novalet.EventRebooted)
	te.waitState("m", novalet.ContainerRunning)
	if out, _ := te.sh("m", "ls /before"); out != "/before\n" {
		t.Errorf("after the reboot: %q", out)
	}
	if err := te.Stop(ctx, "m", novalet.StopOptions{Timeout: time.Minute}); err != nil {
		t.Fatal(err)
	}
	if st := te.waitState("m", novalet.ContainerStopped); st.ExitCode != 0 {
		t.Errorf("it was killed: %+v", st)
	}
	start(nil)
	te.sh("m", "telinit 0")
	if ev := wantEvent(t, events, novalet.EventExited); ev.ExitCode != 0 {
		t.Errorf("poweroff: %+v", ev)
	}
	te.waitState("m", novalet.ContainerStopped)
}
