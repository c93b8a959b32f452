package guest

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// tree makes a root, beside a directory that nothing may be written to.
func tree(t *testing.T) (rootfd int, root, outside string) {
	t.Helper()
	base := t.TempDir()
	root, outside = filepath.Join(base, "root"), filepath.Join(base, "outside")
	for _, d := range []string{root, outside, filepath.Join(root, "etc")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(outside, "file"), []byte("host"), 0o644); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd, root, outside
}

func TestWriteFile(t *testing.T) {
	fd, root, _ := tree(t)
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	write := func(f wire.File) {
		t.Helper()
		if err := writeFile(fd, &f); err != nil {
			t.Fatal(err)
		}
	}
	write(wire.File{Path: "/etc/a", Data: []byte("one\n"), Mode: 0o600})
	if st, err := os.Stat(filepath.Join(root, "etc/a")); err != nil || st.Mode() != 0o600 || read("etc/a") != "one\n" {
		t.Fatal(st, err, read("etc/a"))
	}
	write(wire.File{Path: "etc/a", Data: []byte("two\n"), Append: true})
	write(wire.File{Path: "etc/a", Data: []byte("two\n"), Append: true})
	if got := read("etc/a"); got != "one\ntwo\n" {
		t.Fatalf("appended twice: %q", got)
	}
	write(wire.File{Path: "/etc/a", Data: []byte("no"), IfAbsent: true})
	if got := read("etc/a"); got != "one\ntwo\n" {
		t.Fatalf("replaced: %q", got)
	}
	write(wire.File{Path: "/new/deep/../deeper/b", Data: []byte("x")})
	if got := read("new/deeper/b"); got != "x" {
		t.Fatalf("made parents: %q", got)
	}
	es, _ := os.ReadDir(filepath.Join(root, "etc"))
	if len(es) != 1 {
		t.Fatalf("left beside: %v", es)
	}
	if err := writeFile(fd, &wire.File{Path: "/etc", Data: []byte("x")}); err == nil {
		t.Fatal("wrote over a directory")
	}
}

func TestWriteFileStaysInside(t *testing.T) {
	for name, link := range map[string]func(root, outside string) error{
		"parent is an absolute link": func(r, o string) error { os.Remove(r + "/etc"); return os.Symlink(o, r+"/etc") },
		"parent is a relative link":  func(r, o string) error { os.Remove(r + "/etc"); return os.Symlink("../outside", r+"/etc") },
		"parent is a dangling link":  func(r, o string) error { os.Remove(r + "/etc"); return os.Symlink("nowhere", r+"/etc") },
		"the file is a link":         func(r, o string) error { return os.Symlink(o+"/file", r+"/etc/file") },
		"the file is a hard link":    func(r, o string) error { return os.Link(o+"/file", r+"/etc/file") },
		"the file is a pipe":         func(r, o string) error { return unix.Mkfifo(r+"/etc/file", 0o644) },
		"the new name is a link":     func(r, o string) error { return os.Symlink(o+"/file", r+"/etc/.novalet-file") },
		"parent is a link to /proc":  func(r, o string) error { os.Remove(r + "/etc"); return os.Symlink("/proc/self/cwd", r+"/etc") },
	} {
		for _, appendTo := range []bool{false, true} {
			fd, root, outside := tree(t)
			if err := link(root, outside); err != nil {
				t.Fatal(err)
			}
			err := writeFile(fd, &wire.File{Path: "/etc/file", Data: []byte("changed"), Append: appendTo})
			if b, rerr := os.ReadFile(filepath.Join(outside, "file")); rerr != nil || string(b) != "host" {
				t.Errorf("%s, append %v: outside is %q, %v (%v)", name, appendTo, b, rerr, err)
			}
			if es, _ := os.ReadDir(outside); len(es) != 1 {
				t.Errorf("%s, append %v: outside has %v", name, appendTo, es)
			}
		}
	}
}

// TestWriteFileRace swaps a directory for a link while files are written below it.
func TestWriteFileRace(t *testing.T) {
	fd, root, outside := tree(t)
	if err := os.Symlink(outside, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, filepath.Join(root, "link"), unix.AT_FDCWD, filepath.Join(root, "etc"), unix.RENAME_EXCHANGE)
			}
		}
	}()
	for range 3000 {
		_ = writeFile(fd, &wire.File{Path: "/etc/file", Data: []byte("changed")})
		if dfd, err := mkdirAll(fd, "etc/sub", 0o755); err == nil {
			unix.Close(dfd)
		}
	}
	close(stop)
	<-done
	if b, _ := os.ReadFile(filepath.Join(outside, "file")); string(b) != "host" {
		t.Fatalf("outside is %q", b)
	}
	if es, _ := os.ReadDir(outside); len(es) != 1 {
		t.Fatalf("outside has %v", es)
	}
}

func TestPlaceRefusesLinks(t *testing.T) {
	fd, dir, outside := tree(t)
	for name, target := range map[string]string{"dev": outside, "proc": "../outside", "sys": "/proc/self", "loop": "loop"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		r := &root{fd: fd}
		if got, err := r.place(name, 0o755); err == nil {
			unix.Close(got)
			t.Errorf("%s -> %s was opened", name, target)
		}
	}
}
