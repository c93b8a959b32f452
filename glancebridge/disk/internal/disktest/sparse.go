package disktest

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Sector is the unit in which images are packed.
const Sector = 512

// maxSparse bounds what a packed image may say of its size.
const maxSparse = 1 << 30

// Pack gives an image without its sectors of zeros: the size, then for each other sector its number and bytes. A fuzzer
// that changes the result changes the parts that matter.
func Pack(img []byte) []byte {
	out := binary.LittleEndian.AppendUint64(nil, uint64(len(img)))
	zero := make([]byte, Sector)
	for off := 0; off < len(img); off += Sector {
		s := img[off:min(off+Sector, len(img))]
		if bytes.Equal(s, zero[:len(s)]) {
			continue
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(off/Sector))
		out = append(out, s...)
		out = append(out, zero[len(s):]...)
	}
	return out
}

// Sparse is a packed image to read from.
type Sparse struct {
	Size    int64
	sectors map[int64][]byte
}

// Unpack takes any bytes; what makes no sense is left out.
func Unpack(b []byte) *Sparse {
	s := &Sparse{sectors: map[int64][]byte{}}
	if len(b) < 8 {
		return s
	}
	s.Size = int64(binary.LittleEndian.Uint64(b) % maxSparse)
	for b = b[8:]; len(b) >= 4+Sector; b = b[4+Sector:] {
		s.sectors[int64(binary.LittleEndian.Uint32(b))] = b[4 : 4+Sector]
	}
	return s
}

// ReadAt reads zeros where no sector is.
func (s *Sparse) ReadAt(p []byte, off int64) (int, error) {
	n := min(int64(len(p)), max(0, s.Size-off))
	clear(p[:n])
	for at := off; at < off+n; at += Sector - at%Sector {
		if b, ok := s.sectors[at/Sector]; ok {
			copy(p[at-off:n], b[at%Sector:])
		}
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// Bytes gives the whole image.
func (s *Sparse) Bytes() []byte {
	b := make([]byte, s.Size)
	_, _ = s.ReadAt(b, 0)
	return b
}

// Fixture reads a packed image from testdata.
func Fixture(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// WriteFixture packs an image into testdata.
func WriteFixture(t testing.TB, name string, img []byte) {
	t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(Pack(img)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join("testdata", name+".gz"), b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d bytes, of %d", name, b.Len(), len(img))
}

// Sectors are the numbers of the sectors that are not zero, in order.
func (s *Sparse) Sectors() []int64 { return slices.Sorted(maps.Keys(s.sectors)) }
