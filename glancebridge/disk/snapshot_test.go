package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
	"github.com/novalet/novalet/internal/hosttest"
)

// snapshot copies an image that is mounted, as a snapshot of a running machine does. The file system is frozen to the
// disk's cache only: what it had in its log stays there.
func snapshot(t *testing.T, img string) string {
	t.Helper()
	out := filepath.Join(filepath.Dir(img), "snapshot")
	disktest.Run(t, "cp", "--sparse=always", img, out)
	return out
}

// churn makes, changes and removes names so that the log has something to tell.
func churn(t *testing.T, dir string, round int) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for k := range 200 {
		name := filepath.Join(dir, fmt.Sprintf("churn-%d-%03d", round, k))
		must(os.WriteFile(name, fmt.Appendf(nil, "round %d file %d", round, k), 0o600))
		if k%3 == 0 {
			must(os.Rename(name, name+".renamed"))
		}
		if k%3 != 0 && k%5 == 1 {
			must(os.Remove(name))
		}
	}
	old := filepath.Join(dir, fmt.Sprintf("dir-%d", round-1))
	if _, err := os.Stat(old); err == nil {
		must(os.RemoveAll(old))
	}
	must(os.MkdirAll(filepath.Join(dir, fmt.Sprintf("dir-%d", round), "sub"), 0o755))
	d, err := os.Open(dir)
	must(err)
	must(d.Sync())
	must(d.Close())
}

// TestJournal compares a snapshot of a mounted file system, whose journal is replayed here in memory, with what the
// kernel makes of it.
func TestJournal(t *testing.T) {
	hosttest.RequireRoot(t)
	for _, c := range []string{
		"mkfs.ext4 -F -q -b 4096",
		"mkfs.ext4 -F -q -b 1024 -J size=2",
		"mkfs.ext4 -F -q -b 1024 -O ^metadata_csum,^64bit -J size=1",
		"mkfs.ext3 -F -q -b 1024 -J size=1",
		"mkfs.ext4 -F -q -b 4096 -O ^metadata_csum",
	} {
		t.Run(c, func(t *testing.T) {
			args := strings.Fields(c)
			disktest.Tool(t, "e2fsprogs", args[0])
			img := filepath.Join(disktest.ImageDir(t), "img")
			disktest.Run(t, "truncate", "-s", "48M", img)
			disktest.Run(t, args[0], append(args[1:], img)...)
			dir, end := mount(t, img, "rw,data=journal")
			disktest.Tree(t, dir, disktest.Shape{Files: 50, Bytes: 10000, Sparse: 1 << 20})
			// A block of data that begins with the journal's magic number is escaped.
			if err := os.WriteFile(filepath.Join(dir, "magic"), []byte(strings.Repeat("\xc0\x3b\x39\x98 jbd2", 2000)), 0o600); err != nil {
				t.Fatal(err)
			}
			for round := range 6 {
				churn(t, dir, round)
			}
			snap := snapshot(t, img)
			end()
			i := mustOpen(t, snap, Options{})
			if r, ok := i.fs.(interface{ Replayed() int }); !ok || r.Replayed() == 0 {
				t.Fatal("nothing was replayed: the test tests nothing")
			}
			got := disktest.FromWalk(t, i.Walk)
			dir, end = mount(t, snap, "rw")
			want := disktest.FromDir(t, dir)
			end()
			disktest.Compare(t, want, got, disktest.Ignore{})
		})
	}
}

// TestDirtyRefused is for the logs that are not replayed.
func TestDirtyRefused(t *testing.T) {
	hosttest.RequireRoot(t)
	for _, c := range []struct{ mkfs, size string }{{"mkfs.xfs -q", "320M"}, {"mkfs.btrfs -q", "256M"}, {"mkfs.ext4 -F -q -O fast_commit", "64M"}} {
		t.Run(c.mkfs, func(t *testing.T) {
			args := strings.Fields(c.mkfs)
			disktest.Tool(t, "xfsprogs btrfs-progs e2fsprogs", args[0])
			img := filepath.Join(disktest.ImageDir(t), "img")
			disktest.Run(t, "truncate", "-s", c.size, img)
			disktest.Run(t, args[0], append(args[1:], img)...)
			dir, end := mount(t, img, "rw")
			f, err := os.Create(filepath.Join(dir, "file"))
			if err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if _, err := f.Write(make([]byte, 100000)); err != nil {
					t.Fatal(err)
				}
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			snap := snapshot(t, img)
			end()
			var r *Refused
			if _, err := openFile(t, snap, Options{}); !errors.As(err, &r) || !strings.Contains(r.Hint, "cleanly") {
				t.Errorf("got %v, want a refusal", err)
			}
			mustOpen(t, img, Options{})
		})
	}
}

