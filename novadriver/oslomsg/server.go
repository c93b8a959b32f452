package oslomsg

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
)

// Defaults of a server: the pool of stock nova-compute, and far more ids than
// its 16, since what is journalled may come again after a restart.
const (
	defaultWorkers = 64
	defaultSeen    = 10000
	// acceptRetry is the pause after Accept failed.
	acceptRetry = time.Second
)

// ErrExpired: a recorded call was not resumed, as its caller has gone.
var ErrExpired = errors.New("the caller waits no longer")

// A Handler works on one delivery, in a goroutine of its own. ctx ends when
// the server is shut down for good. A call is answered by exactly one d.Reply
// or d.Fail; a handler that hands the delivery on and answers after it
// returned calls d.Hold first, otherwise the server fails the call so that its
// caller does not hang.
type Handler func(ctx context.Context, d *Delivery)

// Endpoint is one interface that a server offers.
type Endpoint struct {
	Namespace string // "" for the main one
	Version   string // the newest served, e.g. "6.5"
	// AnyMinor accepts every minor version of the same major: newer senders
	// add arguments, which a handler sees when it knows them.
	AnyMinor bool
	Methods  map[string]Handler
}

// ServerOptions describe a [Server].
type ServerOptions struct {
	Exchange  string   // "" means "nova"
	Queues    []string // e.g. compute.host1, compute-alt.host1
	Endpoints []Endpoint

	// Accept, if set, is called for each new delivery to a known method,
	// before it is acked and handled: record it here. It may be called again
	// for the same UniqueID when the process ended between Accept and the
	// ack, and for different queues side by side. After an error the message
	// stays unacked and Accept is tried again each second, and no further
	// delivery of that queue is taken.
	Accept func(ctx context.Context, d *Delivery) error

	Seen    Seen         // remembers the ids handled; nil: the last 10,000, in memory
	Workers int          // deliveries handled at a time; 0: 64
	MaxBody int          // bytes of a message after unpacking; 0: 64 MiB
	Ping    bool         // answer oslo_rpc_server_ping, as [DEFAULT] rpc_ping_enabled
	Logger  *slog.Logger // nil: nothing is logged
}

// Server consumes the queues of one host and dispatches what arrives.
type Server struct {
	transport Transport
	opt       ServerOptions
	log       *slog.Logger
	answers   *answers
	slots     chan struct{} // one for each delivery being handled

	work     context.Context // of handlers and replies
	kill     context.CancelCauseFunc
	handlers sync.WaitGroup

	admitMu   sync.Mutex
	accepting map[string]bool // ids in Accept at this moment

	mu     sync.Mutex
	queues map[string]*serverQueue
	closed bool // no further delivery is dispatched
}

// serverQueue is one queue being consumed.
type serverQueue struct {
	consumer Consumer
	stopped  context.Context // ends when the queue is drained
	stop     context.CancelFunc
}

// Serve starts a server on t. It does not wait for the broker: see Ready. The
// caller shuts the server down before it closes t.
func Serve(t Transport, o ServerOptions) (*Server, error) {
	if len(o.Queues) == 0 {
		return nil, errors.New("serve: no queues")
	}
	if o.Exchange == "" {
		o.Exchange = "nova"
	}
	if o.Workers <= 0 {
		o.Workers = defaultWorkers
	}
	if o.MaxBody <= 0 {
		o.MaxBody = defaultMaxBody
	}
	if o.Seen == nil {
		o.Seen = NewSeen(defaultSeen)
	}
	if o.Ping {
		o.Endpoints = append(slices.Clone(o.Endpoints), pingEndpoint())
	}
	for _, e := range o.Endpoints {
		if _, ok := parseVersion(e.Version); !ok {
			return nil, fmt.Errorf("serve: endpoint version %q is no version", e.Version)
		}
	}
	s := &Server{
		transport: t, opt: o, log: logger(o.Logger),
		slots: make(chan struct{}, o.Workers), queues: map[string]*serverQueue{}, accepting: map[string]bool{},
	}
	s.work, s.kill = context.WithCancelCause(context.Background())
	s.answers = newAnswers(s.work, t, s.log)
	for _, name := range o.Queues {
		q := &serverQueue{}
		q.stopped, q.stop = context.WithCancel(s.work)
		var err error
		q.consumer, err = t.Consume(Queue{Name: name, Kind: TopicQueue, Exchange: o.Exchange}, func(m *Message) { s.onMessage(q, m) })
		if err != nil {
			q.stop()
			s.Drain()
			s.kill(ErrClosed)
			s.answers.close()
			return nil, fmt.Errorf("consume %s: %w", name, err)
		}
		s.mu.Lock()
		s.queues[name] = q
		s.mu.Unlock()
	}
	return s, nil
}

