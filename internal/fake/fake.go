// Package fake holds fakes of the root's contracts that behave: they keep state, refuse what the real parts refuse, and
// fail when a test tells them to. A World joins them. Several handles on one world stand for several agent processes
// on one host, one after the other: Kill makes a handle's calls fail without effect, as if its process had died.
//
// The fakes start no goroutine and write nothing to disk.
package fake

import (
	"context"
	"errors"
	"sync"
)

// ErrKilled is what every call of a killed handle returns.
var ErrKilled = errors.New("this process was killed")

// Phase says on which side of a call's effect a hook runs.
type Phase string

// Before the call has done anything, and After it has done everything.
const (
	Before Phase = "before"
	After  Phase = "after"
)

type rule struct {
	err  error
	left int // < 0: until Clear
}

// Faults decides what goes wrong in the calls of one handle. Names are "Contract.Method", such as
// "Runtime.Start". The zero value lets everything work.
type Faults struct {
	mu     sync.Mutex
	rules  map[string]*rule
	block  map[string]chan struct{}
	calls  map[string]int
	log    []string
	hook   func(ctx context.Context, name string, phase Phase)
	killed bool
}

// Fail makes the next n calls of a name fail with err before they do anything; n < 0 is all until Clear.
func (f *Faults) Fail(name string, err error, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rules == nil {
		f.rules = map[string]*rule{}
	}
	f.rules[name] = &rule{err, n}
}

// Clear ends what Fail began.
func (f *Faults) Clear(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.rules, name)
}

// Block makes calls of a name wait until release is called or their context ends.
func (f *Faults) Block(name string) (release func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.block == nil {
		f.block = map[string]chan struct{}{}
	}
	ch := make(chan struct{})
	f.block[name] = ch
	var once sync.Once
	return func() {
		once.Do(func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.block[name] == ch { // else Kill has let them go
				delete(f.block, name)
				close(ch)
			}
		})
	}
}

// Hook is called around every call, also those that fail. It may block, and it may call Kill.
func (f *Faults) Hook(h func(ctx context.Context, name string, phase Phase)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = h
}

// Kill makes every call from now on return ErrKilled and do nothing, also those that are waiting in Block.
func (f *Faults) Kill() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.killed = true
	for name, ch := range f.block {
		close(ch)
		delete(f.block, name)
	}
}

// Calls returns how often a name was called.
func (f *Faults) Calls(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[name]
}

// Log returns the names of all calls in order, and forgets them.
func (f *Faults) Log() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.log
	f.log = nil
	return l
}

// enter is the first line of every fake method.
func (f *Faults) enter(ctx context.Context, name string) error {
	f.mu.Lock()
	if f.calls == nil {
		f.calls = map[string]int{}
	}
	f.calls[name]++
	if len(f.log) < 100000 {
		f.log = append(f.log, name)
	}
	hook, ch := f.hook, f.block[name]
	f.mu.Unlock()
	if hook != nil {
		hook(ctx, name, Before)
	}
	if ch != nil {
		select {
		case <-ch:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.killed {
		return ErrKilled
	}
	if r := f.rules[name]; r != nil && r.left != 0 {
		if r.left > 0 {
			r.left--
		}
		return r.err
	}
	return nil
}

// leave is called by every fake method after its effect: the answer may get lost.
func (f *Faults) leave(ctx context.Context, name string) error {
	f.mu.Lock()
	hook := f.hook
	f.mu.Unlock()
	if hook != nil {
		hook(ctx, name, After)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.killed {
		return ErrKilled
	}
	return nil
}

// World is one host and the cloud around it.
type World struct {
	Host string
	*conductorState
	*placementState
	*imageState
	*networkState
	*plugState
	*runtimeState
}

// NewWorld makes an empty world whose agent's host has the given name.
func NewWorld(host string) *World {
	w := &World{Host: host}
	w.conductorState = newConductorState(host)
	w.placementState = &placementState{allocations: map[string]bool{}}
	w.imageState = newImageState()
	w.networkState = newNetworkState(host)
	w.runtimeState = newRuntimeState()
	w.plugState = &plugState{plugs: map[string]map[string]*Plug{}, network: w.networkState}
	return w
}

// Handle is one process's access to the world.
type Handle struct {
	Faults    *Faults
	Conductor *Conductor
	Placement *Placement
	Images    *Images
	Network   *Network
	Plugger   *Plugger
	Runtime   *Runtime
}

// Open makes a handle with faults of its own.
func (w *World) Open() *Handle {
	f := &Faults{}
	return &Handle{
		Faults:    f,
		Conductor: &Conductor{w.conductorState, f},
		Placement: &Placement{w.placementState, f},
		Images:    &Images{w.imageState, f},
		Network:   &Network{w.networkState, f},
		Plugger:   &Plugger{w.plugState, f},
		Runtime:   &Runtime{w.runtimeState, f},
	}
}
