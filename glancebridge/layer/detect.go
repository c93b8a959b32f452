package layer

import (
	"bytes"
	"encoding/binary"
	"strings"
)

// Format is what bytes were found to be.
type Format string

// The formats Detect tells apart. FormatUnknown is everything else.
const (
	FormatUnknown Format = ""
	FormatGzip    Format = "gzip"
	FormatXz      Format = "xz"
	FormatZstd    Format = "zstd"
	FormatBzip2   Format = "bzip2"
	FormatLz4     Format = "lz4"
	FormatTar     Format = "tar"
	FormatQcow2   Format = "qcow2"
	FormatVmdk    Format = "vmdk"
	FormatVmdkCow Format = "vmdk-cowd"
	FormatVmdkTxt Format = "vmdk-descriptor"
	FormatSquash  Format = "squashfs"
	FormatErofs   Format = "erofs"
	FormatExt     Format = "ext"
	FormatXfs     Format = "xfs"
	FormatBtrfs   Format = "btrfs"
	FormatMBR     Format = "mbr"
	FormatGPT     Format = "gpt"
	FormatLVM     Format = "lvm"
	FormatLUKS    Format = "luks"
	FormatISO     Format = "iso"
	FormatVhdx    Format = "vhdx"
	FormatVhd     Format = "vhd"
	FormatQed     Format = "qed"
	FormatVdi     Format = "vdi"
	FormatCpio    Format = "cpio"
)

// DetectLen is how many of the first bytes Detect wants: the magic of btrfs lies farthest from the start.
const DetectLen = 68 << 10

// IsWrapper reports whether the format is a compression to be peeled off.
func (f Format) IsWrapper() bool {
	switch f {
	case FormatGzip, FormatXz, FormatZstd, FormatBzip2, FormatLz4:
		return true
	}
	return false
}

// IsDisk reports whether the format is a disk or a file system, which has to be read at random.
func (f Format) IsDisk() bool {
	switch f {
	case FormatQcow2, FormatVmdk, FormatSquash, FormatExt, FormatXfs, FormatBtrfs, FormatMBR, FormatGPT:
		return true
	}
	return false
}

type magic struct {
	off    int
	bytes  string
	format Format
}

// The magic numbers outside the wrappers, from the formats' own documents.
var magics = []magic{
	{0, "QFI\xfb", FormatQcow2},
	{0, "KDMV", FormatVmdk},
	{0, "COWD", FormatVmdkCow},
	{0, "# Disk DescriptorFile", FormatVmdkTxt},
	{0, "hsqs", FormatSquash},
	{1024, "\xe2\xe1\xf5\xe0", FormatErofs},
	{0, "XFSB", FormatXfs},
	{65600, "_BHRfS_M", FormatBtrfs},
	{0, "LUKS\xba\xbe", FormatLUKS},
	{32769, "CD001", FormatISO},
	{0, "vhdxfile", FormatVhdx},
	{0, "conectix", FormatVhd},
	{0, "QED\x00", FormatQed},
	{64, "\x7f\x10\xda\xbe", FormatVdi},
	{0, "070701", FormatCpio},
	{0, "070702", FormatCpio},
	{0, "LABELONE", FormatLVM},
	{512, "LABELONE", FormatLVM},
	{1024, "LABELONE", FormatLVM},
	{1536, "LABELONE", FormatLVM},
}

// Detect tells from the first DetectLen bytes (fewer when the image is shorter) what they are. More than one hit
// is a polyglot, a file that readers disagree about, and refused. Names and declared formats play no part.
func Detect(head []byte) (Format, error) {
	if f := detectWrapper(head); f != FormatUnknown {
		return f, nil
	}
	var hits []Format
	add := func(f Format) {
		for _, h := range hits {
			if h == f {
				return
			}
		}
		hits = append(hits, f)
	}
	for _, m := range magics {
		if at(head, m.off, m.bytes) {
			add(m.format)
		}
	}
	if isExt(head) {
		add(FormatExt)
	}
	gpt := at(head, 512, "EFI PART") || at(head, 4096, "EFI PART")
	switch {
	case gpt:
		add(FormatGPT)
	case at(head, 510, "\x55\xaa") && isMBR(head):
		add(FormatMBR)
	}
	if isTar(head) {
		add(FormatTar)
	}
	switch len(hits) {
	case 0:
		return FormatUnknown, nil
	case 1:
		return hits[0], nil
	}
	names := make([]string, len(hits))
	for i, h := range hits {
		names[i] = string(h)
	}
	return FormatUnknown, Refuse("the image is %s at once; make it one format", strings.Join(names, " and "))
}

