package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"

	"github.com/novalet/novalet"
)

// instance is one record in memory and the goroutine that runs its operations.
type instance struct {
	a    *Agent
	uuid string
	log  *slog.Logger

	// netMu is held while the list of interfaces is read, changed and saved: attach, detach and the events of Neutron do
	// not wait for the queue.
	netMu sync.Mutex

	// writeMu orders the writes of the record; mu is not held while the disk is waited for.
	writeMu sync.Mutex

	mu      sync.Mutex
	rec     record
	tasks   []func(context.Context) // work of our own between operations, not journaled
	busy    bool                    // the goroutine runs
	gone    bool                    // dropped from the agent's table; look it up again
	cur     *novalet.Operation
	stop    context.CancelCauseFunc // ends cur
	power   novalet.PowerState
	stale   bool // Neutron said that something changed while the list could not be read again
	refresh bool // a refresh is under way
	// quiesceStop ends a quiesce that is being done.
	quiesceStop context.CancelCauseFunc
	// netStop ends what holds netMu; deleting lets nothing new hold it for long.
	netStop  context.CancelCauseFunc
	deleting bool
	// replayed: the journal comes from an earlier run of the agent; its first operation may be half done.
	replayed bool
	// netns is the network namespace of the sandbox that runs, held so that it outlives a guest that ends by itself: its
	// interfaces can still be parked then. Nil when nothing is plugged.
	netns *os.File
}

// holdNet holds the network namespace at the path. Without it a guest's own end unplugs its ports: no more than that.
func (in *instance) holdNet(path string) {
	f, err := os.Open(path)
	if err != nil {
		return
	}
	in.mu.Lock()
	old := in.netns
	in.netns = f
	in.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

// takeNet hands over the namespace that is held, or nil.
func (in *instance) takeNet() *os.File {
	in.mu.Lock()
	defer in.mu.Unlock()
	f := in.netns
	in.netns = nil
	return f
}

// dropNet lets go of it.
func (in *instance) dropNet() {
	if f := in.takeNet(); f != nil {
		f.Close()
	}
}

func newInstance(a *Agent, r record) *instance {
	return &instance{a: a, uuid: r.Instance.UUID, log: a.log.With("instance", r.Instance.UUID), rec: r}
}

// update changes the record in memory and on disk. The change is kept in memory when the disk fails.
func (in *instance) update(f func(*record)) error {
	return in.updateIf(func(r *record) bool { f(r); return true }, nil)
}

// updateIf is update with a say in whether anything is to be written. beside, unless it is nil, is called when the change is made
// and still to be written; it must not block.
func (in *instance) updateIf(f func(*record) bool, beside func()) error {
	in.writeMu.Lock()
	defer in.writeMu.Unlock()
	in.mu.Lock()
	if !f(&in.rec) {
		in.mu.Unlock()
		return nil
	}
	r := in.rec
	in.mu.Unlock()
	if beside != nil {
		beside()
	}
	// What the copy points to is replaced by others, never changed.
	if err := in.a.store.write(&r); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// note is update where a failing disk must not end what is under way: the record is behind until the next write.
func (in *instance) note(f func(*record)) {
	if err := in.update(f); err != nil && in.a.ctx.Err() == nil {
		in.log.Error("record is behind", "err", err)
	}
}

// set changes the record in memory alone; the operation's end writes it.
func (in *instance) set(f func(*record)) {
	in.mu.Lock()
	defer in.mu.Unlock()
	f(&in.rec)
}

// read calls f with the record locked; f must not keep it.
func (in *instance) read(f func(*record)) {
	in.mu.Lock()
	defer in.mu.Unlock()
	f(&in.rec)
}

// view returns a copy of the instance. Its maps and slices are never changed in place.
func (in *instance) view() *novalet.Instance {
	in.mu.Lock()
	defer in.mu.Unlock()
	c := in.rec.Instance
	return &c
}

// lockNet takes netMu and returns the context under which to use it: a delete ends it.
func (in *instance) lockNet(ctx context.Context) (context.Context, func()) {
	in.netMu.Lock()
	ctx, cancel := context.WithCancelCause(ctx)
	in.mu.Lock()
	in.netStop = cancel
	if in.deleting {
		cancel(errDeleted)
	}
	in.mu.Unlock()
	return ctx, func() {
		in.mu.Lock()
		in.netStop = nil
		in.mu.Unlock()
		cancel(nil)
		in.netMu.Unlock()
	}
}

// setDeleting ends what holds netMu and keeps others from holding it.
func (in *instance) setDeleting(on bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.deleting = on
	if on && in.netStop != nil {
		in.netStop(errDeleted)
	}
}

// static says whether the host sets the addresses inside.
func (in *instance) static() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	img := in.rec.Image
	if in.rec.Rescue != nil {
		img = in.rec.Rescue.Image
	}
	return img != nil && kindOf(img) == novalet.KindApplication
}

func (in *instance) setPower(p novalet.PowerState) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.power = p
}

