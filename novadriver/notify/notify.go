package notify

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
)

const (
	// maxQueued bounds what waits for a broker that is away: some 20 KiB each.
	maxQueued = 2048
	// flushTime bounds what Close waits for the queue to be sent.
	flushTime = 5 * time.Second
)

// Setup is what a [Notifier] needs beside the options.
type Setup struct {
	Options
	// Host is the host's name in Nova, Exchange the control_exchange.
	Host, Exchange string
	// Transport sends; the caller closes it after the Notifier.
	Transport oslomsg.Transport
	// SharesKnown says whether the controllers' release has the payloads with shares (Nova 31 and later).
	SharesKnown func() bool
	// Describe puts an error into Nova's words.
	Describe func(err error, instanceUUID string) Failure
	// Context makes an admin context, for notifications that no request stands behind.
	Context func() oslomsg.Context
	Logger  *slog.Logger // nil: nothing is logged
	Now     func() time.Time
}

// Notifier implements novalet.Notifier. Make one with New.
type Notifier struct {
	o       Setup
	log     *slog.Logger
	queue   chan *queued
	closing chan struct{}
	cancel  context.CancelFunc
	done    chan struct{}
	once    sync.Once

	mu   sync.Mutex
	lost int // since the last message that was sent
}

var _ novalet.Notifier = (*Notifier)(nil)

// queued is a notification, with the time it was made at.
type queued struct {
	n          *novalet.Notification
	begin, end time.Time // of an audit; zero: the present period so far
	at         time.Time
}

// New starts a notifier.
func New(o Setup) *Notifier {
	s := &Notifier{o: o, log: o.Logger, queue: make(chan *queued, maxQueued), closing: make(chan struct{}), done: make(chan struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.o.Now == nil {
		s.o.Now = time.Now
	}
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(context.Background())
	go s.run(ctx)
	return s
}

// Notify implements novalet.Notifier.
func (s *Notifier) Notify(n *novalet.Notification) { s.put(&queued{n: n, at: s.o.Now()}) }

// Audit tells that an instance existed in a period. It does not block.
func (s *Notifier) Audit(n *novalet.Notification, begin, end time.Time) {
	s.put(&queued{n: n, begin: begin, end: end, at: s.o.Now()})
}

func (s *Notifier) put(q *queued) {
	select {
	case <-s.closing:
		return
	default:
	}
	select {
	case s.queue <- q:
	default:
		s.mu.Lock()
		s.lost++
		first := s.lost == 1
		s.mu.Unlock()
		if first {
			s.log.Warn("the broker takes no notifications; further ones are lost until it does", "waiting", maxQueued)
		}
	}
}

// Close sends what is queued, for a few seconds at most, and waits for the goroutine. It may be called twice.
func (s *Notifier) Close() error {
	s.once.Do(func() {
		close(s.closing)
		t := time.AfterFunc(flushTime, s.cancel)
		<-s.done
		t.Stop()
		s.cancel()
	})
	return nil
}

// run sends in order until Close.
func (s *Notifier) run(ctx context.Context) {
	defer close(s.done)
	for {
		select {
		case q := <-s.queue:
			s.send(ctx, q)
		case <-s.closing:
			for {
				select {
				case q := <-s.queue:
					s.send(ctx, q)
				default:
					return
				}
			}
		}
	}
}

// send tells one notification in every form asked for.
func (s *Notifier) send(ctx context.Context, q *queued) {
	n := q.n
	e, ok := events[n.Action]
	if !ok {
		s.log.Error("a notification has no name", "action", n.Action)
		return
	}
	f, err := factsOf(q)
	if err != nil {
		s.log.Error("a notification cannot be made", "action", n.Action, "instance", n.Instance.UUID, "err", err)
		return
	}
	m := &oslomsg.Notification{Priority: "INFO", At: q.at}
	if n.Err != nil {
		m.Priority = "ERROR"
	}
	if s.o.Unversioned && e.legacy != "" {
		m.Publisher, m.Event = "compute."+s.o.Host, name("compute.instance", e.legacy, n.Phase)
		m.Payload = s.legacy(f, e)
		s.publish(ctx, m, s.o.Topics, n)
	}
	if s.o.Versioned && e.versioned != "" {
		m.Publisher, m.Event = "nova-compute:"+s.o.Host, name("instance", e.versioned, n.Phase)
		m.Payload = s.versioned(f, e)
		s.publish(ctx, m, s.o.VersionedTopics, n)
	}
}

// publish hands one message to each driver and topic.
func (s *Notifier) publish(ctx context.Context, m *oslomsg.Notification, topics []string, n *novalet.Notification) {
	rctx := oslomsg.Context(n.Context.Wire)
	if rctx == nil {
		rctx = s.o.Context()
	}
	if s.o.Log {
		s.log.Info("notification", "event_type", m.Event, "priority", m.Priority, "instance", n.Instance.UUID, "request_id", n.Context.RequestID, "payload", m.Payload)
	}
	for _, topic := range topics {
		for _, envelope := range []bool{true, false} {
			if envelope && !s.o.Envelope || !envelope && !s.o.Bare {
				continue
			}
			if err := oslomsg.Notify(ctx, s.o.Transport, s.o.Exchange, topic, m, rctx, envelope); err != nil {
				s.log.Warn("a notification is lost", "event_type", m.Event, "topic", topic, "instance", n.Instance.UUID, "err", err)
				continue
			}
			s.sent()
		}
	}
}

// sent notes that the broker takes messages, and tells what was lost before.
func (s *Notifier) sent() {
	s.mu.Lock()
	lost := s.lost
	s.lost = 0
	s.mu.Unlock()
	if lost > 0 {
		s.log.Warn("the broker takes notifications again", "lost", lost)
	}
}