func detectWrapper(b []byte) Format {
	switch {
	case at(b, 0, "\x1f\x8b"):
		return FormatGzip
	case at(b, 0, "\xfd7zXZ\x00"):
		return FormatXz
	case at(b, 0, "\x28\xb5\x2f\xfd"):
		return FormatZstd
	case len(b) >= 4 && b[0]&0xf0 == 0x50 && at(b, 1, "\x2a\x4d\x18"):
		return FormatZstd
	case at(b, 0, "BZh") && len(b) > 3 && b[3] >= '1' && b[3] <= '9':
		return FormatBzip2
	case at(b, 0, "\x04\x22\x4d\x18"):
		return FormatLz4
	}
	return FormatUnknown
}

func at(b []byte, off int, s string) bool {
	return len(b) >= off+len(s) && string(b[off:off+len(s)]) == s
}

// isExt checks more than the two bytes of the magic, which other data may hold by chance: the block size and the
// revision must make sense too.
func isExt(b []byte) bool {
	if !at(b, 1080, "\x53\xef") || len(b) < 2048 {
		return false
	}
	return binary.LittleEndian.Uint32(b[1024+24:]) <= 6 && binary.LittleEndian.Uint32(b[1024+76:]) <= 1
}

// isMBR wants one used entry in the partition table and flags that a partition table may have, so that the boot
// sector of a file system is not taken for one.
func isMBR(b []byte) bool {
	used := false
	for i := range 4 {
		e := b[446+16*i : 446+16*i+16]
		if e[0] != 0 && e[0] != 0x80 {
			return false
		}
		if e[4] != 0 {
			used = true
		}
	}
	return used
}

// isTar reports whether the first block is a tar header with a right checksum, ustar or older.
func isTar(b []byte) bool {
	if len(b) < 512 {
		return false
	}
	h := b[:512]
	if bytes.Count(h, []byte{0}) == 512 {
		// An archive without members is two zero blocks: only when there is nothing else.
		return len(b) <= 20<<10 && allZero(b[:len(b)&^7])
	}
	want, ok := octal(h[148:156])
	if !ok {
		return false
	}
	var unsigned, signed int64
	for i, c := range h {
		if i >= 148 && i < 156 {
			c = ' '
		}
		unsigned += int64(c)
		signed += int64(int8(c))
	}
	return want == unsigned || want == signed
}

func octal(b []byte) (int64, bool) {
	s := strings.Trim(string(b), " \x00")
	if s == "" {
		return 0, false
	}
	var n int64
	for _, c := range []byte(s) {
		if c < '0' || c > '7' {
			return 0, false
		}
		n = n<<3 | int64(c-'0')
	}
	return n, true
}

// RefusalText says of a format that is known and refused what to do instead; "" for formats that are read.
func RefusalText(f Format) string {
	switch f {
	case FormatLz4:
		return "the image is compressed with lz4; compress it with gzip, xz or zstd"
	case FormatVmdkCow:
		return "the image is a VMDK of the COWD kind; convert it: qemu-img convert -O qcow2"
	case FormatVmdkTxt:
		return "the image is a VMDK descriptor without the data; convert the disk: qemu-img convert -O qcow2"
	case FormatErofs:
		return "the image is an EROFS file system; upload the files as a tar archive"
	case FormatLVM:
		return "the image is an LVM physical volume; upload a disk whose root is a plain partition, or a tar of the root"
	case FormatLUKS:
		return "the image is encrypted (LUKS); upload it unencrypted"
	case FormatISO:
		return "the image is an ISO, an installation medium; upload an installed disk or a tar of a root file system"
	case FormatVhdx, FormatVhd, FormatQed, FormatVdi:
		return "the image is in the format " + string(f) + "; convert it: qemu-img convert -O qcow2"
	case FormatCpio:
		return "the image is a cpio archive (an initramfs); upload a tar of a root file system"
	}
	return ""
}
