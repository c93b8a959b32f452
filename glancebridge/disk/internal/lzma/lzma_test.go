package lzma

import (
	"bytes"
	"math/rand/v2"
	"os/exec"
	"testing"
)

func samples() map[string][]byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	random := make([]byte, 20000)
	words := make([]byte, 0, 70000)
	for i := range random {
		random[i] = byte(rnd.Uint32())
	}
	for len(words) < 60000 {
		words = append(words, random[rnd.IntN(50)*7:][:rnd.IntN(9)+1]...)
		words = append(words, ' ')
	}
	return map[string][]byte{
		"one": {1}, "zeros": make([]byte, 100000), "random": random, "words": words,
		"mixed": append(append(append([]byte{}, words...), random...), words...),
	}
}

func pack(t testing.TB, in []byte, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath("xz"); err != nil {
		t.Skip("needs xz (packages: xz-utils)")
	}
	cmd := exec.Command("xz", append([]string{"-c"}, args...)...)
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestXZ(t *testing.T) {
	for name, want := range samples() {
		for _, args := range [][]string{{"-6"}, {"-0", "--check=crc32"}, {"--lzma2=lc=1,lp=2,pb=3"}, {"--block-size=20000"}, {"--check=sha256"}} {
			in := pack(t, want, args...)
			var d Decoder
			out := make([]byte, len(want))
			n, err := d.XZ(out, in)
			if err != nil || n != len(want) || !bytes.Equal(out, want) {
				t.Errorf("%s %v: %d of %d bytes, %v", name, args, n, len(want), err)
			}
			if n, err := d.XZ(out[:len(out)-1], in); err == nil {
				t.Errorf("%s %v: %d bytes into too small a buffer", name, args, n)
			}
			// The index behind the data is not looked at.
			for cut := range min(len(in), 60) {
				if n, err := d.XZ(out, in[:cut]); err == nil && n < len(want) {
					t.Errorf("%s %v: %d bytes from %d of input", name, args, n, cut)
				}
			}
		}
	}
}

func TestAlone(t *testing.T) {
	for name, want := range samples() {
		in := pack(t, want, "--format=lzma")
		var d Decoder
		out := make([]byte, len(want))
		if n, err := d.Alone(out, in); err != nil || !bytes.Equal(out[:n], want) {
			t.Errorf("%s: %d of %d bytes, %v", name, n, len(want), err)
		}
	}
}

func TestFilterRefused(t *testing.T) {
	in := pack(t, []byte("some code"), "--x86", "--lzma2")
	var d Decoder
	if _, err := d.XZ(make([]byte, 100), in); err != ErrFilter {
		t.Errorf("got %v, want %v", err, ErrFilter)
	}
}

func FuzzXZ(f *testing.F) {
	f.Add(pack(f, []byte("hello hello hello hello"), "--check=none"), 23)
	f.Fuzz(func(_ *testing.T, in []byte, size int) {
		var d Decoder
		out := make([]byte, min(max(size, 0), 1<<20))
		_, _ = d.XZ(out, in)
		_, _, _ = d.LZMA2(out, in)
		_, _ = d.Alone(out, in)
	})
}

func BenchmarkXZ(b *testing.B) {
	want := samples()["mixed"]
	in := pack(b, want)
	out := make([]byte, len(want))
	var d Decoder
	b.SetBytes(int64(len(want)))
	for b.Loop() {
		if _, err := d.XZ(out, in); err != nil {
			b.Fatal(err)
		}
	}
}
