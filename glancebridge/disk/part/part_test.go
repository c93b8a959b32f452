package part

import (
	"bytes"
	"errors"
	"hash/crc32"
	"strings"
	"testing"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

func read(img []byte) (Table, []Partition, error) {
	return Read(blockio.Raw(bytes.NewReader(img), int64(len(img))))
}

// mark makes an empty MBR.
func mark(img []byte) { img[510], img[511] = 0x55, 0xAA }

func put(img []byte, sector, slot int, kind byte, start, count uint32) {
	mark(img[512*sector:])
	e := img[512*sector+446+16*slot:]
	e[4] = kind
	le.PutUint32(e[8:], start)
	le.PutUint32(e[12:], count)
}

// makeGPT writes a table with one entry, at the beginning or at the end.
func makeGPT(img []byte, sector int, backup bool) {
	put(img, 0, 0, 0xEE, 1, 0xFFFFFFFF)
	last := len(img)/sector - 1
	header, entries := 1, 2
	if backup {
		header, entries = last, last-16384/sector
	}
	e := img[entries*sector:][:16384]
	copy(e, "\xe3\xbc\x68\x4f\xcd\xe8\xb1\x4d\x96\xe7\xfb\xca\xf9\x84\xb7\x09")
	le.PutUint64(e[128*0+32:], 40)
	le.PutUint64(e[128*0+40:], 49)
	copy(e[56:], "r\x00o\x00\xe9\x00")
	h := img[header*sector:][:92]
	copy(h, "EFI PART\x00\x00\x01\x00")
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], uint64(header))
	le.PutUint64(h[72:], uint64(entries))
	le.PutUint32(h[80:], 128)
	le.PutUint32(h[84:], 128)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(e))
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h))
}

func TestGPT(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		for _, backup := range []bool{false, true} {
			img := make([]byte, 1<<20)
			makeGPT(img, sector, backup)
			table, ps, err := read(img)
			if err != nil || table != GPT || len(ps) != 1 {
				t.Fatalf("sectors of %d: got %v, %v, %v", sector, table, ps, err)
			}
			want := Partition{
				Number: 1, Type: "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", Name: "roé",
				Off: int64(40 * sector), Size: int64(10 * sector),
			}
			if ps[0] != want || !ps[0].Root() {
				t.Errorf("got %+v, want %+v", ps[0], want)
			}
		}
	}
}

func refused(t *testing.T, err error, want string) {
	t.Helper()
	var r *verdict.Refused
	if !errors.As(err, &r) || !strings.Contains(r.Reason, want) {
		t.Errorf("got %v, want a refusal with %q", err, want)
	}
}

func TestGPTBroken(t *testing.T) {
	img := make([]byte, 1<<20)
	put(img, 0, 0, 0xEE, 1, 100)
	_, _, err := read(img)
	refused(t, err, "no GPT header")
	for _, c := range []struct {
		at   int
		want string
	}{{512 + 40, "checksum of the GPT header"}, {1024 + 33, "checksum of the GPT's entries"}, {512 + 15, "header has"}} {
		img := make([]byte, 1<<20)
		makeGPT(img, 512, false)
		img[c.at]++
		_, _, err := read(img)
		refused(t, err, c.want)
		// A sound copy at the end is taken instead.
		makeGPT(img[:], 512, true)
		if _, ps, err := read(img); err != nil || len(ps) != 1 {
			t.Errorf("got %v, %v, want the copy's entry", ps, err)
		}
	}
	// A header whose checksum is right may still lie.
	for _, lie := range []struct {
		at   int
		n    uint64
		want string
	}{{72, 1 << 60, "entries are at"}, {80, 1<<32 | 1<<30, "entries of"}, {80, 130<<32 | 127, "entries of"}} {
		img := make([]byte, 1<<20)
		makeGPT(img, 512, false)
		h := img[512:604]
		if lie.at == 80 {
			le.PutUint32(h[80:], uint32(lie.n))
			le.PutUint32(h[84:], uint32(lie.n>>32))
		} else {
			le.PutUint64(h[lie.at:], lie.n)
		}
		clear(h[16:20])
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h))
		_, _, err := read(img)
		refused(t, err, lie.want)
	}
}

func TestMBR(t *testing.T) {
	img := make([]byte, 1<<20)
	put(img, 0, 0, 0x83, 100, 10)
	put(img, 0, 1, 0x05, 200, 1000)
	put(img, 0, 3, 0x82, 1500, 7)
	put(img, 200, 0, 0x83, 2, 20)
	put(img, 200, 1, 0x05, 50, 100)
	put(img, 250, 0, 0x8E, 3, 30)
	table, ps, err := read(img)
	want := []Partition{
		{Number: 1, Type: "0x83", Off: 100 * 512, Size: 10 * 512},
		{Number: 5, Type: "0x83", Off: 202 * 512, Size: 20 * 512},
		{Number: 6, Type: "0x8e", Off: 253 * 512, Size: 30 * 512},
		{Number: 4, Type: "0x82", Off: 1500 * 512, Size: 7 * 512},
	}
	if err != nil || table != MBR || len(ps) != len(want) {
		t.Fatalf("got %v, %v, %v", table, ps, err)
	}
	for k := range want {
		if ps[k] != want[k] {
			t.Errorf("got %+v, want %+v", ps[k], want[k])
		}
	}
	// The chain must not go back, nor go on for ever.
	put(img, 250, 1, 0x05, 0, 100)
	_, _, err = read(img)
	refused(t, err, "goes back")
	put(img, 250, 1, 0x05, 50, 100)
	_, _, err = read(img)
	refused(t, err, "goes back")
	for k := range 100 {
		put(img, 200+k, 1, 0x05, uint32(k+1), 1)
	}
	_, _, err = read(img)
	refused(t, err, "more than 64")
	put(img, 0, 1, 0x05, 1<<30, 1000)
	if _, _, err := read(img); err == nil {
		t.Error("an extended partition beyond the disk was read")
	}
}

func TestNone(t *testing.T) {
	empty := make([]byte, 4096)
	boot := make([]byte, 4096)
	put(boot, 0, 0, 0x83, 1, 1)
	boot[446] = 0x12 // code, not a table
	marked := make([]byte, 4096)
	mark(marked)
	for name, img := range map[string][]byte{"zeros": empty, "short": nil, "boot sector": boot, "no entries": marked} {
		if table, ps, err := read(img); table != None || ps != nil || err != nil {
			t.Errorf("%s: got %v, %v, %v", name, table, ps, err)
		}
	}
}
