package layer

import (
	"bufio"
	"compress/bzip2"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"

	"github.com/novalet/novalet/glancebridge/layer/gunzip"
)

// maxDict bounds the window of xz and zstd in bytes: what the strongest usual setting (xz -9) takes. A larger one
// is a way to exhaust memory.
const maxDict = 64 << 20

// Decompress peels one wrapper off. The reader returned gives io.ErrUnexpectedEOF when the compressed stream is
// cut. Close ends the goroutines that read ahead; it does not close r.
func Decompress(f Format, r io.Reader) (io.ReadCloser, error) {
	switch f {
	case FormatGzip:
		z, err := gunzip.NewReader(r)
		if err != nil {
			return nil, Refuse("the image's gzip header is damaged: %v", err)
		}
		return &wrapped{z, z.Close, "gzip"}, nil
	case FormatZstd:
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxMemory(1<<40), zstd.WithDecoderMaxWindow(maxDict),
			zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, Refuse("the image's zstd header is damaged: %v", err)
		}
		return &wrapped{z, func() error { z.Close(); return nil }, "zstd"}, nil
	case FormatXz:
		br := bufio.NewReaderSize(r, 64<<10)
		if head, _ := br.Peek(64); xzDict(head) > maxDict {
			return nil, Refuse("the image's xz dictionary is larger than %d MiB; compress it with xz -9 or less", maxDict>>20)
		}
		z, err := xz.ReaderConfig{DictCap: lzma.MinDictCap}.NewReader(br)
		if err != nil {
			return nil, Refuse("the image's xz header is damaged: %v", err)
		}
		return &wrapped{z, nil, "xz"}, nil
	case FormatBzip2:
		return &wrapped{bzip2.NewReader(r), nil, "bzip2"}, nil
	}
	return nil, fmt.Errorf("decompress: unknown format %q", f)
}

type wrapped struct {
	io.Reader
	close func() error
	name  string
}

func (w *wrapped) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	if err != nil && err != io.EOF {
		err = Refuse("the image's %s data is damaged or cut: %v", w.name, err)
	}
	return n, err
}

func (w *wrapped) Close() error {
	if w.close == nil {
		return nil
	}
	return w.close()
}

// xzDict reads the dictionary size in bytes from the header of the first block, 0 when it is not where the format
// has it: the library takes whatever the file asks for. Later blocks may ask for more, which the memory limit of
// the process catches.
func xzDict(head []byte) int64 {
	if len(head) < 20 {
		return 0
	}
	b := head[12:]
	if b[0] == 0 { // an index: no block at all
		return 0
	}
	flags, b := b[1], b[2:]
	for _, bit := range []byte{0x40, 0x80} { // compressed and uncompressed size
		if flags&bit != 0 {
			_, n := binary.Uvarint(b)
			if n <= 0 {
				return 0
			}
			b = b[n:]
		}
	}
	if len(b) < 3 || b[0] != 0x21 || b[1] != 1 {
		return 0
	}
	d := b[2] & 0x3f
	if d > 40 {
		return 1 << 62
	}
	return int64(2|d&1) << (d/2 + 11)
}

// LimitRatio bounds what a decompressor gives by how much it was fed.
func LimitRatio(r io.Reader, fed func() int64, l Limits) io.Reader {
	return &ratioReader{r: r, in: fed, ratio: l.withDefaults().Ratio}
}

// ratioReader refuses a stream that grows beyond what compression explains.
type ratioReader struct {
	r     io.Reader
	in    func() int64
	ratio int64
	out   int64
}

func (r *ratioReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if r.out += int64(n); r.out > r.in()*r.ratio+64<<20 {
		return n, Refuse("the image unpacks to more than %d times its size, which no honest image does", r.ratio)
	}
	return n, err
}
