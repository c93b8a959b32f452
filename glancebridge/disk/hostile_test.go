package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
	"github.com/novalet/novalet/glancebridge/disk/qcow2"
	"github.com/novalet/novalet/glancebridge/disk/vmdk"
	"github.com/novalet/novalet/glancebridge/layer"
)

var be = binary.BigEndian

// fixture gives the bytes of a packed image.
func fixture(t *testing.T, name string) []byte {
	t.Helper()
	return disktest.Unpack(disktest.Fixture(t, name)).Bytes()
}

// walkBytes opens and walks an image, and reads all of it.
func walkBytes(t *testing.T, img []byte, o Options) error {
	t.Helper()
	i, err := Open(t.Context(), bytes.NewReader(img), int64(len(img)), o)
	if err != nil {
		return err
	}
	return i.Walk(t.Context(), func(_ *layer.Entry, content io.Reader) error {
		_, err := io.Copy(io.Discard, content)
		return err
	})
}

func refusal(t *testing.T, err error, want string) {
	t.Helper()
	var r *Refused
	if !errors.As(err, &r) || !strings.Contains(r.Reason, want) || r.Hint == "" {
		t.Errorf("got %v, want a refusal with %q", err, want)
	}
}

func TestLimits(t *testing.T) {
	img := fixture(t, "ext4")
	for _, c := range []struct {
		limits Limits
		want   string
	}{
		{Limits{Entries: 20}, "more than 20 files"},
		{Limits{Depth: 2}, "deeper than 2"},
		{Limits{DataBytes: 10000}, "more than 10000 bytes"},
		{Limits{FileBytes: 200000}, "larger than 200000 bytes"},
		{Limits{Held: 500}, "fit in 500 bytes"},
	} {
		refusal(t, walkBytes(t, img, Options{Limits: c.limits}), c.want)
	}
	if err := walkBytes(t, img, Options{Limits: Limits{Entries: 70, Depth: 4, DataBytes: 200000, FileBytes: 400000, Held: 20000}}); err != nil {
		t.Error(err)
	}
}

