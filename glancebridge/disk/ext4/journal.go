package ext4

import (
	"encoding/binary"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

var be = binary.BigEndian

// The journal's format is that of Linux include/linux/jbd2.h; what is replayed follows fs/jbd2/recovery.c.
const (
	jbdMagic      = 0xC03B3998
	jbdDescriptor = 1
	jbdCommit     = 2
	jbdSuperV1    = 3
	jbdSuperV2    = 4
	jbdRevoke     = 5

	jbdIncompat64bit      = 0x2
	jbdIncompatCsumV2     = 0x8
	jbdIncompatCsumV3     = 0x10
	jbdIncompatFastCommit = 0x20

	// Those, revoked blocks, and asynchronous commits.
	jbdIncompatKnown = jbdIncompat64bit | jbdIncompatCsumV2 | jbdIncompatCsumV3 | jbdIncompatFastCommit | 0x1 | 0x4

	tagEscape   = 1
	tagSameUUID = 2
	tagLast     = 8
)

// maxReplay is the number of blocks that are replayed: what the maps may hold, some 16 MiB.
const maxReplay = 1 << 18

const cleanly = "shut the machine down cleanly before taking its disk, or run e2fsck -f on the disk, and upload it again"

type journal struct {
	f        *FS
	i        *inode
	incompat uint32
	first    uint32
	last     uint32 // one past the blocks of the log
	seed     uint32
	writes   map[int64]write // of committed transactions
	revoked  map[int64]uint32
}

// write is where in the file system the journal's copy of a block lies.
type write struct {
	at     int64
	seq    uint32
	escape bool // the copy's first word is the journal's magic number, written as 0
}

type revocation struct {
	block int64
	seq   uint32
}

// replay reads the journal and gives the file system with the committed transactions in place; nil when there are
// none.
func (f *FS) replay() (*overlay, error) {
	s, err := f.c.View(superOff, superSize)
	if err != nil {
		return nil, err
	}
	ino := le.Uint32(s[224:])
	if ino == 0 || f.compat&compatJournal == 0 {
		return nil, verdict.Unsupported(cleanly, "ext4: the disk was in use and its journal is not on it")
	}
	j := &journal{f: f, writes: map[int64]write{}, revoked: map[int64]uint32{}}
	if j.i, err = f.inode(ino); err != nil {
		return nil, err
	}
	j.i.size |= int64(le.Uint32(j.i.raw[108:])) << 32
	start, seq, err := j.super()
	if err != nil || start == 0 {
		return nil, err
	}
	seq, err = j.scan(start, seq)
	if err != nil {
		return nil, err
	}
	if err := j.fast(seq); err != nil {
		return nil, err
	}
	for b, w := range j.writes {
		if r, ok := j.revoked[b]; ok && int32(w.seq-r) <= 0 {
			delete(j.writes, b)
		}
	}
	if len(j.writes) == 0 {
		return nil, nil
	}
	return &overlay{Disk: f.c.Disk(), bs: f.bs, writes: j.writes, count: len(j.writes)}, nil
}

func (j *journal) super() (start, seq uint32, err error) {
	b, err := j.block(0)
	if err != nil {
		return 0, 0, err
	}
	kind := be.Uint32(b[4:])
	if be.Uint32(b) != jbdMagic || kind != jbdSuperV1 && kind != jbdSuperV2 {
		return 0, 0, verdict.Damaged("ext4: the journal has no superblock")
	}
	size := be.Uint32(b[16:])
	j.first, j.last = be.Uint32(b[20:]), size
	if kind == jbdSuperV2 {
		j.incompat = be.Uint32(b[40:])
	}
	if bad := j.incompat &^ jbdIncompatKnown; bad != 0 {
		return 0, 0, verdict.Unsupported(cleanly, "ext4: the disk was in use and its journal needs unknown features (%#x)", bad)
	}
	if j.incompat&jbdIncompatFastCommit != 0 {
		n := be.Uint32(b[84:])
		if n == 0 {
			n = 256
		}
		if n < size {
			j.last = size - n
		}
	}
	if int64(be.Uint32(b[12:])) != j.f.bs || int64(size) > j.i.size/j.f.bs || j.first == 0 || j.first >= j.last {
		return 0, 0, verdict.Damaged("ext4: the journal's superblock makes no sense")
	}
	j.seed = csum(^uint32(0), b[48:64])
	start = be.Uint32(b[28:])
	if start != 0 && (start < j.first || start >= j.last) {
		return 0, 0, verdict.Damaged("ext4: the journal begins at block %d of %d", start, j.last)
	}
	return start, be.Uint32(b[24:]), nil
}

// at is the byte of the disk where a block of the journal lies.
func (j *journal) at(n uint32) (int64, error) {
	r, err := j.f.lookup(j.i, int64(n)*j.f.bs)
	if err != nil {
		return 0, err
	}
	if r.Phys < 0 {
		return 0, verdict.Damaged("ext4: the journal has a hole")
	}
	return r.Phys, nil
}

func (j *journal) block(n uint32) ([]byte, error) {
	at, err := j.at(n)
	if err != nil {
		return nil, err
	}
	return j.f.c.View(at, int(j.f.bs))
}

func (j *journal) next(n uint32) uint32 {
	if n++; n >= j.last {
		return j.first
	}
	return n
}

func (j *journal) hasCsum() bool { return j.incompat&(jbdIncompatCsumV2|jbdIncompatCsumV3) != 0 }

// sumOK checks a block whose checksum is the word at byte at.
func (j *journal) sumOK(b []byte, at int) bool {
	if !j.hasCsum() || j.f.blind {
		return true
	}
	sum := csum(j.seed, b[:at])
	sum = csum(sum, []byte{0, 0, 0, 0})
	return csum(sum, b[at+4:]) == be.Uint32(b[at:])
}

// scan collects the writes and revocations of all committed transactions. The log ends at the first block that does
// not carry on; a transaction without its commit block never happened.
func (j *journal) scan(n, seq uint32) (uint32, error) {
	var writes map[int64]write
	var revokes []revocation
	for left := int64(j.last - j.first); left > 0; left-- {
		b, err := j.block(n)
		if err != nil {
			return 0, err
		}
		if be.Uint32(b) != jbdMagic || be.Uint32(b[8:]) != seq {
			return seq, nil
		}
		n = j.next(n)
		switch be.Uint32(b[4:]) {
		case jbdDescriptor:
			if !j.sumOK(b, len(b)-4) {
				return seq, nil
			}
			if writes == nil {
				writes = map[int64]write{}
			}
			if n, err = j.descriptor(b, n, seq, &left, writes); err != nil {
				return 0, err
			}
		case jbdRevoke:
			if !j.sumOK(b, len(b)-4) {
				return seq, nil
			}
			if revokes, err = j.revokes(b, seq, revokes); err != nil {
				return 0, err
			}
		case jbdCommit:
			if !j.sumOK(b, 16) {
				return seq, nil
			}
			for at, w := range writes {
				j.writes[at] = w
			}
			for _, r := range revokes {
				j.revoked[r.block] = r.seq
			}
			writes, revokes = nil, nil
			seq++
		default:
			return seq, nil
		}
		if len(j.writes)+len(writes) > maxReplay || len(j.revoked)+len(revokes) > maxReplay {
			return 0, verdict.Unsupported(cleanly, "ext4: the disk was in use and its journal holds too much")
		}
	}
	return seq, nil
}

// descriptor reads the tags of a descriptor block, whose data blocks follow at n.
func (j *journal) descriptor(b []byte, n, seq uint32, left *int64, writes map[int64]write) (uint32, error) {
	size := 8
	switch {
	case j.incompat&jbdIncompatCsumV3 != 0:
		size = 16
	case j.incompat&jbdIncompatCsumV2 != 0:
		size = 10
	}
	if j.incompat&jbdIncompat64bit != 0 && size != 16 {
		size += 4
	}
	end := len(b)
	if j.hasCsum() {
		end -= 4
	}
	for p := 12; p+size <= end; {
		tag := b[p : p+size]
		flags := uint32(be.Uint16(tag[6:]))
		if size == 16 {
			flags = be.Uint32(tag[4:])
		}
		block := int64(be.Uint32(tag))
		if j.incompat&jbdIncompat64bit != 0 {
			block |= int64(be.Uint32(tag[8:])) << 32
		}
		if block < 0 || block >= j.f.blocks {
			return 0, verdict.Damaged("ext4: the journal writes to block %d of %d", block, j.f.blocks)
		}
		if *left--; *left <= 0 {
			return n, nil
		}
		at, err := j.at(n)
		if err != nil {
			return 0, err
		}
		if j.hasCsum() && !j.f.blind {
			if err := j.checkData(tag, at, seq); err != nil {
				return 0, err
			}
		}
		writes[block] = write{at: at, seq: seq, escape: flags&tagEscape != 0}
		n = j.next(n)
		if p += size; flags&tagSameUUID == 0 {
			p += 16
		}
		if flags&tagLast != 0 {
			break
		}
	}
	return n, nil
}

func (j *journal) checkData(tag []byte, at int64, seq uint32) error {
	data, err := j.f.c.View(at, int(j.f.bs))
	if err != nil {
		return err
	}
	var s [4]byte
	be.PutUint32(s[:], seq)
	sum := csum(csum(j.seed, s[:]), data)
	if len(tag) == 16 && sum == be.Uint32(tag[12:]) || len(tag) < 16 && uint16(sum) == be.Uint16(tag[4:]) {
		return nil
	}
	return verdict.Unsupported(cleanly, "ext4: the disk was in use and a block of its journal has a wrong checksum")
}

func (j *journal) revokes(b []byte, seq uint32, all []revocation) ([]revocation, error) {
	size := 4
	if j.incompat&jbdIncompat64bit != 0 {
		size = 8
	}
	end := int64(be.Uint32(b[12:]))
	room := int64(len(b))
	if j.hasCsum() {
		room -= 4
	}
	if end > room {
		return nil, verdict.Damaged("ext4: the journal has a broken list of revoked blocks")
	}
	for p := 16; p+size <= int(end); p += size {
		block := int64(be.Uint32(b[p:]))
		if size == 8 {
			block = int64(be.Uint64(b[p:]))
		}
		all = append(all, revocation{block: block, seq: seq})
	}
	return all, nil
}

// fast refuses a journal with fast commits after the last whole transaction: they tell of changes, not of blocks.
func (j *journal) fast(seq uint32) error {
	if j.incompat&jbdIncompatFastCommit == 0 || int64(j.last+1) >= j.i.size/j.f.bs {
		return nil
	}
	b, err := j.block(j.last + 1)
	if err != nil {
		return err
	}
	const tagHead = 9
	if le.Uint16(b) == tagHead && le.Uint16(b[2:]) >= 8 && le.Uint32(b[8:]) == seq {
		return verdict.Unsupported(cleanly, "ext4: the disk was in use and its journal holds fast commits")
	}
	return nil
}

// overlay is a disk some blocks of which are found elsewhere on it.
type overlay struct {
	blockio.Disk
	bs     int64
	writes map[int64]write
	count  int
}

func (o *overlay) ReadAt(p []byte, off int64) (int, error) {
	for done := 0; done < len(p); {
		at := off + int64(done)
		n, w, ok := o.plain(at, int64(len(p)-done))
		if !ok {
			if _, err := o.Disk.ReadAt(p[done:done+int(n)], at); err != nil {
				return done, err
			}
			done += int(n)
			continue
		}
		in := at % o.bs
		n = min(o.bs-in, int64(len(p)-done))
		if _, err := o.Disk.ReadAt(p[done:done+int(n)], w.at+in); err != nil {
			return done, err
		}
		if w.escape && in < 4 {
			copy(p[done:done+int(n)], []byte{0xC0, 0x3B, 0x39, 0x98}[in:])
		}
		done += int(n)
	}
	return len(p), nil
}

// plain is the number of bytes at off, n at most, that are read where they are; or the write that covers off.
func (o *overlay) plain(off, n int64) (int64, write, bool) {
	for b := off / o.bs; b*o.bs < off+n; b++ {
		if w, ok := o.writes[b]; ok {
			if b*o.bs <= off {
				return 0, w, true
			}
			return b*o.bs - off, write{}, false
		}
	}
	return n, write{}, false
}

// Span is that of the disk below, cut short around blocks from the journal.
func (o *overlay) Span(off, length int64) (int64, bool, error) {
	n, data, err := o.Disk.Span(off, length)
	if err != nil || data {
		return n, data, err
	}
	plain, _, ok := o.plain(off, n)
	if ok {
		return min(o.bs-off%o.bs, n), true, nil
	}
	return plain, false, nil
}
