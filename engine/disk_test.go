package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/novalet/novalet"
)

// TestEphemeralDisks: each is a file system of its size, at its place, full when it is full, counted apart from the root,
// the same after a stop, and not in a rescue.
func TestEphemeralDisks(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	limits := novalet.Limits{RootBytes: 64 << 20, EphemeralBytes: []int64{32 << 20, 48 << 20}}
	te.run("e", limits, app(busybox(t), "sleep 1000"))
	want := func(script, out string) {
		t.Helper()
		if got, _ := te.sh("e", script); strings.TrimSpace(got) != out {
			t.Errorf("%s: %q, want %q", script, got, out)
		}
	}
	for dir, size := range map[string]int{"/mnt": 32 << 10, "/mnt1": 48 << 10} {
		out, _ := te.sh("e", "df -k "+dir+" | awk 'NR==2 && $6==\""+dir+"\" {print $2}'")
		kib, err := strconv.Atoi(strings.TrimSpace(out))
		if err != nil || kib > size || kib < size*3/4 {
			t.Errorf("%s is of %q KiB, want nearly %d", dir, out, size)
		}
		want("stat -c %u:%g "+dir, "0:0")
	}
	want("cat /sys/block/vdb/size /sys/block/vdc/size", "65536\n98304")
	want("ls /sys/block /sys/class/block", "/sys/block:\nvdb\nvdc\n\n/sys/class/block:\nvdb\nvdc")
	want("cat /sys/dev/block/$(awk '$5==\"/mnt\"{print $3}' /proc/self/mountinfo)/size", "65536")
	want("(echo x >/sys/block/vdb/size) 2>/dev/null; echo $?", "1")
	if out, code := te.sh("e", "dd if=/dev/zero of=/mnt/fill bs=1M count=100 2>&1"); code == 0 || !strings.Contains(out, "No space left") {
		t.Errorf("fill /mnt: %q %d", out, code)
	}
	st, err := te.Stats(ctx, "e")
	if err != nil || st.EphemeralBytes < 16<<20 || st.EphemeralBytes > 80<<20 || st.RootBytes > 16<<20 {
		t.Errorf("counted: %+v %v", st, err)
	}
	if out, code := te.sh("e", "dd if=/dev/zero of=/fill bs=1M count=8 2>&1 && dd if=/dev/zero of=/mnt1/fill bs=1M count=8 2>&1"); code != 0 {
		t.Errorf("the others are full too: %q", out)
	}
	te.sh("e", "rm /mnt/fill; echo kept >/mnt/kept; chown 100:101 /mnt/kept")
	again := func(c *novalet.ContainerSpec) {
		t.Helper()
		if err := te.Stop(ctx, "e", novalet.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "e", Limits: limits}); err != nil {
			t.Fatal(err)
		}
		if err := te.Start(ctx, "e", c); err != nil {
			t.Fatal(err)
		}
	}
	rescue := app(busybox(t), "sleep 1000")
	rescue.Rescue = "/mnt"
	again(rescue)
	want("ls /mnt/kept 2>/dev/null; cat /proc/mounts | grep -c ' /mnt1 '; ls /sys/block", "0")
	again(nil)
	want("cat /mnt/kept; stat -c %u:%g /mnt/kept", "kept\n100:101")
}

