package layer

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"time"
)

// The stream between the parser and the applier is a sequence of frames. Both ends bound every length, since
// the parser may have been taken over by the image it reads.
//
//	'L' index flags            a layer begins
//	'E' entry                  an entry; for a regular file its content follows until Size bytes were given
//	'D' n bytes                n bytes of content
//	'M' block off n            n bytes of content, in the memory that both share
//	'Z' n                      n zero bytes of content that need not be stored
//	'F' block                  no more of this block's bytes will be named
//	'X'                        the layer ends
//	'Q'                        the stream ends; an end without it is a cut stream
//
// Numbers are varints, texts are a length and raw bytes.
const (
	frameLayer  = 'L'
	frameEntry  = 'E'
	frameData   = 'D'
	frameShared = 'M'
	frameFree   = 'F'
	frameZero   = 'Z'
	frameEnd    = 'X'
	frameFinish = 'Q'
)

// The bounds of one entry; what exceeds them is refused at both ends.
const (
	MaxPath       = 4096      // bytes of a path
	MaxName       = 255       // bytes of one path element
	MaxDepth      = 512       // elements of a path
	MaxSymlink    = 4095      // bytes of a symlink's target
	MaxXattrName  = 255       // bytes
	MaxXattrValue = 64 << 10  // bytes of one value
	MaxXattrs     = 256 << 10 // bytes of all names and values of one entry
	// MaxChunk bounds one data frame in bytes.
	MaxChunk = 128 << 10
	// zeroBlock is the smallest run of zero bytes that is turned into a hole: the block of common file systems.
	zeroBlock = 4096
)

// Flags of a layer in a stream.
const (
	// FlagWhiteouts: names beginning with ".wh." are deletions, as in the layers of container images.
	FlagWhiteouts = 1 << iota
	// FlagMerge: the stream holds the trees of several layers, base first, and what it makes is one that has no deletions
	// in it: a deletion, given before the other entries of its layer, acts on what is there.
	FlagMerge
)

// errFrame is the base of all errors about a malformed stream.
var errFrame = errors.New("malformed entry stream")

// Encoder writes a stream of layers. Not safe for concurrent use.
type Encoder struct {
	out    io.Writer
	w      *bufio.Writer // to out
	buf    []byte
	seg    []byte    // unless memory is shared
	sum    hash.Hash // nil unless the layer's own digest is wanted
	shared *lender   // nil unless memory is shared
}

// NewEncoder returns an encoder that writes to w.
func NewEncoder(w io.Writer) *Encoder {
	return &Encoder{out: w, w: bufio.NewWriterSize(w, 256<<10), seg: make([]byte, MaxChunk)}
}

// NewSharedEncoder returns an encoder whose content goes by the SharedBytes bytes of mem, which the decoder has before it too;
// back is where it says which blocks it is done with.
func NewSharedEncoder(w io.Writer, mem []byte, back io.Reader) *Encoder {
	return &Encoder{out: w, w: bufio.NewWriterSize(w, 256<<10), shared: newLender(mem, back)}
}

// Sum starts a digest over the entries that follow and returns the function that ends it: the name of a tree that
// came from no tar. It covers the frames, so equal trees given in the same order have equal names.
func (e *Encoder) Sum() func() string {
	e.sum = sha256.New()
	e.sum.Write([]byte("novalet entries 1\n"))
	return func() string {
		h := e.sum
		e.sum = nil
		return "sha256:" + hex.EncodeToString(h.Sum(nil))
	}
}

// Begin starts layer index; the layers of a stream need not come in order.
func (e *Encoder) Begin(index int, flags uint64) error {
	b := append(e.buf[:0], frameLayer)
	b = binary.AppendUvarint(b, uint64(index))
	b = binary.AppendUvarint(b, flags)
	return e.write(b)
}

// End ends the layer that was begun last.
func (e *Encoder) End() error { return e.write(append(e.buf[:0], frameEnd)) }

// Finish ends the stream and flushes it.
func (e *Encoder) Finish() error {
	if err := e.write(append(e.buf[:0], frameFinish)); err != nil {
		return err
	}
	return e.w.Flush()
}

