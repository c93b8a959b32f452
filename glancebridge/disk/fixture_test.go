package disk

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
	"github.com/novalet/novalet/glancebridge/layer"
	"github.com/novalet/novalet/internal/hosttest"
)

// fixtures are packed images of one small tree, made by TestMakeFixtures.
var fixtures = []struct {
	name string
	size string // of a file system that is filled through a mount
	mkfs string
	opts string
}{
	{"ext2", "512K", "mkfs.ext2 -F -q -b 1024 -N 128 -I 128", ""},
	{"ext4", "1M", "mkfs.ext4 -F -q -b 1024 -N 128 -O ^has_journal,^resize_inode,inline_data", ""},
	{"ext4-journal", "4M", "mkfs.ext4 -F -q -b 1024 -N 128 -J size=1 -O ^resize_inode", "data=journal"},
	{"xfs", "32M", "mkfs.xfs --unsupported -q -d agcount=1 -l size=1368b", ""},
	{"btrfs", "16M", "mkfs.btrfs -q --mixed -n 4096", "compress-force=zlib"},
	{"btrfs-zstd", "16M", "mkfs.btrfs -q --mixed -n 4096", "compress-force=zstd"},
	{"btrfs-lzo", "16M", "mkfs.btrfs -q --mixed -n 4096", "compress-force=lzo"},
	{"squashfs-gzip", "", "mksquashfs -comp gzip -b 4096", ""},
	{"squashfs-xz", "", "mksquashfs -comp xz", ""},
	{"squashfs-lz4", "", "mksquashfs -comp lz4", ""},
	{"squashfs-zstd", "", "mksquashfs -comp zstd", ""},
	{"gpt", "", "sgdisk", ""},
	{"mbr", "", "sfdisk", ""},
	{"qcow2", "", "qemu-img convert -O qcow2 -o cluster_size=4096", ""},
	{"qcow2-zlib", "", "qemu-img convert -O qcow2 -c -o cluster_size=4096,compat=0.10", ""},
	{"qcow2-zstd", "", "qemu-img convert -O qcow2 -c -o compression_type=zstd,cluster_size=16384", ""},
	{"vmdk", "", "qemu-img convert -O vmdk -o subformat=monolithicSparse", ""},
	{"vmdk-stream", "", "qemu-img convert -O vmdk -o subformat=streamOptimized", ""},
}

