package layer

import (
	"hash"
	"sync"
)

// behind hashes memory on a goroutine of its own, in the order in which it is given, so that who reads on need not wait for
// it. Its methods are called by one goroutine.
type behind struct {
	in   chan []byte
	end  chan struct{}
	put  int64 // bytes
	mu   sync.Mutex
	cond sync.Cond
	done int64 // bytes
}

// hashBehind starts it; it has to be stopped.
func hashBehind(h hash.Hash) *behind {
	// What is given is bounded by the memory it lies in.
	b := &behind{in: make(chan []byte, SharedBytes/hashPiece), end: make(chan struct{})}
	b.cond.L = &b.mu
	go func() {
		defer close(b.end)
		for p := range b.in {
			h.Write(p)
			b.mu.Lock()
			b.done += int64(len(p))
			b.cond.Signal()
			b.mu.Unlock()
		}
	}()
	return b
}

// hash takes p, which must not change until await says so, and returns how much was taken by then.
func (b *behind) hash(p []byte) int64 {
	b.put += int64(len(p))
	b.in <- p
	return b.put
}

// await returns when the first n bytes are hashed.
func (b *behind) await(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.done < n {
		b.cond.Wait()
	}
}

// stop returns when everything is hashed.
func (b *behind) stop() {
	close(b.in)
	<-b.end
}
