package rootfs

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/internal/hosttest"
)

// TestEmpty: a disk is emptied of what an instance may have left, and only called empty when all its room is free again.
func TestEmpty(t *testing.T) {
	hosttest.RequireRoot(t)
	ctx, cancel := context.WithTimeout(context.Background(), hosttest.Patience(time.Minute))
	defer cancel()
	tpl := Templates(filepath.Join(t.TempDir(), "templates"))
	disk := func(size int64) (Disk, Room) {
		t.Helper()
		d := Disk{Dir: t.TempDir()}
		if err := d.MakeFrom(ctx, tpl, size, 2048); err != nil {
			t.Fatal(err)
		}
		if err := d.Attach(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := d.Detach(); err != nil {
				t.Error(err)
			}
		})
		room, err := d.Room()
		if err != nil {
			t.Fatal(err)
		}
		return d, room
	}
	write := func(d Disk, name string, size int) string {
		t.Helper()
		p := filepath.Join(d.Mount(), "root/upper", name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	d, fresh := disk(64 << 20)
	for range 2 {
		p := write(d, "etc/deep/file", 1<<20)
		if err := os.Symlink("/etc", filepath.Join(d.Mount(), "root/link")); err != nil {
			t.Fatal(err)
		}
		if err := unix.Setxattr(p, "user.big", make([]byte, 800), 0); err != nil {
			t.Fatal(err)
		}
		if err := d.Empty(fresh); err != nil {
			t.Fatal(err)
		}
		left, err := os.ReadDir(d.Mount())
		if err != nil || len(left) != 1 || left[0].Name() != "lost+found" {
			t.Fatalf("left: %v %v", left, err)
		}
	}
	if _, err := os.Stat("/etc/passwd"); err != nil {
		t.Fatal(err)
	}
	refused := func(d Disk, what string) {
		t.Helper()
		if err := d.Empty(fresh); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("empty: %v, want %q", err, what)
		}
	}
	f, err := os.Open(write(d, "held", 10))
	if err != nil {
		t.Fatal(err)
	}
	refused(d, "in use")
	f.Close()
	if err := d.Empty(fresh); err != nil {
		t.Error(err)
	}
	many, _ := disk(64 << 20)
	for i := range maxEmptyFiles {
		write(many, "f"+string(rune('0'+i%10))+"/"+time.Duration(i).String(), 0)
	}
	refused(many, "too much")
	large, _ := disk(64 << 20)
	write(large, "large", 5<<20)
	refused(large, "too much")
	other, _ := disk(48 << 20)
	refused(other, "of that size")
	fixed, _ := disk(64 << 20)
	p := write(fixed, "fixed", 10)
	setFixed(t, p, true)
	defer setFixed(t, p, false)
	refused(fixed, "not permitted")
	grown, _ := disk(64 << 20)
	if err := os.WriteFile(filepath.Join(grown.Mount(), "grown"), make([]byte, 20<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	if err := os.Remove(filepath.Join(grown.Mount(), "grown")); err != nil {
		t.Fatal(err)
	}
	refused(grown, "has grown")
	gone := Disk{Dir: t.TempDir()}
	if err := gone.Empty(fresh); err == nil {
		t.Error("a disk that is not there is empty")
	}
}

func setFixed(t *testing.T, path string, on bool) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const immutable = 0x10 // FS_IMMUTABLE_FL
	flags := 0
	if on {
		flags = immutable
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags); err != nil {
		t.Fatal(err)
	}
}
