package agent

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/novalet/novalet"
)

const (
	// quiesceWithin bounds how long a quiesce takes: nova-api waits a minute for the answer (rpc_response_timeout).
	quiesceWithin = 45 * time.Second
	// quiesceTime is how long a guest stays quiesced when nobody unquiesces it: nova-api may have ended in between.
	quiesceTime = 10 * time.Minute
)

var (
	errOvertaken   = fmt.Errorf("another operation came: %w", novalet.ErrBusy)
	errQuiesceLate = fmt.Errorf("the guest did not stop, or its files were not on disk, within %v: %w", quiesceWithin, novalet.ErrBusy)
)

// quiesced says whether the guest is stopped by a quiesce, or about to be. One that is paused since is stopped by that.
func (in *instance) quiesced() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	vm := in.rec.Instance.VMState
	return in.rec.Quiesced != nil && vm != novalet.VMPaused && vm != novalet.VMSuspended
}

// Quiesce implements novalet.Compute. It runs on the instance's goroutine but waits there for no operation, and the next
// operation ends it.
func (a *Agent) Quiesce(ctx context.Context, instanceUUID string) error {
	in, err := a.lookup(instanceUUID)
	if err != nil {
		return err
	}
	ctx, done := context.WithTimeoutCause(ctx, quiesceWithin, errQuiesceLate)
	defer done()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(a.ctx, func() { stop(context.Cause(a.ctx)) })()
	in.mu.Lock()
	free := len(in.rec.Ops) == 0 && in.quiesceStop == nil && !in.gone
	if free {
		in.quiesceStop = stop
	}
	in.mu.Unlock()
	if !free {
		return fmt.Errorf("quiesce instance %s: %w", instanceUUID, errOvertaken)
	}
	answer := make(chan error, 1)
	// Either the caller is told that the guest is quiesced, or it goes on.
	var settled atomic.Bool
	in.post(func(work context.Context) {
		defer context.AfterFunc(work, func() { stop(context.Cause(work)) })()
		err := a.quiesce(ctx, in)
		if err == nil && !settled.CompareAndSwap(false, true) {
			err = context.Cause(ctx)
			a.endQuiesce(in)
		}
		in.mu.Lock()
		in.quiesceStop = nil
		in.mu.Unlock()
		answer <- err
	})
	select {
	case err = <-answer:
	case <-ctx.Done():
		err = context.Cause(ctx) // the goroutine sees it, too, and takes back what it has done
		if !settled.CompareAndSwap(false, true) {
			err = <-answer
		}
	}
	if err != nil {
		return fmt.Errorf("quiesce instance %s: %w", instanceUUID, err)
	}
	return nil
}

// quiesce stops the guest with its files on disk. On error the guest goes on.
func (a *Agent) quiesce(ctx context.Context, in *instance) (err error) {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	began := a.now()
	st, err := a.runtime.Status(ctx, in.uuid)
	switch {
	case err != nil && !errors.Is(err, novalet.ErrNotFound):
		return fmt.Errorf("read container: %w", err)
	case err != nil, st.State != novalet.ContainerRunning && !(st.State == novalet.ContainerPaused && in.quiesced()):
		return fmt.Errorf("the guest does not run: %w", novalet.ErrInvalidState)
	}
	// Most is on disk then before the guest has to wait for it.
	if err := a.runtime.Sync(ctx, in.uuid); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			a.endQuiesce(in)
		}
	}()
	// Nobody has been told yet: the next agent would let it go on.
	if err := in.update(func(r *record) { r.Quiesced = &began }); err != nil {
		return err
	}
	if err := a.runtime.Freeze(ctx, in.uuid); err != nil {
		return fmt.Errorf("freeze container: %w", err)
	}
	if err := a.runtime.Sync(ctx, in.uuid); err != nil {
		return err
	}
	until := a.now().Add(quiesceTime)
	if err := in.update(func(r *record) { r.Quiesced = &until }); err != nil {
		return err
	}
	in.log.Info("guest is quiesced", "until", until, "took", a.now().Sub(began))
	return nil
}

// Unquiesce implements novalet.Compute.
func (a *Agent) Unquiesce(instanceUUID string) {
	in, err := a.lookup(instanceUUID)
	if err != nil {
		a.log.Debug("an instance that is not here is not unquiesced", "instance", instanceUUID)
		return
	}
	in.mu.Lock()
	if in.quiesceStop != nil {
		in.quiesceStop(errOvertaken)
	}
	due := in.rec.Quiesced != nil
	in.mu.Unlock()
	if due {
		// Should the agent end now, the next one sees that the time is over.
		now := a.now()
		in.note(func(r *record) {
			if r.Quiesced != nil {
				r.Quiesced = &now
			}
		})
	}
	in.post(func(context.Context) { a.endQuiesce(in) })
}

// quiesceOver lets a guest go on whose time is over.
func (in *instance) quiesceOver() {
	in.mu.Lock()
	over := in.rec.Quiesced != nil && !in.a.now().Before(*in.rec.Quiesced) && !in.busy
	in.mu.Unlock()
	if over {
		in.log.Warn("guest was quiesced and nobody unquiesced it; it goes on")
		in.post(func(context.Context) { in.a.endQuiesce(in) })
	}
}

// rouse lets a quiesced guest go on before an operation in which it has a part. A delete ends the container as it is.
func (a *Agent) rouse(in *instance, m novalet.Method) {
	if !methods[m].aside && m != novalet.MethodTerminate {
		a.endQuiesce(in)
	}
}

// endQuiesce lets a quiesced guest go on. It runs on the instance's goroutine, and whatever ended. One that could not be thawed
// stays marked: quiesceOver tries again.
func (a *Agent) endQuiesce(in *instance) {
	var marked bool
	in.read(func(r *record) { marked = r.Quiesced != nil })
	if !marked {
		return
	}
	if in.quiesced() {
		err := a.runtime.Thaw(context.WithoutCancel(a.ctx), in.uuid)
		if err != nil && !errors.Is(err, novalet.ErrNotFound) && !errors.Is(err, novalet.ErrInvalidState) {
			in.log.Error("a quiesced guest does not go on", "err", err)
			past := a.now()
			in.note(func(r *record) { r.Quiesced = &past })
			return
		}
	}
	in.note(func(r *record) { r.Quiesced = nil })
	in.log.Info("guest is not quiesced any more")
}
