package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// A warm slot is a sandbox made in advance: a range of ids, cgroups that a waiting init has joined (on v1 that takes a
// grace period of the kernel), namespaces, the /proc view. A new instance takes one and gives it its name,
// limits and console log. It is not recorded: an agent that finds one in a keeper ends it.
type warmSlot struct {
	slot   int
	base   uint32
	id     string
	keeper *keeper
}

const warmPrefix = "warm."

// takeWarm takes a prepared slot for an instance, nil when there is none. e.mu is held.
func (e *Engine) takeWarm(id string) *warmSlot {
	n := len(e.warm)
	if n == 0 || e.o.MaxInstances > 0 && len(e.instances) >= e.o.MaxInstances {
		return nil
	}
	w := e.warm[n-1]
	e.warm = e.warm[:n-1]
	e.slots[w.slot] = id
	return w
}

// assign makes a prepared slot the instance's. On error the slot's sandbox is gone and the range of ids still the
// instance's.
func (e *Engine) assign(ctx context.Context, in *instance, rec *record, w *warmSlot, st *wire.Status) error {
	limited := make(chan error, 1)
	go func() { limited <- e.group(w.slot).Apply(&rec.Limits, e.apply(rec)) }()
	dir, err := os.Open(e.dir(rec.ID))
	if err == nil {
		var got []int
		got, err = w.keeper.call(ctx, wire.OpAssign, w.id, &wire.Assign{ID: rec.ID, Hostname: rec.Hostname, LogMax: e.o.ConsoleLogBytes}, st, int(dir.Fd()))
		dir.Close()
		if err == nil {
			in.hold(got)
		}
	}
	if err = errors.Join(err, <-limited); err == nil {
		in.mu.Lock()
		in.keeper = w.keeper
		in.mu.Unlock()
		return nil
	}
	undo := context.WithoutCancel(ctx)
	// It may have been given the name before the answer was lost.
	err = errors.Join(err, e.endWarm(undo, w, w.id), e.endWarm(undo, w, rec.ID), e.group(w.slot).Remove())
	w.keeper.add(-1)
	return err
}

// endWarm ends a sandbox by the name that its keeper knows it by.
func (e *Engine) endWarm(ctx context.Context, w *warmSlot, id string) error {
	_, err := w.keeper.call(ctx, wire.OpStop, id, &wire.Stop{}, nil)
	if err == nil {
		_, err = w.keeper.call(ctx, wire.OpForget, id, nil, nil)
	}
	if err = fromKeeper(err); errors.Is(err, novalet.ErrNotFound) {
		return nil
	}
	return err
}

// fillDelay is how long what is made in advance waits when one has been taken: the boot that took it is not to share the
// processors with the making of the next.
const fillDelay = 100 * time.Millisecond

// later runs f in a while, unless the engine has closed by then; f starts what it does under e.wg itself.
func (e *Engine) later(f func()) { time.AfterFunc(fillDelay, f) }

// fillWarm prepares slots in the background until enough wait.
func (e *Engine) fillWarm() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.warming || e.o.WarmSlots < 0 || e.ctx.Err() != nil {
		return
	}
	e.warming = true
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		for {
			e.mu.Lock()
			full := len(e.warm) >= e.o.WarmSlots || e.ctx.Err() != nil ||
				e.o.MaxInstances > 0 && len(e.slots) >= e.o.MaxInstances
			if full {
				e.warming = false
			}
			e.mu.Unlock()
			if full {
				return
			}
			if err := e.prepareSlot(e.ctx); err != nil {
				e.mu.Lock()
				e.warming = false
				e.mu.Unlock()
				if e.ctx.Err() == nil {
					e.log.Warn("no sandbox prepared", "error", err)
				}
				return
			}
		}
	}()
}

// prepareSlot makes one.
func (e *Engine) prepareSlot(ctx context.Context) error {
	e.mu.Lock()
	slot, base, err := e.takeSlot(warmPrefix)
	e.mu.Unlock()
	if err != nil {
		return err
	}
	w := &warmSlot{slot: slot, base: base, id: fmt.Sprintf("%s%d", warmPrefix, slot)}
	if err = e.prepareIn(ctx, w); err != nil {
		undo := context.WithoutCancel(ctx)
		if w.keeper != nil {
			err = errors.Join(err, e.endWarm(undo, w, w.id))
			w.keeper.add(-1)
		}
		err = errors.Join(err, e.group(slot).Remove())
		e.mu.Lock()
		delete(e.slots, slot)
		e.mu.Unlock()
		return err
	}
	e.mu.Lock()
	e.warm = append(e.warm, w)
	e.mu.Unlock()
	return nil
}

func (e *Engine) prepareIn(ctx context.Context, w *warmSlot) error {
	g := e.group(w.slot)
	rec := &record{}
	if err := g.Create(w.base, &rec.Limits, e.apply(rec)); err != nil {
		return err
	}
	m := &wire.Create{Advance: true, Slot: w.slot, UIDBase: w.base, UIDSize: e.o.UIDCount}
	var fds []int
	defer func() { wire.CloseAll(fds) }()
	for _, r := range g.Refs() {
		fd, err := unix.Open(r.Path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open cgroup: %w", err)
		}
		fds = append(fds, fd)
		m.Cgroups = append(m.Cgroups, wire.CgroupRef{Kind: r.Kind, Controller: r.Controller})
	}
	var err error
	if w.keeper, err = e.reserve(ctx); err != nil {
		return err
	}
	got, err := w.keeper.call(ctx, wire.OpCreate, w.id, m, nil, fds...)
	wire.CloseAll(got)
	return fromKeeper(err)
}

// dropWarm ends the prepared slots: they would keep their keeper from ending. It waits for the one being made.
func (e *Engine) dropWarm() {
	ctx := context.Background()
	for {
		e.mu.Lock()
		busy, ws := e.warming, e.warm
		e.warm = nil
		for _, w := range ws {
			delete(e.slots, w.slot)
		}
		e.mu.Unlock()
		for _, w := range ws {
			if err := errors.Join(e.endWarm(ctx, w, w.id), e.group(w.slot).Remove()); err != nil {
				e.log.Warn("prepared sandbox left", "slot", w.slot, "error", err)
			}
			w.keeper.add(-1)
		}
		if !busy {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
