package disk

import (
	"context"
	"io"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
	"github.com/novalet/novalet/glancebridge/disk/part"
	"github.com/novalet/novalet/glancebridge/layer"
)

// Refused says why an image cannot be used, and what its owner can do about it.
type Refused = verdict.Refused

// Limits bound what one image may hold. A zero value means the default.
type Limits struct {
	Entries   int64 // names in the tree; 2 million
	Depth     int   // elements of a path; 512
	Held      int64 // bytes of names and hard links kept at a time; 24 MiB
	DataBytes int64 // contents of all files without holes; 256 GiB
	FileBytes int64 // contents of all files with holes; 16 TiB
}

func (l Limits) walk() walk.Limits {
	w := walk.Limits(l)
	set(&w.Entries, 2<<20)
	set(&w.Depth, 512)
	set(&w.Held, 24<<20)
	set(&w.DataBytes, 256<<30)
	set(&w.FileBytes, 16<<40)
	return w
}

func set[T int | int64](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// Options change how an image is opened.
type Options struct {
	// Format is what the image's record says of it (raw, qcow2, vmdk). Another content is refused. Empty: not checked.
	Format Format
	// RootPartition is the number of the partition with the root file system; 0 looks for it.
	RootPartition int
	Limits        Limits

	// ignoreChecksums lets the tests reach what lies behind the checksums of metadata.
	ignoreChecksums bool
}

// Image is an open image. It is not safe for concurrent use.
type Image struct {
	info   Info
	fs     walk.FS
	limits Limits
}

// Info says what was found.
type Info struct {
	Format     Format     // of the file
	Size       int64      // of the virtual disk, bytes
	Table      part.Table // gpt, mbr or none
	Partition  int        // number of the root's partition; 0 for a whole disk
	Filesystem string     // ext2, ext3, ext4, xfs, btrfs, squashfs
}

// Open finds the root file system in the size bytes of r. It reads headers, and for ext3 and ext4 an unfinished
// journal. r must not change while the image is in use; nothing needs closing.
func Open(ctx context.Context, r io.ReaderAt, size int64, o Options) (*Image, error) {
	d, format, err := container(blockio.Raw(r, size))
	if err != nil {
		return nil, err
	}
	if o.Format != "" && o.Format != format {
		return nil, verdict.Unsupported("set the image's disk_format to what the file is", "the image is declared %s but is %s", o.Format, format)
	}
	img := &Image{info: Info{Format: format, Size: d.Size()}, limits: o.Limits}
	if err := img.root(ctx, d, o); err != nil {
		return nil, err
	}
	return img, nil
}

// Info says what the image is.
func (i *Image) Info() Info { return i.info }

// Walk gives the whole tree to sink. It may be repeated. It ends with the first error of the sink, of ctx, or of the
// image (*Refused).
func (i *Image) Walk(ctx context.Context, sink layer.Sink) error {
	return walk.Walk(ctx, i.fs, i.limits.walk(), sink)
}

// Skipper is what the content reader that a Sink gets can do besides: go ahead by n bytes without reading them, which
// costs next to nothing where the file has a hole.
type Skipper interface{ Skip(n int64) error }
