package layer

import (
	"fmt"
	"io"
)

// Blocks tells which blocks of shared memory may be filled: those that were not lent, and those whose number came back in one
// byte of a pipe. Not safe for concurrent use.
type Blocks struct {
	back io.Reader
	free []int
	out  []bool
}

// NewBlocks begins with n blocks, at most 256, of which none is lent; back is where their numbers come from.
func NewBlocks(n int, back io.Reader) *Blocks {
	b := &Blocks{back: back, out: make([]bool, n)}
	for i := range n {
		b.free = append(b.free, i)
	}
	return b
}

// Take gives a block, which is lent from then on. Without a free one it calls wait, unless nil, and blocks until one comes
// back. io.EOF says that nobody is left to give one back; another number than that of a lent block is an error.
func (b *Blocks) Take(wait func() error) (int, error) {
	if len(b.free) == 0 {
		if wait != nil {
			if err := wait(); err != nil {
				return 0, err
			}
		}
		nos := make([]byte, len(b.out))
		n, err := b.back.Read(nos)
		if n == 0 {
			if err == nil {
				err = io.ErrNoProgress
			}
			return 0, err
		}
		for _, no := range nos[:n] {
			if int(no) >= len(b.out) || !b.out[no] {
				return 0, fmt.Errorf("it gives back block %d", no)
			}
			b.out[no] = false
			b.free = append(b.free, int(no))
		}
	}
	no := b.free[0]
	b.free = b.free[1:]
	b.out[no] = true
	return no, nil
}
