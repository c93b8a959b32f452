package disk

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/novalet/novalet/glancebridge/disk/btrfs"
	"github.com/novalet/novalet/glancebridge/disk/ext4"
	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
	"github.com/novalet/novalet/glancebridge/disk/internal/walk"
	"github.com/novalet/novalet/glancebridge/disk/part"
	"github.com/novalet/novalet/glancebridge/disk/squashfs"
	"github.com/novalet/novalet/glancebridge/disk/xfs"
)

// root finds the root file system of a disk.
func (i *Image) root(ctx context.Context, d blockio.Disk, o Options) error {
	b, err := head(d)
	if err != nil {
		return err
	}
	hits := fileSystems(b)
	table, parts, err := part.Read(d)
	if len(hits) > 0 {
		if len(hits) > 1 || table != part.None {
			return polyglot()
		}
		if n := o.RootPartition; n != 0 {
			return verdict.Unsupported("leave the root partition number out", "the disk has no partitions, number %d is asked for", n)
		}
		fs, name, err := open(ctx, d, hits, o)
		i.fs, i.info.Filesystem = fs, name
		return err
	}
	if err != nil {
		return err
	}
	i.info.Table = table
	if table == part.None {
		return verdict.Unsupported("upload a disk with a partition table or a Linux file system",
			"the image holds no partition table and no known file system")
	}
	if o.RootPartition != 0 {
		return i.numbered(ctx, d, parts, o)
	}
	return i.search(ctx, d, parts, o)
}

func (i *Image) numbered(ctx context.Context, d blockio.Disk, parts []part.Partition, o Options) error {
	for _, p := range parts {
		if p.Number != o.RootPartition {
			continue
		}
		c, err := probe(ctx, d, p, o)
		if err != nil {
			return err
		}
		i.take(c)
		return nil
	}
	return verdict.Unsupported("use one of the disk's numbers: "+numbers(parts), "the disk has no partition %d", o.RootPartition)
}

func numbers(parts []part.Partition) string {
	var s []string
	for _, p := range parts {
		s = append(s, fmt.Sprint(p.Number))
	}
	return strings.Join(s, ", ")
}

// candidate is a partition with a file system.
type candidate struct {
	part part.Partition
	fs   walk.FS
	name string
}

func (i *Image) take(c *candidate) {
	i.fs, i.info.Filesystem, i.info.Partition = c.fs, c.name, c.part.Number
}

// search takes the one partition that holds a root: by its type if that says so, else by its contents. When there is
// none, the largest partition's problem is the answer.
func (i *Image) search(ctx context.Context, d blockio.Disk, parts []part.Partition, o Options) error {
	var typed, found []*candidate
	var problem error
	var size int64
	for _, p := range parts {
		c, ok, err := consider(ctx, d, p, o)
		var r *Refused
		switch {
		case errors.As(err, &r):
			if p.Size > size {
				problem, size = err, p.Size
			}
		case err != nil:
			return err
		case p.Root():
			typed = append(typed, c)
		case ok:
			found = append(found, c)
		}
	}
	if len(typed) > 0 {
		found = typed
	}
	switch {
	case len(found) == 1:
		i.take(found[0])
		return nil
	case len(found) > 1:
		var s []part.Partition
		for _, c := range found {
			s = append(s, c.part)
		}
		return verdict.Unsupported("name the right one in the image's root partition property",
			"partitions %s each hold a root file system", numbers(s))
	case problem != nil:
		return problem
	}
	return verdict.Unsupported("upload a disk with an installed Linux system",
		"none of the disk's %d partitions holds a Linux root file system", len(parts))
}

// consider opens a partition and says whether its contents are those of a root file system.
func consider(ctx context.Context, d blockio.Disk, p part.Partition, o Options) (*candidate, bool, error) {
	c, err := probe(ctx, d, p, o)
	if err != nil {
		return nil, false, err
	}
	ok, err := isRoot(ctx, c.fs)
	return c, ok, explain(p, err)
}

// probe opens the file system of a partition.
func probe(ctx context.Context, d blockio.Disk, p part.Partition, o Options) (*candidate, error) {
	if p.Off >= d.Size() {
		return nil, verdict.Cut("partition %d begins at byte %d of %d", p.Number, p.Off, d.Size())
	}
	s := blockio.Section(d, p.Off, p.Size)
	b, err := head(s)
	if err != nil {
		return nil, err
	}
	fs, name, err := open(ctx, s, fileSystems(b), o)
	if err != nil {
		return nil, explain(p, err)
	}
	return &candidate{part: p, fs: fs, name: name}, nil
}

// explain puts the partition's number before a refusal.
func explain(p part.Partition, err error) error {
	var r *Refused
	if errors.As(err, &r) {
		return &Refused{Reason: fmt.Sprintf("partition %d: %s", p.Number, r.Reason), Hint: r.Hint}
	}
	return err
}

// open opens the file system that a look at the first bytes has found.
func open(ctx context.Context, d blockio.Disk, hits []hit, o Options) (walk.FS, string, error) {
	switch {
	case len(hits) == 0:
		return nil, "", verdict.Unsupported("use ext4, XFS, btrfs or squashfs for the root file system", "no known file system")
	case len(hits) > 1:
		return nil, "", polyglot()
	case hits[0].kind == "":
		return nil, "", verdict.Unsupported(hits[0].hint, "it is %s", hits[0].name)
	}
	switch hits[0].kind {
	case "ext4":
		fs, err := ext4.Open(ctx, d, ext4.Options{IgnoreChecksums: o.ignoreChecksums})
		if err != nil {
			return nil, "", err
		}
		return fs, fs.Name(), nil
	case "xfs":
		fs, err := xfs.Open(ctx, d, xfs.Options{IgnoreChecksums: o.ignoreChecksums})
		return fs, "xfs", err
	case "btrfs":
		fs, err := btrfs.Open(ctx, d, btrfs.Options{IgnoreChecksums: o.ignoreChecksums})
		return fs, "btrfs", err
	case "squashfs":
		fs, err := squashfs.Open(ctx, d)
		return fs, "squashfs", err
	}
	return nil, "", verdict.Unsupported("use ext4", "%s is not read yet", hits[0].kind)
}

// markers are names that a root file system has one of.
var markers = []string{"etc/os-release", "usr/lib/os-release", "sbin/init", "usr/sbin/init", "usr/lib/systemd/systemd"}

func isRoot(ctx context.Context, fs walk.FS) (bool, error) {
	fs.Bind(ctx)
	for _, m := range markers {
		ok, err := walk.Exists(fs, m)
		if ok || err != nil {
			return ok, err
		}
	}
	return false, nil
}