// TestEphemeralDiskOfAMachine: it is there after a reboot from inside, and lsblk lists it.
func TestEphemeralDiskOfAMachine(t *testing.T) {
	te := newEngine(t)
	events := te.Events(te.ctx())
	te.run("lsblk", novalet.Limits{EphemeralBytes: []int64{32 << 20}}, machineOf(debian(t)))
	if out, _ := te.sh("lsblk", "lsblk -bnr -o NAME,SIZE,TYPE,MOUNTPOINT"); out != "vdb 33554432 disk /mnt\n" {
		t.Errorf("lsblk: %q", out)
	}
	layers := busybox(t)
	if err := os.WriteFile(filepath.Join(layers[0].Path, "etc/inittab"), []byte("::respawn:/bin/sleep 1000\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../bin/busybox", filepath.Join(layers[0].Path, "sbin/init")); err != nil {
		t.Fatal(err)
	}
	te.run("m", novalet.Limits{EphemeralBytes: []int64{32 << 20}}, &novalet.ContainerSpec{Kind: novalet.KindMachine, Layers: layers})
	te.sh("m", "echo kept >/mnt/kept; reboot")
	wantEvent(t, events, novalet.EventRebooted)
	te.waitState("m", novalet.ContainerRunning)
	if out, _ := te.sh("m", "cat /mnt/kept; ls /sys/block"); out != "kept\nvdb\n" {
		t.Errorf("after the reboot: %q", out)
	}
}

// TestEphemeralPlaceIsALink: an image whose /mnt leads elsewhere does not start, and says why.
func TestEphemeralPlaceIsALink(t *testing.T) {
	te := newEngine(t)
	layers := busybox(t)
	if err := os.Symlink("/etc", filepath.Join(layers[0].Path, "mnt")); err != nil {
		t.Fatal(err)
	}
	if _, err := te.Create(te.ctx(), &novalet.SandboxSpec{ID: "l", Limits: novalet.Limits{EphemeralBytes: []int64{32 << 20}}}); err != nil {
		t.Fatal(err)
	}
	if err := te.Start(te.ctx(), "l", app(layers, "sleep 1000")); !strings.Contains(novalet.FaultText(err), "/mnt in the image is not a directory") {
		t.Errorf("start: %v", err)
	}
}

// TestSwap: what the flavor has beyond memory is the limit of both together, and what the usual programs show.
func TestSwap(t *testing.T) {
	te := newEngine(t)
	te.run("app", novalet.Limits{MemoryBytes: 128 << 20, SwapBytes: 64 << 20}, app(busybox(t), "sleep 1000"))
	te.run("deb", novalet.Limits{MemoryBytes: 128 << 20, SwapBytes: 64 << 20}, machineOf(debian(t)))
	te.run("none", novalet.Limits{MemoryBytes: 128 << 20}, app(busybox(t), "sleep 1000"))
	in, err := te.find("app")
	if err != nil {
		t.Fatal(err)
	}
	rec, _ := in.get()
	counted := false
	for _, r := range te.group(rec.Slot).Refs() {
		for file, want := range map[string]int64{"memory.memsw.limit_in_bytes": 192 << 20, "memory.swap.max": 64 << 20} {
			if b, err := os.ReadFile(filepath.Join(r.Path, file)); err == nil && (r.Kind == "v1" || r.Kind == "base") {
				counted = true
				if got := strings.TrimSpace(string(b)); got != fmt.Sprint(want) {
					t.Errorf("%s is %s, want %d", file, got, want)
				}
			}
		}
	}
	if !counted {
		t.Skip("this host's kernel does not count swap")
	}
	for _, c := range [][3]string{
		{"app", "awk '/^SwapTotal/{print $2}' /proc/meminfo", "65536"},
		{"app", "awk 'NR==2{print $3}' /proc/swaps", "65536"},
		{"deb", "free -k | awk '/^Swap/{print $2}'", "65536"},
		{"deb", "swapon --show=SIZE --bytes --noheadings", "67108864"},
		{"none", "awk '/^SwapTotal/{print $2}' /proc/meminfo", "0"},
		{"none", "wc -l </proc/swaps", "1"},
	} {
		if out, _ := te.sh(c[0], c[1]); strings.TrimSpace(out) != c[2] {
			t.Errorf("%s: %s: %q, want %q", c[0], c[1], out, c[2])
		}
	}
}

// TestPoolIsMountedOnce: a disk that is taken while the waiting ones are being mounted, as after a restart of the agent, is
// mounted once: two mounts by two loop devices would damage it.
func TestPoolIsMountedOnce(t *testing.T) {
	te := newEngine(t)
	const size = 16 << 20
	for round := range 4 {
		te.fillPool(size, 0)
		eventually(t, "disks wait", func() string {
			waiting, _ := filepath.Glob(filepath.Join(te.poolDir(size, 0), "*[0-9]", "fs", "lost+found"))
			if len(waiting) < 2 {
				return fmt.Sprint(waiting)
			}
			return ""
		})
		te.closePool() // unmounts them
		var wg sync.WaitGroup
		wg.Go(te.openPool)
		for i := range 2 {
			id := fmt.Sprintf("taker-%d-%d", round, i)
			if err := os.Mkdir(te.dir(id), 0o711); err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				if err := te.makeDisk(te.ctx(), te.disk(id), size, 0); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			dir := te.dir(fmt.Sprintf("taker-%d-%d", round, i))
			if n := strings.Count(string(mounts), dir+"/"); n != 1 {
				t.Errorf("round %d: %s is mounted %d times", round, filepath.Base(dir), n)
			}
			for range 2 {
				if err := detachDisks(dir); err != nil {
					t.Error(err)
				}
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
	}
}
