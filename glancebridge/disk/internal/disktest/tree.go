// Package disktest makes trees and images for the disk readers' tests and compares what they read with what is there.
package disktest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Tool skips the test unless the programs are there; packages are what to install. Tests that make images with them take
// longer than unit tests may, and run with those that need root.
func Tool(t testing.TB, packages string, programs ...string) {
	t.Helper()
	if _, bench := t.(*testing.B); !bench && os.Getenv("NOVALET_ROOT_TESTS") != "1" {
		t.Skip("makes images with the distribution's tools: runs with NOVALET_ROOT_TESTS=1 (make test)")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s (packages: %s)", p, packages)
		}
	}
}

// Run runs a program and gives what it printed.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	var out []byte
	var err error
	for range 100 {
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		out, err = cmd.CombinedOutput()
		// qemu-img measures how long a key's derivation takes. Where the kernel counts a thread's time in ticks, that may be
		// none, and it gives up.
		if err == nil || !bytes.Contains(out, []byte("Unable to get accurate CPU usage")) {
			break
		}
	}
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Shape says how much a tree holds.
type Shape struct {
	Files   int   // in one directory
	Bytes   int64 // of random data
	Sparse  int64 // size of a file with a little data
	NoOwner bool  // no ids, devices and capabilities even as root
	NoXattr bool
}

// Small is a tree with one of everything.
var Small = Shape{Files: 300, Bytes: 1 << 20, Sparse: 8 << 20}

// Tree fills dir. As root it has owners, devices and capabilities too.
func Tree(t testing.TB, dir string, s Shape) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(1, 2))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, n int64, mode os.FileMode) {
		t.Helper()
		b := make([]byte, n)
		for k := 0; k+8 <= len(b); k += 8 {
			binary.LittleEndian.PutUint64(b[k:], rnd.Uint64())
		}
		must(os.WriteFile(at(name), b, mode))
		must(os.Chmod(at(name), mode))
	}
	for _, d := range []string{"etc", "usr/lib", "usr/bin", "var/many", "var/deep/1/2/3/4/5/6/7/8", "dev", "home/user", "tmp", "empty"} {
		must(os.MkdirAll(at(d), 0o755))
	}
	must(os.WriteFile(at("etc/os-release"), []byte("ID=test\nVERSION_ID=1\n"), 0o644))
	must(os.Symlink("usr/bin", at("bin")))
	must(os.Symlink("../"+strings.Repeat("long-", 20)+"target", at("etc/long")))
	must(os.Symlink(strings.Repeat("/very/long/target", 60), at("etc/longer")))
	must(os.Symlink(strings.Repeat("x", 59), at("etc/59")))
	must(os.Symlink(strings.Repeat("y", 60), at("etc/60")))
	for k := range s.Files {
		write(fmt.Sprintf("var/many/file-%05d-%s", k, strings.Repeat("n", k%40)), int64(k%97), 0o640)
	}
	write("var/deep/1/2/3/4/5/6/7/8/bottom", 5000, 0o600)
	write("usr/bin/large", s.Bytes, 0o755)
	write("usr/bin/set", 20000, 0o755|os.ModeSetuid)
	write("usr/bin/setg", 12, 0o755|os.ModeSetgid)
	write("usr/bin/none", 0, 0)
	for _, n := range []int64{1, 59, 60, 61, 100, 150, 159, 160, 1023, 1024, 4095, 4096, 4097, 65535, 65536, 65537, 131072, 131073} {
		write(fmt.Sprintf("usr/lib/size-%d", n), n, 0o644)
	}
	must(os.WriteFile(at("usr/lib/text"), bytes.Repeat([]byte("all work and no play makes a dull file\n"), 20000), 0o644))
	must(os.WriteFile(at("usr/lib/zeros"), make([]byte, 300000), 0o644))
	must(os.Chmod(at("tmp"), 0o777|os.ModeSticky))
	must(os.Chmod(at("empty"), 0o700))
	must(os.WriteFile(at("home/user/not-utf8-\xff\xfe\x80"), []byte("raw"), 0o644))
	must(os.WriteFile(at("home/user/new\nline \x01"), []byte("raw"), 0o644))
	must(os.WriteFile(at("home/user/"+strings.Repeat("N", 255)), []byte("long"), 0o644))
	write("usr/lib/linked", 7000, 0o644)
	must(os.Link(at("usr/lib/linked"), at("usr/bin/linked-2")))
	must(os.Link(at("usr/lib/linked"), at("home/user/linked-3")))
	must(unix.Mkfifo(at("dev/fifo"), 0o620))
	must(unix.Mknod(at("dev/socket"), unix.S_IFSOCK|0o755, 0))
	sparse(t, at("home/user/sparse"), s.Sparse)
	sparse(t, at("home/user/hole"), 0)
	if !s.NoXattr {
		xattrs(t, at)
	}
	if os.Geteuid() == 0 && !s.NoOwner {
		owners(t, at, !s.NoXattr)
	}
	times(t, dir, at)
}

