package glancebridge

import (
	"bytes"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// spool gives an empty file that goes with the test.
func spool(t *testing.T) *os.File {
	t.Helper()
	f, err := unlinkedFile(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestSpooledDiskIsReadWhileItComes: the beginning can be read before the end is there, the end when it has come; a hole at
// the end is no end.
func TestSpooledDiskIsReadWhileItComes(t *testing.T) {
	disk := make([]byte, 5<<20)
	copy(disk, "beginning")
	copy(disk[4<<20:], "end")
	f := spool(t)
	come, give := io.Pipe()
	notes, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer notes.Close()
	fed := make(chan error, 1)
	go func() {
		err := feedDisk(write, f, come, int64(len(disk)), func() bool { return true })
		write.Close()
		fed <- err
	}()
	s := &spooled{spool: f, notes: notes, size: int64(len(disk))}
	if _, err := give.Write(disk[:2<<20]); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 16)
	if _, err := s.ReadAt(b, 0); err != nil || !bytes.Equal(b, disk[:16]) {
		t.Fatalf("the beginning is %q, %v", b, err)
	}
	rest := make([]byte, 1<<20)
	read := make(chan error, 1)
	go func() {
		_, err := s.ReadAt(rest, 4<<20)
		read <- err
	}()
	if _, err := give.Write(disk[2<<20:]); err != nil {
		t.Fatal(err)
	}
	give.Close()
	if err := <-read; err != nil || !bytes.Equal(rest, disk[4<<20:]) {
		t.Errorf("the end: %v", err)
	}
	if err := <-fed; err != nil {
		t.Error(err)
	}
}

// TestSpooledDiskIsCut: who waits for what never comes is told so.
func TestSpooledDiskIsCut(t *testing.T) {
	f, cut := spool(t), errors.New("cut")
	var notes bytes.Buffer
	disk := io.MultiReader(bytes.NewReader(make([]byte, 3<<20)), &endingReader{cut})
	if err := feedDisk(&notes, f, disk, 8<<20, func() bool { return true }); !errors.Is(err, cut) {
		t.Fatalf("got %v", err)
	}
	s := &spooled{spool: f, notes: &notes, size: 8 << 20}
	if _, err := s.ReadAt(make([]byte, 512), 2<<20); err != nil {
		t.Error(err)
	}
	if _, err := s.ReadAt(make([]byte, 512), 7<<20); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("got %v", err)
	}
}

type endingReader struct{ err error }

func (r *endingReader) Read([]byte) (int, error) { return 0, r.err }

// TestFeedDiskWithoutParser: a parser that has what it wants ends before the disk does, whose rest is read all the same;
// one that refused the disk ends it.
func TestFeedDiskWithoutParser(t *testing.T) {
	for _, good := range []bool{true, false} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		disk := bytes.NewReader(make([]byte, 3<<20))
		err = feedDisk(w, spool(t), disk, 3<<20, func() bool { return good })
		w.Close()
		if good && (err != nil || disk.Len() != 0) {
			t.Errorf("the parser has ended well: %v, %d bytes left", err, disk.Len())
		}
		if !good && (!errors.Is(err, unix.EPIPE) || disk.Len() == 0) {
			t.Errorf("the parser has refused: %v, %d bytes left", err, disk.Len())
		}
	}
}

func TestDiskImages(t *testing.T) {
	needTools(t, "mkfs.ext4")
	work := t.TempDir()
	tree, file := filepath.Join(work, "tree"), filepath.Join(work, "disk")
	if err := os.MkdirAll(filepath.Join(tree, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", "-d", tree, file, "8m")
	disk, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Clone(disk)
	damaged[len(damaged)-1] ^= 1 // nothing that the reader looks at
	for _, c := range []struct {
		name   string
		data   []byte
		change func(*ImageRecord)
		want   string // "" is taken
	}{
		{"whole", disk, func(*ImageRecord) {}, ""},
		{"of unknown size", disk, func(r *ImageRecord) { r.Size = 0 }, ""},
		{"damaged where nobody looks", damaged, func(r *ImageRecord) { r.HashValue = fmt.Sprintf("%x", sha512.Sum512(disk)) }, "does not match the checksum"},
		{"shorter than its record", disk[:len(disk)/2], func(r *ImageRecord) { r.Size = int64(len(disk)) }, "download ends after"},
		{"no file system", make([]byte, 4<<20), func(*ImageRecord) {}, "no format"},
	} {
		t.Run(c.name, func(t *testing.T) {
			images := t.TempDir()
			id := addImage(t, images, c.data, c.change)
			s := openStore(t, images, nil)
			_, err := s.Cache(t.Context(), novalet.RequestContext{}, id)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantRefused(t, err, c.want)
		})
	}
}
