package layer

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// bigTar has files of all sizes, more than the shared memory holds several times over, with runs of zero bytes in them that
// begin and end anywhere.
func bigTar(t *testing.T) []byte {
	rnd := rand.New(rand.NewPCG(3, 4))
	noise := make([]byte, 3<<20)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	parts := []part{{name: "bin/sh", data: "\x7fELF" + string(noise[:100])}}
	for i, size := range []int{0, 1, 511, 4095, 4096, 4097, joined - 1, joined, joined + 1, SharedBlock, SharedBlock + 7, 3 << 20, 3 << 20, 3 << 20} {
		parts = append(parts, part{name: fmt.Sprintf("size/%d", i), data: string(noise[:size])})
	}
	for i := range 400 {
		n := rnd.IntN(120_000)
		b := bytes.Clone(noise[i : i+n])
		from := rnd.IntN(n + 1)
		clear(b[from : from+rnd.IntN(n-from+1)])
		parts = append(parts, part{name: fmt.Sprintf("some/%d/%d", i%7, i), data: string(b)})
	}
	hole := make([]byte, 2<<20+5)
	copy(hole[1<<20+3:], "x")
	return tarOf(t, append(parts, part{name: "hole", data: string(hole)})...)
}

// sumTree is a line for each file.
func sumTree(t *testing.T, dir string) string {
	var out strings.Builder
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		fmt.Fprintf(&out, "%s %d %x\n", strings.TrimPrefix(p, dir), len(b), sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// passShared has send write a layer to an applier that shares memory with it.
func passShared(t *testing.T, send func(enc *Encoder) error) string {
	mem := make([]byte, SharedBytes)
	back, done, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		enc := NewSharedEncoder(w, mem, back)
		err := errors.Join(enc.Begin(0, 0), send(enc), enc.End(), enc.Finish())
		w.CloseWithError(err)
		sent <- err
	}()
	dir := t.TempDir()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	_, err = Apply(d, NewSharedDecoder(r, mem, done), ApplyOptions{})
	r.Close()
	done.Close()
	if serr := <-sent; err != nil || serr != nil {
		t.Fatal(err, serr)
	}
	return filepath.Join(dir, "0")
}

// TestSharedTar: what goes by the shared memory is what goes by the pipe, and no block is lost on the way.
func TestSharedTar(t *testing.T) {
	data := bigTar(t)
	plain, _, err := applyTar(t, data)
	if err != nil {
		t.Fatal(err)
	}
	var info *TarInfo
	var seen Observed
	dir := passShared(t, func(enc *Encoder) error {
		var err error
		info, err = ReadTar(bytes.NewReader(data), TarOptions{enc: enc}, seen.Observe(enc.Entry))
		return err
	})
	if got, want := sumTree(t, dir), sumTree(t, plain); got != want {
		t.Errorf("by the shared memory:\n%s\nby the pipe:\n%s", got, want)
	}
	if want := fmt.Sprintf("sha256:%x", sha256.Sum256(data)); info.DiffID != want || info.Bytes != int64(len(data)) {
		t.Errorf("the tar is %+v, of %d bytes and %s", info, len(data), want)
	}
	if len(seen.Machines) != 1 {
		t.Errorf("programs for %v", seen.Machines)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "hole"), &st); err != nil || st.Size != 2<<20+5 || st.Blocks*512 > 1<<20 {
		t.Errorf("a file that is empty but for a byte takes %d bytes, %v", st.Blocks*512, err)
	}
}