// TestMakeFixtures makes testdata anew, having compared each image with the tree. It runs only when asked.
func TestMakeFixtures(t *testing.T) {
	if os.Getenv("NOVALET_MAKE_FIXTURES") != "1" {
		t.Skip("writes testdata: runs with NOVALET_MAKE_FIXTURES=1")
	}
	hosttest.RequireRoot(t)
	tree := filepath.Join(t.TempDir(), "tree")
	disktest.Mini(t, tree)
	table := ""
	for _, c := range fixtures {
		img := filepath.Join(disktest.ImageDir(t), "img")
		args := strings.Fields(c.mkfs)
		want := disktest.FromDir(t, tree)
		keep := img
		switch {
		case c.size != "":
			disktest.Run(t, "truncate", "-s", c.size, img)
			disktest.Run(t, args[0], append(args[1:], img)...)
			dir, end := mount(t, img, "rw,"+c.opts)
			disktest.Run(t, "cp", "-a", tree+"/.", dir)
			d, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(d.Sync(), d.Close()); err != nil {
				t.Fatal(err)
			}
			if c.opts == "data=journal" {
				keep = snapshot(t, img)
			} else {
				unix.Sync()
			}
			end()
		case args[0] == "mksquashfs":
			disktest.Run(t, args[0], append([]string{tree, img, "-quiet", "-no-progress", "-all-time", "1700000000"}, args[1:]...)...)
			want = nil // times are set
		case args[0] == "sgdisk":
			table = layout(t, filepath.Join(filepath.Dir(img), "fs"), 1<<20, "2560K", func(out string) {
				ext2 := disktest.Unpack(disktest.Fixture(t, "ext2")).Bytes()
				if err := os.WriteFile(filepath.Join(filepath.Dir(img), "fs"), ext2, 0o600); err != nil {
					t.Fatal(err)
				}
				disktest.Run(t, "sgdisk", "-n", "3:2048:+1M", "-t", "3:8304", out)
			})
			keep = table
		case args[0] == "sfdisk":
			keep = layout(t, filepath.Join(filepath.Dir(img), "fs"), 1<<20, "2560K", func(out string) {
				ext2 := disktest.Unpack(disktest.Fixture(t, "ext2")).Bytes()
				if err := os.WriteFile(filepath.Join(filepath.Dir(img), "fs"), ext2, 0o600); err != nil {
					t.Fatal(err)
				}
				sfdisk(t, "label: dos\nstart=64, size=32K, type=83\nstart=256, type=5\nstart=320, size=32K, type=83\nstart=2048, size=1M, type=83\n")(out)
			})
		default:
			disktest.Run(t, args[0], append(args[1:], "-f", "raw", table, img)...)
		}
		got := disktest.FromWalk(t, mustOpen(t, keep, Options{}).Walk)
		if want != nil {
			disktest.Compare(t, want, got, disktest.Ignore{
				Names: lostFound,
				Times: func(string) bool { return strings.Contains(c.mkfs, "-I 128") },
			})
		}
		if t.Failed() {
			t.Fatal(c.name)
		}
		b, err := os.ReadFile(keep)
		if err != nil {
			t.Fatal(err)
		}
		if c.name == "xfs" {
			clearLog(b)
		}
		disktest.WriteFixture(t, c.name, b)
		if err := os.WriteFile(filepath.Join("testdata", c.name+".txt"), []byte(got.Listing()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// clearLog leaves of an XFS log the newest record, which says that the file system was unmounted: the numbers in all
// other sectors would be most of the fixture.
func clearLog(b []byte) {
	be := binary.BigEndian
	bs := int(be.Uint32(b[4:]))
	from := int(be.Uint64(b[48:])) * bs // in the first allocation group
	log := b[from : from+int(be.Uint32(b[96:]))*bs]
	newest, lsn := 0, uint64(0)
	for k := 0; k < len(log); k += 512 {
		if n := be.Uint64(log[k+16:]); be.Uint32(log[k:]) == 0xFEEDBABE && n >= lsn {
			newest, lsn = k, n
		}
	}
	clear(log[:newest])
	clear(log[newest+1024:])
}

func TestFixtures(t *testing.T) {
	for _, c := range fixtures {
		t.Run(c.name, func(t *testing.T) {
			s := disktest.Unpack(disktest.Fixture(t, c.name))
			i, err := Open(t.Context(), s, s.Size, Options{})
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(filepath.Join("testdata", c.name+".txt"))
			if err != nil {
				t.Fatal(err)
			}
			if got := disktest.FromWalk(t, i.Walk).Listing(); got != string(want) {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

// smallLimits keep a hostile image from being slow to refuse.
var smallLimits = Limits{Entries: 5000, Depth: 50, DataBytes: 64 << 20, FileBytes: 1 << 40}

// survive opens and walks whatever it is given. Errors must be refusals, and all must end soon.
func survive(t *testing.T, r io.ReaderAt, size int64) (entries int, err error) {
	t.Helper()
	i, err := Open(t.Context(), r, size, Options{Limits: smallLimits, ignoreChecksums: true})
	if err == nil {
		err = i.Walk(t.Context(), func(e *layer.Entry, content io.Reader) error {
			entries++
			_, err := io.CopyN(io.Discard, content, 256<<10)
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		})
	}
	var refused *Refused
	if err != nil && !errors.As(err, &refused) {
		t.Errorf("got %v (%T), want a refusal", err, err)
	}
	return entries, err
}

// TestTruncated cuts each fixture where its sectors end.
func TestTruncated(t *testing.T) {
	for _, c := range fixtures {
		t.Run(c.name, func(t *testing.T) {
			packed := disktest.Fixture(t, c.name)
			whole, err := survive(t, disktest.Unpack(packed), disktest.Unpack(packed).Size)
			if err != nil {
				t.Fatal(err)
			}
			bad := 0
			s := disktest.Unpack(packed)
			size := s.Size
			for _, cut := range s.Sectors() {
				s.Size = cut * disktest.Sector
				n, err := survive(t, s, s.Size)
				if n > whole {
					t.Errorf("cut at %d of %d: %d entries, more than %d", s.Size, size, n, whole)
				}
				if err != nil {
					bad++
				}
			}
			if bad == 0 {
				t.Error("no cut was noticed")
			}
		})
	}
}

// TestFlipped changes bytes of each fixture, the same ones in each run.
func TestFlipped(t *testing.T) {
	rounds := 100
	if testing.Short() {
		rounds = 20
	}
	for _, c := range fixtures {
		t.Run(c.name, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(7, uint64(len(c.name))))
			packed := disktest.Fixture(t, c.name)
			start := time.Now()
			for range rounds {
				b := append([]byte{}, packed...)
				for range 1 + rnd.IntN(8) {
					b[8+rnd.IntN(len(b)-8)] = []byte{0, 1, 0x7F, 0x80, 0xFF, byte(rnd.Uint32())}[rnd.IntN(6)]
				}
				s := disktest.Unpack(b)
				_, _ = survive(t, s, s.Size)
			}
			t.Logf("%d in %v", rounds, time.Since(start))
		})
	}
}

func fuzz(f *testing.F, names ...string) {
	for _, c := range fixtures {
		for _, n := range names {
			if strings.HasPrefix(c.name, n) {
				f.Add(disktest.Fixture(f, c.name))
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := disktest.Unpack(b)
		_, _ = survive(t, s, s.Size)
	})
}

func FuzzExt4(f *testing.F)     { fuzz(f, "ext") }
func FuzzXFS(f *testing.F)      { fuzz(f, "xfs") }
func FuzzBtrfs(f *testing.F)    { fuzz(f, "btrfs") }
func FuzzSquashfs(f *testing.F) { fuzz(f, "squashfs") }
func FuzzPart(f *testing.F)     { fuzz(f, "gpt", "mbr") }
func FuzzQcow2(f *testing.F)    { fuzz(f, "qcow2") }
func FuzzVMDK(f *testing.F)     { fuzz(f, "vmdk") }
