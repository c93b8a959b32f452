package glancebridge

import (
	"context"
	"errors"
	"io"

	"github.com/novalet/novalet/glancebridge/disk"
	"github.com/novalet/novalet/glancebridge/layer"
)

// readDisk finds the root in a disk or file system and sends its entries as one layer, named by a digest over them.
func readDisk(r io.ReaderAt, size int64, enc *layer.Encoder, q *parseRequest) (*layer.Result, error) {
	ctx := context.Background()
	img, err := disk.Open(ctx, r, size, disk.Options{RootPartition: q.Partition, Limits: disk.Limits{Entries: q.Limits.Entries}})
	if err != nil {
		return nil, diskRefused(err)
	}
	l := layer.StreamLayer{}
	if err := enc.Begin(0, 0); err != nil {
		return nil, err
	}
	sum := enc.Sum()
	if err := img.Walk(ctx, l.Observe(enc.Entry)); err != nil {
		return nil, diskRefused(err)
	}
	l.ID = sum()
	if err := enc.End(); err != nil {
		return nil, err
	}
	info := img.Info()
	res := &layer.Result{Format: string(info.Format), VirtualSize: info.Size, Layers: []layer.StreamLayer{l}, Order: []int{0}}
	if res.Format == "raw" && info.Partition == 0 {
		res.Format = info.Filesystem
	}
	return res, nil
}

// diskRefused makes the disk readers' refusals ours.
func diskRefused(err error) error {
	var r *disk.Refused
	if errors.As(err, &r) {
		return layer.Refuse("%s", r.Error())
	}
	return err
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
