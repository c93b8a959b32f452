// Package qcow2 reads QEMU's copy-on-write disks, versions 2 and 3, as docs/interop/qcow2.txt describes them. Only the
// file itself is ever read: whatever names another file is refused.
package qcow2

import (
	"encoding/binary"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/cluster"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

var be = binary.BigEndian

const magic = 0x514649FB // "QFI\xfb"

const (
	incompatDirty       = 1 << 0 // counts of references are stale: nothing to a reader
	incompatCorrupt     = 1 << 1
	incompatData        = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
)

const (
	minClusterBits = 9
	maxClusterBits = 21
	maxL1          = 32 << 20 // bytes, as in QEMU
	cachePages     = 64       // of tables: 4 MiB
)

// flatten is the advice for images that are more than one plain file.
const flatten = "convert it with: qemu-img convert -O qcow2 OLD NEW"

// Disk is an open image.
type Disk struct {
	*cluster.Disk
	file    blockio.Disk
	tables  *blockio.Cache
	bits    uint
	cluster int64
	size    int64
	l1      int64 // byte of the file
	l1Size  int64 // entries
	v3      bool
	zstd    bool
}

// Detect says whether head begins a qcow2 file.
func Detect(head []byte) bool { return len(head) >= 4 && be.Uint32(head) == magic }

// Open reads the header. Errors are refusals, but for those of file.
func Open(file blockio.Disk) (*Disk, error) {
	d := &Disk{file: file, tables: blockio.NewCache(file, cachePages)}
	h := make([]byte, 112)
	n := min(int64(len(h)), file.Size())
	if n < 72 {
		return nil, verdict.Cut("qcow2: the header has %d bytes", n)
	}
	if _, err := file.ReadAt(h[:n], 0); err != nil {
		return nil, err
	}
	if be.Uint32(h) != magic {
		return nil, verdict.Damaged("qcow2: no header")
	}
	if err := d.features(h); err != nil {
		return nil, err
	}
	d.bits = uint(be.Uint32(h[20:]))
	if d.bits < minClusterBits || d.bits > maxClusterBits {
		return nil, verdict.Damaged("qcow2: the cluster size is 1 << %d", d.bits)
	}
	d.cluster = 1 << d.bits
	size := be.Uint64(h[24:])
	if size > 1<<56 {
		return nil, verdict.Damaged("qcow2: the disk has %d bytes", size)
	}
	d.size = int64(size)
	d.l1Size = int64(be.Uint32(h[36:]))
	l1 := be.Uint64(h[40:])
	per := d.cluster * (d.cluster / 8) // bytes of the disk below one entry of the first table
	if need := (d.size + per - 1) / per; d.l1Size < need || d.l1Size > maxL1/8 {
		return nil, verdict.Damaged("qcow2: the first table has %d entries, %d are needed", d.l1Size, need)
	}
	if l1 > 1<<56 || l1&uint64(d.cluster-1) != 0 || !blockio.Inside(int64(l1), d.l1Size*8, file.Size()) {
		return nil, verdict.Cut("qcow2: the first table is at byte %d of %d", l1, file.Size())
	}
	d.l1 = int64(l1)
	f, err := newInflater(file, d.cluster, d.zstd)
	if err != nil {
		return nil, err
	}
	d.Disk = cluster.New(file, d.bits, d.size, d.find, f.load)
	return d, nil
}

// features refuses what would lead out of the file or cannot be read.
func (d *Disk) features(h []byte) error {
	version := be.Uint32(h[4:])
	if version != 2 && version != 3 {
		return verdict.Unsupported(flatten, "qcow2: version %d is not known", version)
	}
	if be.Uint64(h[8:]) != 0 || be.Uint32(h[16:]) != 0 {
		return verdict.Unsupported(flatten, "qcow2: the image has a backing file and is not complete by itself")
	}
	if be.Uint32(h[32:]) != 0 {
		return verdict.Unsupported("upload it decrypted (qemu-img convert with the secret)", "qcow2: the image is encrypted")
	}
	if version == 2 {
		return nil
	}
	d.v3 = true
	f := be.Uint64(h[72:])
	switch {
	case f&incompatData != 0:
		return verdict.Unsupported(flatten, "qcow2: the image keeps its data in another file")
	case f&incompatExtendedL2 != 0:
		return verdict.Unsupported("convert it with: qemu-img convert -O qcow2 -o extended_l2=off OLD NEW",
			"qcow2: the image has subclusters (extended_l2)")
	case f&incompatCorrupt != 0:
		return verdict.Unsupported("repair it with: qemu-img check -r all IMAGE", "qcow2: the image is marked corrupt")
	case f&^(incompatDirty|incompatCompression) != 0:
		return verdict.Unsupported(flatten, "qcow2: the image needs unknown features (%#x)", f)
	}
	length := be.Uint32(h[100:])
	if length < 104 || length > 1<<16 {
		return verdict.Damaged("qcow2: the header has %d bytes", length)
	}
	kind := byte(0)
	if length > 104 {
		kind = h[104]
	}
	if kind > 1 || (kind != 0) != (f&incompatCompression != 0) {
		return verdict.Unsupported(flatten, "qcow2: the kind of compression (%d) is not known", kind)
	}
	d.zstd = kind == 1
	return nil
}

// find looks up the cluster with number n.
func (d *Disk) find(n int64) (cluster.Cell, error) {
	l2bits := d.bits - 3
	b, err := d.tables.View(d.l1+n>>l2bits*8, 8)
	if err != nil {
		return cluster.Cell{}, err
	}
	table := int64(be.Uint64(b) & 0x00FFFFFFFFFFFE00)
	if table == 0 {
		return cluster.Cell{}, nil
	}
	if table&(d.cluster-1) != 0 {
		return cluster.Cell{}, verdict.Damaged("qcow2: a table is at byte %d", table)
	}
	b, err = d.tables.View(table+(n&(1<<l2bits-1))*8, 8)
	if err != nil {
		return cluster.Cell{}, err
	}
	e := be.Uint64(b)
	if e&(1<<62) != 0 {
		x := 62 - (d.bits - 8)
		at := int64(e & (1<<x - 1))
		sectors := int64(e >> x & (1<<(62-x) - 1))
		c := cluster.Cell{Kind: cluster.Compressed, At: at, Length: (sectors+1)*512 - at&511}
		if at >= d.file.Size() {
			return cluster.Cell{}, verdict.Cut("qcow2: data at byte %d of %d", at, d.file.Size())
		}
		c.Length = min(c.Length, d.file.Size()-at)
		return c, nil
	}
	at := int64(e & 0x00FFFFFFFFFFFE00)
	if at == 0 || d.v3 && e&1 != 0 {
		return cluster.Cell{}, nil
	}
	if at&(d.cluster-1) != 0 {
		return cluster.Cell{}, verdict.Damaged("qcow2: data at byte %d", at)
	}
	if at >= d.file.Size() {
		return cluster.Cell{}, verdict.Cut("qcow2: data at byte %d of %d", at, d.file.Size())
	}
	// The file may end inside its last cluster: QEMU reads zeros there.
	return cluster.Cell{Kind: cluster.Plain, At: at, Length: min(d.cluster, d.file.Size()-at)}, nil
}
