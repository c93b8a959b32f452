// Package vmdk reads VMware's sparse disks that are one file: monolithicSparse and streamOptimized, as the "Virtual Disk
// Format 5.0" note describes them. Names of other files are never followed.
package vmdk

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/bits"
	"strings"
	"sync"

	"github.com/klauspost/compress/zlib"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/cluster"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

var le = binary.LittleEndian

const (
	sector     = 512
	headerSize = 512
	flagZeroed = 1 << 2
	flagZip    = 1 << 16

	atEnd          = ^uint64(0) // the directory's place is in the footer
	maxGrain       = 4096       // sectors
	maxTable       = 512        // entries
	maxDescriptor  = 64 << 10   // bytes
	compressionZip = 1
	cachePages     = 64
)

const convert = "convert it with: qemu-img convert -O vmdk -o subformat=streamOptimized OLD NEW"

// Disk is an open image.
type Disk struct {
	*cluster.Disk
	file   blockio.Disk
	tables *blockio.Cache
	grain  int64 // bytes
	dir    int64 // byte of the file
	per    int64 // entries of a table
	zeroed bool
	zip    bool
	pool   sync.Pool
}

// Detect says whether head begins a sparse VMDK.
func Detect(head []byte) bool { return len(head) >= 4 && string(head[:4]) == "KDMV" }

// Open reads the header and the descriptor. Errors are refusals, but for those of file.
func Open(file blockio.Disk) (*Disk, error) {
	d := &Disk{file: file, tables: blockio.NewCache(file, cachePages)}
	h, err := d.header(0)
	if err != nil {
		return nil, err
	}
	if err := d.descriptor(h); err != nil {
		return nil, err
	}
	if le.Uint64(h[56:]) == atEnd {
		// A stream ends with the footer, a header again, and the end marker.
		if h, err = d.header(file.Size()/sector*sector - 2*sector); err != nil {
			return nil, err
		}
	}
	size, err := d.geometry(h)
	if err != nil {
		return nil, err
	}
	d.Disk = cluster.New(file, uint(bits.TrailingZeros64(uint64(d.grain))), size, d.find, d.load)
	return d, nil
}

func (d *Disk) header(at int64) ([]byte, error) {
	if !blockio.Inside(at, headerSize, d.file.Size()) {
		return nil, verdict.Cut("vmdk: the header is at byte %d of %d", at, d.file.Size())
	}
	h := make([]byte, headerSize)
	if _, err := d.file.ReadAt(h, at); err != nil {
		return nil, err
	}
	if !Detect(h) {
		return nil, verdict.Cut("vmdk: there is no header at byte %d of %d", at, d.file.Size())
	}
	if v := le.Uint32(h[4:]); v < 1 || v > 3 {
		return nil, verdict.Unsupported(convert, "vmdk: version %d is not known", v)
	}
	return h, nil
}

// descriptor refuses the kinds of disk whose data is not all in this file.
func (d *Disk) descriptor(h []byte) error {
	at, size := le.Uint64(h[28:]), le.Uint64(h[36:])
	if at == 0 || size == 0 {
		return verdict.Unsupported(convert, "vmdk: the file is one part of a disk and has no descriptor")
	}
	if size > maxDescriptor/sector || at > uint64(d.file.Size()/sector) {
		return verdict.Damaged("vmdk: the descriptor has %d sectors at sector %d", size, at)
	}
	b := make([]byte, size*sector)
	if _, err := d.file.ReadAt(b, int64(at)*sector); err != nil {
		return err
	}
	b, _, _ = bytes.Cut(b, []byte{0})
	extents, kind := 0, ""
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		key, value, _ := strings.Cut(line, "=")
		value = strings.Trim(strings.TrimSpace(value), `"`)
		switch key = strings.TrimSpace(key); {
		case strings.EqualFold(key, "createType"):
			kind = value
		case strings.EqualFold(key, "parentCID") && !strings.EqualFold(value, "ffffffff"),
			strings.EqualFold(key, "parentFileNameHint"):
			return verdict.Unsupported(convert, "vmdk: the disk has a parent and is not complete by itself")
		case strings.HasPrefix(line, "RW ") || strings.HasPrefix(line, "RDONLY ") || strings.HasPrefix(line, "NOACCESS "):
			extents++
		}
	}
	if kind != "monolithicSparse" && kind != "streamOptimized" {
		return verdict.Unsupported(convert, "vmdk: disks of the kind %q are not read", kind)
	}
	if extents > 1 {
		return verdict.Unsupported(convert, "vmdk: the disk has %d parts", extents)
	}
	return nil
}

