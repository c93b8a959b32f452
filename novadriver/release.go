package novadriver

import (
	"sync/atomic"

	"github.com/novalet/novalet/novadriver/ovo"
)

// releaseBox holds the release spoken with the controllers. It changes when they are upgraded, and when the conductor
// says that it knows an object only in an older version.
type releaseBox struct{ p atomic.Pointer[ovo.Release] }

func newReleaseBox(r *ovo.Release) *releaseBox {
	b := &releaseBox{}
	b.p.Store(r)
	return b
}

func (b *releaseBox) get() *ovo.Release { return b.p.Load() }

func (b *releaseBox) set(r *ovo.Release) { b.p.Store(r) }

func (b *releaseBox) lower(name, version string) {
	for {
		old := b.p.Load()
		if b.p.CompareAndSwap(old, old.Lower(name, version)) {
			return
		}
	}
}

// hasComputeID reports whether Instance has compute_id, which must then be saved with every change of node.
func (b *releaseBox) hasComputeID() bool { return b.get().Version("Instance") != "2.7" }
