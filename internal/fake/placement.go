package fake

import (
	"context"
	"sync"

	"github.com/novalet/novalet"
)

type placementState struct {
	pmu         sync.Mutex
	allocations map[string]bool
}

// Allocate gives an instance an allocation, as the scheduler does.
func (s *placementState) Allocate(uuid string) {
	s.pmu.Lock()
	defer s.pmu.Unlock()
	s.allocations[uuid] = true
}

// Allocated says whether the instance has one.
func (s *placementState) Allocated(uuid string) bool {
	s.pmu.Lock()
	defer s.pmu.Unlock()
	return s.allocations[uuid]
}

// Placement is a fake novalet.Placement.
type Placement struct {
	*placementState
	f *Faults
}

var _ novalet.Placement = (*Placement)(nil)

// DeleteAllocation implements novalet.Placement.
func (p *Placement) DeleteAllocation(ctx context.Context, uuid string) error {
	if err := p.f.enter(ctx, "Placement.DeleteAllocation"); err != nil {
		return err
	}
	p.pmu.Lock()
	delete(p.allocations, uuid)
	p.pmu.Unlock()
	return p.f.leave(ctx, "Placement.DeleteAllocation")
}
