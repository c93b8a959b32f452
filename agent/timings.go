package agent

import (
	"log/slog"
	"sync"
	"time"
)

// Step is one part of a boot. Steps overlap.
type Step struct {
	Name string        `json:"name"`
	From time.Duration `json:"from"` // since the build began
	Took time.Duration `json:"took"`
}

// Timings say where the time of a boot went.
type Timings struct {
	Began time.Time     `json:"began"`
	Total time.Duration `json:"total"`
	Steps []Step        `json:"steps"` // in the order in which they ended
}

// timing collects the steps of one operation.
type timing struct {
	began time.Time
	clock time.Time // with the monotonic reading
	mu    sync.Mutex
	end   time.Duration
	steps []Step
}

func newTiming(began time.Time) *timing { return &timing{began: began, clock: time.Now()} }

// start begins a step; the function it returns ends it, at its first call.
func (t *timing) start(name string) func() {
	from := time.Since(t.clock)
	var once sync.Once
	return func() {
		once.Do(func() {
			t.mu.Lock()
			defer t.mu.Unlock()
			t.end = time.Since(t.clock)
			t.steps = append(t.steps, Step{Name: name, From: from, Took: t.end - from})
		})
	}
}

// total is the time from the beginning to the end of the last step.
func (t *timing) total() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.end
}

// LogValue implements slog.LogValuer: one attribute per step.
func (t *timing) LogValue() slog.Value {
	t.mu.Lock()
	defer t.mu.Unlock()
	attrs := make([]slog.Attr, 0, len(t.steps))
	for _, s := range t.steps {
		attrs = append(attrs, slog.Duration(s.Name, s.Took))
	}
	return slog.GroupValue(attrs...)
}

// timingTable keeps the boots of the instances that are here.
type timingTable struct {
	mu    sync.Mutex
	boots map[string]*timing
}

func newTimingTable() *timingTable { return &timingTable{boots: map[string]*timing{}} }

func (t *timingTable) put(uuid string, b *timing) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.boots[uuid] = b
}

func (t *timingTable) forget(uuid string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.boots, uuid)
}

// Timings returns where the time of an instance's boot went. False when it was not booted by this process.
func (a *Agent) Timings(instanceUUID string) (Timings, bool) {
	a.timings.mu.Lock()
	b, ok := a.timings.boots[instanceUUID]
	a.timings.mu.Unlock()
	if !ok {
		return Timings{}, false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return Timings{Began: b.began, Total: b.end, Steps: append([]Step(nil), b.steps...)}, true
}