// Entry implements Sink: it writes one entry and, of a regular file, all of its content.
func (e *Encoder) Entry(en *Entry, content io.Reader) error {
	b := append(e.buf[:0], frameEntry, byte(en.Type))
	b = appendText(b, en.Name)
	b = binary.AppendUvarint(b, uint64(en.Mode))
	b = binary.AppendUvarint(b, uint64(en.UID))
	b = binary.AppendUvarint(b, uint64(en.GID))
	b = binary.AppendVarint(b, en.ModTime.Unix())
	b = binary.AppendUvarint(b, uint64(en.ModTime.Nanosecond()))
	b = binary.AppendUvarint(b, uint64(max(en.Size, 0)))
	b = appendText(b, en.Linkname)
	b = binary.AppendUvarint(b, uint64(en.Major))
	b = binary.AppendUvarint(b, uint64(en.Minor))
	b = binary.AppendUvarint(b, uint64(len(en.Xattrs)))
	if len(en.Xattrs) > 0 {
		for _, k := range sortedKeys(en.Xattrs) {
			b = appendText(b, k)
			b = appendText(b, en.Xattrs[k])
		}
	}
	if err := e.write(b); err != nil {
		return err
	}
	if en.Type != TypeRegular || en.Size <= 0 {
		return nil
	}
	if c, ok := content.(*tarContent); ok && e.shared != nil {
		return e.pieces(c, en.Size)
	}
	return e.read(content, en.Size)
}

func (e *Encoder) write(b []byte) error {
	e.buf = b[:0]
	if e.sum != nil {
		e.sum.Write(b)
	}
	_, err := e.w.Write(b)
	return err
}

