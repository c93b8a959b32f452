package sha512

import (
	"bytes"
	"crypto/sha512"
	"fmt"
	"hash"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
)

func TestLengths(t *testing.T) {
	p := make([]byte, 4200)
	rand.NewChaCha8([32]byte{1}).Read(p)
	for n := range len(p) {
		// Past the beginning too: nothing may depend on where the bytes lie.
		in := p[n%7 : n]
		if n < 7 {
			in = p[:n]
		}
		h := New()
		h.Write(in)
		if want := sha512.Sum512(in); !bytes.Equal(h.Sum(nil), want[:]) {
			t.Fatalf("%d bytes: another digest", len(in))
		}
	}
}

// TestHash has everything else that a hash.Hash promises.
func TestHash(t *testing.T) {
	h := New()
	if h.Size() != Size || h.BlockSize() != BlockSize {
		t.Error("wrong sizes")
	}
	h.Write([]byte("abc"))
	first := h.Sum([]byte("before"))
	if again := h.Sum([]byte("before")); !bytes.Equal(first, again) || !bytes.HasPrefix(first, []byte("before")) || len(first) != 6+Size {
		t.Errorf("Sum changes what it sums, or does not append: %x, %x", first, again)
	}
	h.Write(make([]byte, 5000))
	h.Reset()
	h.Write([]byte("abc"))
	if got := h.Sum(nil); !bytes.Equal(got, first[6:]) {
		t.Errorf("after Reset %x, want %x", got, first[6:])
	}
}

// FuzzSHA512 compares with the standard library, however the bytes are cut up.
func FuzzSHA512(f *testing.F) {
	f.Add([]byte("abc"), uint64(1))
	f.Add(make([]byte, 3000), uint64(2))
	f.Fuzz(func(t *testing.T, p []byte, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 0))
		// The fuzzer rarely makes inputs of several groups.
		p = bytes.Repeat(p, 1+r.IntN(1+20000/max(len(p), 1)))
		ours, std := New(), sha512.New()
		for rest := p; len(rest) > 0; {
			n := min(1+r.IntN(1<<r.IntN(14)), len(rest))
			ours.Write(rest[:n])
			std.Write(rest[:n])
			rest = rest[n:]
			if r.IntN(4) == 0 && !bytes.Equal(ours.Sum(nil), std.Sum(nil)) {
				t.Fatalf("another digest after %d of %d bytes", len(p)-len(rest), len(p))
			}
		}
		if !bytes.Equal(ours.Sum(nil), std.Sum(nil)) {
			t.Fatal("another digest")
		}
	})
}

// TestGenerated holds the code against what makes it.
func TestGenerated(t *testing.T) {
	if testing.Short() {
		t.Skip("runs the compiler")
	}
	have, err := os.ReadFile("blocks_amd64.s")
	if err != nil {
		t.Fatal(err)
	}
	want, err := exec.Command("go", "run", "./gen").Output()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, want) {
		t.Error("blocks_amd64.s is not what gen writes; run go generate")
	}
}

func BenchmarkSHA512(b *testing.B) {
	for _, n := range []int{1 << 10, 256 << 10} {
		p := make([]byte, n)
		for _, h := range []struct {
			name string
			hash.Hash
		}{{"ours", New()}, {"standard", sha512.New()}} {
			b.Run(fmt.Sprint(n, "-", h.name), func(b *testing.B) {
				b.SetBytes(int64(n))
				for b.Loop() {
					h.Write(p)
				}
			})
		}
	}
}