// Submit implements novalet.Compute.
func (a *Agent) Submit(ctx context.Context, op *novalet.Operation) error {
	if op.ID == "" || !validUUID(op.Instance.UUID) {
		return fmt.Errorf("submit %s: operation %q names instance %q: %w", op.Method, op.ID, op.Instance.UUID, novalet.ErrInvalidState)
	}
	if _, ok := methods[op.Method]; !ok {
		return fmt.Errorf("submit %s: %w", op.Method, novalet.ErrUnsupported)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if a.store.wasFinished(op.ID) {
		a.log.Info("operation was carried out before", "instance", op.Instance.UUID, "method", op.Method, "id", op.ID)
		return nil
	}
	for {
		in, err := a.obtain(&op.Instance)
		if err != nil {
			return err
		}
		ok, err := in.submit(op)
		if ok || err != nil {
			return err
		}
	}
}

// obtain finds or makes the entry of an instance. A new one has no record on disk yet.
func (a *Agent) obtain(inst *novalet.Instance) (*instance, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, fmt.Errorf("submit: %w", errShutdown)
	}
	in, ok := a.instances[inst.UUID]
	if !ok {
		in = newInstance(a, record{Version: recordVersion, Instance: *inst})
		a.instances[inst.UUID] = in
	}
	return in, nil
}

// lookup finds an instance that this host has.
func (a *Agent) lookup(uuid string) (*instance, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	in, ok := a.instances[uuid]
	if !ok {
		return nil, fmt.Errorf("instance %s: %w", uuid, novalet.ErrNotFound)
	}
	return in, nil
}

// all returns the instances in no order.
func (a *Agent) all() []*instance {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]*instance, 0, len(a.instances))
	for _, in := range a.instances {
		out = append(out, in)
	}
	return out
}

// submit journals the operation and sees to it that it runs. False means that the entry is stale.
//
// A delete starts beside its journal entry, and whether or not that can be written: what a user does against a full disk is to
// delete servers. It is accepted, as all others, only with the entry on disk: until then its message comes again. What it has
// done by then is not done again by this process, and does no harm if another one does it.
func (in *instance) submit(op *novalet.Operation) (bool, error) {
	gone, dup := false, false
	var beside func()
	if op.Method == novalet.MethodTerminate {
		beside = func() {
			in.mu.Lock()
			if in.stop != nil && in.cur.Method != novalet.MethodTerminate {
				in.stop(errDeleted)
			}
			in.mu.Unlock()
			in.kick()
		}
	}
	err := in.updateIf(func(r *record) bool {
		switch {
		case in.gone:
			gone = true
			return false
		case slices.Contains(r.Seen, op.ID):
			dup = true
			return false
		}
		r.see(op.ID)
		if in.quiesceStop != nil && !methods[op.Method].aside {
			in.quiesceStop(errOvertaken)
		}
		if op.Method == novalet.MethodTerminate {
			// A delete wins over everything: what waits will never run, what runs is told beside.
			keep := 0
			if in.cur != nil {
				keep = 1
			}
			r.Ops = append(slices.Clone(r.Ops[:min(keep, len(r.Ops))]), *op)
		} else {
			r.Ops = append(slices.Clone(r.Ops), *op)
		}
		return true
	}, beside)
	if gone || dup {
		if dup {
			in.log.Info("duplicate operation dropped", "method", op.Method, "id", op.ID)
			in.a.dropIfIdle(in) // what could not be written before
		}
		return !gone, nil
	}
	if err != nil {
		// Not durable, so not accepted: the message is delivered again.
		this := func(o novalet.Operation) bool { return o.ID == op.ID }
		in.mu.Lock()
		if slices.ContainsFunc(in.rec.Ops, this) { // else it is done
			in.rec.Seen = slices.DeleteFunc(slices.Clone(in.rec.Seen), func(id string) bool { return id == op.ID })
		}
		if beside == nil {
			in.rec.Ops = slices.DeleteFunc(slices.Clone(in.rec.Ops), this)
		}
		in.mu.Unlock()
		in.a.dropIfIdle(in)
		return true, fmt.Errorf("submit %s: %w", op.Method, err)
	}
	if beside == nil {
		in.kick()
	}
	return true, nil
}

// see remembers the id of an operation.
func (r *record) see(id string) {
	r.Seen = append(slices.Clone(r.Seen[max(0, len(r.Seen)+1-seenPerInstance):]), id)
}

