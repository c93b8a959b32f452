package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/rootfs"
)

// copied reads a file of a disk as a snapshot of it has it: from a copy of its image file, as it lies there.
func copied(t *testing.T, d rootfs.Disk, file string) string {
	t.Helper()
	c := rootfs.Disk{Dir: t.TempDir()}
	in, err := os.Open(d.Image())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(c.Image())
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
	if err := c.Attach(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Detach(); err != nil {
			t.Error(err)
		}
	}()
	b, err := os.ReadFile(filepath.Join(c.Mount(), file))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// TestSync: what a guest has written and not synced is in the image files of its disks, while it is frozen as well.
func TestSync(t *testing.T) {
	te := newEngine(t)
	te.opts.RootLimits = LimitPool
	te.Close()
	te.open()
	ctx := te.ctx()
	te.run("d", novalet.Limits{RootBytes: 64 << 20, EphemeralBytes: []int64{32 << 20}}, app(busybox(t), "sleep 1000"))
	te.run("plain", novalet.Limits{}, app(busybox(t), "sleep 1000"))
	for _, frozen := range []bool{false, true} {
		text := fmt.Sprintf("frozen: %v\n", frozen)
		if _, code := te.sh("d", "printf '"+text+"' | tee /written >/mnt/written"); code != 0 {
			t.Fatal("cannot write")
		}
		if frozen {
			if err := te.Freeze(ctx, "d"); err != nil {
				t.Fatal(err)
			}
		}
		for _, id := range []string{"d", "plain"} {
			if err := te.Sync(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
		for file, disk := range map[string]rootfs.Disk{"root/upper/written": te.disk("d"), "written": te.ephemeral("d", 0)} {
			if got := copied(t, disk, file); got != text {
				t.Errorf("frozen %v: %s: %q", frozen, file, got)
			}
		}
	}
	// As many as may hang do; one more waits no longer than its caller.
	for range syncsAtOnce {
		te.syncs <- struct{}{}
	}
	short, done := context.WithTimeout(ctx, 50*time.Millisecond)
	defer done()
	if err := te.Sync(short, "d"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("beside all that may hang: %v", err)
	}
	for range syncsAtOnce {
		<-te.syncs
	}
}

// TestFreezeHanging: a process that waits for a file system which never answers cannot be stopped. The others go on then, and the
// caller's end is heard at once.
func TestFreezeHanging(t *testing.T) {
	te := newEngine(t)
	te.run("m", novalet.Limits{}, machineOf(attacker(t)))
	te.sh("m", "mkdir -p /hung; (while :; do echo x >>/ticks; sleep 0.02; done) >/dev/null 2>&1 </dev/null &")
	end := te.hang("fuse", "/hung")
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(te.ctx())
	wg.Go(func() {
		_, _ = te.Exec(ctx, "m", &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: []string{"ls", "/hung"}}})
	})
	eventually(t, "a process hangs", func() string {
		out, _ := te.sh("m", "grep -l ^ls /proc/[0-9]*/comm | while read f; do grep -h ^State ${f%comm}status; done")
		if !strings.Contains(out, "S (sleeping)") && !strings.Contains(out, "D (disk sleep)") {
			return fmt.Sprintf("%q", out)
		}
		return ""
	})
	short, done := context.WithTimeout(te.ctx(), time.Second)
	defer done()
	began := time.Now()
	if err := te.Freeze(short, "m"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("frozen, with a process that cannot be: %v after %v", err, time.Since(began))
	}
	te.waitState("m", novalet.ContainerRunning)
	count := func() string { out, _ := te.sh("m", "wc -l </ticks"); return out }
	was := count()
	eventually(t, "the others go on", func() string {
		if now := count(); now == was {
			return "still " + now
		}
		return ""
	})
	if err := te.Stop(te.ctx(), "m", novalet.StopOptions{}); err != nil {
		t.Error(err)
	}
	cancel()
	wg.Wait()
	end()
}
