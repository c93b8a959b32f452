package layer

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// slowHash is slow to begin.
type slowHash struct {
	hash.Hash
	began bool
}

func (h *slowHash) Write(p []byte) (int, error) {
	if !h.began {
		h.began = true
		time.Sleep(200 * time.Millisecond)
	}
	return h.Hash.Write(p)
}

// TestHashBehind: memory is not used again before it was hashed, however quick the applier is.
func TestHashBehind(t *testing.T) {
	defer goleak.VerifyNone(t)
	data := make([]byte, 3*SharedBytes+12345)
	for i := range data {
		data[i] = byte(i>>12) ^ byte(i>>20)
	}
	back, done, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	// Every block comes back at once.
	r, w := io.Pipe()
	go func() {
		d := NewSharedDecoder(r, make([]byte, SharedBytes), done)
		for {
			if _, err := d.Next(); err != nil {
				return
			}
		}
	}()
	h := newHashReader(bytes.NewReader(data))
	h.h = &slowHash{Hash: h.h}
	h.share(NewSharedEncoder(w, make([]byte, SharedBytes), back))
	n, err := io.Copy(io.Discard, struct{ io.Reader }{h})
	if err == nil {
		err = h.finish()
	}
	if err != nil || n != int64(len(data)) {
		t.Fatalf("%d of %d bytes, %v", n, len(data), err)
	}
	h.stop()
	if got, want := fmt.Sprintf("%x", h.sum()), fmt.Sprintf("%x", sha256.Sum256(data)); got != want {
		t.Errorf("digest %s, want %s", got, want)
	}
	w.Close()
	done.Close()
}
