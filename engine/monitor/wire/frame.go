package wire

import (
	"encoding/binary"
	"fmt"
	"io"
)

// WriteFrame writes one frame of a console stream: kind, 24-bit length, payload.
func WriteFrame(w io.Writer, kind byte, p []byte) error {
	for first := true; first || len(p) > 0; first = false {
		n := min(len(p), MaxFrame)
		buf := make([]byte, 4, 4+n)
		binary.BigEndian.PutUint32(buf, uint32(n))
		buf[0] = kind
		if _, err := w.Write(append(buf, p[:n]...)); err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// ReadFrame reads one frame.
func ReadFrame(r io.Reader) (kind byte, p []byte, err error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	kind, head[0] = head[0], 0
	n := binary.BigEndian.Uint32(head[:])
	if n > MaxFrame {
		return 0, nil, fmt.Errorf("read frame: %d bytes are more than %d", n, MaxFrame)
	}
	p = make([]byte, n)
	if _, err := io.ReadFull(r, p); err != nil {
		return 0, nil, err
	}
	return kind, p, nil
}
