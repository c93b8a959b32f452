package glancebridge

import (
	"bufio"
	"io"
	"os"
	"sync/atomic"

	"github.com/novalet/novalet/glancebridge/layer"
)

var _ spoolFile = (*os.File)(nil)

// parseImage tells what an image is and reads it by its kind. A stream is read to its end in any case that
// succeeds, so that who feeds it can check what it fed.
func parseImage(in io.Reader, enc *layer.Encoder, spool spoolFile, q *parseRequest) (*layer.Result, error) {
	o := layer.ArchiveOptions{Arch: q.Arch, Ref: q.Ref, Limits: q.Limits,
		Spool: func() (io.ReadWriteSeeker, error) { return spool, nil }}
	if len(q.Known) > 0 {
		known := make(map[string]bool, len(q.Known))
		for _, d := range q.Known {
			known[d] = true
		}
		o.Known = func(d string) bool { return known[d] }
	}
	if len(q.Trusted) > 0 {
		o.Trusted = q.Trusted
		in = &gapReader{r: in, gaps: q.Trusted}
	}
	if q.Spooled {
		in = io.NewSectionReader(&spooled{spool: spool, notes: in, size: q.Size}, 0, q.Size)
	}
	count := &countReader{r: in}
	below := io.Reader(count)
	br := bufio.NewReaderSize(below, 256<<10)
	suffix := ""
	var closers []io.Closer
	defer func() {
		for _, c := range closers {
			c.Close()
		}
	}()
	for depth := 0; ; depth++ {
		head, err := br.Peek(layer.DetectLen)
		if err != nil && err != io.EOF {
			return nil, err
		}
		if len(head) == 0 {
			return nil, layer.Refuse("the image is empty; upload its data")
		}
		format, err := layer.Detect(head)
		if err != nil {
			return nil, err
		}
		if text := layer.RefusalText(format); text != "" {
			return nil, layer.Refuse("%s", text)
		}
		switch {
		case format.IsWrapper():
			// One wrapper is usual, a second one an accident; more are a bomb.
			if depth == 2 {
				return nil, layer.Refuse("the image is compressed more than twice; compress it once")
			}
			z, err := layer.Decompress(format, beyond(br, below))
			if err != nil {
				return nil, err
			}
			closers = append(closers, z)
			suffix += "." + string(format)
			below = layer.LimitRatio(z, count.count, q.Limits)
			br = bufio.NewReaderSize(below, 256<<10)
		case format == layer.FormatTar:
			res, err := layer.ReadArchive(br, enc, o)
			if err != nil {
				return nil, err
			}
			res.Format += suffix
			_, err = io.Copy(io.Discard, count)
			return res, err
		case format.IsDisk():
			r, size, err := randomAccess(in, br, spool, depth == 0)
			if err != nil {
				return nil, err
			}
			res, err := readDisk(r, size, enc, q)
			if err != nil {
				return nil, err
			}
			res.Format += suffix
			if !q.Spooled {
				_, err = io.Copy(io.Discard, count)
			}
			return res, err
		default:
			return nil, layer.Refuse("the image is in no format that can be booted here; upload a docker save archive, a tar of " +
				"a root file system, or a qcow2 or raw disk")
		}
	}
}

// randomAccess gives a disk as something that can be read anywhere, by way of the spool unless it is the image itself, which
// lies there already.
func randomAccess(in io.Reader, br *bufio.Reader, spool spoolFile, itself bool) (io.ReaderAt, int64, error) {
	if s, ok := in.(*io.SectionReader); ok && itself {
		return s, s.Size(), nil
	}
	size, err := copySparse(spool, br, 0, nil)
	if err != nil {
		return nil, 0, err
	}
	return spool, size, nil
}

// countReader counts what passes; decompressors read ahead on goroutines of their own.
type countReader struct {
	r io.Reader
	n atomic.Int64
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func (c *countReader) count() int64 { return c.n.Load() }
