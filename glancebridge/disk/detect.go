package disk

import (
	"io"

	"github.com/novalet/novalet/glancebridge/disk/btrfs"
	"github.com/novalet/novalet/glancebridge/disk/ext4"
	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/qcow2"
	"github.com/novalet/novalet/glancebridge/disk/squashfs"
	"github.com/novalet/novalet/glancebridge/disk/vmdk"
	"github.com/novalet/novalet/glancebridge/disk/xfs"
)

// Format is how a file holds a disk.
type Format string

// The formats that are read.
const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
	VMDK  Format = "vmdk"
)

// headSize covers every magic number that is looked for: btrfs has the last.
const headSize = 68 << 10

// head is the beginning of a disk, short if the disk is.
func head(d blockio.Disk) ([]byte, error) {
	b := make([]byte, min(headSize, d.Size()))
	_, err := d.ReadAt(b, 0)
	return b, err
}

// has says whether b holds s at byte off.
func has(b []byte, off int, s string) bool {
	return len(b) >= off+len(s) && string(b[off:off+len(s)]) == s
}

const convert = "convert it with: qemu-img convert -O qcow2 OLD NEW"

// container opens the format of a file; what is no container is a raw disk.
func container(file blockio.Disk) (blockio.Disk, Format, error) {
	b, err := head(file)
	if err != nil {
		return nil, "", err
	}
	for _, f := range foreign {
		if has(b, f.off, f.magic) {
			return nil, "", verdict.Unsupported(f.hint, "the image is %s", f.name)
		}
	}
	if n := len(fileSystems(b)); n > 0 && (qcow2.Detect(b) || vmdk.Detect(b)) {
		return nil, "", polyglot()
	}
	switch {
	case qcow2.Detect(b):
		d, err := qcow2.Open(file)
		if err != nil {
			return nil, "", err
		}
		return d, QCOW2, nil
	case vmdk.Detect(b):
		d, err := vmdk.Open(file)
		if err != nil {
			return nil, "", err
		}
		return d, VMDK, nil
	}
	return file, Raw, nil
}

func polyglot() error {
	return verdict.Unsupported("wipe the old signatures (wipefs) or make the image anew",
		"the image is more than one format at a time")
}

type signature struct {
	off   int
	magic string
	name  string
	hint  string
}

// foreign are contents that are recognised in order to refuse them with advice.
var foreign = []signature{
	{0, "\x1f\x8b", "compressed with gzip", "upload it uncompressed"},
	{0, "\xfd7zXZ\x00", "compressed with xz", "upload it uncompressed"},
	{0, "\x28\xb5\x2f\xfd", "compressed with zstd", "upload it uncompressed"},
	{0, "BZh", "compressed with bzip2", "upload it uncompressed"},
	{0, "vhdxfile", "a VHDX disk", convert},
	{0, "conectix", "a VHD disk", convert},
	{0, "QED\x00", "a QED disk", convert},
	{64, "\x7f\x10\xda\xbe", "a VDI disk", convert},
	{0, "COWD", "an ESX sparse disk", convert},
	{0, "# Disk DescriptorFile", "a VMDK descriptor: the data is in other files",
		"convert it with: qemu-img convert -O vmdk -o subformat=streamOptimized OLD NEW"},
	{0, "070701", "a cpio archive", "upload a disk, a root tar or a container image"},
	{0, "070702", "a cpio archive", "upload a disk, a root tar or a container image"},
	{0, "LUKS\xba\xbe", "encrypted with LUKS", "upload it decrypted"},
	{32769, "CD001", "an ISO 9660 disc", "install it to a disk first, then upload that disk"},
}

// hit is a content found in a disk or a partition. open is nil for what is only recognised.
type hit struct {
	name string
	hint string
	kind string
}

// fileSystems lists what a disk or partition looks like by its first bytes. More than one hit is a disk that different
// programs read differently.
func fileSystems(b []byte) []hit {
	var all []hit
	if ext4.Detect(b) {
		all = append(all, hit{kind: "ext4"})
	}
	if btrfs.Detect(b) {
		all = append(all, hit{kind: "btrfs"})
	}
	if xfs.Detect(b) {
		all = append(all, hit{kind: "xfs"})
	}
	if squashfs.Detect(b) {
		all = append(all, hit{kind: "squashfs"})
	}
	for _, f := range members {
		if has(b, f.off, f.magic) {
			all = append(all, hit{name: f.name, hint: f.hint})
		}
	}
	for k := range 4 {
		if has(b, 512*k, "LABELONE") {
			all = append(all, hit{name: "an LVM physical volume", hint: "make the image with plain partitions instead of LVM"})
		}
	}
	if len(b) >= 512 && b[510] == 0x55 && b[511] == 0xAA && b[0x10] == 2 && b[0x15] == 0xF8 {
		all = append(all, hit{name: "a FAT file system", hint: "upload a disk with a Linux root file system"})
	}
	return all
}

// members are contents of a disk or partition without a root file system that is read here.
var members = []signature{
	{0, "LUKS\xba\xbe", "encrypted with LUKS", "upload it decrypted"},
	{32769, "CD001", "an ISO 9660 file system", "install it to a disk first, then upload that disk"},
	{1024, "\xe2\xe1\xf5\xe0", "an EROFS file system", "upload it as ext4, XFS or squashfs"},
	{1024, "\x10\x20\xf5\xf2", "an F2FS file system", "upload it as ext4, XFS or btrfs"},
	{4096, "\xfc\x4e\x2b\xa9", "a member of a RAID array", "make the image with plain partitions"},
	{3, "NTFS    ", "an NTFS file system", "upload a disk with a Linux root file system"},
	{4086, "SWAPSPACE2", "swap space", "upload a disk with a Linux root file system"},
}

// Sniff says which format a file has, and whether anything in it looks like a disk: false for a raw file without a
// partition table or file system, such as a tar archive. It reads the first 68 KiB; it does not judge.
func Sniff(r io.ReaderAt, size int64) (Format, bool, error) {
	b, err := head(blockio.Raw(r, size))
	if err != nil {
		return "", false, err
	}
	switch {
	case qcow2.Detect(b):
		return QCOW2, true, nil
	case vmdk.Detect(b):
		return VMDK, true, nil
	case len(fileSystems(b)) > 0:
		return Raw, true, nil
	}
	return Raw, len(b) >= 512 && b[510] == 0x55 && b[511] == 0xAA, nil
}
