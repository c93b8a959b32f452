package disk

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
)

// openFile opens an image and closes its file with the test.
func openFile(t testing.TB, name string, o Options) (*Image, error) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return Open(t.Context(), f, st.Size(), o)
}

func mustOpen(t testing.TB, name string, o Options) *Image {
	t.Helper()
	img, err := openFile(t, name, o)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func lostFound(name string) bool { return name == "lost+found" }

// mkfsLoses is what mkfs -d does not copy: the root's attributes, nanoseconds and the bits of times beyond 2038.
var mkfsLoses = disktest.Ignore{
	Names: lostFound, Root: true, Nanoseconds: true,
	Times: func(name string) bool { return name == "empty" || name == "usr/lib/size-60" },
}

func TestExt4(t *testing.T) {
	disktest.Tool(t, "e2fsprogs", "mkfs.ext4", "mkfs.ext3", "mkfs.ext2")
	dir := filepath.Join(t.TempDir(), "tree")
	disktest.Tree(t, dir, disktest.Small)
	all := disktest.FromDir(t, dir)
	for _, c := range []struct {
		name string
		args string
		kind string
	}{
		{"default", "mkfs.ext4 -b 4096", "ext4"},
		{"plain", "mkfs.ext4 -O ^metadata_csum,^64bit,^flex_bg", "ext4"},
		{"blocks of 1 KiB", "mkfs.ext4 -b 1024 -N 20000", "ext4"},
		{"meta_bg", "mkfs.ext4 -b 1024 -O meta_bg,^resize_inode -g 2048 -N 4096", "ext4"},
		{"bigalloc", "mkfs.ext4 -O bigalloc -C 65536", "ext4"},
		{"inline_data", "mkfs.ext4 -O inline_data,ea_inode -I 256", "ext4"},
		{"inodes of 1 KiB", "mkfs.ext4 -O inline_data -I 1024", "ext4"},
		{"no journal", "mkfs.ext4 -O ^has_journal,sparse_super2", "ext4"},
		{"ext3", "mkfs.ext3", "ext3"},
		{"ext3 of 1 KiB", "mkfs.ext3 -b 1024 -I 256", "ext3"},
		{"ext2", "mkfs.ext2", "ext2"},
		{"ext2 without file types", "mkfs.ext2 -O ^filetype -b 4096", "ext2"},
		{"blocks of 64 KiB", "mkfs.ext4 -b 65536", "ext4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := maps.Clone(all)
			if strings.Contains(c.args, "inline_data") {
				// mke2fs 1.47 rounds these sizes down to whole blocks in inodes that begin inline.
				for _, n := range []string{"usr/lib/size-4097", "usr/lib/size-65537", "usr/lib/size-131073", "home/user/sparse"} {
					delete(want, n)
				}
			}
			img := filepath.Join(disktest.ImageDir(t), "img")
			args := append(strings.Fields(c.args), "-F", "-q", "-d", dir, img, "32M")
			disktest.Run(t, args[0], args[1:]...)
			i := mustOpen(t, img, Options{})
			if i.Info().Filesystem != c.kind {
				t.Errorf("is %s, want %s", i.Info().Filesystem, c.kind)
			}
			got := disktest.FromWalk(t, i.Walk)
			if d := got["home/user/sparse"].Data; d > 512<<10 {
				t.Errorf("the sparse file has %d bytes of data", d)
			}
			maps.DeleteFunc(got, func(n string, _ disktest.Record) bool {
				return len(want) < len(all) && all[n].Sum != "" && want[n].Sum == ""
			})
			disktest.Compare(t, want, got, mkfsLoses)
		})
	}
}
