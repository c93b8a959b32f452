package disk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
	"github.com/novalet/novalet/internal/hosttest"
)

// mount mounts an image until the test or the returned function ends it.
func mount(t *testing.T, img, options string) (string, func()) {
	t.Helper()
	dir := t.TempDir()
	patiently(t, "mount", "-o", strings.Trim("loop,"+options, ","), img, dir)
	done := false
	end := func() {
		t.Helper()
		if !done {
			done = true
			patiently(t, "umount", dir)
		}
	}
	t.Cleanup(end)
	return dir, end
}

// patiently runs a program again while loop devices are busy: the kernel lets go of one some time after the umount, and
// other programs take them too.
func patiently(t *testing.T, name string, args ...string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err == nil {
			return
		}
		text := string(out)
		busy := strings.Contains(text, "busy") || strings.Contains(text, "already mounted") || strings.Contains(text, "loop device")
		if !busy || time.Now().After(end) {
			t.Fatalf("%s %v: %v\n%s", name, args, err, text)
		}
	}
}

// populate fills a mounted file system with the common tree and what only it can hold.
func populate(t *testing.T, dir string, s disktest.Shape, keys int) {
	t.Helper()
	disktest.Tree(t, dir, s)
	big := filepath.Join(dir, "usr/lib/attributes")
	if err := os.WriteFile(big, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for k := range keys {
		if err := unix.Setxattr(big, fmt.Sprintf("user.key-%02d", k), []byte(strings.Repeat("v", 4*k)), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// fragment makes a file with many pieces, written backwards.
func fragment(t *testing.T, name string, pieces int64) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for k := pieces - 1; k >= 0; k-- {
		if _, err := fmt.Fprintf(&offsetWriter{f, k * 8192}, "piece %d", k); err != nil {
			t.Fatal(err)
		}
		if k%16 == 0 {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := unix.Fallocate(int(f.Fd()), 0, pieces*8192, 1<<20); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Fatal(err)
	}
}

// rewrite makes a file whose middle was written again, so that extents are used in part.
func rewrite(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, w := range []struct {
		off, n int64
		c      byte
	}{{0, 1 << 20, 'a'}, {40960, 8192, 'b'}, {200704, 4096, 'c'}, {500000, 70000, 'd'}} {
		b := make([]byte, w.n)
		for k := range b {
			b[k] = w.c + byte(k/4096)
		}
		if _, err := f.WriteAt(b, w.off); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
}

// far makes a file with data at its beginning and at a distance only.
func far(t *testing.T, name string, off int64) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for k := range int64(4) {
		if _, err := fmt.Fprintf(&offsetWriter{f, off * k / 3}, "far %d", k); err != nil {
			t.Fatal(err)
		}
	}
}

type offsetWriter struct {
	f   *os.File
	off int64
}

func (w *offsetWriter) Write(p []byte) (int, error) { return w.f.WriteAt(p, w.off) }

// largeAttr adds an attribute that has blocks of its own.
func largeAttr(t *testing.T, dir string, size int) {
	t.Helper()
	name := filepath.Join(dir, "usr/lib/attributes")
	if err := unix.Setxattr(name, "user.large", []byte(strings.Repeat("large ", size/6)), 0); err != nil {
		t.Fatal(err)
	}
}

// TestKernel compares with what the kernel that wrote a file system says of it.
func TestKernel(t *testing.T) {
	hosttest.RequireRoot(t)
	many := disktest.Small
	many.Files = 4000
	for _, c := range []struct {
		mkfs    string
		size    string
		shape   disktest.Shape
		attr    int
		options string
	}{
		{"mkfs.ext4 -F -q -b 4096", "64M", many, 0, ""},
		{"mkfs.ext4 -F -q -b 1024 -O ea_inode -N 20000", "64M", many, 2000, ""},
		{"mkfs.ext4 -F -q -O inline_data,ea_inode -b 4096 -I 512 -N 20000", "64M", many, 60000, ""},
		{"mkfs.ext4 -F -q -O bigalloc,inline_data", "64M", disktest.Small, 0, ""},
		{"mkfs.ext4 -F -q -O large_dir", "64M", many, 0, ""},
		{"mkfs.ext3 -F -q -b 1024 -N 20000", "64M", many, 0, ""},
		{"mkfs.ext2 -F -q -b 1024 -N 20000 -I 128", "64M", many, 0, ""},
		{"mkfs.xfs -q", "320M", many, 60000, ""},
		{"mkfs.xfs -q -b size=1024 -n size=8192 -i size=512", "320M", many, 60000, ""},
		{"mkfs.xfs -q -m bigtime=1,inobtcount=1,reflink=1 -i sparse=1,nrext64=1", "320M", many, 60000, ""},
		{"mkfs.btrfs -q", "256M", many, 3000, ""},
		{"mkfs.btrfs -q -n 4096 -m dup", "256M", many, 1000, "compress-force=zlib"},
		{"mkfs.btrfs -q --mixed", "256M", many, 1000, "compress-force=zstd"},
		{"mkfs.btrfs -q -O no-holes -n 65536", "256M", many, 3000, "compress-force=lzo"},
		{"mkfs.btrfs -q --csum xxhash", "256M", many, 3000, "compress=zstd,max_inline=2048"},
		{"mkfs.btrfs -q -O ^no-holes", "256M", many, 3000, "max_inline=0"},
	} {
		t.Run(c.mkfs+" "+c.options, func(t *testing.T) {
			args := strings.Fields(c.mkfs)
			disktest.Tool(t, "e2fsprogs xfsprogs btrfs-progs", args[0])
			img := filepath.Join(disktest.ImageDir(t), "img")
			disktest.Run(t, "truncate", "-s", c.size, img)
			disktest.Run(t, args[0], append(args[1:], img)...)
			dir, end := mount(t, img, "rw,"+c.options)
			keys := 5
			if c.attr > 2000 {
				keys = 30
			}
			populate(t, dir, c.shape, keys)
			fragment(t, filepath.Join(dir, "usr/lib/pieces"), 600)
			rewrite(t, filepath.Join(dir, "usr/lib/rewritten"))
			if strings.Contains(c.mkfs, "ext2") || strings.Contains(c.mkfs, "ext3") {
				// Beyond 64 MiB blocks of 1 KiB are mapped through three levels.
				far(t, filepath.Join(dir, "usr/lib/far"), 80<<20)
			}
			if c.attr > 0 {
				largeAttr(t, dir, c.attr)
			}
			unix.Sync()
			end()
			dir, end = mount(t, img, "ro")
			want := disktest.FromDir(t, dir)
			end()
			i := mustOpen(t, img, Options{})
			got := disktest.FromWalk(t, i.Walk)
			disktest.Compare(t, want, got, disktest.Ignore{Xattrs: func(_, key string) bool {
				return strings.HasPrefix(key, "trusted.SGI_ACL_") // the kernel shows access lists twice
			}})
			if d := got["home/user/sparse"].Data; d > 512<<10 {
				t.Errorf("the sparse file has %d bytes of data", d)
			}
			// One block a piece; what is allocated and not written is a hole.
			if d := got["usr/lib/pieces"].Data; d > 600*4096+128<<10 {
				t.Errorf("the file of pieces has %d bytes of data", d)
			}
		})
	}
}
