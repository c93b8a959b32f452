package novadriver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/notify"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// Driver is this host's place on Nova's bus.
type Driver struct {
	o       Options
	log     *slog.Logger
	client  *oslomsg.Client
	rpc     *rpc
	release *releaseBox
	tracker *tracker
	service service
	compute atomic.Pointer[novalet.Compute]
	owner   atomic.Bool // the provider carries OWNER_NOVA
	greeted atomic.Bool // the controllers' release was logged
	said    sync.Map    // keys of once

	notifier *notify.Notifier // nil: nothing is told to anybody

	notes *notes
	since time.Time // casts that came later are in notes

	announcements chan announcement
	look          chan struct{} // asks for a look at the controllers' release
	nodeReady     chan struct{} // closed when the ComputeNode has an id

	mu        sync.Mutex
	node      *node
	nodeKnown bool
	server    *oslomsg.Server
	stop      context.CancelCauseFunc
	closed    bool
	running   sync.WaitGroup
}

// New makes a driver on the transport. It does not wait for the broker. The Conductor may be used at once; SetCompute
// must come before Start. Close it even when Start failed.
func New(o Options) (*Driver, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	client, err := oslomsg.NewClient(o.Transport, oslomsg.ClientOptions{Timeout: o.RPCTimeout, Logger: o.Logger})
	if err != nil {
		return nil, fmt.Errorf("open the reply queue: %w", err)
	}
	d := &Driver{
		o: o, log: o.Logger, client: client, release: newReleaseBox(ovo.Releases()[0]),
		notes: newNotes(), since: o.now(),
		announcements: make(chan announcement, maxAnnouncements), look: make(chan struct{}, 1), nodeReady: make(chan struct{}),
	}
	d.rpc = &rpc{
		client: client, exchange: o.ControlExchange, release: d.release, timeout: o.RPCTimeout, pause: o.pause, log: o.Logger,
	}
	d.tracker = newTracker(d)
	d.startNotifier()
	return d, nil
}

// SetCompute gives the driver the agent it calls. Once, before Start.
func (d *Driver) SetCompute(c novalet.Compute) { d.compute.Store(&c) }

// Conductor returns Nova's conductor for the agent.
func (d *Driver) Conductor() novalet.Conductor { return &conductor{d} }

// Node is the hypervisor hostname, known when Recover runs.
func (d *Driver) Node() string { return d.o.Node }

// Calls counts the requests sent to the conductor, for metrics.
func (d *Driver) Calls() int64 { return d.rpc.calls.Load() }

// Renegotiate looks at the controllers' release soon instead of at the next interval, and updates the resources, as after
// SIGHUP or a reconnect. It does not block.
func (d *Driver) Renegotiate() {
	select {
	case d.look <- struct{}{}:
	default:
	}
	d.tracker.changed()
}

// Status is what health and metrics show.
type Status struct {
	Release        string    // spoken with the controllers
	ServiceVersion int       // reported; 0 before the registration
	ComputeID      string    // uuid of the ComputeNode
	Disabled       bool      // by an operator
	ForcedDown     bool      // by an operator
	Away           bool      // the conductor does not answer
	LastReport     time.Time // heartbeat that was taken; zero for none yet
	FailedBuilds   int64     // since the last one that went well
}

// Status reads the state without blocking.
func (d *Driver) Status() Status {
	s := Status{
		Release: d.release.get().Name, ServiceVersion: d.service.version(), ComputeID: d.nodeUUID(), Disabled: d.service.disabled.Load(),
		ForcedDown: d.service.forced.Load(), Away: d.rpc.away.Load(), FailedBuilds: d.tracker.failed.Load(),
	}
	if n := d.service.beat.Load(); n != 0 {
		s.LastReport = time.Unix(0, n)
	}
	return s
}

// once logs a state of things the first time it is met.
func (d *Driver) once(key, text string, kv ...any) {
	if _, said := d.said.LoadOrStore(key, true); !said {
		d.log.Warn(text, kv...)
	}
}

// Start registers this host and begins to serve, in stock's order: wait for the conductor, agree on a release,
// recover, register, node and provider, consumers, heartbeat. It blocks until the consumers are asked for, however long
// the broker, the conductor or Placement take to be there; ctx ends it. An error that waiting does not heal (a wrong
// identity, a refused version) is returned.
func (d *Driver) Start(ctx context.Context) error {
	if d.compute.Load() == nil {
		return errors.New("novadriver: Start before SetCompute")
	}
	if err := d.start(ctx); err != nil {
		return fmt.Errorf("start compute service %s: %w", d.o.Host, err)
	}
	return nil
}