// Ready waits until every queue is consumed.
func (s *Server) Ready(ctx context.Context) error {
	for _, q := range s.consuming() {
		if err := q.consumer.Ready(ctx); err != nil {
			return err
		}
	}
	return nil
}

// consuming returns the queues named that are not drained yet; all for no name.
func (s *Server) consuming(names ...string) map[string]*serverQueue {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]*serverQueue{}
	for n, q := range s.queues {
		if len(names) == 0 || slices.Contains(names, n) {
			out[n] = q
		}
	}
	return out
}

// Drain stops consuming the queues named (all, if none is) and returns when no
// further delivery of theirs will be dispatched. Handlers go on. What was not
// accepted stays with the broker.
func (s *Server) Drain(queues ...string) {
	for name, q := range s.consuming(queues...) {
		q.stop()
		if err := q.consumer.Close(); err != nil {
			s.log.Debug("stop consuming", "queue", name, "error", err)
		}
		s.mu.Lock()
		delete(s.queues, name)
		s.mu.Unlock()
	}
}

// Shutdown drains every queue and waits for handlers and replies, held calls
// included; when ctx ends first the handlers' contexts end, replies are given
// up, and the cause of ctx is returned once the handlers have come back. It may
// be called twice.
func (s *Server) Shutdown(ctx context.Context) error {
	s.Drain()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.handlers.Wait()
		s.answers.wait()
		close(done)
	}()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		err = fmt.Errorf("shut down: %w", context.Cause(ctx))
	}
	s.kill(ErrClosed)
	<-done
	s.answers.close()
	return err
}

// onMessage takes one message from a queue: drop it, or record, ack and
// dispatch it. It runs in the consumer's goroutine, so that a slow journal
// holds back that queue alone.
func (s *Server) onMessage(q *serverQueue, m *Message) {
	inner, err := open(m, s.opt.MaxBody)
	var d *Delivery
	if err == nil {
		d, err = parseRequest(inner)
	}
	if err != nil {
		s.log.Warn("dropped an unreadable message", "queue", m.Queue, "bytes", len(m.Body), "error", err)
		s.ack(m)
		return
	}
	d.Queue, d.Redelivered, d.Received, d.Expiration = m.Queue, m.Redelivered, m.Received, m.Expiration
	d.sent, d.answers = m.Timestamp, s.answers

	now := time.Now()
	if d.Expired(now) {
		s.log.Info("dropped a call whose caller has gone", d.attrs()...)
		s.ack(m)
		// Its age was estimated: if it does wait, it learns at once.
		s.answers.once(d, &Failure{
			Module: "oslo_messaging.exceptions", Class: "MessagingTimeout", Message: "The request was too old to be carried out",
		})
		return
	}
	handler, refusal := s.lookup(d)
	if refusal != nil {
		s.log.Warn("refused a request", append(d.attrs(), "version", clip(d.Version, 20), "namespace", clip(d.Namespace, 40), "error", refusal)...)
		s.ack(m)
		if d.IsCall() {
			d.Fail(refusal)
		}
		return
	}

	select {
	case s.slots <- struct{}{}:
	case <-q.stopped.Done():
		s.requeue(m, d)
		return
	}
	switch s.admit(q.stopped, d) {
	case refused:
		<-s.slots
		s.requeue(m, d)
	case duplicate:
		<-s.slots
		s.log.Info("dropped a duplicate", d.attrs()...)
		s.ack(m)
	case admitted:
		s.ack(m)
		s.dispatch(handler, d)
	}
}

type admission int

const (
	refused admission = iota
	duplicate
	admitted
)

// admit records a delivery that is new. What arrives while the same id is being
// recorded is a duplicate too: should recording fail, the first one goes back
// to the broker.
func (s *Server) admit(ctx context.Context, d *Delivery) admission {
	if !s.begin(d.UniqueID) {
		return duplicate
	}
	ok := s.record(ctx, d)
	s.end(d.UniqueID, ok)
	if !ok {
		return refused
	}
	return admitted
}

// begin reports whether the id is new, and then marks it as being recorded. The
// empty id is always new.
func (s *Server) begin(id string) bool {
	if id == "" {
		return true
	}
	s.admitMu.Lock()
	defer s.admitMu.Unlock()
	if s.accepting[id] || s.opt.Seen.Has(id) {
		return false
	}
	s.accepting[id] = true
	return true
}