// sparse makes a file with pieces of data between holes; a size of 0 makes one of nothing but hole.
func sparse(t testing.TB, name string, size int64) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if size == 0 {
		size = 1 << 20
	} else {
		for k := range int64(8) {
			if _, err := f.WriteAt(bytes.Repeat([]byte{byte(k + 1)}, 4096+int(k)), (size/8*k)&^0xFFFF+8192*(k%2)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := f.Truncate(size + 12345); err != nil {
		t.Fatal(err)
	}
}

func xattrs(t testing.TB, at func(string) string) {
	t.Helper()
	set := func(name, key, value string) {
		t.Helper()
		if err := unix.Lsetxattr(at(name), key, []byte(value), 0); err != nil {
			t.Skipf("the temporary directory takes no extended attributes: %v", err)
		}
	}
	set("usr/lib/text", "user.short", "v")
	set("usr/lib/text", "user.empty", "")
	set("usr/lib/size-1", "user.binary", "\x00\x01\xff")
	set("usr/lib/size-4096", "user.long", strings.Repeat("long value ", 50))
	for k := range 12 {
		set("usr/lib", fmt.Sprintf("user.dir-%02d", k), strings.Repeat(string(rune('a'+k)), 6*k))
	}
}

// ACL is an access list as system.posix_acl_access holds it.
func ACL(entries ...[3]uint32) string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return string(b)
}

const noID = ^uint32(0)

func owners(t testing.TB, at func(string) string, xattr bool) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Lchown(at("home/user"), 1000, 1000))
	must(os.Lchown(at("home/user/sparse"), 100000, 4000000000))
	must(os.Lchown(at("etc/long"), 65534, 70000))
	must(os.Lchown(at("usr/lib/size-100"), 3000000000, 0))
	must(unix.Mknod(at("dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(unix.Mknod(at("dev/sda1"), unix.S_IFBLK|0o660, int(unix.Mkdev(8, 1))))
	must(unix.Mknod(at("dev/big"), unix.S_IFCHR|0o600, int(unix.Mkdev(511, 70000))))
	must(os.Chmod(at("dev/null"), 0o666))
	if !xattr {
		return
	}
	set := func(name, key, value string) {
		t.Helper()
		if err := unix.Lsetxattr(at(name), key, []byte(value), 0); err != nil {
			t.Fatalf("%s %s: %v", name, key, err)
		}
	}
	set("usr/bin/large", "security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	set("usr/bin/setg", "trusted.thing", "t")
	set("etc/long", "trusted.on-a-link", "t")
	acl := ACL([3]uint32{1, 7, noID}, [3]uint32{2, 5, 1000}, [3]uint32{2, 4, 70000}, [3]uint32{4, 5, noID}, [3]uint32{8, 6, 2000}, [3]uint32{0x10, 7, noID}, [3]uint32{0x20, 5, noID})
	set("home/user", "system.posix_acl_access", acl)
	set("home/user", "system.posix_acl_default", acl)
}

// times gives everything a fixed time, and some things odd ones.
func times(t testing.TB, dir string, at func(string) string) {
	t.Helper()
	set := func(name string, when time.Time) {
		t.Helper()
		ts := unix.NsecToTimespec(when.UnixNano())
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
	}
	var all []string
	err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		all = append(all, p)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for k := len(all) - 1; k >= 0; k-- {
		set(all[k], time.Unix(1700000000+int64(k), int64(k)*1001))
	}
	set(at("usr/lib/size-59"), time.Date(1969, 5, 6, 7, 8, 9, 123456789, time.UTC))
	set(at("usr/lib/size-60"), time.Date(2040, 5, 6, 7, 8, 9, 987654321, time.UTC))
	set(at("empty"), time.Date(2100, 1, 1, 0, 0, 0, 1, time.UTC))
}

// ImageDir is a directory for images, in memory where that is possible: the programs that make them sync their files.
func ImageDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "disktest")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Mini fills dir with a few kinds of everything, small enough to keep.
func Mini(t testing.TB, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"etc", "dir/sub/deeper", "many"} {
		must(os.MkdirAll(at(d), 0o755))
	}
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		must(os.WriteFile(at(name), []byte(text), 0o600))
		must(os.Chmod(at(name), mode))
	}
	write("etc/os-release", "ID=mini\n", 0o644)
	write("dir/text", strings.Repeat("a line of text\n", 1000), 0o644)
	write("dir/short", "short", 0o600)
	write("dir/empty", "", 0o600)
	write("dir/setuid", strings.Repeat("x", 5000), 0o755|os.ModeSetuid)
	write("dir/name-\xff\n", "odd", 0o644)
	must(os.Link(at("dir/text"), at("etc/linked")))
	must(os.Symlink("../dir/short", at("etc/link")))
	must(os.Symlink(strings.Repeat("long/", 60), at("etc/longlink")))
	for k := range 40 {
		write(fmt.Sprintf("many/name-%02d", k), strings.Repeat("k", k), 0o644)
	}
	f, err := os.Create(at("dir/sparse"))
	must(err)
	for _, off := range []int64{0, 65536, 196608} {
		_, err := f.WriteAt([]byte("data between holes"), off)
		must(err)
	}
	must(f.Truncate(300000))
	must(f.Close())
	must(unix.Mkfifo(at("dir/fifo"), 0o600))
	must(unix.Mknod(at("dir/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(os.Lchown(at("dir/short"), 1000, 100000))
	must(unix.Setxattr(at("dir/text"), "user.key", []byte("value"), 0))
	must(unix.Setxattr(at("dir/short"), "user.longer", []byte(strings.Repeat("v", 300)), 0))
	must(unix.Setxattr(at("dir/setuid"), "security.capability",
		[]byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	var all []string
	must(filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		all = append(all, p)
		return err
	}))
	for k := len(all) - 1; k >= 0; k-- {
		ts := unix.NsecToTimespec(int64(1700000000+k) * 1e9)
		must(unix.UtimesNanoAt(unix.AT_FDCWD, all[k], []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}
}
