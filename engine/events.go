package engine

import (
	"context"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// subscriber is one caller of Events. Its queue is as long as it must be: an event is never dropped.
type subscriber struct {
	wake  chan struct{}
	queue []novalet.ContainerEvent // under Engine.mu
}

// Events implements novalet.Runtime. The channel is closed when ctx or the engine ends.
func (e *Engine) Events(ctx context.Context) <-chan novalet.ContainerEvent {
	s := &subscriber{wake: make(chan struct{}, 1)}
	out := make(chan novalet.ContainerEvent)
	e.mu.Lock()
	e.subs[s] = struct{}{}
	e.mu.Unlock()
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		defer close(out)
		defer func() {
			e.mu.Lock()
			delete(e.subs, s)
			e.mu.Unlock()
		}()
		for {
			select {
			case <-s.wake:
			case <-ctx.Done():
				return
			case <-e.ctx.Done():
				return
			}
			e.mu.Lock()
			queue := s.queue
			s.queue = nil
			e.mu.Unlock()
			for _, ev := range queue {
				select {
				case out <- ev:
				case <-ctx.Done():
					return
				case <-e.ctx.Done():
					return
				}
			}
		}
	}()
	return out
}

// publish hands an event to all subscribers.
func (e *Engine) publish(ev novalet.ContainerEvent) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for s := range e.subs {
		s.queue = append(s.queue, ev)
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// happened takes an event from a keeper.
func (e *Engine) happened(ev *wire.Event) {
	e.log.Info("container event", "instance", ev.ID, "event", ev.Type, "exit_code", ev.ExitCode)
	e.publish(novalet.ContainerEvent{ID: ev.ID, Type: novalet.ContainerEventType(ev.Type), ExitCode: ev.ExitCode, At: ev.At})
	if ev.Type == wire.EventExited {
		e.settleLater(ev.ID)
	}
}
