package disk

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
	"github.com/novalet/novalet/glancebridge/layer"
)

// benchTree is shaped like an installed system: many small files and some large ones, half of the data compressible.
// NOVALET_BENCH_MB sets its size, 64 by default.
func benchTree(b *testing.B) (dir string, size int64) {
	b.Helper()
	mb := 64
	if n, err := strconv.Atoi(os.Getenv("NOVALET_BENCH_MB")); err == nil && n > 0 {
		mb = n
	}
	dir = filepath.Join(disktest.ImageDir(b), "tree")
	rnd := rand.NewChaCha8([32]byte{1})
	block := make([]byte, 1<<20)
	_, _ = rnd.Read(block[:len(block)/2])
	copy(block[len(block)/2:], strings.Repeat("compressible text, more or less ", len(block)/64))
	write := func(name string, n int) {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(name, block[:n], 0o644); err != nil {
			b.Fatal(err)
		}
		size += int64(n)
	}
	for k := range mb * 20 {
		write(filepath.Join(dir, fmt.Sprintf("usr/share/%d/%d", k%50, k)), 500+k*37%20000)
	}
	for k := 0; size < int64(mb)<<20; k++ {
		_, _ = rnd.Read(block[:len(block)/2])
		write(filepath.Join(dir, fmt.Sprintf("usr/lib/%d/large", k)), len(block))
	}
	return dir, size
}

// BenchmarkWalk reads every byte of images of one tree; "kernel" reads the same through a mount where that is allowed.
func BenchmarkWalk(b *testing.B) {
	disktest.Tool(b, "e2fsprogs squashfs-tools qemu-utils", "mkfs.ext4", "mksquashfs", "qemu-img")
	dir, size := benchTree(b)
	out := disktest.ImageDir(b)
	raw := filepath.Join(out, "raw")
	disktest.Run(b, "mkfs.ext4", "-F", "-q", "-b", "4096", "-d", dir, raw, fmt.Sprintf("%dM", size>>20*3/2+64))
	for _, c := range []struct{ name, args string }{
		{"ext4", ""},
		{"qcow2", "qemu-img convert -O qcow2 -f raw RAW OUT"},
		{"qcow2-zlib", "qemu-img convert -O qcow2 -c -f raw RAW OUT"},
		{"qcow2-zstd", "qemu-img convert -O qcow2 -c -o compression_type=zstd -f raw RAW OUT"},
		{"vmdk-stream", "qemu-img convert -O vmdk -o subformat=streamOptimized -f raw RAW OUT"},
		{"squashfs-zstd", "mksquashfs DIR OUT -quiet -no-progress -comp zstd"},
		{"squashfs-xz", "mksquashfs DIR OUT -quiet -no-progress -comp xz"},
	} {
		b.Run(c.name, func(b *testing.B) {
			img := raw
			if c.args != "" {
				img = filepath.Join(disktest.ImageDir(b), "img")
				args := strings.Fields(strings.NewReplacer("RAW", raw, "OUT", img, "DIR", dir).Replace(c.args))
				disktest.Run(b, args[0], args[1:]...)
			}
			b.SetBytes(size)
			b.ReportAllocs()
			b.ResetTimer()
			for b.Loop() {
				i := mustOpen(b, img, Options{})
				if err := i.Walk(context.Background(), func(_ *layer.Entry, content io.Reader) error {
					_, err := io.Copy(io.Discard, content)
					return err
				}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("kernel", func(b *testing.B) {
		if os.Geteuid() != 0 || os.Getenv("NOVALET_ROOT_TESTS") != "1" {
			b.Skip("mounts an image: runs as root with NOVALET_ROOT_TESTS=1")
		}
		b.SetBytes(size)
		buf := make([]byte, 1<<20)
		for b.Loop() {
			// A new mount each time: a second look at one would be answered from memory.
			mnt := b.TempDir()
			disktest.Run(b, "mount", "-o", "loop,ro", raw, mnt)
			err := filepath.WalkDir(mnt, func(p string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return err
				}
				f, err := os.Open(p)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
				return err
			})
			if e := unix.Unmount(mnt, 0); err == nil {
				err = e
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}
