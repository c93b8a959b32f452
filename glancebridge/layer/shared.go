package layer

import (
	"fmt"
	"io"
	"sync/atomic"
)

// The content of files need not go through the pipe between the two helpers: both map the same memory, the parser reads
// into it, and the applier writes files out of it. It is cut into blocks. The parser lends a block by naming pieces of it in
// the stream ('M') and says when it names no more ('F'); the applier gives it back, as its number in one byte of a pipe, when
// it has written everything.
//
// The parser may alter a block at any time. That changes nothing but the content of files, which it decides over anyway:
// whatever is looked at before it is used, names above all, comes by the pipe.
const (
	// SharedBlock is the size of a block in bytes.
	SharedBlock = 1 << 20
	// SharedBytes is the size of the whole.
	SharedBytes  = 8 * SharedBlock
	sharedBlocks = SharedBytes / SharedBlock
)

// block is a block as the parser sees it.
type block struct {
	no   int
	data []byte
}

// piece is content that lies in a block, or anywhere else when block is nil.
type piece struct {
	data  []byte
	block *block
	off   int // in the block
}

// cut splits a piece after n bytes.
func (p piece) cut(n int) (before, after piece) {
	return piece{p.data[:n], p.block, p.off}, piece{p.data[n:], p.block, p.off + n}
}

// lender is the parser's side.
type lender struct {
	mem    []byte
	blocks *Blocks
	cur    *block // for content that is read for the encoder alone
	used   int    // bytes of cur
}

func newLender(mem []byte, back io.Reader) *lender {
	return &lender{mem: mem, blocks: NewBlocks(sharedBlocks, back)}
}

// take gives a block to fill. flush is called before it waits: the applier must know of what it is to give back.
func (l *lender) take(flush func() error) (*block, error) {
	no, err := l.blocks.Take(flush)
	if err != nil {
		return nil, fmt.Errorf("wait for the applier: %w", err)
	}
	return &block{no: no, data: l.mem[no*SharedBlock:][:SharedBlock:SharedBlock]}, nil
}

// borrowed is the applier's side. Its methods but name and end may be called from any goroutine.
type borrowed struct {
	mem  []byte
	back io.Writer
	// users counts who may still read a block, the parser's right to name pieces of it among them; named says that it has
	// that right.
	users [sharedBlocks]atomic.Int32
	named [sharedBlocks]atomic.Bool
}

func newBorrowed(mem []byte, back io.Writer) *borrowed {
	b := &borrowed{mem: mem, back: back}
	for i := range sharedBlocks {
		b.users[i].Store(1)
		b.named[i].Store(true)
	}
	return b
}

// name gives a piece of a block, to be released.
func (b *borrowed) name(no, off, n int) ([]byte, error) {
	if no >= sharedBlocks || off > SharedBlock || n > SharedBlock-off || !b.named[no].Load() {
		return nil, fmt.Errorf("%w: %d bytes at %d of block %d", errFrame, n, off, no)
	}
	b.users[no].Add(1)
	at := no*SharedBlock + off
	return b.mem[at : at+n : at+n], nil
}

// end says that no more pieces of a block will be named.
func (b *borrowed) end(no int) error {
	if no >= sharedBlocks || !b.named[no].Load() {
		return fmt.Errorf("%w: the end of block %d", errFrame, no)
	}
	b.named[no].Store(false)
	b.release(no)
	return nil
}

// release ends a use of a block; the last one gives it back.
func (b *borrowed) release(no int) {
	if b.users[no].Add(-1) > 0 {
		return
	}
	b.users[no].Store(1)
	b.named[no].Store(true)
	// A parser that has gone needs none; what it left in the stream is still written.
	_, _ = b.back.Write([]byte{byte(no)})
}
