package glancebridge

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// node is what a comparison of trees looks at.
type node struct {
	Mode  uint32
	UID   uint32
	GID   uint32
	Size  int64
	Mtime string
	Link  string
	Sum   string
	Xattr string
	Peers string // other names of the same inode
}

// readTree describes every entry of a tree except device nodes, which are never made.
func readTree(t testing.TB, root string) map[string]node {
	t.Helper()
	out := map[string]node{}
	inodes := map[uint64][]string{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		err = unix.Lstat(p, &st)
		if err == unix.ENOENT {
			// overlayfs lists a deletion in a directory that has nothing below it.
			return nil
		}
		if err != nil {
			return err
		}
		kind := st.Mode & unix.S_IFMT
		if kind == unix.S_IFCHR || kind == unix.S_IFBLK {
			return nil
		}
		n := node{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)}
		switch kind {
		case unix.S_IFREG:
			n.Size = st.Size
			f, err := os.Open(p)
			if err != nil {
				return err
			}
			h := sha256.New()
			_, err = io.Copy(h, f)
			f.Close()
			if err != nil {
				return err
			}
			n.Sum = hex.EncodeToString(h.Sum(nil))
			if st.Nlink > 1 {
				inodes[st.Ino] = append(inodes[st.Ino], rel)
			}
		case unix.S_IFLNK:
			if n.Link, err = os.Readlink(p); err != nil {
				return err
			}
		}
		buf := make([]byte, 64<<10)
		if m, err := unix.Llistxattr(p, buf); err == nil && m > 0 {
			names := strings.Split(strings.TrimSuffix(string(buf[:m]), "\x00"), "\x00")
			slices.Sort(names)
			for _, name := range names {
				v := make([]byte, 64<<10)
				k, err := unix.Lgetxattr(p, name, v)
				if err != nil {
					return err
				}
				n.Xattr += name + "=" + hex.EncodeToString(v[:k]) + ";"
			}
		}
		out[rel] = n
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, names := range inodes {
		slices.Sort(names)
		for _, name := range names {
			n := out[name]
			n.Peers = strings.Join(names, ",")
			out[name] = n
		}
	}
	return out
}

// sameTree compares two trees entry by entry.
func sameTree(t testing.TB, got, want map[string]node) {
	t.Helper()
	bad := 0
	for name, w := range want {
		g, ok := got[name]
		if !ok {
			t.Errorf("%q is missing", name)
			bad++
		} else if g != w {
			t.Errorf("%q is\n  %+v, want\n  %+v", name, g, w)
			bad++
		}
		if bad > 10 {
			t.Fatal("and more")
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%q is too much", name)
			if bad++; bad > 10 {
				t.Fatal("and more")
			}
		}
	}
}

// run runs a command that must succeed.
func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// oddTree makes a tree with one of everything that is hard to keep.
func oddTree(t testing.TB, root string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p := func(s string) string { return filepath.Join(root, s) }
	file := func(name, data string, mode os.FileMode) {
		must(os.WriteFile(p(name), []byte(data), 0o600))
		must(os.Chmod(p(name), mode))
	}
	for _, d := range []string{"etc", "bin", "sbin", "usr/bin", "usr/lib", "home/user", "tmp", "var/shared", "dev"} {
		must(os.MkdirAll(p(d), 0o755))
	}
	must(os.Chmod(p("tmp"), 0o777|os.ModeSticky))
	must(os.Chown(p("var/shared"), 0, 50))
	must(os.Chmod(p("var/shared"), 0o775|os.ModeSetgid))
	file("var/shared/made-by-root", "x", 0o644)
	file("sbin/init", "#!/bin/sh\n", 0o755)
	file("bin/su", "setuid", 0o755)
	must(os.Chown(p("bin/su"), 0, 7))
	must(os.Chmod(p("bin/su"), 0o755|os.ModeSetuid|os.ModeSetgid))
	must(os.Symlink("usr/lib", p("lib")))
	must(os.Symlink("/does/not/exist", p("etc/dangling")))
	must(os.Symlink(strings.Repeat("long/", 300)+"x", p("etc/longlink")))
	file("home/user/unreadable", "secret", 0)
	must(os.Chown(p("home/user"), 1000, 1000))
	must(os.Chmod(p("home/user"), 0o500))
	must(os.Chown(p("home/user/unreadable"), 1000, 70000))
	file("etc/name-\xff\xfe-not-utf8", "raw", 0o644)
	file("etc/with\nnewline and 'quotes'", "n", 0o644)
	file("etc/"+strings.Repeat("n", 255), "longest name", 0o644)
	file("etc/empty", "", 0o644)
	file("etc/big", strings.Repeat("0123456789abcdef", 40000), 0o644)
	deep := root
	for range 40 {
		deep = filepath.Join(deep, strings.Repeat("d", 40))
		must(os.Mkdir(deep, 0o711))
	}
	must(os.WriteFile(filepath.Join(deep, "bottom"), []byte("deep"), 0o644))
	must(os.Link(p("bin/su"), p("usr/bin/su-again")))
	must(os.Link(p("bin/su"), p("bin/su-too")))
	must(syscall.Mkfifo(p("var/fifo"), 0o640))
	f, err := os.Create(p("var/sparse"))
	must(err)
	_, err = f.WriteAt([]byte("middle"), 8<<20)
	must(err)
	must(f.Truncate(32 << 20))
	must(f.Close())
	for name, sec := range map[string]int64{"etc/empty": -1234567, "etc/big": 4102444800, "bin/su": 1} {
		must(unix.UtimesNanoAt(unix.AT_FDCWD, p(name), []unix.Timespec{{Sec: sec, Nsec: 123456789}, {Sec: sec, Nsec: 123456789}}, 0))
	}
	must(unix.Setxattr(p("etc/big"), "user.note", []byte("a\x00b"), 0))
	must(unix.Setxattr(p("usr/lib"), "user.dir", []byte("on a directory"), 0))
	// cap_net_raw+ep, as ping has it.
	must(unix.Setxattr(p("usr/bin/su-again"), "security.capability",
		[]byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	if path, err := exec.LookPath("setfacl"); err == nil {
		run(t, path, "-m", "u:1000:rwx,g:50:r-x", p("var/shared"))
		run(t, path, "-d", "-m", "u:1000:rwx", p("var/shared"))
		run(t, path, "-m", "u:70000:r--", p("etc/big"))
	}
	must(unix.Mknod(p("dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
}

func blocks(fi os.FileInfo) int64 { return fi.Sys().(*syscall.Stat_t).Blocks }
