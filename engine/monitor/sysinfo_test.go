package monitor

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestForeignListener: what is no listener of the kernel's is closed and never asked.
func TestForeignListener(t *testing.T) {
	in := &instance{k: &keeper{}}
	file, err := os.Create(filepath.Join(t.TempDir(), "anon_inode:seccomp notify"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	open := map[string]func() (int, error){
		"a file of that name": func() (int, error) { return unix.Dup(int(file.Fd())) },
		"memory of that name": func() (int, error) { return unix.MemfdCreate("anon_inode:seccomp notify", 0) },
		"another anonymous":   func() (int, error) { return unix.EpollCreate1(0) },
		"a socket":            func() (int, error) { return unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0) },
	}
	for what, f := range open {
		fd, err := f()
		if err != nil {
			t.Fatal(err)
		}
		if in.serveListener([]int{fd}) == nil {
			t.Errorf("%s was taken", what)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			t.Errorf("%s is still open", what)
		}
	}
	if in.serveListener(nil) == nil || in.asked.listeners != 0 {
		t.Errorf("%d listeners", in.asked.listeners)
	}
}