func TestErrorsPassThrough(t *testing.T) {
	img := fixture(t, "ext4")
	i, err := Open(t.Context(), bytes.NewReader(img), int64(len(img)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	mine := errors.New("mine")
	if err := i.Walk(t.Context(), func(*layer.Entry, io.Reader) error { return mine }); !errors.Is(err, mine) {
		t.Errorf("got %v, want the sink's error", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	n := 0
	err = i.Walk(ctx, func(*layer.Entry, io.Reader) error {
		if n++; n == 5 {
			cancel(mine)
		}
		return nil
	})
	if !errors.Is(err, mine) || n != 5 {
		t.Errorf("got %v after %d entries, want the context's cause after 5", err, n)
	}
	if err := i.Walk(t.Context(), func(*layer.Entry, io.Reader) error { return nil }); err != nil {
		t.Errorf("a second walk: %v", err)
	}
	var r *Refused
	if _, err := Open(t.Context(), failing{mine}, 1<<20, Options{}); !errors.Is(err, mine) || errors.As(err, &r) {
		t.Errorf("got %v, want the reader's error", err)
	}
}

type failing struct{ err error }

func (f failing) ReadAt([]byte, int64) (int, error) { return 0, f.err }

// TestSkip reads each file twice, once with its holes left out.
func TestSkip(t *testing.T) {
	for _, name := range []string{"ext4", "btrfs", "squashfs-gzip", "xfs"} {
		img := fixture(t, name)
		i, err := Open(t.Context(), bytes.NewReader(img), int64(len(img)), Options{})
		if err != nil {
			t.Fatal(err)
		}
		whole := map[string]string{}
		skipped := 0
		for _, skip := range []bool{false, true} {
			err := i.Walk(t.Context(), func(e *layer.Entry, content io.Reader) error {
				if e.Type != layer.TypeRegular {
					return nil
				}
				b := make([]byte, e.Size)
				at := int64(0)
				if skip {
					for _, h := range e.Holes {
						if _, err := io.ReadFull(content, b[at:h.Off]); err != nil {
							return err
						}
						if err := content.(Skipper).Skip(h.Len); err != nil {
							return err
						}
						at = h.Off + h.Len
						skipped++
					}
				}
				if _, err := io.ReadFull(content, b[at:]); err != nil {
					return err
				}
				if n, err := content.Read(make([]byte, 10)); n != 0 || err != io.EOF {
					return fmt.Errorf("%d bytes and %w behind the end of %s", n, err, e.Name)
				}
				if skip && whole[e.Name] != string(b) {
					t.Errorf("%s: %s differs", name, e.Name)
				}
				whole[e.Name] = string(b)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if skipped == 0 {
			t.Errorf("%s: no hole", name)
		}
	}
}

// TestDirectoryLoop points a directory's entry at one of its ancestors.
func TestDirectoryLoop(t *testing.T) {
	img := fixture(t, "ext2")
	at := bytes.Index(img, []byte("\x06\x02deeper"))
	if at < 6 {
		t.Fatal("the entry is not found")
	}
	for _, ino := range []uint32{2, 12} {
		binary.LittleEndian.PutUint32(img[at-6:], ino)
		err := walkBytes(t, img, Options{})
		if ino == 2 {
			refusal(t, err, "found twice")
		}
		var r *Refused
		if err != nil && !errors.As(err, &r) {
			t.Errorf("got %v", err)
		}
	}
	binary.LittleEndian.PutUint32(img[at-6:], 1<<31)
	refusal(t, walkBytes(t, img, Options{}), "inode 2147483648")
	copy(img[at+2:], "../../")
	binary.LittleEndian.PutUint32(img[at-6:], 12)
	refusal(t, walkBytes(t, img, Options{}), `"../../"`)
}

func TestPolyglot(t *testing.T) {
	for _, c := range []struct {
		name string
		off  int
		text string
	}{
		{"ext2", 0, "hsqs"}, {"ext2", 0, "XFSB"}, {"ext2", 65600, "_BHRfS_M"}, {"ext2", 0, "QFI\xfb"}, {"ext2", 0, "KDMV"},
		{"gpt", 1080, "\x53\xef"},
	} {
		img := fixture(t, c.name)
		copy(img[c.off:], c.text)
		refusal(t, walkBytes(t, img, Options{}), "more than one format")
	}
}

func TestQcow2Header(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(h []byte)
		want string
	}{
		{"backing file", func(h []byte) { be.PutUint64(h[8:], 512); be.PutUint32(h[16:], 11) }, "backing file"},
		{"backing name only", func(h []byte) { be.PutUint32(h[16:], 11) }, "backing file"},
		{"encryption", func(h []byte) { be.PutUint32(h[32:], 2) }, "encrypted"},
		{"data file", func(h []byte) { h[79] |= 4 }, "another file"},
		{"subclusters", func(h []byte) { h[79] |= 16 }, "subclusters"},
		{"corrupt", func(h []byte) { h[79] |= 2 }, "marked corrupt"},
		{"unknown feature", func(h []byte) { h[72] |= 1 }, "unknown features"},
		{"version", func(h []byte) { h[7] = 4 }, "version 4"},
		{"cluster size", func(h []byte) { h[23] = 40 }, "1 << 40"},
		{"table outside", func(h []byte) { be.PutUint64(h[40:], 1<<40) }, "first table"},
		{"table too short", func(h []byte) { be.PutUint32(h[36:], 0) }, "first table"},
		{"huge", func(h []byte) { be.PutUint64(h[24:], 1<<62) }, "bytes"},
		{"compression", func(h []byte) { h[104] = 7 }, "compression"},
	} {
		img := fixture(t, "qcow2")
		c.set(img)
		err := walkBytes(t, img, Options{})
		refusal(t, err, c.want)
	}
	img := fixture(t, "qcow2")
	img[79] |= 1 // the counts of references are stale: harmless to a reader
	if err := walkBytes(t, img, Options{}); err != nil {
		t.Error(err)
	}
}

func TestVMDKDescriptor(t *testing.T) {
	for _, c := range []struct{ old, text, want string }{
		{`createType="monolithicSparse"`, `createType="monolithicFlat"`, "monolithicFlat"},
		{`createType="monolithicSparse"`, `createType="custom"`, "custom"},
		{`parentCID=ffffffff`, `parentCID=12345678`, "parent"},
		{`version=1`, `RW 1 FLAT "/etc/passwd" 0`, "2 parts"},
	} {
		img := fixture(t, "vmdk")
		d := bytes.Index(img, []byte("# Disk DescriptorFile"))
		text, _, _ := strings.Cut(string(img[d:d+10240]), "\x00")
		changed := strings.Replace(text, c.old, c.text, 1)
		if changed == text {
			t.Fatalf("%q is not in %q", c.old, text)
		}
		copy(img[d:], changed+"\x00")
		refusal(t, walkBytes(t, img, Options{}), c.want)
	}
}

func TestForeignPartition(t *testing.T) {
	for _, c := range []struct {
		off  int
		text string
		want string
	}{
		{512, "LABELONE", "LVM"}, {0, "LUKS\xba\xbe", "LUKS"}, {4096, "\xfc\x4e\x2b\xa9", "RAID"}, {3, "NTFS    ", "NTFS"},
		{4086, "SWAPSPACE2", "swap"}, {1024, "\xe2\xe1\xf5\xe0", "EROFS"}, {0, "", "no known file system"},
	} {
		img := fixture(t, "gpt")
		clear(img[1<<20 : 1<<20+4096])
		copy(img[1<<20+c.off:], c.text)
		refusal(t, walkBytes(t, img, Options{}), c.want)
	}
}

// read4K reads the first bytes of a disk at an offset.
func read4K(t *testing.T, d blockio.Disk, off int64) []byte {
	t.Helper()
	b := make([]byte, 4096)
	if _, err := d.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	return b
}

// rootAt is where the tables' fixture has its file system's superblock.
const rootAt = 1<<20 + 1024

// TestZeroClusters marks a stored cluster as zero: what it stores must not show.
func TestZeroClusters(t *testing.T) {
	zero := make([]byte, 4096)
	img := fixture(t, "qcow2")
	open := func() blockio.Disk {
		t.Helper()
		d, err := qcow2.Open(blockio.Raw(bytes.NewReader(img), int64(len(img))))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	if bytes.Equal(read4K(t, open(), rootAt), zero) {
		t.Fatal("the cluster is zero from the start")
	}
	const cluster = 4096
	l1 := be.Uint64(img[40:]) + rootAt/cluster/(cluster/8)*8
	l2 := be.Uint64(img[l1:])&0x00FFFFFFFFFFFE00 + rootAt/cluster%(cluster/8)*8
	img[l2+7] |= 1
	if !bytes.Equal(read4K(t, open(), rootAt-1024), zero) {
		t.Error("a zero cluster of qcow2 shows what it stores")
	}
	if _, data, err := open().Span(rootAt, 512); data || err != nil {
		t.Errorf("it has data, %v", err)
	}

	img = fixture(t, "vmdk")
	img[8] |= 4 // such grains may be
	dir := binary.LittleEndian.Uint64(img[56:]) * 512
	table := uint64(binary.LittleEndian.Uint32(img[dir:])) * 512
	binary.LittleEndian.PutUint32(img[table+rootAt/65536*4:], 1)
	d, err := vmdk.Open(blockio.Raw(bytes.NewReader(img), int64(len(img))))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read4K(t, d, rootAt), zero) {
		t.Error("a zero grain of a VMDK is not zero")
	}
}

func TestSniff(t *testing.T) {
	for name, want := range map[string]Format{"ext2": Raw, "gpt": Raw, "mbr": Raw, "btrfs": Raw, "squashfs-xz": Raw, "qcow2": QCOW2, "vmdk": VMDK} {
		img := fixture(t, name)
		if f, ok, err := Sniff(bytes.NewReader(img), int64(len(img))); f != want || !ok || err != nil {
			t.Errorf("%s: got %s, %v, %v", name, f, ok, err)
		}
	}
	for _, text := range []string{"", "short", strings.Repeat("tar", 100000)} {
		if f, ok, err := Sniff(strings.NewReader(text), int64(len(text))); f != Raw || ok || err != nil {
			t.Errorf("%.10q: got %s, %v, %v", text, f, ok, err)
		}
		refusal(t, walkBytes(t, []byte(text), Options{}), "no partition table")
	}
}
