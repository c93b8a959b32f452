package ext4

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
)

// journalImage is an image whose journal the test writes: put overwrites the journal's next block.
type journalImage struct {
	t    *testing.T
	img  []byte
	f    *FS
	i    *inode
	next uint32
}

func newJournalImage(t *testing.T, start, seq uint32) *journalImage {
	t.Helper()
	file, err := os.Open(filepath.Join("..", "testdata", "ext4-journal.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	z, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	packed, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	j := &journalImage{t: t, img: disktest.Unpack(packed).Bytes(), next: start}
	j.f = &FS{c: blockio.NewCache(blockio.Raw(bytes.NewReader(j.img), int64(len(j.img))), 16)}
	if err := j.f.super(Options{}); err != nil {
		t.Fatal(err)
	}
	if j.i, err = j.f.inode(8); err != nil {
		t.Fatal(err)
	}
	s := j.block(0)
	be.PutUint32(s[24:], seq)
	be.PutUint32(s[28:], start)
	be.PutUint32(s[40:], 1) // revoked blocks, and no checksums
	for k := be.Uint32(s[20:]); k < be.Uint32(s[16:]); k++ {
		clear(j.block(k))
	}
	return j
}

// block is the journal's own block n, to write to.
func (j *journalImage) block(n uint32) []byte {
	j.t.Helper()
	r, err := j.f.lookup(j.i, int64(n)*j.f.bs)
	if err != nil || r.Phys < 0 {
		j.t.Fatalf("block %d of the journal: %v", n, err)
	}
	return j.img[r.Phys : r.Phys+j.f.bs]
}

func (j *journalImage) put(kind, seq uint32) []byte {
	j.t.Helper()
	b := j.block(j.next)
	if j.next++; j.next == be.Uint32(j.block(0)[16:]) {
		j.next = be.Uint32(j.block(0)[20:])
	}
	if kind != 0 {
		be.PutUint32(b, jbdMagic)
		be.PutUint32(b[4:], kind)
		be.PutUint32(b[8:], seq)
	}
	return b
}

// write puts a descriptor and the blocks it names, each filled with a letter.
func (j *journalImage) write(seq uint32, flags uint16, letter byte, blocks ...uint32) {
	d := j.put(jbdDescriptor, seq)
	for k, b := range blocks {
		be.PutUint32(d[12+8*k:], b)
		be.PutUint16(d[12+8*k+6:], flags|tagSameUUID)
		copy(j.put(0, 0), bytes.Repeat([]byte{letter}, int(j.f.bs)))
	}
	d[12+8*(len(blocks)-1)+7] |= tagLast
}

func (j *journalImage) revoke(seq uint32, blocks ...uint32) {
	b := j.put(jbdRevoke, seq)
	be.PutUint32(b[12:], uint32(16+4*len(blocks)))
	for k, n := range blocks {
		be.PutUint32(b[16+4*k:], n)
	}
}

// replayed is the first bytes of the blocks that come from the journal.
func (j *journalImage) replayed() map[int64]string {
	j.t.Helper()
	j.f.c = blockio.NewCache(blockio.Raw(bytes.NewReader(j.img), int64(len(j.img))), 16)
	over, err := j.f.replay()
	if err != nil {
		j.t.Fatal(err)
	}
	got := map[int64]string{}
	if over == nil {
		return got
	}
	whole := make([]byte, len(j.img))
	if _, err := over.ReadAt(whole, 0); err != nil {
		j.t.Fatal(err)
	}
	for b := range over.writes {
		got[b] = string(whole[b*j.f.bs:][:5])
		part := make([]byte, 3)
		if _, err := over.ReadAt(part, b*j.f.bs+2); err != nil || string(part) != got[b][2:] {
			j.t.Errorf("block %d: %q, %v in part, %q whole", b, part, err, got[b])
		}
	}
	for b := range j.f.blocks {
		if _, ok := over.writes[b]; !ok && !bytes.Equal(whole[b*j.f.bs:][:j.f.bs], j.img[b*j.f.bs:][:j.f.bs]) {
			j.t.Errorf("block %d is not in the journal and has changed", b)
		}
	}
	return got
}

func TestReplay(t *testing.T) {
	const start = 1000 // of 1024: the log goes round
	j := newJournalImage(t, start, 7)
	j.write(7, 0, 'a', 2001, 2002, 2003, 2004)
	j.write(7, tagEscape, 'b', 2005)
	j.put(jbdCommit, 7)
	j.revoke(8, 2001, 2002)
	j.put(jbdCommit, 8)
	j.write(9, 0, 'c', 2002, 2006, 2007, 2008, 2009, 2010, 2011, 2012, 2013)
	j.put(jbdCommit, 9)
	j.write(10, 0, 'd', 2003) // without a commit it never happened
	j.revoke(10, 2004)
	got := j.replayed()
	if j.next > start {
		t.Fatal("the log did not go round")
	}
	want := map[int64]string{2002: "ccccc", 2003: "aaaaa", 2004: "aaaaa", 2005: "\xc0\x3b\x39\x98b"}
	for b := int64(2006); b <= 2013; b++ {
		want[b] = "ccccc"
	}
	if len(got) != len(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for b, s := range want {
		if got[b] != s {
			t.Errorf("block %d: got %q, want %q", b, got[b], s)
		}
	}
	// What follows with an old number belongs to an earlier round.
	j = newJournalImage(t, start, 7)
	j.write(6, 0, 'a', 2001)
	j.put(jbdCommit, 6)
	if got := j.replayed(); len(got) != 0 {
		t.Errorf("got %v from an old transaction", got)
	}
}

func TestReplayRefused(t *testing.T) {
	for name, damage := range map[string]func(j *journalImage){
		"a block outside":  func(j *journalImage) { j.write(7, 0, 'a', 1<<30); j.put(jbdCommit, 7) },
		"unknown features": func(j *journalImage) { be.PutUint32(j.block(0)[40:], 1<<20) },
		"a start outside":  func(j *journalImage) { be.PutUint32(j.block(0)[28:], 1<<20) },
		"no superblock":    func(j *journalImage) { clear(j.block(0)) },
		"too long":         func(j *journalImage) { be.PutUint32(j.block(0)[16:], 1<<24) },
	} {
		j := newJournalImage(t, 500, 7)
		j.put(jbdDescriptor, 7)
		j.next = 500
		damage(j)
		j.f.c = blockio.NewCache(blockio.Raw(bytes.NewReader(j.img), int64(len(j.img))), 16)
		if _, err := j.f.replay(); err == nil {
			t.Errorf("%s: the journal was replayed", name)
		}
	}
}

func TestACL(t *testing.T) {
	disk := []byte("\x01\x00\x00\x00" + "\x01\x00\x07\x00" + "\x02\x00\x05\x00\xe8\x03\x00\x00" + "\x04\x00\x05\x00" + "\x10\x00\x07\x00" + "\x20\x00\x05\x00")
	want := disktest.ACL([3]uint32{1, 7, 1<<32 - 1}, [3]uint32{2, 5, 1000}, [3]uint32{4, 5, 1<<32 - 1}, [3]uint32{0x10, 7, 1<<32 - 1}, [3]uint32{0x20, 5, 1<<32 - 1})
	if got, ok := acl(disk); !ok || string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, bad := range [][]byte{nil, {2, 0, 0, 0}, disk[:len(disk)-1], slices.Concat(disk, []byte{9, 0, 0, 0}), disk[:12]} {
		if got, ok := acl(bad); ok {
			t.Errorf("%q became %q", bad, got)
		}
	}
}
