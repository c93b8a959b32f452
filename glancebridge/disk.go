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

// copySparse copies to an empty file, leaving holes where the input is zero, and returns the length.
func copySparse(w spoolFile, r io.Reader) (int64, error) {
	buf := make([]byte, 64<<10)
	var off int64
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			b := buf[:n]
			if !allZero(b) {
				if _, err := w.Seek(off, io.SeekStart); err != nil {
					return 0, err
				}
				if _, err := w.Write(b); err != nil {
					return 0, err
				}
			}
			off += int64(n)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			// A hole at the end is only there once something says so.
			if t, ok := w.(interface{ Truncate(int64) error }); ok {
				return off, t.Truncate(off)
			}
			return off, nil
		}
		if err != nil {
			return 0, err
		}
	}
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
