// Package cleanup keeps a list of undo steps. A step is registered before the thing it undoes is done, so it must be
// safe on nothing and on half. The package starts no goroutine.
package cleanup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// StepTimeout bounds one undo step.
const StepTimeout = 2 * time.Minute

// Stack is a list of undo steps, run last first. The zero value is empty and ready. Its methods may be called
// from several goroutines.
type Stack struct {
	mu    sync.Mutex
	steps []step
}

type step struct {
	name string
	undo func(context.Context) error
}

// Add registers an undo under a name; a step of the same name is replaced where it stands.
func (s *Stack) Add(name string, undo func(context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.steps {
		if s.steps[i].name == name {
			s.steps[i].undo = undo
			return
		}
	}
	s.steps = append(s.steps, step{name, undo})
}

// Drop forgets the steps: what they would undo is to stay.
func (s *Stack) Drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = nil
}

// Unwind runs the steps, last first, each under its own timeout, and goes on after a failure. The context must be one that
// outlives what failed. It returns the names of the steps that failed and their errors joined; the others are forgotten.
func (s *Stack) Unwind(ctx context.Context) ([]string, error) {
	s.mu.Lock()
	steps := s.steps
	s.steps = nil
	s.mu.Unlock()
	var failed []string
	var errs []error
	for _, st := range slices.Backward(steps) {
		stepCtx, cancel := context.WithTimeout(ctx, StepTimeout)
		if err := st.undo(stepCtx); err != nil {
			failed = append(failed, st.name)
			errs = append(errs, fmt.Errorf("undo %s: %w", st.name, err))
		}
		cancel()
	}
	return failed, errors.Join(errs...)
}
