package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"time"

	"github.com/novalet/novalet"
)

// pollFirst and pollMax space the questions to Neutron about a port whose event does not come: an event may get lost, and a
// port that is ACTIVE is equally good evidence.
const (
	pollFirst = 1500 * time.Millisecond
	pollMax   = 20 * time.Second
)

type eventKey struct{ uuid, name, tag string }

// waiter waits for one event of Neutron.
type waiter struct {
	key  eventKey
	vif  string
	done chan struct{} // closed by the event
	// failed is set before done is closed.
	failed bool
}

// eventTable joins external events with those that wait for them.
type eventTable struct {
	mu      sync.Mutex
	waiters map[eventKey]*waiter
}

func newEventTable() *eventTable { return &eventTable{waiters: map[eventKey]*waiter{}} }

func (t *eventTable) expect(uuid, name, tag string) *waiter {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := &waiter{key: eventKey{uuid, name, tag}, vif: tag, done: make(chan struct{})}
	t.waiters[w.key] = w
	return w
}

func (t *eventTable) drop(ws []*waiter) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, w := range ws {
		if t.waiters[w.key] == w {
			delete(t.waiters, w.key)
		}
	}
}

// deliver wakes the waiter of an event, if there is one.
func (t *eventTable) deliver(e *novalet.ExternalEvent) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := eventKey{e.InstanceUUID, e.Name, e.Tag}
	w, ok := t.waiters[key]
	if !ok {
		return false
	}
	delete(t.waiters, key)
	w.failed = e.Status == "failed"
	close(w.done)
	return true
}

// forget drops the waiters of an instance that went.
func (t *eventTable) forget(uuid string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k := range t.waiters {
		if k.uuid == uuid {
			delete(t.waiters, k)
		}
	}
}

// expectPlugged registers a waiter for every interface that is not wired yet. A port that is ACTIVE already makes no
// transition, so no event of it would come.
func (a *Agent) expectPlugged(uuid string, info novalet.NetworkInfo) []*waiter {
	var ws []*waiter
	if a.cfg.VIFPluggingTimeout <= 0 {
		return nil
	}
	for i := range info {
		// Neutron's agent takes a card's function for wired when its interface is in no namespace of the host at all, as in a
		// virtual machine (eswitch_manager.py, is_assigned_vf_direct): it never tells of one in a container. The card is
		// set up by the plug.
		if !info[i].Active && info[i].VNICType != "direct" {
			ws = append(ws, a.events.expect(uuid, "network-vif-plugged", info[i].ID))
		}
	}
	return ws
}

