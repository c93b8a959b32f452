package layer

import "hash"

// behind hashes memory on a goroutine of its own, in the order in which it is given, so that who reads on need not wait for
// it. Its methods are called by one goroutine.
type behind struct {
	in  chan behindJob
	end chan struct{}
}

// behindJob is memory to hash, or a mark to close once everything before it is hashed.
type behindJob struct {
	p    []byte
	mark chan struct{}
}

// hashBehind starts it; it has to be stopped.
func hashBehind(h hash.Hash) *behind {
	// Room for all of the shared memory and a mark for each block: what is given lies there.
	b := &behind{in: make(chan behindJob, sharedBlocks*(SharedBlock/hashPiece+1)), end: make(chan struct{})}
	go func() {
		defer close(b.end)
		for j := range b.in {
			if j.mark != nil {
				close(j.mark)
				continue
			}
			h.Write(j.p)
		}
	}()
	return b
}

// hash takes p, which must not change before a mark that is made later is closed.
func (b *behind) hash(p []byte) { b.in <- behindJob{p: p} }

// mark gives a channel that is closed when everything that was given is hashed.
func (b *behind) mark() <-chan struct{} {
	m := make(chan struct{})
	b.in <- behindJob{mark: m}
	return m
}

// stop returns when everything is hashed.
func (b *behind) stop() {
	close(b.in)
	<-b.end
}
