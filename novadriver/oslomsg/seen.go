package oslomsg

import "sync"

// Seen remembers the _unique_id of deliveries that were accepted, so that one
// delivered again is dropped. Implementations that persist it may use the
// recorded deliveries themselves.
type Seen interface {
	// Has reports whether id was added, among the last ones remembered.
	Has(id string) bool
	// Add remembers id. It is called after ServerOptions.Accept returned nil.
	Add(id string)
}

// memorySeen is a ring of ids.
type memorySeen struct {
	mu   sync.Mutex
	ids  map[string]struct{}
	ring []string
	next int
}

// NewSeen remembers the last n ids in memory.
func NewSeen(n int) Seen {
	return &memorySeen{ids: make(map[string]struct{}, n), ring: make([]string, max(n, 1))}
}

func (s *memorySeen) Has(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.ids[id]
	return ok
}

func (s *memorySeen) Add(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.ids[id]; ok {
		return
	}
	if old := s.ring[s.next]; old != "" {
		delete(s.ids, old)
	}
	s.ring[s.next] = id
	s.ids[id] = struct{}{}
	s.next = (s.next + 1) % len(s.ring)
}