// awaitPlugged waits for all of them: by event, or by asking Neutron when the event does not come. A timeout or a failed event
// is an error only when vif_plugging_is_fatal says so.
func (a *Agent) awaitPlugged(ctx context.Context, in *instance, ws []*waiter) error {
	if len(ws) == 0 {
		return nil
	}
	timeout := time.NewTimer(a.cfg.VIFPluggingTimeout)
	defer timeout.Stop()
	delay := pollFirst
	in.mu.Lock()
	if in.replayed {
		delay = 50 * time.Millisecond // the event of an interrupted boot may have come to nobody
	}
	in.mu.Unlock()
	poll := time.NewTimer(delay)
	defer poll.Stop()
	for len(ws) > 0 {
		select {
		case <-ws[0].done:
			if ws[0].failed {
				if err := a.notPlugged(in, ws[0].vif, "Neutron reported that it could not wire the port"); err != nil {
					return err
				}
			}
			ws = ws[1:]
		case <-poll.C:
			var err error
			if ws, err = a.askPorts(ctx, in, ws); err != nil {
				return err
			}
			delay = min(2*delay, pollMax)
			poll.Reset(delay)
		case <-timeout.C:
			return a.notPlugged(in, ws[0].vif, fmt.Sprintf("Neutron did not wire the port within %v (vif_plugging_timeout)", a.cfg.VIFPluggingTimeout))
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// askPorts asks Neutron for the ports still waited for and returns those that are not wired yet.
func (a *Agent) askPorts(ctx context.Context, in *instance, ws []*waiter) ([]*waiter, error) {
	var left []*waiter
	for _, w := range ws {
		select {
		case <-w.done:
			left = append(left, w) // judged by the caller
			continue
		default:
		}
		askCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
		active, err := a.network.PortActive(askCtx, w.vif)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errors.Is(err, novalet.ErrNotFound):
			return nil, novalet.Faultf(novalet.ErrAbort, "PortNotFound", "Port %s was deleted while the server was being started.", w.vif)
		case err != nil:
			in.log.Debug("port is not read", "vif", w.vif, "err", err)
			left = append(left, w)
		case active:
			in.log.Info("port is wired; its event did not come", "vif", w.vif)
		default:
			left = append(left, w)
		}
	}
	return left, nil
}

func (a *Agent) notPlugged(in *instance, vif, why string) error {
	if !a.cfg.VIFPluggingIsFatal {
		in.log.Warn("goes on without a wired port", "vif", vif, "why", why)
		return nil
	}
	f := novalet.Faultf(novalet.ErrAbort, "VirtualInterfaceCreateException",
		"Virtual Interface creation failed: %s. Ask the operator to look at the network agent of the compute host, then create the server again.", why)
	f.Details = map[string]any{"vif_id": vif}
	return f
}

// ExternalEvents implements novalet.Compute.
func (a *Agent) ExternalEvents(_ context.Context, rc novalet.RequestContext, events []novalet.ExternalEvent) {
	for i := range events {
		e := &events[i]
		log := a.log.With("instance", e.InstanceUUID, "request_id", rc.RequestID, "event", e.Name, "tag", e.Tag)
		switch e.Name {
		case "network-changed":
			if in, err := a.lookup(e.InstanceUUID); err == nil {
				in.refreshSoon()
			} else {
				log.Debug("event for an instance that is not here")
			}
		case "network-vif-deleted":
			if in, err := a.lookup(e.InstanceUUID); err == nil {
				a.goRun(func() { a.vifDeleted(rc, in, e.Tag) })
			} else {
				log.Debug("event for an instance that is not here")
			}
		default:
			// network-vif-plugged and -unplugged, volume-reimaged, accelerator-request-bound: somebody waits, or nobody does.
			if !a.events.deliver(e) {
				log.Debug("nobody waits for the event", "status", e.Status)
			}
		}
	}
}

// refreshSoon reads the interfaces from Neutron again, now, or when the operation that holds them ends. Several calls
// become one.
func (in *instance) refreshSoon() {
	in.mu.Lock()
	if in.refresh || in.cur != nil && in.cur.Method == novalet.MethodBuild {
		in.stale = true
		in.mu.Unlock()
		return
	}
	in.refresh, in.stale = true, false
	in.mu.Unlock()
	started := in.a.goRun(func() {
		ctx, cancel := context.WithTimeout(in.a.ctx, 2*time.Minute)
		err := in.a.refreshNetwork(ctx, in)
		cancel()
		if err != nil && in.a.ctx.Err() == nil && !errors.Is(err, errDeleted) && !errors.Is(err, novalet.ErrInstanceGone) {
			in.log.Warn("interfaces are not read again", "err", err)
		}
		in.mu.Lock()
		in.refresh = false
		again := in.stale
		in.mu.Unlock()
		if again {
			in.refreshSoon()
		}
	})
	if !started {
		in.mu.Lock()
		in.refresh = false
		in.mu.Unlock()
	}
}

// refreshNetwork rebuilds the list of interfaces from Neutron, brings the addresses inside up to date, and saves it
// when it changed.
func (a *Agent) refreshNetwork(ctx context.Context, in *instance) error {
	ctx, unlock := in.lockNet(ctx)
	defer unlock()
	inst := in.view()
	var resident bool
	in.read(func(r *record) { resident = r.Resident })
	if !resident || inst.TaskState == novalet.TaskDeleting {
		return nil
	}
	rc := a.conductor.NewContext()
	info, err := a.network.Refresh(ctx, rc, inst, inst.NetworkInfo)
	if err != nil {
		return fmt.Errorf("refresh interfaces: %w", err)
	}
	if sameInfo(info, inst.NetworkInfo) {
		return nil
	}
	if err := a.configure(ctx, in, info); err != nil {
		in.log.Warn("addresses are not brought up to date", "err", err)
	}
	return a.putNetworkInfo(ctx, in, rc, info)
}

// sameInfo compares interfaces, "active" aside: whether a port is wired is no change that users see.
func sameInfo(x, y novalet.NetworkInfo) bool {
	if len(x) != len(y) {
		return false
	}
	for i := range x {
		v, w := x[i], y[i]
		v.Active, w.Active = false, false
		if !reflect.DeepEqual(v, w) {
			return false
		}
	}
	return true
}

// putNetworkInfo records the interfaces here and in Nova's cache. netMu is held.
func (a *Agent) putNetworkInfo(ctx context.Context, in *instance, rc novalet.RequestContext, info novalet.NetworkInfo) error {
	if err := in.update(func(r *record) { r.Instance.NetworkInfo = info }); err != nil {
		return err
	}
	err := a.insist(ctx, in.log, "save network info", func(ctx context.Context) error {
		return a.conductor.SaveNetworkInfo(ctx, rc, in.uuid, info)
	})
	if err != nil {
		return fmt.Errorf("save network info: %w", err)
	}
	return nil
}

// configure makes the plugs of a running instance follow its ports' addresses.
func (a *Agent) configure(ctx context.Context, in *instance, info novalet.NetworkInfo) error {
	st, err := a.runtime.Status(ctx, in.uuid)
	if err != nil || st.NetNS == "" {
		return err
	}
	var errs []error
	requests := in.plugRequests(info, st.NetNS, in.static())
	for i := range requests {
		errs = append(errs, a.plugger.Configure(ctx, &requests[i]))
	}
	return errors.Join(errs...)
}

// vifDeleted takes an interface away whose port was deleted in Neutron.
func (a *Agent) vifDeleted(rc novalet.RequestContext, in *instance, port string) {
	ctx, unlock := in.lockNet(a.ctx)
	defer unlock()
	var info novalet.NetworkInfo
	var lost *novalet.VIF
	inst := in.view()
	for i := range inst.NetworkInfo {
		if v := inst.NetworkInfo[i]; v.ID == port {
			lost = &v
		} else {
			info = append(info, v)
		}
	}
	var resident bool
	in.read(func(r *record) { resident = r.Resident })
	if lost == nil || !resident || inst.TaskState == novalet.TaskDeleting {
		return
	}
	a.retrieveDevices(ctx, in, novalet.NetworkInfo{*lost})
	if err := a.plugger.Unplug(ctx, in.uuid, lost); err != nil {
		in.log.Warn("deleted port stays plugged", "vif", port, "err", err)
	} else {
		a.dropClaim(in, port)
	}
	if err := a.putNetworkInfo(ctx, in, rc, info); err != nil && ctx.Err() == nil {
		in.log.Warn("deleted port stays listed", "vif", port, "err", err)
	}
}
