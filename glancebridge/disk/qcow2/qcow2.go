// Package qcow2 reads QEMU's copy-on-write disks, versions 2 and 3, as docs/interop/qcow2.txt describes them. Only the
// file itself is ever read: whatever names another file is refused. Reads of several compressed clusters use a few
// goroutines, which have ended when the read returns.
package qcow2

import (
	"encoding/binary"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
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
	file    blockio.Disk
	tables  *blockio.Cache
	bits    uint
	cluster int64
	size    int64
	l1      int64 // byte of the file
	l1Size  int64 // entries
	v3      bool
	zstd    bool
	inflate *inflater
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
	var err error
	d.inflate, err = newInflater(d.cluster, d.zstd)
	return d, err
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

// Size is the virtual size in bytes.
func (d *Disk) Size() int64 { return d.size }

type kind uint8

const (
	zero kind = iota
	plain
	compressed
)

// cell is what the tables say of one cluster: at and length are of the file.
type cell struct {
	kind   kind
	at     int64
	length int64
}

// find looks up the cluster with number n.
func (d *Disk) find(n int64) (cell, error) {
	l2bits := d.bits - 3
	b, err := d.tables.View(d.l1+n>>l2bits*8, 8)
	if err != nil {
		return cell{}, err
	}
	table := int64(be.Uint64(b) & 0x00FFFFFFFFFFFE00)
	if table == 0 {
		return cell{}, nil
	}
	if table&(d.cluster-1) != 0 {
		return cell{}, verdict.Damaged("qcow2: a table is at byte %d", table)
	}
	b, err = d.tables.View(table+(n&(1<<l2bits-1))*8, 8)
	if err != nil {
		return cell{}, err
	}
	e := be.Uint64(b)
	if e&(1<<62) != 0 {
		x := 62 - (d.bits - 8)
		at := int64(e & (1<<x - 1))
		sectors := int64(e >> x & (1<<(62-x) - 1))
		c := cell{kind: compressed, at: at, length: (sectors+1)*512 - at&511}
		if at >= d.file.Size() {
			return cell{}, verdict.Cut("qcow2: data at byte %d of %d", at, d.file.Size())
		}
		c.length = min(c.length, d.file.Size()-at)
		return c, nil
	}
	at := int64(e & 0x00FFFFFFFFFFFE00)
	if at == 0 || d.v3 && e&1 != 0 {
		return cell{}, nil
	}
	if at&(d.cluster-1) != 0 {
		return cell{}, verdict.Damaged("qcow2: data at byte %d", at)
	}
	if at >= d.file.Size() {
		return cell{}, verdict.Cut("qcow2: data at byte %d of %d", at, d.file.Size())
	}
	// The file may end inside its last cluster: QEMU reads zeros there.
	return cell{kind: plain, at: at, length: min(d.cluster, d.file.Size()-at)}, nil
}

// spanClusters bounds how far one Span looks.
const spanClusters = 4096

// Span goes on while clusters are all stored or all not.
func (d *Disk) Span(off int64) (int64, bool, error) {
	first := off >> d.bits
	end := min((d.size+d.cluster-1)>>d.bits, first+spanClusters)
	c, err := d.find(first)
	if err != nil {
		return 0, false, err
	}
	data := c.kind != zero
	n := first + 1
	for ; n < end; n++ {
		if c, err = d.find(n); err != nil {
			return 0, false, err
		}
		if (c.kind != zero) != data {
			break
		}
	}
	return min(n<<d.bits, d.size) - off, data, nil
}

// ReadAt reads all of p.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if !blockio.Inside(off, int64(len(p)), d.size) {
		return 0, verdict.Cut("%d bytes are wanted at byte %d of a disk of %d", len(p), off, d.size)
	}
	var jobs []job
	for done := 0; done < len(p); {
		in := (off + int64(done)) & (d.cluster - 1)
		n := int(min(int64(len(p)-done), d.cluster-in))
		c, err := d.find((off + int64(done)) >> d.bits)
		if err != nil {
			return done, err
		}
		switch c.kind {
		case zero:
			clear(p[done : done+n])
		case compressed:
			jobs = append(jobs, job{c: c, dst: p[done : done+n], in: in})
		case plain:
			if n, err = d.plain(p[done:], off+int64(done), in, c); err != nil {
				return done, err
			}
		}
		done += n
	}
	return len(p), d.inflate.run(d.file, jobs)
}

// plain reads a run of clusters that follow one another in the file.
func (d *Disk) plain(p []byte, off, in int64, c cell) (int, error) {
	length := c.length - in
	for length < int64(len(p)) && c.length == d.cluster {
		next, err := d.find((off + length) >> d.bits)
		if err != nil {
			return 0, err
		}
		if next.kind != plain || next.at != c.at+in+length || next.length < d.cluster {
			break
		}
		length += next.length
	}
	if length < min(d.cluster-in, int64(len(p))) { // the file's end
		n := int(min(d.cluster-in, int64(len(p))))
		length = max(length, 0)
		clear(p[length:n])
		_, err := d.file.ReadAt(p[:length], c.at+in)
		return n, err
	}
	n := int(min(length, int64(len(p))))
	_, err := d.file.ReadAt(p[:n], c.at+in)
	return n, err
}