// TestSharedUnread: members that nobody reads, as those of a layer that is stored, lend nothing for good.
func TestSharedUnread(t *testing.T) {
	data := bigTar(t)
	passShared(t, func(enc *Encoder) error {
		for range 3 {
			if _, err := ReadTar(bytes.NewReader(data), TarOptions{enc: enc}, func(*Entry, io.Reader) error { return nil }); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestSharedReader: content that lies in no tar, as that of a disk, and its digest.
func TestSharedReader(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	var files [][]byte
	for range 60 {
		b := make([]byte, rnd.IntN(900_000))
		for i := rnd.IntN(len(b) + 1); i < len(b); i++ {
			b[i] = byte(rnd.Uint32())
		}
		files = append(files, b)
	}
	send := func(enc *Encoder) (string, error) {
		sum := enc.Sum()
		for i, b := range files {
			if err := enc.Entry(&Entry{Name: fmt.Sprint(i), Type: TypeRegular, Size: int64(len(b))}, bytes.NewReader(b)); err != nil {
				return "", err
			}
		}
		return sum(), nil
	}
	want, err := send(NewEncoder(io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	var got string
	dir := passShared(t, func(enc *Encoder) (err error) { got, err = send(enc); return err })
	if got != want {
		t.Errorf("the tree is named %s, by a pipe %s", got, want)
	}
	for i, b := range files {
		if got, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(i))); err != nil || !bytes.Equal(got, b) {
			t.Errorf("file %d: %d of %d bytes, %v", i, len(got), len(b), err)
		}
	}
}

// TestSharedHostile: a parser that was taken over names what is not there, or not its own.
func TestSharedHostile(t *testing.T) {
	num := func(b []byte, v ...uint64) []byte {
		for _, n := range v {
			b = binary.AppendUvarint(b, n)
		}
		return b
	}
	file := func(size int64) []byte {
		var b bytes.Buffer
		enc := NewEncoder(&b)
		_ = enc.Begin(0, 0)
		_ = enc.w.Flush()
		e := append([]byte{frameEntry, byte(TypeRegular)}, num(nil, 1)...)
		e = append(e, 'f')
		return append(b.Bytes(), num(e, 0o644, 0, 0, 0, 0, uint64(size), 0, 0, 0, 0)...)
	}
	for name, stream := range map[string][]byte{
		"no such block":       num(append(file(10), frameShared), sharedBlocks, 0, 10),
		"beyond the block":    num(append(file(10), frameShared), 0, SharedBlock-9, 10),
		"more than the block": num(append(file(SharedBlock+1), frameShared), 0, 0, SharedBlock+1),
		"more than the file":  num(append(file(10), frameShared), 0, 0, 11),
		"nothing":             num(append(file(10), frameShared), 0, 0, 0),
		"huge numbers":        num(append(file(10), frameShared), 0, 1<<63, 10),
		"end of no block":     num(append(file(10), frameFree), sharedBlocks),
	} {
		d, err := os.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		_, err = Apply(d, NewSharedDecoder(bytes.NewReader(stream), make([]byte, SharedBytes), io.Discard), ApplyOptions{})
		if !errors.Is(err, errFrame) {
			t.Errorf("%s: %v", name, err)
		}
		// Without shared memory there is none to name.
		_, err = Apply(d, NewDecoder(bytes.NewReader(stream)), ApplyOptions{})
		if err == nil {
			t.Errorf("%s: taken by a pipe", name)
		}
		d.Close()
	}
	b := newBorrowed(make([]byte, SharedBytes), io.Discard)
	if _, err := b.name(1, 0, 5); err != nil {
		t.Fatal(err)
	}
	if err := b.end(1); err != nil {
		t.Fatal(err)
	}
	if _, err := b.name(1, 0, 5); !errors.Is(err, errFrame) {
		t.Errorf("a piece of a block that was ended while it is still written: %v", err)
	}
	if err := b.end(1); !errors.Is(err, errFrame) {
		t.Errorf("a block that ends twice: %v", err)
	}
	b.release(1)
	if _, err := b.name(1, 0, 5); err != nil {
		t.Errorf("a block that was given back: %v", err)
	}
}

// TestSharedGone: a parser that waits for an applier that has gone ends.
func TestSharedGone(t *testing.T) {
	data := bigTar(t)
	for back, want := range map[string]string{"": "EOF", "\xff": "gives back block 255", "\x07\x07": "gives back block 7"} {
		enc := NewSharedEncoder(io.Discard, make([]byte, SharedBytes), strings.NewReader(back))
		if _, err := ReadTar(bytes.NewReader(data), TarOptions{enc: enc}, enc.Entry); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", back, err)
		}
	}
}
