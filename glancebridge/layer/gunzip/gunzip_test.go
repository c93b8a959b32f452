package gunzip

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"testing/iotest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// samples are streams of different kinds: literals, near and far copies, runs, what does not compress.
func samples(t testing.TB) map[string][]byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 700_000)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	var text, few, far bytes.Buffer
	for i := range 60_000 {
		fmt.Fprintf(&text, "line %d of %x\n", i, rnd.Uint32N(1<<uint(i%30)+1))
		few.WriteByte("ab"[rnd.IntN(10)/9])
	}
	for range 40 {
		far.Write(noise[:32<<10])
		far.Write(noise[:rnd.IntN(300)])
	}
	// Every distance below that of a word copy, and every length.
	var near bytes.Buffer
	for dist := 1; dist <= 20; dist++ {
		for length := 3; length <= 258; length += 1 + length/20 {
			near.Write(noise[dist*1000+length : dist*1000+length+dist])
			near.Write(bytes.Repeat(noise[dist*1000+length:dist*1000+length+dist], length/dist+1))
		}
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{"empty": nil, "one": {7}, "noise": noise, "text": text.Bytes(), "few": few.Bytes(), "far": far.Bytes(),
		"near": near.Bytes(), "zeros": make([]byte, 3<<20), "program": program[:min(len(program), 4<<20)]}
}

func compress(t testing.TB, data []byte, level int) []byte {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Name, w.Comment, w.Extra = "name", "comment", []byte("extra")
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func inflate(r io.Reader) ([]byte, error) {
	z, err := NewReader(r)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	return io.ReadAll(z)
}

func TestAllLevels(t *testing.T) {
	for name, data := range samples(t) {
		for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, gzip.BestSpeed, 4, gzip.DefaultCompression, gzip.BestCompression} {
			z := compress(t, data, level)
			for how, r := range map[string]io.Reader{"whole": bytes.NewReader(z), "halves": iotest.HalfReader(bytes.NewReader(z)),
				"eof with data": iotest.DataErrReader(bytes.NewReader(z))} {
				got, err := inflate(r)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s, level %d, %s: %d of %d bytes, %v", name, level, how, len(got), len(data), err)
				}
			}
		}
	}
}

func TestOneByteAtATime(t *testing.T) {
	s := samples(t)
	data := append(append([]byte{}, s["text"][:100_000]...), s["near"][:100_000]...)
	got, err := inflate(iotest.OneByteReader(bytes.NewReader(compress(t, data, 6))))
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d of %d bytes, %v", len(got), len(data), err)
	}
}

func TestMembers(t *testing.T) {
	s := samples(t)
	var z, want []byte
	for _, name := range []string{"text", "empty", "noise", "one", "few"} {
		z, want = append(z, compress(t, s[name], 6)...), append(want, s[name]...)
	}
	got, err := inflate(bytes.NewReader(z))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d of %d bytes, %v", len(got), len(want), err)
	}
	if _, err := inflate(bytes.NewReader(append(z, "rest of something"...))); err == nil {
		t.Error("what follows the last member is taken for nothing")
	}
}

func TestCutAndDamaged(t *testing.T) {
	data := samples(t)["text"][:6000]
	z := compress(t, data, 6)
	for n := range z {
		if _, err := inflate(bytes.NewReader(z[:n])); err != io.ErrUnexpectedEOF {
			t.Fatalf("cut after %d of %d bytes: %v", n, len(z), err)
		}
	}
	wrong := 0
	for n := 30; n < len(z); n += 7 { // after the header
		bad := bytes.Clone(z)
		bad[n] ^= 0x10
		got, err := inflate(bytes.NewReader(bad))
		if err != nil {
			wrong++
		} else if !bytes.Equal(got, data) { // else they are bits that mean nothing, before a stored block
			t.Fatalf("byte %d is wrong: %d bytes and no error", n, len(got))
		}
	}
	if most := (len(z) - 30) / 7; wrong < most-3 {
		t.Errorf("%d of %d wrong bytes were noticed", wrong, most)
	}
}

// TestCopyOfNothing: a copy from before the beginning of a member, even where there was one before it.
func TestCopyOfNothing(t *testing.T) {
	header := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}
	// A block of the fixed code: three bytes from one byte back.
	bad := append(header, 0x03, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	if got, err := inflate(bytes.NewReader(bad)); err != errDamaged {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := inflate(bytes.NewReader(append(compress(t, []byte("before"), 6), bad...))); err != errDamaged {
		t.Errorf("%q, %v", got, err)
	}
}

func TestClose(t *testing.T) {
	z, err := NewReader(bytes.NewReader(compress(t, make([]byte, 64<<20), 1)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(z, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil { // goleak looks for the goroutine
		t.Fatal(err)
	}
}

// FuzzGunzip holds the reader against the standard library's.
func FuzzGunzip(f *testing.F) {
	for _, data := range samples(f) {
		for _, level := range []int{gzip.HuffmanOnly, gzip.BestSpeed, gzip.BestCompression} {
			f.Add(compress(f, data[:min(len(data), 5000)], level))
		}
	}
	f.Fuzz(func(t *testing.T, z []byte) {
		const most = 4 << 20
		var want []byte
		r, werr := gzip.NewReader(bytes.NewReader(z))
		if werr == nil {
			want, werr = io.ReadAll(io.LimitReader(r, most))
		}
		var got []byte
		g, gerr := NewReader(bytes.NewReader(z))
		if gerr == nil {
			got, gerr = io.ReadAll(io.LimitReader(g, most))
			g.Close()
		}
		if (werr == nil) != (gerr == nil) || werr == nil && !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, %v; the standard library gives %d bytes, %v", len(got), gerr, len(want), werr)
		}
	})
}

// BenchmarkGunzip compares with the standard library.
func BenchmarkGunzip(b *testing.B) {
	data := samples(b)["program"]
	z := compress(b, data, 6)
	for name, open := range map[string]func() (io.ReadCloser, error){
		"ours":    func() (io.ReadCloser, error) { return NewReader(bytes.NewReader(z)) },
		"library": func() (io.ReadCloser, error) { return gzip.NewReader(bytes.NewReader(z)) },
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				r, err := open()
				if err != nil {
					b.Fatal(err)
				}
				if n, err := io.Copy(io.Discard, r); err != nil || n != int64(len(data)) {
					b.Fatal(n, err)
				}
				r.Close()
			}
		})
	}
}
