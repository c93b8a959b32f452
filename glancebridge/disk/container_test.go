package disk

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
	"github.com/novalet/novalet/glancebridge/disk/part"
)

// layout writes fs into a new disk image at the first sector that sgdisk or sfdisk gave the partition.
func layout(t *testing.T, fs string, off int64, size string, table func(img string)) string {
	t.Helper()
	img := filepath.Join(disktest.ImageDir(t), "disk.img")
	disktest.Run(t, "truncate", "-s", size, img)
	table(img)
	b, err := os.ReadFile(fs)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(img, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
	return img
}

func sfdisk(t *testing.T, script string) func(img string) {
	return func(img string) {
		t.Helper()
		s := filepath.Join(t.TempDir(), "script")
		if err := os.WriteFile(s, []byte(script), 0o600); err != nil {
			t.Fatal(err)
		}
		disktest.Run(t, "sh", "-c", "sfdisk -q --no-reread "+img+" < "+s)
	}
}

// cloudImage is laid out as Debian's and Ubuntu's are: the root is number 1, behind 14 (BIOS boot) and 15 (ESP).
func cloudImage(t *testing.T, fs string) string {
	return layout(t, fs, 16<<20, "64M", func(img string) {
		disktest.Run(t, "sgdisk", "-n", "14:2048:+1M", "-t", "14:ef02", "-n", "15:4096:+8M", "-t", "15:ef00",
			"-n", "1:32768:+32M", "-t", "1:8300", "-c", "1:rootfs", img)
		disktest.Run(t, "mkfs.vfat", "--offset", "4096", "-F", "16", "-s", "1", img, "8192")
	})
}

func smallExt4(t *testing.T) (string, disktest.Records) {
	t.Helper()
	disktest.Tool(t, "e2fsprogs", "mkfs.ext4")
	dir := filepath.Join(t.TempDir(), "tree")
	disktest.Tree(t, dir, disktest.Small)
	img := filepath.Join(disktest.ImageDir(t), "fs.img")
	disktest.Run(t, "mkfs.ext4", "-b", "4096", "-F", "-q", "-d", dir, img, "32M")
	return img, disktest.FromDir(t, dir)
}

func TestTables(t *testing.T) {
	disktest.Tool(t, "gdisk fdisk dosfstools", "sgdisk", "sfdisk", "mkfs.vfat")
	fs, want := smallExt4(t)
	for _, c := range []struct {
		name   string
		make   func(t *testing.T) string
		table  part.Table
		number int
	}{
		{"cloud image", func(t *testing.T) string { return cloudImage(t, fs) }, part.GPT, 1},
		{"root by type", func(t *testing.T) string {
			return layout(t, fs, 16<<20, "64M", func(img string) {
				disktest.Run(t, "sgdisk", "-n", "3:32768:+32M", "-t", "3:8304", img)
			})
		}, part.GPT, 3},
		{"backup table", func(t *testing.T) string {
			img := cloudImage(t, fs)
			disktest.Run(t, "dd", "if=/dev/zero", "of="+img, "bs=512", "seek=1", "count=33", "conv=notrunc", "status=none")
			return img
		}, part.GPT, 1},
		{"broken entries", func(t *testing.T) string {
			img := cloudImage(t, fs)
			disktest.Run(t, "dd", "if=/dev/urandom", "of="+img, "bs=512", "seek=4", "count=1", "conv=notrunc", "status=none")
			return img
		}, part.GPT, 1},
		{"mbr", func(t *testing.T) string {
			return layout(t, fs, 1<<20, "64M", sfdisk(t, "label: dos\nstart=2048, size=32M, type=83, bootable\n"))
		}, part.MBR, 1},
		{"logical", func(t *testing.T) string {
			return layout(t, fs, 20<<20, "64M", sfdisk(t, "label: dos\nstart=2048, size=1M, type=82\nstart=6144, type=5\n"+
				"start=8192, size=1M, type=83\nstart=12288, size=2M, type=83\nstart=40960, size=32M, type=83\n"))
		}, part.MBR, 7},
	} {
		t.Run(c.name, func(t *testing.T) {
			i := mustOpen(t, c.make(t), Options{})
			if in := i.Info(); in.Table != c.table || in.Partition != c.number || in.Format != Raw {
				t.Fatalf("found %+v", in)
			}
			disktest.Compare(t, want, disktest.FromWalk(t, i.Walk), mkfsLoses)
		})
	}
}

func TestContainers(t *testing.T) {
	disktest.Tool(t, "qemu-utils gdisk dosfstools", "qemu-img", "sgdisk", "mkfs.vfat")
	fs, want := smallExt4(t)
	img := cloudImage(t, fs)
	for _, c := range []struct {
		args   string
		format Format
	}{
		{"-O qcow2", QCOW2},
		{"-O qcow2 -c", QCOW2},
		{"-O qcow2 -c -o compression_type=zstd", QCOW2},
		{"-O qcow2 -o compat=0.10", QCOW2},
		{"-O qcow2 -c -o compat=0.10,cluster_size=4096", QCOW2},
		{"-O qcow2 -o cluster_size=512", QCOW2},
		{"-O qcow2 -c -o cluster_size=2M", QCOW2},
		{"-O qcow2 -o cluster_size=2M,preallocation=metadata", QCOW2},
		{"-O qcow2 -S 0", QCOW2},
		{"-O vmdk -o subformat=monolithicSparse", VMDK},
		{"-O vmdk -o subformat=streamOptimized", VMDK},
	} {
		t.Run(c.args, func(t *testing.T) {
			out := filepath.Join(disktest.ImageDir(t), "out")
			args := append([]string{"convert"}, strings.Fields(c.args)...)
			disktest.Run(t, "qemu-img", append(args, "-f", "raw", img, out)...)
			i := mustOpen(t, out, Options{Format: c.format})
			if in := i.Info(); in.Format != c.format || in.Partition != 1 || in.Size != 64<<20 {
				t.Fatalf("found %+v", in)
			}
			disktest.Compare(t, want, disktest.FromWalk(t, i.Walk), mkfsLoses)
		})
	}
}

func TestContainersRefused(t *testing.T) {
	disktest.Tool(t, "qemu-utils", "qemu-img")
	dir := disktest.ImageDir(t)
	base := filepath.Join(dir, "base")
	disktest.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
	for _, c := range []struct {
		args string
		want string
	}{
		{"create -q -f qcow2 -F qcow2 -b " + base + " OUT", "backing file"},
		{"create -q -f qcow2 -o data_file=" + dir + "/data OUT 4M", "another file"},
		{"create -q -f qcow2 -o extended_l2=on OUT 4M", "subclusters"},
		{"create -q --object secret,id=s,data=secret -f qcow2 -o encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s OUT 4M", "encrypted"},
		{"create -q -f vmdk -o subformat=monolithicFlat OUT 4M", "descriptor"},
		{"create -q -f vmdk -o subformat=twoGbMaxExtentSparse OUT 4M", "descriptor"},
		{"create -q -f vhdx OUT 4M", "VHDX"},
		{"create -q -f vpc OUT 4M", "VHD"},
		{"create -q -f vdi OUT 4M", "VDI"},
		{"create -q -f qed OUT 4M", "QED"},
		{"create -q --object secret,id=s,data=secret -f luks -o key-secret=s,iter-time=10 OUT 4M", "LUKS"},
		{"create -q -f raw OUT 4M", "no partition table"},
	} {
		t.Run(c.want, func(t *testing.T) {
			out := filepath.Join(disktest.ImageDir(t), "out")
			disktest.Run(t, "qemu-img", strings.Fields(strings.ReplaceAll(c.args, "OUT", out))...)
			_, err := openFile(t, out, Options{})
			var r *Refused
			if !errors.As(err, &r) || !strings.Contains(r.Reason, c.want) || r.Hint == "" {
				t.Fatalf("got %v, want a refusal with %q", err, c.want)
			}
		})
	}
}

func TestTwoRoots(t *testing.T) {
	disktest.Tool(t, "fdisk", "sfdisk")
	fs, want := smallExt4(t)
	img := layout(t, fs, 1<<20, "80M", sfdisk(t, "label: gpt\nstart=2048, size=32M\nstart=81920, size=32M\n"))
	b, err := os.ReadFile(fs)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(img, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 81920*512); err != nil {
		t.Fatal(err)
	}
	var r *Refused
	if _, err := openFile(t, img, Options{}); !errors.As(err, &r) || !strings.Contains(r.Reason, "1, 2") {
		t.Fatalf("got %v, want a refusal of two roots", err)
	}
	if _, err := openFile(t, img, Options{RootPartition: 3}); !errors.As(err, &r) || !strings.Contains(r.Hint, "1, 2") {
		t.Fatalf("got %v, want a refusal of partition 3", err)
	}
	i := mustOpen(t, img, Options{RootPartition: 2})
	if i.Info().Partition != 2 {
		t.Fatalf("found %+v", i.Info())
	}
	disktest.Compare(t, want, disktest.FromWalk(t, i.Walk), mkfsLoses)
}

func TestDeclaredFormat(t *testing.T) {
	fs, _ := smallExt4(t)
	var r *Refused
	if _, err := openFile(t, fs, Options{Format: QCOW2}); !errors.As(err, &r) || !strings.Contains(r.Reason, "declared qcow2") {
		t.Fatalf("got %v, want a refusal", err)
	}
}
