package xfs

import (
	"context"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

const (
	logMagic   = 0xFEEDBABE
	logSector  = 512
	logHeader  = 32 << 10 // bytes of a record that one header sector covers
	logChunk   = 256 << 10
	logVersion = 2
	opUnmount  = 0x20
	maxLog     = 4 << 30
)

// log refuses a file system that was not unmounted: the newest record of the log must be the one that an unmount writes
// (xlog_check_unmount_rec in fs/xfs/xfs_log_recover.c). Records begin with a magic number, and every sector in between
// with a cycle number, so that headers are found by looking at the first word of each.
func (f *FS) log(ctx context.Context, s []byte) error {
	start, count := int64(min(be.Uint64(s[48:]), 1<<62)), int64(be.Uint32(s[96:]))
	if start == 0 {
		return verdict.Unsupported("make the file system with an internal log", "xfs: the log is on another device")
	}
	at, err := f.linear(start, count)
	if err != nil {
		return err
	}
	size := count * f.bs
	if size > maxLog {
		return verdict.Damaged("xfs: the log has %d bytes", size)
	}
	var newest uint64
	where := int64(-1)
	buf := make([]byte, logChunk)
	d := f.c.Disk()
	for off := int64(0); off < size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, data, err := d.Span(at+off, size-off)
		if err != nil {
			return err
		}
		if !data && n >= logSector {
			off += n &^ (logSector - 1)
			continue
		}
		b := buf[:min(logChunk, size-off)]
		if _, err := d.ReadAt(b, at+off); err != nil {
			return err
		}
		for k := 0; k+logSector <= len(b); k += logSector {
			if h := b[k:]; be.Uint32(h) == logMagic {
				if lsn := be.Uint64(h[16:]); lsn >= newest {
					newest, where = lsn, off+int64(k)
				}
			}
		}
		off += int64(len(b))
	}
	if where < 0 {
		return nil // an empty log
	}
	return f.unmounted(at, where, size)
}

// unmounted looks at the operation in the record at byte off of the log.
func (f *FS) unmounted(at, off, size int64) error {
	h, err := f.c.View(at+off, logSector)
	if err != nil {
		return err
	}
	heads := int64(1)
	if n := int64(be.Uint32(h[320:])); be.Uint32(h[8:])&logVersion != 0 && n > logHeader {
		heads = (n + logHeader - 1) / logHeader
	}
	if be.Uint32(h[40:]) == 1 {
		op, err := f.c.View(at+(off+heads*logSector)%size, logSector)
		if err != nil {
			return err
		}
		if op[9]&opUnmount != 0 {
			return nil
		}
	}
	return verdict.Unsupported("shut the machine down cleanly before taking its disk, or "+repair,
		"xfs: the disk was in use and its log holds changes")
}
