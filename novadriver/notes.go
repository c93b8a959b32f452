package novadriver

import (
	"maps"
	"sync"
	"time"
)

// notesFor is how long a build is remembered that left no instance here.
const notesFor = 24 * time.Hour

// notes remembers which builds this process was handed, and whose consoles were opened since: so much less has to be
// asked. What is forgotten only costs a call.
type notes struct {
	mu    sync.Mutex
	built map[string]time.Time // uuid, when its build came
	token map[string]bool      // uuid, a console token was made
}

func newNotes() *notes { return &notes{built: map[string]time.Time{}, token: map[string]bool{}} }

func (n *notes) build(uuid string, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.built[uuid] = now
}

// knows reports whether the build of the instance came to this process.
func (n *notes) knows(uuid string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.built[uuid]
	return ok
}

func (n *notes) opened(uuid string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.token[uuid] = true
}

// mayHaveTokens reports whether console tokens of the instance may exist: it is older than this process, or its
// console was opened.
func (n *notes) mayHaveTokens(uuid string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ours := n.built[uuid]
	return !ours || n.token[uuid]
}

// forget drops what is known of an instance.
func (n *notes) forget(uuid string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.built, uuid)
	delete(n.token, uuid)
}

// prune drops old builds of instances that are not here.
func (n *notes) prune(here map[string]bool, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	maps.DeleteFunc(n.built, func(uuid string, at time.Time) bool { return !here[uuid] && now.Sub(at) > notesFor })
	maps.DeleteFunc(n.token, func(uuid string, _ bool) bool { _, ours := n.built[uuid]; return !ours && !here[uuid] })
}
