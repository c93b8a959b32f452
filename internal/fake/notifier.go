package fake

import (
	"slices"
	"sync"

	"github.com/novalet/novalet"
)

// Notifier is a fake novalet.Notifier that remembers what it was told.
type Notifier struct {
	mu   sync.Mutex
	told []novalet.Notification
}

var _ novalet.Notifier = (*Notifier)(nil)

// Notify implements novalet.Notifier.
func (f *Notifier) Notify(n *novalet.Notification) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, *n)
}

// Told returns what was told of an instance, in order.
func (f *Notifier) Told(uuid string) []novalet.Notification {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.told), func(n novalet.Notification) bool { return n.Instance.UUID != uuid })
}

// Forget drops all that was told.
func (f *Notifier) Forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = nil
}