// post runs f on the instance's goroutine, after what waits there. It is not journaled.
func (in *instance) post(f func(context.Context)) {
	in.mu.Lock()
	in.tasks = append(in.tasks, f)
	in.mu.Unlock()
	in.kick()
}

// kick starts the goroutine unless it runs or operations may not run yet.
func (in *instance) kick() {
	in.a.mu.Lock()
	ready := in.a.recovered && !in.a.closed
	in.a.mu.Unlock()
	in.mu.Lock()
	if !ready || in.busy || in.gone || len(in.rec.Ops) == 0 && len(in.tasks) == 0 {
		in.mu.Unlock()
		return
	}
	in.busy = true
	in.mu.Unlock()
	if !in.a.goRun(in.work) {
		in.mu.Lock()
		in.busy = false
		in.mu.Unlock()
	}
}

// work is the instance's goroutine: operations first, then work of our own, until nothing is left.
func (in *instance) work() {
	for in.a.ctx.Err() == nil {
		in.mu.Lock()
		var task func(context.Context)
		var op *novalet.Operation
		ctx, cancel := context.WithCancelCause(in.a.ctx)
		switch {
		case len(in.rec.Ops) > 0:
			o := in.rec.Ops[0]
			op = &o
			in.cur, in.stop = op, cancel
			if len(in.rec.Ops) > 1 && op.Method != novalet.MethodTerminate &&
				slices.ContainsFunc(in.rec.Ops[1:], func(o novalet.Operation) bool { return o.Method == novalet.MethodTerminate }) {
				cancel(errDeleted)
			}
		case len(in.tasks) > 0:
			task = in.tasks[0]
			in.tasks = in.tasks[1:]
		default:
			in.busy = false
			in.mu.Unlock()
			cancel(nil)
			in.a.dropIfIdle(in)
			return
		}
		in.mu.Unlock()
		if task != nil {
			task(ctx)
			cancel(nil)
			continue
		}
		err := in.a.execute(ctx, in, op)
		in.mu.Lock()
		in.cur, in.stop = nil, nil
		in.mu.Unlock()
		cancel(nil)
		if errors.Is(err, errShutdown) {
			break
		}
		in.finish(op)
		in.settle()
	}
	in.mu.Lock()
	in.busy = false
	in.mu.Unlock()
}

// portsToFree names the ports of the instance, those that the user brought as ones to keep, also when a build ended
// before it knew what it had got.
func (in *instance) portsToFree(info novalet.NetworkInfo) novalet.NetworkInfo {
	out := slices.Clone(info)
	known := map[string]bool{}
	for i := range out {
		known[out[i].ID] = true
	}
	in.read(func(r *record) {
		if r.Build == nil {
			return
		}
		for _, q := range r.Build.RequestedNetworks {
			if q.PortID != "" && !known[q.PortID] {
				out = append(out, novalet.VIF{ID: q.PortID, PreserveOnDelete: true})
			}
		}
	})
	return out
}

// finish takes an operation out of the journal. One that ran without an entry there has been seen from now on.
func (in *instance) finish(op *novalet.Operation) {
	in.note(func(r *record) {
		in.replayed = false
		if !slices.Contains(r.Seen, op.ID) {
			r.see(op.ID)
		}
		r.Ops = slices.DeleteFunc(slices.Clone(r.Ops), func(o novalet.Operation) bool { return o.ID == op.ID })
	})
}

// settle looks at what came up while an operation held the instance.
func (in *instance) settle() {
	in.mu.Lock()
	stale := in.stale && in.rec.Resident
	in.mu.Unlock()
	if stale {
		in.refreshSoon()
	}
}

// dropIfIdle forgets an instance that is not here, has nothing to do and nothing to undo.
func (a *Agent) dropIfIdle(in *instance) {
	in.writeMu.Lock()
	defer in.writeMu.Unlock()
	a.mu.Lock()
	in.mu.Lock()
	r := in.rec
	idle := !in.gone && !in.busy && len(r.Ops) == 0 && len(in.tasks) == 0 && !r.Resident && r.Pending.empty()
	in.mu.Unlock()
	a.mu.Unlock()
	if !idle {
		return
	}
	// An operation that comes now waits for writeMu, and then finds the entry gone.
	if err := a.store.remove(&r); err != nil {
		if a.ctx.Err() == nil {
			in.log.Error("record stays", "err", err)
		}
		return
	}
	a.mu.Lock()
	in.mu.Lock()
	in.gone = true
	if a.instances[in.uuid] == in {
		delete(a.instances, in.uuid)
	}
	in.mu.Unlock()
	a.mu.Unlock()
	in.dropNet()
	a.events.forget(in.uuid)
	a.timings.forget(in.uuid)
}