// TestSubvolumes has the layouts of Fedora, Debian and openSUSE.
func TestSubvolumes(t *testing.T) {
	hosttest.RequireRoot(t)
	disktest.Tool(t, "btrfs-progs", "mkfs.btrfs", "btrfs")
	for _, c := range []struct {
		name     string
		root     string
		also     map[string]string // mount point: subvolume
		nested   string
		snapshot string // of the root, made the default
	}{
		{"Fedora", "root", map[string]string{"home": "home", "var": "var"}, "", ""},
		{"Debian", "@rootfs", map[string]string{"home": "@home"}, "srv", ""},
		{"openSUSE", "@", map[string]string{"var": "@/var", "home": "@/home"}, "", "@/.snapshots"},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := filepath.Join(disktest.ImageDir(t), "img")
			disktest.Run(t, "truncate", "-s", "256M", img)
			disktest.Run(t, "mkfs.btrfs", "-q", img)
			top, end := mount(t, img, "rw,subvolid=5")
			sub := func(name string) string {
				p := filepath.Join(top, name)
				disktest.Run(t, "btrfs", "subvolume", "create", p)
				return p
			}
			write := func(name, text string) {
				t.Helper()
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			root := sub(c.root)
			fstab := "UUID=1 / btrfs subvol=" + c.root + " 0 0\nUUID=2 /boot ext4 defaults 0 0\n"
			for at, volume := range c.also {
				fstab += "UUID=1 /" + at + " btrfs compress=zstd:1,subvol=/" + volume + " 0 0\n"
				write(filepath.Join(sub(volume), "in-"+at), at)
				if err := os.MkdirAll(filepath.Join(root, at), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			write(filepath.Join(root, "etc/os-release"), "ID=x\n")
			write(filepath.Join(root, "etc/fstab"), fstab)
			if c.nested != "" {
				write(filepath.Join(sub(c.root+"/"+c.nested), "nested"), "nested")
			}
			booted := c.root
			if c.snapshot != "" {
				sub(c.snapshot)
				disktest.Run(t, "mkdir", filepath.Join(top, c.snapshot, "1"))
				booted = c.snapshot + "/1/snapshot"
				disktest.Run(t, "btrfs", "subvolume", "snapshot", root, filepath.Join(top, booted))
				disktest.Run(t, "btrfs", "subvolume", "set-default", filepath.Join(top, booted))
			} else {
				disktest.Run(t, "btrfs", "subvolume", "snapshot", "-r", root, filepath.Join(root, "a-snapshot"))
			}
			unix.Sync()
			end()
			// What a boot would see: the root, and over it the mounts of its fstab.
			dir, end := mount(t, img, "ro,subvol="+booted)
			for at, volume := range c.also {
				patiently(t, "mount", "-o", "loop,ro,subvol="+volume, img, filepath.Join(dir, at))
			}
			want := disktest.FromDir(t, dir)
			for at := range c.also {
				patiently(t, "umount", filepath.Join(dir, at))
			}
			end()
			got := disktest.FromWalk(t, mustOpen(t, img, Options{}).Walk)
			disktest.Compare(t, want, got, disktest.Ignore{
				// Snapshots are left out.
				Names: func(n string) bool { return strings.HasPrefix(n, "a-snapshot") },
				// What is left of a subvolume in a snapshot has the time of the look at it.
				Times: func(n string) bool { return n == ".snapshots" },
			})
			if n := len(got); n < 7 {
				t.Errorf("only %d names", n)
			}
		})
	}
}
