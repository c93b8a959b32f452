package glancebridge

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"
)

// TestLentMemoryIsReadOnly: a parser that was taken over must not change what is hashed.
func TestLentMemoryIsReadOnly(t *testing.T) {
	mem, f, err := lendMemory()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer unix.Munmap(mem)
	fd := int(f.Fd())
	if m, err := unix.Mmap(fd, 0, lentBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		t.Error("it can be mapped for writing")
		unix.Munmap(m)
	}
	m, err := unix.Mmap(fd, 0, lentBytes, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	if err := unix.Mprotect(m, unix.PROT_READ|unix.PROT_WRITE); err == nil {
		t.Error("a mapping can be made writable")
	}
	if _, err := unix.Pwrite(fd, []byte("x"), 0); err == nil {
		t.Error("it can be written to")
	}
	for _, size := range []int64{0, lentBytes - 1, lentBytes + 1} {
		if err := f.Truncate(size); err == nil {
			t.Errorf("its size can be made %d", size)
		}
	}
	if mem[5] = 'x'; m[5] != 'x' {
		t.Error("what the agent writes does not arrive")
	}
}

// lending makes both sides over pipes; ends are the parser's.
func lending(t *testing.T) (l *lender, p *lent, notes, back *os.File, ends []*os.File) {
	t.Helper()
	notesR, notesW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	backR, backW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, f := range []*os.File{notesR, notesW, backR, backW} {
			f.Close()
		}
	})
	mem := make([]byte, lentBytes)
	return newLender(mem, notesW, backR), newLent(mem, notesR, backW), notesW, backW, []*os.File{notesR, backW}
}

func TestLend(t *testing.T) {
	want := make([]byte, 3*lentBytes+12345)
	rand.NewChaCha8([32]byte{1}).Read(want)
	for name, cut := range map[string]func(io.Reader) io.Reader{
		"whole":  func(r io.Reader) io.Reader { return r },
		"halves": iotest.HalfReader,
		// As a connection gives it, never in step with the blocks.
		"odd": func(r io.Reader) io.Reader {
			return readerOf(func(p []byte) (int, error) { return r.Read(p[:min(len(p), 16411)]) })
		},
		"last EOF": iotest.DataErrReader,
	} {
		for _, size := range []int{len(want), lentBlock, lentBlock - 1, lentBytes, lentBytes + 1, 1, 0} {
			l, p, notes, _, _ := lending(t)
			sent := make(chan error, 1)
			go func() {
				err := l.send(cut(bytes.NewReader(want[:size])))
				notes.Close()
				sent <- err
			}()
			got, err := io.ReadAll(p)
			if err != nil || !bytes.Equal(got, want[:size]) {
				t.Errorf("%s: %d of %d bytes arrive right: %v", name, len(got), size, err)
			}
			if err := <-sent; err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	l, _, _, _, _ := lending(t)
	broken := errors.New("broken")
	if err := l.send(iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("the failure of a download comes back as %v", err)
	}
}

type readerOf func(p []byte) (int, error)

func (f readerOf) Read(p []byte) (int, error) { return f(p) }

// TestLendToNobody: a parser that has gone ends the feeding, wherever that stands, and one that is not itself any more gets no
// further.
func TestLendToNobody(t *testing.T) {
	endless := readerOf(func(p []byte) (int, error) { return len(p), nil })
	for n := range 2 {
		l, _, _, _, ends := lending(t)
		done := make(chan error, 1)
		go func() { done <- l.send(endless) }()
		ends[n].Close()
		if err := <-done; !errors.Is(err, unix.EPIPE) {
			t.Errorf("without end %d of the parser: %v", n, err)
		}
	}
	for _, wrong := range []byte{lentBlocks, 255} {
		l, _, _, back, _ := lending(t)
		for range lentBlocks {
			if _, err := l.blocks.Take(nil); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := back.Write([]byte{0, wrong}); err != nil {
			t.Fatal(err)
		}
		if _, err := l.blocks.Take(nil); err == nil || errors.Is(err, unix.EPIPE) {
			t.Errorf("given back block %d: %v", wrong, err)
		}
	}
}