func (d *Driver) start(ctx context.Context) error {
	if err := d.ping(ctx); err != nil {
		return err
	}
	registered, err := d.readService(ctx)
	if err != nil {
		return err
	}
	n, err := d.negotiated(ctx)
	if err != nil {
		return err
	}
	d.apply(n)
	uuid, err := d.identity(ctx, registered)
	if err != nil {
		return err
	}
	if err := d.findNode(ctx, uuid); err != nil {
		return err
	}
	if d.service.forced.Load() {
		d.log.Warn("an operator has forced this service down: controllers take the host for dead and may evacuate it")
	}
	if d.o.Recover != nil {
		if err := d.o.Recover(ctx); err != nil {
			return fmt.Errorf("recover instances: %w", err)
		}
	}
	if err := d.register(ctx, registered, n.report); err != nil {
		return err
	}
	if err := d.firstUpdate(ctx); err != nil {
		return err
	}
	return d.serve()
}

// negotiated waits until the controllers can be agreed with.
func (d *Driver) negotiated(ctx context.Context) (*negotiated, error) {
	for {
		n, err := d.negotiate(ctx, d.service.version())
		switch {
		case err == nil && n.minimum <= n.report:
			return n, nil
		case err == nil:
			err = fmt.Errorf("the oldest nova-compute reports version %d, this program could report %d at most", n.minimum, n.report)
			d.once("minimum", "the conductor would refuse this host; waiting", "err", err)
		case errors.Is(err, novalet.ErrNotFound):
			d.once("conductor record", "no controller has a service record yet; waiting", "err", err)
		default:
			return nil, err
		}
		if !sleep(ctx, d.o.pause) {
			return nil, err
		}
	}
}

// firstUpdate creates node and provider, waiting for Placement as long as it takes.
func (d *Driver) firstUpdate(ctx context.Context) error {
	for {
		err := d.tracker.update(ctx)
		if !errors.Is(err, novalet.ErrTryAgain) {
			return err
		}
		d.once("placement", "Placement does not answer; waiting for it", "err", err)
		if !sleep(ctx, d.o.pause) {
			return err
		}
	}
}

// serve starts the consumers and the goroutines that go on until Close.
func (d *Driver) serve() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return errors.New("closed")
	}
	server, err := oslomsg.Serve(d.o.Transport, d.serverOptions())
	if err != nil {
		return fmt.Errorf("consume the queues of host %s: %w", d.o.Host, err)
	}
	d.server = server
	ctx, cancel := context.WithCancelCause(context.Background())
	d.stop = cancel
	for _, f := range []func(context.Context){d.report, d.tracker.run, d.watchReleases, d.announcer, d.reconcile, d.audit} {
		d.running.Go(func() { f(ctx) })
	}
	d.log.Info("compute service started", "host", d.o.Host, "node", d.o.Node, "compute_id", d.node.uuid)
	return nil
}

// Ready waits until the queues of this host are consumed.
func (d *Driver) Ready(ctx context.Context) error {
	d.mu.Lock()
	s := d.server
	d.mu.Unlock()
	if s == nil {
		return errors.New("novadriver: not started")
	}
	return s.Ready(ctx)
}

// Drain stops taking work: the queue compute.<host> first, while external events still come through compute-alt. What
// is sent meanwhile waits in the queues for the next start. The conductor stays usable until Close.
func (d *Driver) Drain() {
	d.mu.Lock()
	s := d.server
	d.mu.Unlock()
	if s != nil {
		s.Drain("compute." + d.o.Host)
	}
}

// Close stops consuming, waits for the calls under way (GracefulTimeout), ends the goroutines and the client. The
// queues stay, and the service record: it ages out by itself. It may be called twice.
func (d *Driver) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	s, stop := d.server, d.stop
	d.mu.Unlock()
	var err error
	if s != nil {
		s.Drain("compute." + d.o.Host)
		ctx, cancel := context.WithTimeout(context.Background(), d.o.GracefulTimeout)
		err = s.Shutdown(ctx)
		cancel()
	}
	if stop != nil {
		stop(errors.New("the driver is closed"))
	}
	d.running.Wait()
	if d.notifier != nil {
		err = errors.Join(err, d.notifier.Close())
	}
	return errors.Join(err, d.client.Close())
}
