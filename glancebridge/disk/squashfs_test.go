package disk

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
	"github.com/novalet/novalet/internal/hosttest"
)

func TestSquashfs(t *testing.T) {
	disktest.Tool(t, "squashfs-tools", "mksquashfs")
	dir := filepath.Join(t.TempDir(), "tree")
	disktest.Tree(t, dir, disktest.Small)
	want := disktest.FromDir(t, dir)
	for _, args := range []string{
		"-comp gzip", "-comp xz", "-comp lz4", "-comp zstd", "-comp lzma", "-comp lzo",
		"-comp zstd -b 1M", "-comp gzip -b 4096", "-noI -noD -noF -noX", "-no-fragments", "-always-use-fragments", "-no-duplicates -noappend",
	} {
		t.Run(args, func(t *testing.T) {
			img := filepath.Join(disktest.ImageDir(t), "img")
			all := append([]string{dir, img, "-no-progress", "-quiet"}, strings.Fields(args)...)
			disktest.Run(t, "mksquashfs", all...)
			i := mustOpen(t, img, Options{})
			if in := i.Info(); in.Filesystem != "squashfs" || in.Table != "" {
				t.Errorf("found %+v", in)
			}
			got := disktest.FromWalk(t, i.Walk)
			disktest.Compare(t, want, got, disktest.Ignore{
				Nanoseconds: true,
				// Seconds are unsigned 32-bit numbers, and access lists are not stored.
				Times:  func(name string) bool { return name == "usr/lib/size-59" },
				Xattrs: func(_, key string) bool { return strings.HasPrefix(key, "system.posix_acl") },
			})
			if d := got["home/user/sparse"].Data; d > 8<<20 {
				t.Errorf("the sparse file has %d bytes of data", d)
			}
		})
	}
}

// TestSquashfsKernel compares with what the kernel says of an image.
func TestSquashfsKernel(t *testing.T) {
	hosttest.RequireRoot(t)
	disktest.Tool(t, "squashfs-tools", "mksquashfs")
	dir := filepath.Join(t.TempDir(), "tree")
	disktest.Tree(t, dir, disktest.Small)
	img := filepath.Join(disktest.ImageDir(t), "img")
	disktest.Run(t, "mksquashfs", dir, img, "-no-progress", "-quiet", "-comp", "gzip")
	mnt, end := mount(t, img, "ro")
	want := disktest.FromDir(t, mnt)
	end()
	disktest.Compare(t, want, disktest.FromWalk(t, mustOpen(t, img, Options{}).Walk), disktest.Ignore{})
}