func appendText(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// Frame is what Decoder.Next found.
type Frame struct {
	Kind  byte // 'L', 'E', 'X' or 'Q'
	Index int
	Flags uint64
	Entry *Entry
}

// Decoder reads what an Encoder wrote. It trusts nothing: lengths are bounded, and an end without the finishing
// frame is io.ErrUnexpectedEOF.
type Decoder struct {
	r      *bufio.Reader
	left   int64     // content bytes of the current entry not yet given
	used   int       // bytes of r's buffer that were given last
	shared *borrowed // nil unless memory is shared
	block  int       // of the piece that was given last, else -1
	waits  func()    // called before it may have to wait for more, unless nil
	frame  Frame     // given last
	entry  Entry     // of it
}

// NewDecoder returns a decoder that reads from r.
func NewDecoder(r io.Reader) *Decoder {
	d := &Decoder{block: -1}
	d.r = bufio.NewReaderSize(readerFunc(func(p []byte) (int, error) {
		if d.waits != nil {
			d.waits()
		}
		return r.Read(p)
	}), 4*MaxChunk)
	return d
}

// NewSharedDecoder returns a decoder for what a shared encoder writes.
func NewSharedDecoder(r io.Reader, mem []byte, back io.Writer) *Decoder {
	d := NewDecoder(r)
	d.shared = newBorrowed(mem, back)
	return d
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Next reads the next frame that is no content; it is valid until the next call. The content of the entry before must have been
// consumed.
func (d *Decoder) Next() (*Frame, error) {
	if d.left != 0 {
		return nil, fmt.Errorf("%w: content of the entry before was not read", errFrame)
	}
	k, err := d.kind()
	if err != nil {
		return nil, err
	}
	switch k {
	case frameLayer:
		i, err := d.number(1 << 20)
		if err != nil {
			return nil, err
		}
		flags, err := d.number(1 << 20)
		d.frame = Frame{Kind: k, Index: int(i), Flags: flags}
		return &d.frame, err
	case frameEntry:
		e, err := d.readEntry()
		d.frame = Frame{Kind: k, Entry: e}
		return &d.frame, err
	case frameEnd, frameFinish:
		d.frame = Frame{Kind: k}
		return &d.frame, nil
	}
	return nil, fmt.Errorf("%w: frame %#x", errFrame, k)
}

// kind reads the first byte of a frame.
func (d *Decoder) kind() (byte, error) {
	d.release(d.keep())
	_, err := d.r.Discard(d.used)
	d.used = 0
	if err != nil {
		return 0, unexpected(err)
	}
	for {
		k, err := d.r.ReadByte()
		if err != nil || k != frameFree || d.shared == nil {
			return k, unexpected(err)
		}
		no, err := d.number(sharedBlocks - 1)
		if err == nil {
			err = d.shared.end(int(no))
		}
		if err != nil {
			return 0, err
		}
	}
}

// keep gives the block of the piece that segment gave last, or -1. The piece is valid until the block is released; else
// it is until the next call.
func (d *Decoder) keep() int {
	b := d.block
	d.block = -1
	return b
}

// release may be called from any goroutine.
func (d *Decoder) release(block int) {
	if block >= 0 {
		d.shared.release(block)
	}
}

func (d *Decoder) readEntry() (*Entry, error) {
	t, err := d.r.ReadByte()
	if err != nil {
		return nil, unexpected(err)
	}
	e := &d.entry
	*e = Entry{Type: Type(t)}
	if e.Type < TypeRegular || e.Type > TypeSocket {
		return nil, fmt.Errorf("%w: entry type %d", errFrame, t)
	}
	if e.Name, err = d.text(MaxPath); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		to  *uint32
		max uint64
	}{{&e.Mode, 07777}, {&e.UID, 1<<32 - 1}, {&e.GID, 1<<32 - 1}} {
		n, err := d.number(f.max)
		if err != nil {
			return nil, err
		}
		*f.to = uint32(n)
	}
	sec, err := binary.ReadVarint(d.r)
	if err != nil {
		return nil, unexpected(err)
	}
	nsec, err := d.number(999_999_999)
	if err != nil {
		return nil, err
	}
	e.ModTime = time.Unix(sec, int64(nsec))
	size, err := d.number(1<<63 - 1)
	if err != nil {
		return nil, err
	}
	e.Size = int64(size)
	if e.Linkname, err = d.text(MaxPath); err != nil {
		return nil, err
	}
	for _, to := range []*uint32{&e.Major, &e.Minor} {
		n, err := d.number(1<<32 - 1)
		if err != nil {
			return nil, err
		}
		*to = uint32(n)
	}
	n, err := d.number(MaxXattrs)
	if err != nil {
		return nil, err
	}
	if n > 0 {
		e.Xattrs = make(map[string]string)
		total := 0
		for range n {
			k, err := d.text(MaxXattrName)
			if err != nil {
				return nil, err
			}
			v, err := d.text(MaxXattrValue)
			if err != nil {
				return nil, err
			}
			if total += len(k) + len(v); total > MaxXattrs {
				return nil, fmt.Errorf("%w: extended attributes of more than %d bytes", errFrame, MaxXattrs)
			}
			e.Xattrs[k] = v
		}
	}
	if e.Type == TypeRegular {
		d.left = e.Size
	} else {
		e.Size = 0
	}
	return e, nil
}

// segment gives the next piece of the current entry's content: data, valid until the next call, or a count of
// zero bytes. Both empty is the end.
func (d *Decoder) segment() (data []byte, zeros int64, err error) {
	if d.left == 0 {
		return nil, 0, nil
	}
	k, err := d.kind()
	if err != nil {
		return nil, 0, err
	}
	switch k {
	case frameZero:
		n, err := d.number(uint64(d.left))
		if err != nil {
			return nil, 0, err
		}
		if n == 0 {
			return nil, 0, fmt.Errorf("%w: empty zero frame", errFrame)
		}
		d.left -= int64(n)
		return nil, int64(n), nil
	case frameData:
		n, err := d.number(uint64(min(d.left, MaxChunk)))
		if err != nil {
			return nil, 0, err
		}
		d.left -= int64(n)
		if n == 0 {
			return nil, 0, fmt.Errorf("%w: empty data frame", errFrame)
		}
		// A piece fits the buffer, and is given where it lies there.
		b, err := d.r.Peek(int(n))
		if err != nil {
			return nil, 0, unexpected(err)
		}
		d.used = len(b)
		return b, 0, nil
	}
	if k == frameShared && d.shared != nil {
		return d.piece()
	}
	return nil, 0, fmt.Errorf("%w: frame %#x inside content", errFrame, k)
}

// piece gives content that lies in the shared memory.
func (d *Decoder) piece() (data []byte, zeros int64, err error) {
	var v [3]uint64
	for i, limit := range []uint64{sharedBlocks - 1, SharedBlock, uint64(min(d.left, SharedBlock))} {
		if v[i], err = d.number(limit); err != nil {
			return nil, 0, err
		}
	}
	no, off, n := int(v[0]), int(v[1]), int(v[2])
	if n == 0 {
		return nil, 0, fmt.Errorf("%w: empty data frame", errFrame)
	}
	if data, err = d.shared.name(no, off, n); err != nil {
		return nil, 0, err
	}
	d.left -= int64(n)
	d.block = no
	return data, 0, nil
}

func (d *Decoder) number(limit uint64) (uint64, error) {
	n, err := binary.ReadUvarint(d.r)
	if err != nil {
		return 0, unexpected(err)
	}
	if n > limit {
		return 0, fmt.Errorf("%w: number %d above %d", errFrame, n, limit)
	}
	return n, nil
}

func (d *Decoder) text(limit int) (string, error) {
	n, err := d.number(uint64(limit))
	if err != nil || n == 0 {
		return "", err
	}
	// It fits the buffer.
	b, err := d.r.Peek(int(n))
	if err != nil {
		return "", unexpected(err)
	}
	s := string(b)
	_, err = d.r.Discard(len(b))
	return s, err
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
