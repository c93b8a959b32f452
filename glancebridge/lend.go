package glancebridge

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
)

// An image that is read as a stream goes to the parser by memory: the agent reads it into blocks, hashes it there, and writes
// notes of where the next bytes lie; the parser gives a block back, as its number in one byte of a pipe, when it has read it
// to its end. The memory is sealed, so that nobody but the agent can write to it: what was hashed is what is parsed.
const (
	lentBlock  = 256 << 10
	lentBlocks = 8
	lentBytes  = lentBlocks * lentBlock
)

// lender is the agent's side.
type lender struct {
	mem    []byte
	notes  io.Writer // to the parser
	blocks *layer.Blocks
}

// lendMemory makes the memory, and the file that the parser maps it by.
func lendMemory() ([]byte, *os.File, error) {
	f, err := memoryFile(lentBytes, 0)
	if err != nil {
		return nil, nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, lentBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err == nil {
		// This mapping stays writable, any other one is not and cannot be made so (memfd_create(2)).
		if _, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE|unix.F_SEAL_SEAL); err != nil {
			_ = unix.Munmap(mem)
		}
	}
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("lend memory: %w", err)
	}
	return mem, f, nil
}

func newLender(mem []byte, notes io.Writer, back io.Reader) *lender {
	return &lender{mem: mem, notes: notes, blocks: layer.NewBlocks(lentBlocks, back)}
}

// send passes on all of an image. An EPIPE says that the parser has gone.
func (l *lender) send(in io.Reader) error {
	var rest []byte
	at := 0
	for {
		if len(rest) == 0 {
			no, err := l.blocks.Take(nil)
			if err == io.EOF {
				return unix.EPIPE
			}
			if err != nil {
				return fmt.Errorf("lend memory: %w", err)
			}
			at = no * lentBlock
			rest = l.mem[at : at+lentBlock]
		}
		n, err := in.Read(rest)
		if n > 0 {
			if _, err := l.notes.Write(binary.BigEndian.AppendUint64(nil, uint64(at)<<32|uint64(n))); err != nil {
				return err
			}
			rest, at = rest[n:], at+n
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// lent is the parser's side: the image as a stream.
type lent struct {
	mem   []byte
	notes io.Reader
	back  io.Writer
	at    int // of have in mem
	have  []byte
}

func newLent(mem []byte, notes io.Reader, back io.Writer) *lent {
	return &lent{mem: mem, notes: bufio.NewReaderSize(notes, 16*noteLen), back: back}
}

// Read implements io.Reader.
func (l *lent) Read(p []byte) (int, error) {
	if len(l.have) == 0 {
		var note [noteLen]byte
		if _, err := io.ReadFull(l.notes, note[:]); err != nil {
			return 0, err
		}
		v := binary.BigEndian.Uint64(note[:])
		l.at = int(v >> 32)
		l.have = l.mem[l.at : l.at+int(uint32(v))]
	}
	n := copy(p, l.have)
	l.have, l.at = l.have[n:], l.at+n
	if len(l.have) == 0 && l.at%lentBlock == 0 {
		if _, err := l.back.Write([]byte{byte(l.at/lentBlock - 1)}); err != nil {
			return n, fmt.Errorf("give back memory: %w", err)
		}
	}
	return n, nil
}

// beyond reads what a bufio.Reader has and then from below it: its buffer would cost a copy of all that comes.
func beyond(br *bufio.Reader, r io.Reader) io.Reader {
	have, _ := br.Peek(br.Buffered())
	return io.MultiReader(bytes.NewReader(have), r)
}
