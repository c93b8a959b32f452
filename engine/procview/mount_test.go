package procview

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/internal/hosttest"
)

// TestReadWithoutSize: what is read without asking for its size, as busybox cat does by sendfile, comes whole, also where it is
// longer than one read of the kernel's.
func TestReadWithoutSize(t *testing.T) {
	hosttest.RequireRoot(t)
	want := bytes.Repeat([]byte("processor : 0\n"), 30_000)
	v, err := New([]File{{Name: "cpuinfo", Path: "proc/cpuinfo", Read: func() ([]byte, error) { return want, nil }}})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	go v.Serve() // ends with Close
	dir := t.TempDir()
	if err := unix.MoveMount(v.Mount, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	unix.Close(v.Mount)
	defer unix.Unmount(dir, unix.MNT_DETACH)
	from, err := unix.Open(filepath.Join(dir, "cpuinfo"), unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(from)
	to, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	for {
		n, err := unix.Sendfile(int(to.Fd()), from, nil, 16<<20)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
	}
	got, err := os.ReadFile(to.Name())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
}
