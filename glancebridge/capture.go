package glancebridge

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
)

// capture is a copy of a running instance's writable layer at one moment: what it holds in memory, and the contents
// of its files in one unlinked file.
//
// It is made in two walks. The first copies everything while the instance runs; the second, while it is frozen, copies
// again only what changed, so that the instance stands still for about as long as it takes to look at each file.
type capture struct {
	spool   *os.File
	off     int64
	copies  map[[2]uint64]copied // by inode
	entries []captured
	ids     shift
	started time.Time
}

// copied is a file's content in the spool and what the file looked like before it was copied.
type copied struct {
	size       int64
	ctim, mtim unix.Timespec
	data       []layer.Extent // in the file
	at         []int64        // where each lies in the spool
	frozen     bool           // copied while nothing could change
}

type captured struct {
	e    *walkEntry
	copy copied
}

// ctimeGrain is how long a second change may leave the change time as it was.
const ctimeGrain = time.Second

// captureTree copies the upper layer below root. freeze stops the instance and returns what lets it go on.
func captureTree(ctx context.Context, root int, ids shift, spool *os.File, freeze func(context.Context) (func(), error)) (*capture, error) {
	c := &capture{spool: spool, copies: map[[2]uint64]copied{}, ids: ids}
	// Pages that are dirty through a memory map change without changing the file's times; once written out, the next
	// change shows.
	if err := unix.Syncfs(root); err != nil {
		return nil, fmt.Errorf("capture: sync: %w", err)
	}
	c.started = time.Now()
	if err := c.walk(ctx, root, false); err != nil {
		return nil, err
	}
	if freeze != nil {
		thaw, err := freeze(ctx)
		if err != nil {
			return nil, fmt.Errorf("capture: freeze: %w", err)
		}
		defer thaw()
	}
	return c, c.walk(ctx, root, true)
}

// walk copies what is new or has changed; the last one also keeps the list of entries.
func (c *capture) walk(ctx context.Context, root int, last bool) error {
	return walkTree(root, c.ids, func(e *walkEntry) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		var cp copied
		if e.Type == layer.TypeRegular {
			var err error
			if cp, err = c.content(e, last); err != nil {
				return fmt.Errorf("capture %q: %w", cut(e.Name), err)
			}
			e.Size = cp.size
		}
		if !last {
			return nil
		}
		if len(c.entries) >= layer.DefaultEntries {
			return fmt.Errorf("capture: more than %d files", layer.DefaultEntries)
		}
		e.open = nil
		c.entries = append(c.entries, captured{e, cp})
		return nil
	})
}

// content returns the copy of a file, made now unless there is one that still holds.
func (c *capture) content(e *walkEntry, last bool) (copied, error) {
	key := [2]uint64{uint64(e.st.Dev), e.st.Ino}
	have, ok := c.copies[key]
	settled := timeOf(e.st.Ctim).Before(c.started.Add(-ctimeGrain))
	if ok && have.size == e.st.Size && have.ctim == e.st.Ctim && have.mtim == e.st.Mtim && (settled || have.frozen) {
		return have, nil
	}
	if !settled && !last {
		return copied{}, nil // it will be copied in the second walk anyway
	}
	f, err := e.open()
	if err != nil {
		return copied{}, err
	}
	cp := copied{size: e.st.Size, ctim: e.st.Ctim, mtim: e.st.Mtim, frozen: last}
	for pos := int64(0); pos < cp.size; {
		start, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		if err != nil {
			return copied{}, err
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return copied{}, err
		}
		start, end = min(start, cp.size), min(end, cp.size)
		if end <= start {
			break
		}
		if _, err := f.Seek(start, io.SeekStart); err != nil {
			return copied{}, err
		}
		n, err := io.Copy(c.spool, io.LimitReader(f, end-start)) // copy_file_range(2)
		if err != nil {
			return copied{}, err
		}
		cp.data = append(cp.data, layer.Extent{Off: start, Len: n})
		cp.at = append(cp.at, c.off)
		c.off += n
		pos = end
		if n < end-start {
			break // cut meanwhile; a change that the second walk sees
		}
	}
	c.copies[key] = cp
	return cp, nil
}

// write gives the captured layer as a tar. It may be called again and gives the same bytes.
func (c *capture) write(w io.Writer) error {
	l := newLayerWriter(w)
	for i := range c.entries {
		en := &c.entries[i]
		if err := l.add(en.e, func() (io.Reader, error) { return &copyReader{c: c, copied: en.copy}, nil }); err != nil {
			return err
		}
	}
	return l.w.Close()
}

// copyReader reads a copied file, zeros where it has holes.
type copyReader struct {
	c   *capture
	pos int64
	copied
}

func (r *copyReader) Read(p []byte) (int, error) {
	if r.pos >= r.size {
		return 0, io.EOF
	}
	for len(r.data) > 0 && r.pos >= r.data[0].Off+r.data[0].Len {
		r.data, r.at = r.data[1:], r.at[1:]
	}
	end := r.size
	if len(r.data) > 0 {
		if x := r.data[0]; r.pos >= x.Off {
			n, err := r.c.spool.ReadAt(p[:min(int64(len(p)), x.Off+x.Len-r.pos)], r.at[0]+r.pos-x.Off)
			r.pos += int64(n)
			if n > 0 {
				err = nil
			}
			return n, err
		}
		end = min(end, r.data[0].Off)
	}
	n := int(min(int64(len(p)), end-r.pos))
	clear(p[:n])
	r.pos += int64(n)
	return n, nil
}
