package glancebridge

import (
	"io"

	"github.com/novalet/novalet/glancebridge/layer"
)

// readDisk finds the root in a disk or file system and sends its entries as one layer.
func readDisk(format layer.Format, r io.ReaderAt, size int64, enc *layer.Encoder, q *parseRequest) (*layer.Result, error) {
	return nil, layer.Refuse("the image is a disk (%s), which this version does not read; upload a tar of its root file system", format)
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
