package glancebridge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// spoolFile is a file for what cannot be read as a stream.
type spoolFile interface {
	io.ReadWriteSeeker
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
}

// A disk is read at random, so all of it has to lie somewhere: in the spool. The parser reads there what has come while the
// rest is still coming; notes of eight bytes tell it how far that is.
const (
	noteLen = 8
	// A note comes after so many bytes, and so seldom that all of them fit into a pipe: telling a parser that does not
	// ask must not hold up the download.
	minNote  = 1 << 20
	maxNotes = 4096
)

// trailed is a disk whose download hashes it behind the writing of the spool.
type trailed struct {
	io.Reader
	d *download
	t *trail
}

// behind has a disk of known size hashed out of the spool, if it comes from a download: the parser need not wait for the hash
// then.
func behind(disk io.Reader, src source, spool io.ReaderAt) io.Reader {
	d, ok := src.(*download)
	if !ok {
		return disk
	}
	return &trailed{disk, d, d.hashBehind(spool)}
}

// feedDisk copies a disk of size bytes to the spool, with notes for the parser; nil is one that lies there already. parsed
// waits for the parser and says whether it came to a good end: the disk is read to its own end then, since whoever gives it
// checks the whole. An EPIPE or io.ErrClosedPipe says that the parser has gone for another reason.
func feedDisk(notes io.Writer, spool spoolFile, disk io.Reader, size int64, parsed func() bool) error {
	note := func(off int64) error {
		_, err := notes.Write(binary.BigEndian.AppendUint64(nil, uint64(off)))
		return err
	}
	if disk == nil {
		return note(size)
	}
	if err := spool.Truncate(size); err != nil {
		return fmt.Errorf("spool disk: %w", err)
	}
	tr, _ := disk.(*trailed)
	step, told := max(minNote, size/maxNotes+1), int64(0)
	_, err := copySparse(spool, disk, size, func(off int64) error {
		if tr != nil {
			tr.t.written(off)
		}
		if off-told < step && off < size {
			return nil
		}
		told = off
		return note(off)
	})
	if (errors.Is(err, unix.EPIPE) || errors.Is(err, io.ErrClosedPipe)) && parsed() {
		if tr != nil {
			// What comes now is not written.
			if err := tr.d.hashInline(); err != nil {
				return err
			}
		}
		_, err = io.Copy(io.Discard, disk)
	}
	return err
}

// spooled is the parser's side: a disk of size bytes whose beginning is in the spool. Safe for concurrent use.
type spooled struct {
	spool io.ReaderAt
	size  int64

	mu    sync.Mutex
	notes io.Reader
	have  int64
}

// ReadAt implements io.ReaderAt; it waits for what is still to come.
func (s *spooled) ReadAt(p []byte, off int64) (int, error) {
	if err := s.await(min(off+int64(len(p)), s.size)); err != nil {
		return 0, err
	}
	return s.spool.ReadAt(p, off)
}

func (s *spooled) await(end int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.have < end {
		var note [noteLen]byte
		if _, err := io.ReadFull(s.notes, note[:]); err != nil {
			// Not for the tenant: who feeds us knows why.
			return fmt.Errorf("wait for byte %d of the disk, %d have come: %v", end, s.have, err)
		}
		s.have = int64(binary.BigEndian.Uint64(note[:]))
	}
	return nil
}

// copySparse copies to an empty file, leaving holes where the input is zero, and returns the length. progress, when not
// nil, is told of each step. Where size bytes are expected, and not 0, all of them are written before more are asked for.
func copySparse(w spoolFile, r io.Reader, size int64, progress func(off int64) error) (int64, error) {
	buf := make([]byte, 128<<10)
	var off int64
	for {
		b := buf
		if left := size - off; left > 0 {
			b = buf[:min(left, int64(len(buf)))]
		}
		n, err := io.ReadFull(r, b)
		if n > 0 {
			if b := buf[:n]; !allZero(b) {
				if _, err := w.WriteAt(b, off); err != nil {
					return 0, fmt.Errorf("spool disk: %w", err)
				}
			}
			off += int64(n)
			if progress != nil {
				if err := progress(off); err != nil {
					return 0, err
				}
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			// A hole at the end is only there once something says so.
			return off, w.Truncate(off)
		}
		if err != nil {
			return 0, err
		}
	}
}
