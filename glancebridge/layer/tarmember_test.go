package layer

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// teller writes down what it is given; read says how much of the nth content is asked for.
type teller struct {
	strings.Builder
	n    int
	read func(n int) int64
}

func (b *teller) Entry(e *Entry, r io.Reader) error {
	b.n++
	fmt.Fprintf(b, "%#v", *e)
	if e.Size > 1<<20 {
		return Refuse("too large for a test")
	}
	content, err := io.ReadAll(io.LimitReader(r, b.read(b.n)))
	fmt.Fprintf(b, " %x %v\n", content, err)
	return err
}

// byArchiveTar is ReadTar without anything of our own.
func byArchiveTar(data []byte, sink Sink) (*TarInfo, error) {
	info := &TarInfo{DiffID: digest(data), Bytes: int64(len(data))}
	r := &placeReader{r: bytes.NewReader(data)}
	tr := tar.NewReader(r)
	for {
		end := (r.n + 511) &^ 511
		hdr, err := tr.Next()
		if err == io.EOF {
			info.Ended = r.n > end
			return info, nil
		}
		if err != nil {
			return nil, tarError(err)
		}
		if info.Entries++; info.Entries > 1000 {
			return nil, Refuse("the image has more than %d files", 1000)
		}
		e, err := tarEntry(hdr, "")
		if err != nil {
			return nil, err
		}
		if e != nil {
			if err := sink(e, tr); err != nil {
				return nil, tarError(err)
			}
		}
		if _, err := io.Copy(io.Discard, tr); err != nil {
			return nil, tarError(err)
		}
	}
}

// sameMembers checks that our reading is that of archive/tar, for any bytes in any pieces.
func sameMembers(t *testing.T, data []byte) {
	t.Helper()
	for name, read := range map[string]func(int) int64{
		"all":  func(int) int64 { return 1 << 20 },
		"some": func(n int) int64 { return int64(n * 100 % 1000) },
	} {
		want := &teller{read: read}
		info, err := byArchiveTar(data, want.Entry)
		fmt.Fprintf(want, "%+v %v", info, err)
		for _, r := range []io.Reader{bytes.NewReader(data), iotest.HalfReader(bytes.NewReader(data))} {
			got := &teller{read: read}
			info, err := ReadTar(r, TarOptions{MaxEntries: 1000}, got.Entry)
			fmt.Fprintf(got, "%+v %v", info, err)
			if got.String() != want.String() {
				t.Fatalf("reading %s: %s\n\narchive/tar: %s", name, got, want)
			}
		}
	}
}

// headers are members as various tools write them, each with content behind it.
func headers(t testing.TB) map[string][]byte {
	out := map[string][]byte{}
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatGNU, tar.FormatPAX} {
		for name, h := range map[string]tar.Header{
			"file":    {Typeflag: tar.TypeReg, Name: "usr/bin/x", Size: 700, Mode: 0o4755, Uid: 7, Gid: 8},
			"folder":  {Typeflag: tar.TypeDir, Name: "./usr/", Mode: 0o1777},
			"symlink": {Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../" + strings.Repeat("y", 97)},
			"link":    {Typeflag: tar.TypeLink, Name: "m", Linkname: "usr/bin/x"},
			"device":  {Typeflag: tar.TypeChar, Name: "n", Devmajor: 1, Devminor: 3},
			"long":    {Typeflag: tar.TypeReg, Name: strings.Repeat("d/", 60) + "file", Size: 3},
			"full":    {Typeflag: tar.TypeReg, Name: strings.Repeat("n", 100), Size: 512},
			"empty":   {Typeflag: tar.TypeReg, Name: "e"},
			"huge id": {Typeflag: tar.TypeReg, Name: "h", Uid: 1 << 22, Size: 1},
			"utf-8":   {Typeflag: tar.TypeReg, Name: "ü", Size: 1},
		} {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			h.Format, h.ModTime = format, time.Unix(1700000000, 0)
			if err := w.WriteHeader(&h); err != nil {
				continue // not in this format
			}
			if _, err := w.Write(bytes.Repeat([]byte("c"), int(h.Size))); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			out[name+" "+format.String()] = b.Bytes()
		}
	}
	return out
}

// resum puts the checksum of a changed header right.
func resum(b []byte) { copy(b[148:156], fmt.Sprintf("%06o\x00 ", checksum(b))) }

// sameHeader checks one header, if it is read here at all.
func sameHeader(t *testing.T, data []byte) (plain bool) {
	t.Helper()
	var got tar.Header
	if !plainHeader(data[:tarBlock], &got) {
		return false
	}
	want, err := tar.NewReader(bytes.NewReader(data)).Next()
	if err != nil {
		t.Fatalf("%q is read as %+v, by archive/tar not: %v", data[:tarBlock], got, err)
	}
	// What is not asked for.
	want.Uname, want.Gname, want.Devmajor, want.Devminor, want.Format = "", "", 0, 0, 0
	if !reflect.DeepEqual(&got, want) {
		t.Fatalf("%q is read as %+v, by archive/tar as %+v", data[:tarBlock], got, *want)
	}
	return true
}

func TestMembers(t *testing.T) {
	var read []string
	for name, data := range headers(t) {
		if sameHeader(t, data) {
			read = append(read, name)
		}
		for cut := 0; cut <= len(data); cut += 128 {
			for _, n := range []int{cut - 1, cut, cut + 1} {
				sameMembers(t, data[:min(max(n, 0), len(data))])
			}
		}
		// With another member behind it, and with a size that it says it has.
		twice := append(slices.Clone(data[:len(data)-2*tarBlock]), data...)
		sameMembers(t, twice)
		for _, size := range []string{"00000000777\x00", "00000001000\x00", "77777777777\x00"} {
			copy(twice[124:], size)
			resum(twice)
			sameMembers(t, twice)
		}
		// Every byte of the header as some other ones, with the checksum that belongs to it and without.
		for i := range tarBlock {
			for _, c := range []byte("\x00 /01789Sx\x7f\x80\xff") {
				changed := slices.Clone(data)
				changed[i] = c
				sameHeader(t, changed)
				resum(changed)
				sameHeader(t, changed)
			}
		}
	}
	star := slices.Clone(headers(t)["file USTAR"])
	copy(star[345:], strings.Repeat("p", 131)+"00000000001\x00")
	copy(star[508:], "tar\x00")
	resum(star)
	sameMembers(t, star)
	slices.Sort(read)
	want := strings.Split("empty GNU,empty PAX,empty USTAR,file GNU,file PAX,file USTAR,folder GNU,folder PAX,folder USTAR,full GNU,"+
		"full PAX,full USTAR,link GNU,link PAX,link USTAR,long PAX,long USTAR,symlink GNU,symlink PAX,symlink USTAR,utf-8 GNU", ",")
	if !slices.Equal(read, want) {
		t.Errorf("read here are %q, want %q", read, want)
	}
}
