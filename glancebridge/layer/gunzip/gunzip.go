// Package gunzip undoes gzip (RFC 1952), about twice as fast as compress/gzip (BenchmarkGunzip): half of what reading a
// compressed root file system costs is this. A goroutine reads ahead, and ends with Close or the stream. It keeps nothing on disk.
package gunzip

import (
	"errors"
	"hash/crc32"
	"io"
	"sync"
)

// errHeader says that what follows is no member of a gzip file.
var errHeader = errors.New("gzip: damaged header")

// errSum says that a member's checksum or length is wrong.
var errSum = errors.New("gzip: wrong checksum")

// buffers is how many pieces of the stream there are, one with the caller and one that is being filled.
const buffers = 3

// piece is a part of the stream, in a buffer to give back.
type piece struct {
	data, buf []byte
	err       error
}

// Reader gives what was compressed. Not safe for concurrent use.
type Reader struct {
	full chan piece
	free chan []byte
	cur  piece
	stop chan struct{}
	once sync.Once
	done sync.WaitGroup
}

// NewReader reads the first header. The stream may have several members, and ends with io.EOF or an error: io.ErrUnexpectedEOF
// when it is cut.
func NewReader(r io.Reader) (*Reader, error) {
	f := newInflater(r)
	if err := f.member(); err == io.EOF {
		return nil, io.ErrUnexpectedEOF
	} else if err != nil {
		return nil, err
	}
	z := &Reader{full: make(chan piece, buffers), free: make(chan []byte, buffers), stop: make(chan struct{})}
	for range buffers {
		z.free <- nil
	}
	z.done.Go(func() {
		defer close(z.full)
		z.run(f)
	})
	return z, nil
}

// run inflates all members.
func (z *Reader) run(f *inflater) {
	sum, size := uint32(0), uint32(0)
	for {
		var buf []byte
		select {
		case buf = <-z.free:
		case <-z.stop:
			return
		}
		if buf == nil {
			buf = newOut()
		}
		data, err := f.next(buf)
		if err == io.EOF {
			if err = f.trailer(sum, size); err == nil {
				err = f.member()
			}
			sum, size = 0, 0
		}
		sum = crc32.Update(sum, crc32.IEEETable, data)
		size += uint32(len(data))
		z.full <- piece{data, buf, err}
		if err != nil {
			return
		}
	}
}

// Read implements io.Reader.
func (z *Reader) Read(p []byte) (int, error) {
	for len(z.cur.data) == 0 {
		if z.cur.err != nil {
			return 0, z.cur.err
		}
		if z.cur.buf != nil {
			z.free <- z.cur.buf
		}
		var ok bool
		if z.cur, ok = <-z.full; !ok {
			z.cur = piece{err: io.ErrClosedPipe}
		}
	}
	n := copy(p, z.cur.data)
	z.cur.data = z.cur.data[n:]
	return n, nil
}

// Close ends the reading ahead; it waits for a read that is under way.
func (z *Reader) Close() error {
	z.once.Do(func() { close(z.stop) })
	z.done.Wait()
	return nil
}

// member reads a header; io.EOF says that there is none.
func (f *inflater) member() error {
	f.begin()
	sum := uint32(0)
	get := func() (byte, error) {
		b, err := f.byte()
		if err != nil {
			return 0, f.cut()
		}
		sum = crc32.Update(sum, crc32.IEEETable, []byte{b})
		return b, nil
	}
	var h [10]byte
	for i := range h {
		b, err := f.byte()
		if err == io.EOF && i > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		h[i] = b
	}
	const (
		headerSum = 1 << (1 + iota)
		extra
		name
		comment
	)
	if h[0] != 0x1f || h[1] != 0x8b || h[2] != 8 {
		return errHeader
	}
	sum = crc32.ChecksumIEEE(h[:])
	if h[3]&extra != 0 {
		var n int
		for i := range 2 {
			b, err := get()
			if err != nil {
				return err
			}
			n |= int(b) << (8 * i)
		}
		for range n {
			if _, err := get(); err != nil {
				return err
			}
		}
	}
	for _, flag := range []byte{name, comment} {
		for b := byte(1); h[3]&flag != 0 && b != 0; {
			var err error
			if b, err = get(); err != nil {
				return err
			}
		}
	}
	if h[3]&headerSum != 0 {
		want := uint16(sum)
		for i := range 2 {
			b, err := get()
			if err != nil {
				return err
			}
			if b != byte(want>>(8*i)) {
				return errHeader
			}
		}
	}
	return nil
}

// trailer checks what follows a member.
func (f *inflater) trailer(sum, size uint32) error {
	for i := range 8 {
		b, err := f.byte()
		if err != nil {
			return f.cut()
		}
		want := sum >> (8 * i)
		if i >= 4 {
			want = size >> (8 * (i - 4))
		}
		if b != byte(want) {
			return errSum
		}
	}
	return nil
}
