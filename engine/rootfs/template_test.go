package rootfs

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestTemplate: disks copied from one template are sound to e2fsck, of the size asked for, sparse, and have identities of
// their own; a template that has been damaged is made again; what a killed agent left of one is removed.
func TestTemplate(t *testing.T) {
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("needs mkfs.ext4 (e2fsprogs)")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tpl := Templates(filepath.Join(t.TempDir(), "templates"))
	const bytesEach, inodes = 64 << 20, 4096
	seen := map[string]bool{}
	check := func() {
		t.Helper()
		d := Disk{Dir: t.TempDir()}
		if err := d.MakeFrom(ctx, tpl, bytesEach, inodes); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("e2fsck", "-f", "-n", d.Image()).CombinedOutput(); err != nil {
			t.Errorf("e2fsck: %v\n%s", err, out)
		}
		f, err := os.Open(d.Image())
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Size != bytesEach || st.Blocks*512 > bytesEach/4 {
			t.Errorf("size %d with %d bytes of data, %v", st.Size, st.Blocks*512, err)
		}
		sb, err := superblock(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range [][]byte{sb[superUUID : superUUID+16], sb[superHashSeed : superHashSeed+16]} {
			if seen[string(id)] {
				t.Errorf("%x is another disk's", id)
			}
			seen[string(id)] = true
		}
	}
	check()
	check()
	made, err := os.ReadFile(tpl.path(bytesEach, inodes))
	if err != nil {
		t.Fatal(err)
	}
	made[superOffset+superUUID]++
	if err := os.WriteFile(tpl.path(bytesEach, inodes), made, 0o600); err != nil {
		t.Fatal(err)
	}
	check()
	left := filepath.Join(string(tpl), "mkfs.new1")
	if err := os.MkdirAll(filepath.Join(left, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := tpl.Tidy(); err != nil {
		t.Fatal(err)
	}
	if es, err := os.ReadDir(string(tpl)); err != nil || len(es) != 1 {
		t.Errorf("left are %v, %v", es, err)
	}
}
