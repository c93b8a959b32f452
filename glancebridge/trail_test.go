package glancebridge

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// oneImage is a Glance with one image, whose data is as the record says or not.
type oneImage struct {
	Glance
	data []byte
}

func (g *oneImage) Download(_ context.Context, _ novalet.RequestContext, _ string, off int64) (io.ReadCloser, int64, error) {
	return io.NopCloser(bytes.NewReader(g.data[off:])), off, nil
}

// TestHashBehind: what comes to the spool is hashed there, from whatever byte on and however soon the parser ends, and the
// verdict is that of the whole.
func TestHashBehind(t *testing.T) {
	data := make([]byte, 3<<20+777)
	rand.NewChaCha8([32]byte{1}).Read(data)
	clear(data[1<<20 : 2<<20]) // a hole in the spool
	sum := sha512.Sum512(data)
	for name, c := range map[string]struct {
		damaged int // byte, -1 for none
		read    int // bytes read before
		parser  bool
	}{
		"all":                     {-1, 0, true},
		"from the middle":         {-1, 300_000, true},
		"parser ends":             {-1, 1000, false},
		"damaged":                 {2<<20 + 5, 0, true},
		"damaged hole":            {1<<20 + 5, 0, true},
		"damaged end":             {len(data) - 1, 0, true},
		"damaged before":          {7, 300_000, true},
		"damaged, parser ends":    {len(data) - 1, 1000, false},
		"damaged, it ended later": {1000, 1000, false},
	} {
		bytesNow := bytes.Clone(data)
		if c.damaged >= 0 {
			bytesNow[c.damaged] ^= 1
		}
		rec := &ImageRecord{ImageMeta: novalet.ImageMeta{ID: "img", Size: int64(len(data))}, HashAlgo: "sha512", HashValue: hex.EncodeToString(sum[:])}
		d := newDownload(t.Context(), &oneImage{data: bytesNow}, novalet.RequestContext{}, rec, time.Minute, 1, 0, nil)
		f := spool(t)
		head := make([]byte, c.read)
		if _, err := io.ReadFull(d, head); err != nil {
			t.Fatal(err)
		}
		notes, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if !c.parser {
			notes.Close()
		}
		err = feedDisk(write, f, behind(io.MultiReader(bytes.NewReader(head), d), d, f), rec.Size, func() bool { return true })
		notes.Close()
		write.Close()
		switch ended := d.failure(); {
		case c.damaged < 0 && (err != nil || ended != io.EOF):
			t.Errorf("%s: %v, the download ends by %v", name, err, ended)
		case c.damaged >= 0 && (ended == io.EOF || ended == nil):
			t.Errorf("%s: not found: %v, %v", name, err, ended)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestTrailEnds: it ends with what it cannot read, and when nobody wants it any more.
func TestTrailEnds(t *testing.T) {
	tr := newTrail(bytes.NewReader(make([]byte, 10)), 0, io.Discard)
	tr.written(20)
	if err := tr.finish(); err == nil {
		t.Error("bytes that are not there are hashed")
	}
	tr = newTrail(bytes.NewReader(nil), 0, io.Discard)
	tr.stop()
}

// TestSpoolIsReadOnly: the parser reads what is hashed, and does not write it.
func TestSpoolIsReadOnly(t *testing.T) {
	f := spool(t)
	if _, err := f.WriteString("disk"); err != nil {
		t.Fatal(err)
	}
	var files openFiles
	defer files.close()
	r, err := files.readOnly(f)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4)
	if _, err := r.ReadAt(b, 0); err != nil || string(b) != "disk" {
		t.Errorf("it reads %q, %v", b, err)
	}
	if _, err := r.WriteAt(b, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("writing: %v", err)
	}
	if err := r.Truncate(0); err == nil {
		t.Error("it can be cut")
	}
}

// TestParserCannotWriteSpool holds the fetch of a disk in its middle and looks at the descriptors of its parser.
func TestParserCannotWriteSpool(t *testing.T) {
	hosttest.RequireRoot(t)
	needTools(t, "mkfs.ext4")
	tree, file := t.TempDir(), filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(filepath.Join(tree, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	// More than the half that comes before the gate.
	if err := os.WriteFile(filepath.Join(tree, "etc/big"), bytes.Repeat([]byte("x"), 10<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", "-d", tree, file, "16m")
	disk, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	images := t.TempDir()
	id := addImage(t, images, disk, nil)
	g := &halfGlance{FileGlance: NewFileGlance(images), gate: make(chan struct{})}
	helper := staticHelper(t)
	s := openStore(t, images, func(o *Options) { o.Glance, o.Unconfined, o.Helper = g, false, helper })
	done := make(chan error, 1)
	go func() {
		_, err := s.Cache(t.Context(), novalet.RequestContext{}, id)
		done <- err
	}()
	var info []byte
	await(t, "the parser to run", func() bool {
		for _, pid := range children(t) {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if args := strings.Split(string(cmdline), "\x00"); len(args) > 2 && args[2] == "parse" {
				info, _ = os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fdSpool))
			}
		}
		return len(info) > 0
	})
	// pos: and flags: are the first of its words (proc_pid_fdinfo(5)).
	words := append(strings.Fields(string(info)), "", "", "", "")
	if flags, err := strconv.ParseUint(words[3], 8, 64); err != nil || flags&unix.O_ACCMODE != unix.O_RDONLY {
		t.Errorf("the parser has the spool with %q", info)
	}
	close(g.gate)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
