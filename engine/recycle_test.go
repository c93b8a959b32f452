package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// TestDiskIsUsedAgain: the next instance gets the disk of one that wrote little, and finds nothing on it; of one that wrote
// much it does not.
func TestDiskIsUsedAgain(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	limits := novalet.Limits{RootBytes: 64 << 20, RootInodes: 2000}
	// By the UUID in the superblock: numbers of inodes come again.
	image := func(d string) string {
		f, err := os.Open(filepath.Join(d, "root.img"))
		if err != nil {
			return ""
		}
		defer f.Close()
		uuid := make([]byte, 16)
		_, _ = f.ReadAt(uuid, 1024+0x68)
		return string(uuid)
	}
	waiting := func() map[string]string {
		out := map[string]string{}
		dirs, _ := filepath.Glob(filepath.Join(te.poolDir(limits.RootBytes, limits.RootInodes), "*"))
		for _, d := range dirs {
			out[image(d)] = d
		}
		return out
	}
	layers := busybox(t)
	te.run("a", limits, app(layers, "sleep 1000"))
	if _, code := te.sh("a", "mkdir -p /etc/x && echo secret >/etc/x/secret && ln -s / /etc/x/up && rm /bin/vi && mkfifo /etc/x/pipe"); code != 0 {
		t.Fatal("write")
	}
	free, _ := te.sh("a", "rm -rf /etc/x/pipe; df -k / | awk 'NR==2{print $2}'")
	was := image(te.disk("a").Dir)
	if err := te.Destroy(ctx, "a", novalet.DestroyOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the disk waits, emptied", func() string {
		if d := waiting()[was]; d == "" || !ready(d) {
			return fmt.Sprint(waiting())
		}
		return ""
	})
	// The one that waits longest is taken first: of a few that follow one has it.
	found := false
	for n := 0; n < 2*maxSpare && !found; n++ {
		id := "b" + string(rune('a'+n))
		te.run(id, limits, app(layers, "sleep 1000"))
		if found = image(te.disk(id).Dir) == was; found {
			out, _ := te.sh(id, "ls /etc/x 2>&1; ls /bin/vi; df -k / | awk 'NR==2{print $2}'")
			if !strings.Contains(out, "No such file") || !strings.Contains(out, "/bin/vi\n"+free) {
				t.Errorf("on the disk of another: %q", out)
			}
			if out, code := te.sh(id, "dd if=/dev/zero of=/much bs=1M count=6 2>&1"); code != 0 {
				t.Fatal(out)
			}
		}
		if err := te.Destroy(ctx, id, novalet.DestroyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if !found {
		t.Fatal("no instance got the disk")
	}
	eventually(t, "the disk that held much is gone", func() string { return waiting()[was] })
	te.o.spareTime = 100 * time.Millisecond
	for _, id := range []string{"x", "y", "z"} {
		te.run(id, limits, app(layers, "sleep 1000"))
	}
	for _, id := range []string{"x", "y", "z"} {
		if err := te.Destroy(ctx, id, novalet.DestroyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "no more wait than are made in advance", func() string {
		if n := len(waiting()); n != te.o.DiskPool {
			return fmt.Sprint(n)
		}
		return ""
	})
}

// TestDisksOfAnEarlierBoot: what was being emptied when the agent was killed, and what waited when the host went down, are nobody's
// next disk: files that were removed may be there again.
func TestDisksOfAnEarlierBoot(t *testing.T) {
	te := newEngine(t)
	const size = 16 << 20
	te.fillPool(size, 0)
	dir := te.poolDir(size, 0)
	eventually(t, "disks wait", func() string {
		es, _ := os.ReadDir(dir)
		if len(es) < 2 || !ready(es[0].Name()) || !ready(es[1].Name()) {
			return "not yet"
		}
		return ""
	})
	if err := te.Close(); err != nil {
		t.Fatal(err)
	}
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, to := range []string{"another-boot.1", es[1].Name() + used} {
		if err := os.Rename(filepath.Join(dir, es[i].Name()), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if _, err := os.Stat(filepath.Join(dir, to)); err == nil {
				t.Errorf("%s still waits", to)
			}
		}()
	}
	te.open()
}