func (d *Disk) geometry(h []byte) (int64, error) {
	capacity, grain, dir := le.Uint64(h[12:]), le.Uint64(h[20:]), le.Uint64(h[56:])
	d.per = int64(le.Uint32(h[44:]))
	flags := le.Uint32(h[8:])
	d.zeroed, d.zip = flags&flagZeroed != 0, flags&flagZip != 0
	switch {
	case capacity > 1<<47:
		return 0, verdict.Damaged("vmdk: the disk has %d sectors", capacity)
	case grain == 0 || grain > maxGrain || grain&(grain-1) != 0:
		return 0, verdict.Damaged("vmdk: a grain has %d sectors", grain)
	case d.per == 0 || d.per > maxTable:
		return 0, verdict.Damaged("vmdk: a table has %d entries", d.per)
	case d.zip && le.Uint16(h[77:]) != compressionZip:
		return 0, verdict.Unsupported(convert, "vmdk: the kind of compression (%d) is not known", le.Uint16(h[77:]))
	}
	d.grain = int64(grain) * sector
	span := grain * uint64(d.per)
	tables := int64((capacity + span - 1) / span)
	if dir > uint64(d.file.Size()/sector) || !blockio.Inside(int64(dir)*sector, tables*4, d.file.Size()) {
		return 0, verdict.Cut("vmdk: the directory is at sector %d of %d", dir, d.file.Size()/sector)
	}
	d.dir = int64(dir) * sector
	return int64(capacity) * sector, nil
}

// find looks up the grain with number n.
func (d *Disk) find(n int64) (cluster.Cell, error) {
	b, err := d.tables.View(d.dir+n/d.per*4, 4)
	if err != nil {
		return cluster.Cell{}, err
	}
	table := int64(le.Uint32(b))
	if table == 0 {
		return cluster.Cell{}, nil
	}
	if b, err = d.tables.View(table*sector+n%d.per*4, 4); err != nil {
		return cluster.Cell{}, err
	}
	e := int64(le.Uint32(b))
	if e == 0 || e == 1 && d.zeroed {
		return cluster.Cell{}, nil
	}
	at := e * sector
	if at >= d.file.Size() {
		return cluster.Cell{}, verdict.Cut("vmdk: data at byte %d of %d", at, d.file.Size())
	}
	if d.zip {
		return cluster.Cell{Kind: cluster.Compressed, At: at, Length: d.grain}, nil
	}
	return cluster.Cell{Kind: cluster.Plain, At: at, Length: min(d.grain, d.file.Size()-at)}, nil
}

type scratch struct {
	in []byte
	r  bytes.Reader
	z  io.ReadCloser
}

// load inflates the grain whose marker (its first sector's number and its length) is at c.At.
func (d *Disk) load(c cluster.Cell, dst []byte) error {
	s, _ := d.pool.Get().(*scratch)
	if s == nil {
		s = &scratch{in: make([]byte, 2*d.grain+1024)}
	}
	defer d.pool.Put(s)
	var mark [12]byte
	if _, err := d.file.ReadAt(mark[:], c.At); err != nil {
		return err
	}
	n := int64(le.Uint32(mark[8:]))
	if n == 0 || n > int64(len(s.in)) {
		return verdict.Damaged("vmdk: the grain at byte %d has %d bytes", c.At, n)
	}
	if _, err := d.file.ReadAt(s.in[:n], c.At+12); err != nil {
		return err
	}
	s.r.Reset(s.in[:n])
	var err error
	if s.z == nil {
		s.z, err = zlib.NewReader(&s.r)
	} else {
		err = s.z.(zlib.Resetter).Reset(&s.r, nil)
	}
	for err == nil && len(dst) > 0 {
		var n int
		n, err = s.z.Read(dst)
		dst = dst[n:]
	}
	if err == io.EOF { // the last grain may be short of its end
		clear(dst)
		err = nil
	}
	if err != nil {
		return verdict.Damaged("vmdk: the grain at byte %d does not unpack", c.At)
	}
	return nil
}