// end says how recording an id went.
func (s *Server) end(id string, ok bool) {
	if id == "" {
		return
	}
	s.admitMu.Lock()
	defer s.admitMu.Unlock()
	delete(s.accepting, id)
	if ok {
		s.opt.Seen.Add(id)
	}
}

// record calls Accept until it succeeds, or ctx ends.
func (s *Server) record(ctx context.Context, d *Delivery) bool {
	if s.opt.Accept == nil {
		return true
	}
	for failed := false; ; failed = true {
		err := s.opt.Accept(ctx, d)
		if err == nil {
			if failed {
				s.log.Info("deliveries are recorded again", d.attrs()...)
			}
			return true
		}
		if !failed {
			s.log.Error("record a delivery; it is tried again", append(d.attrs(), "error", err)...)
		}
		if !sleep(ctx, acceptRetry) {
			return false
		}
	}
}

// lookup finds the handler, by the rules of oslo's dispatcher.
func (s *Server) lookup(d *Delivery) (Handler, *Failure) {
	found := false
	for _, e := range s.opt.Endpoints {
		if e.Namespace != d.Namespace || !compatible(d.Version, e.Version, e.AnyMinor) {
			continue
		}
		found = true
		if h := e.Methods[d.Method]; h != nil && !strings.HasPrefix(d.Method, "_") {
			return h, nil
		}
	}
	if found {
		return nil, noSuchMethod(d.Method)
	}
	return nil, unsupportedVersion(d.Method, d.Version)
}

// dispatch starts the handler; the caller holds a slot.
func (s *Server) dispatch(h Handler, d *Delivery) {
	s.answers.begin(d)
	s.handlers.Add(1)
	go func() {
		defer s.handlers.Done()
		defer func() { <-s.slots }()
		defer func() {
			if p := recover(); p != nil {
				s.log.Error("handler panicked", append(d.attrs(), "panic", fmt.Sprint(p), "stack", string(debug.Stack()))...)
				d.Fail(&Failure{Module: "builtins", Class: "RuntimeError", Message: "internal error in " + d.Method})
			}
		}()
		h(s.work, d)
		d.returned()
	}()
}

// Resume dispatches a recorded delivery again, as after a restart: nothing is
// acked and Accept is not called. It may be replied to like a new one. It
// blocks while all workers are busy. Errors: ErrExpired, ErrClosed, the cause
// of ctx, or that the record is damaged or its method unknown.
func (s *Server) Resume(ctx context.Context, r Record) error {
	d, err := parseRequest(r.Message)
	if err != nil {
		return err
	}
	d.Queue, d.Redelivered, d.Received, d.Expiration, d.answers = r.Queue, true, r.Received, r.Expiration, s.answers
	if d.Expired(time.Now()) {
		return ErrExpired
	}
	handler, refusal := s.lookup(d)
	if refusal != nil {
		return refusal
	}
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.work.Done():
		return ErrClosed
	}
	if d.UniqueID != "" {
		s.opt.Seen.Add(d.UniqueID)
	}
	// Under mu, so that Shutdown either refuses it or waits for it.
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		<-s.slots
		return ErrClosed
	}
	s.dispatch(handler, d)
	return nil
}

func (s *Server) ack(m *Message) {
	if err := m.Ack(); err != nil {
		// The connection broke: the broker will deliver it again.
		s.log.Debug("ack a message", "queue", m.Queue, "error", err)
	}
}

func (s *Server) requeue(m *Message, d *Delivery) {
	if err := m.Requeue(); err != nil {
		s.log.Debug("requeue a message", append(d.attrs(), "error", err)...)
	}
}

// BaseAPI is the endpoint every Nova service has: ping and get_backdoor_port.
// service is the topic, e.g. "compute".
func BaseAPI(service string) Endpoint {
	return Endpoint{
		Namespace: "baseapi", Version: "1.1",
		Methods: map[string]Handler{
			"ping": func(_ context.Context, d *Delivery) {
				_ = d.Reply(map[string]any{"service": service, "arg": d.Arg("arg")}) // always encodable
			},
			"get_backdoor_port": func(_ context.Context, d *Delivery) { _ = d.Reply(nil) },
		},
	}
}

// pingEndpoint answers oslo.messaging's own liveness probe.
func pingEndpoint() Endpoint {
	return Endpoint{
		Version: defaultVersion,
		Methods: map[string]Handler{
			"oslo_rpc_server_ping": func(_ context.Context, d *Delivery) { _ = d.Reply("pong") },
		},
	}
}
