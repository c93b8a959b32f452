package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
)

// protofile describes a tree to mkfs.xfs, which makes it without a mount: files, directories, links, devices and owners, but
// neither times nor attributes.
func protofile(t *testing.T, want disktest.Records, long string) string {
	t.Helper()
	dir := t.TempDir()
	var b strings.Builder
	b.WriteString("/\n0 0\nd--755 0 0\n")
	mode := func(kind string, m uint32) string {
		s := []byte(kind + "--" + fmt.Sprintf("%03o", m&0o777))
		if m&0o4000 != 0 {
			s[1] = 'u'
		}
		if m&0o2000 != 0 {
			s[2] = 'g'
		}
		return string(s)
	}
	dirs := func(m uint32) string { return fmt.Sprintf("d--%03o 3 4\n", m) }
	add := func(name string, r disktest.Record) { r.Same = name; want[name] = r }
	file := func(name, base string, m, uid, gid uint32, content []byte) {
		p := filepath.Join(dir, fmt.Sprint(len(want)))
		if err := os.WriteFile(p, content, 0o600); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %s %d %d %s\n", base, mode("-", m), uid, gid, p)
		add(name, disktest.Record{Type: 1, Mode: m, UID: uid, GID: gid, Size: int64(len(content)), Sum: disktest.Sum(content)})
	}
	file("etc-file", "etc-file", 0o644, 0, 0, []byte("content"))
	file("large", "large", 0o4755, 1000, 70000, []byte(strings.Repeat("0123456789abcdef", 30000)))
	file("empty", "empty", 0o600, 0, 0, nil)
	b.WriteString("link l--777 0 0 some/target\n")
	add("link", disktest.Record{Type: 3, Mode: 0o777, Size: 0, Link: "some/target"})
	b.WriteString("longlink l--777 5 6 " + long + "\n")
	add("longlink", disktest.Record{Type: 3, Mode: 0o777, UID: 5, GID: 6, Link: long})
	b.WriteString("null c--666 0 0 1 3\nsda b--660 0 6 8 300\npipe p--600 0 0\n")
	add("null", disktest.Record{Type: 5, Mode: 0o666, Major: 1, Minor: 3})
	add("sda", disktest.Record{Type: 6, Mode: 0o660, GID: 6, Major: 8, Minor: 300})
	add("pipe", disktest.Record{Type: 7, Mode: 0o600})
	for _, d := range []struct {
		name string
		n    int
	}{{"short", 3}, {"block", 30}, {"leaf", 300}, {"node", 3000}} {
		b.WriteString(d.name + " " + dirs(0o750))
		want[d.name] = disktest.Record{Type: 2, Mode: 0o750, UID: 3, GID: 4}
		for k := range d.n {
			base := fmt.Sprintf("name-%d-%s", k, strings.Repeat("x", k%30))
			fmt.Fprintf(&b, "%s c--600 0 0 4 %d\n", base, k)
			add(d.name+"/"+base, disktest.Record{Type: 5, Mode: 0o600, Major: 4, Minor: uint32(k)})
		}
		b.WriteString("$\n")
	}
	b.WriteString("$\n")
	p := filepath.Join(dir, "proto")
	if err := os.WriteFile(p, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestXFS(t *testing.T) {
	disktest.Tool(t, "xfsprogs", "mkfs.xfs")
	for _, args := range []string{
		"", "-m crc=0", "-m crc=0 -n ftype=0 -b size=512 -i size=256", "-m crc=0 -b size=1024 -n size=4096",
		"-m bigtime=1,reflink=1 -i nrext64=1,sparse=1", "-b size=1024 -n size=16384", "-m bigtime=0,finobt=0,rmapbt=1",
	} {
		t.Run(args, func(t *testing.T) {
			link := strings.Repeat("long/", 180)
			if !strings.Contains(args, "crc=0") {
				link = "short" // mkfs.xfs 6.1 writes long ones without the header that version 5 has
			}
			want := disktest.Records{}
			proto := protofile(t, want, link)
			img := filepath.Join(disktest.ImageDir(t), "img")
			disktest.Run(t, "truncate", "-s", "320M", img)
			disktest.Run(t, "mkfs.xfs", append(strings.Fields(args), "-q", "-p", proto, img)...)
			i := mustOpen(t, img, Options{})
			if in := i.Info(); in.Filesystem != "xfs" {
				t.Errorf("found %+v", in)
			}
			disktest.Compare(t, want, disktest.FromWalk(t, i.Walk), disktest.Ignore{Root: true, Times: func(string) bool { return true }})
		})
	}
}

func TestBtrfs(t *testing.T) {
	disktest.Tool(t, "btrfs-progs", "mkfs.btrfs")
	dir := filepath.Join(t.TempDir(), "tree")
	s := disktest.Small
	s.NoOwner = true // mkfs.btrfs 6.2 writes device numbers in another form than the kernel
	disktest.Tree(t, dir, s)
	want := disktest.FromDir(t, dir)
	for _, args := range []string{"", "-n 4096 -m single", "--mixed", "-n 65536 -O no-holes"} {
		t.Run(args, func(t *testing.T) {
			img := filepath.Join(disktest.ImageDir(t), "img")
			disktest.Run(t, "truncate", "-s", "128M", img)
			disktest.Run(t, "mkfs.btrfs", append(strings.Fields(args), "-q", "-r", dir, img)...)
			i := mustOpen(t, img, Options{})
			if in := i.Info(); in.Filesystem != "btrfs" {
				t.Errorf("found %+v", in)
			}
			disktest.Compare(t, want, disktest.FromWalk(t, i.Walk), disktest.Ignore{Root: true, Nanoseconds: true})
		})
	}
}
