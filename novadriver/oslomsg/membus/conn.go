package membus

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/novalet/novalet/novadriver/oslomsg"
)

// Conn is a connection to a [Bus]; it implements oslomsg.Transport. Cut and
// Restore break and mend it.
type Conn struct {
	bus       *Bus
	closed    chan struct{}
	closeOnce sync.Once

	// guarded by bus.mu
	up           bool
	blocked      string
	since        time.Time
	loseConfirms int
	consumers    map[*consumer]struct{}
}

var _ oslomsg.Transport = (*Conn)(nil)

// Publish implements oslomsg.Transport.
func (c *Conn) Publish(ctx context.Context, p oslomsg.Publishing) error {
	b := c.bus
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		select {
		case <-c.closed:
			return oslomsg.ErrClosed
		default:
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if c.up && c.blocked == "" {
			n, err := b.route(p)
			if err != nil {
				return err
			}
			if n == 0 && p.Mandatory {
				return oslomsg.ErrUnroutable
			}
			if c.loseConfirms == 0 {
				return nil
			}
			c.loseConfirms-- // as after a reconnect: it is sent again
			continue
		}
		changed := b.changed
		b.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		case <-c.closed:
		}
		b.mu.Lock()
	}
}

// Consume implements oslomsg.Transport.
func (c *Conn) Consume(q oslomsg.Queue, fn func(*oslomsg.Message)) (oslomsg.Consumer, error) {
	if q.Name == "" || fn == nil {
		return nil, errors.New("consume: queue and function are needed")
	}
	b := c.bus
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-c.closed:
		return nil, oslomsg.ErrClosed
	default:
	}
	s := &consumer{conn: c, queue: q, stop: make(chan struct{}), done: make(chan struct{}), unacked: map[*message]struct{}{}}
	c.consumers[s] = struct{}{}
	s.subscribe()
	go s.run(fn)
	return s, nil
}

// Health implements oslomsg.Transport.
func (c *Conn) Health() oslomsg.Health {
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	l := oslomsg.Link{Name: "memory", Connected: c.up, Host: "memory", Since: c.since, Blocked: c.blocked}
	if !c.up {
		l.Problem = errLost.Error()
	}
	return oslomsg.Health{Links: []oslomsg.Link{l}}
}

// Close implements oslomsg.Transport.
func (c *Conn) Close() error {
	c.closeOnce.Do(func() { close(c.closed) })
	c.bus.mu.Lock()
	all := make([]*consumer, 0, len(c.consumers))
	for s := range c.consumers {
		all = append(all, s)
	}
	c.bus.mu.Unlock()
	for _, s := range all {
		_ = s.Close()
	}
	return nil
}

// Cut breaks the connection: unacked messages go back to their queues, and
// Publish waits, until Restore.
func (c *Conn) Cut() {
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	if !c.up {
		return
	}
	c.up, c.since = false, time.Now()
	for s := range c.consumers {
		s.unsubscribe()
	}
	c.bus.wake()
}

// Restore mends the connection; consumers declare their queues again.
func (c *Conn) Restore() {
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	if c.up {
		return
	}
	c.up, c.since = true, time.Now()
	for s := range c.consumers {
		s.subscribe()
	}
	c.bus.wake()
}

// Block makes the broker take no messages from this connection, for a reason
// that Health shows; "" ends it.
func (c *Conn) Block(reason string) {
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	c.blocked = reason
	c.bus.wake()
}

// LoseConfirms makes the next n messages that are published arrive twice, as
// when the connection breaks between a message and its confirmation.
func (c *Conn) LoseConfirms(n int) {
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	c.loseConfirms = n
}

// consumer is one subscription.
type consumer struct {
	conn      *Conn
	queue     oslomsg.Queue
	stop      chan struct{}
	done      chan struct{}
	closeOnce sync.Once

	// guarded by bus.mu
	active  bool
	epoch   int // grows with each cut: settling an older message is an error
	unacked map[*message]struct{}
}

func (s *consumer) subscribe() {
	if s.conn.up && !s.active {
		s.conn.bus.declare(s.queue)
		s.conn.bus.queues[s.queue.Name].consumers++
		s.active = true
		s.conn.bus.wake()
	}
}

func (s *consumer) unsubscribe() {
	if !s.active {
		return
	}
	s.active = false
	s.epoch++
	b := s.conn.bus
	for m := range s.unacked {
		b.putBack(s.queue.Name, m)
	}
	clear(s.unacked)
	if q := b.queues[s.queue.Name]; q != nil {
		q.consumers--
	}
}

func (s *consumer) run(fn func(*oslomsg.Message)) {
	defer close(s.done)
	b := s.conn.bus
	for {
		b.mu.Lock()
		var m *message
		if s.active {
			m = b.take(s.queue.Name)
		}
		changed, epoch := b.changed, s.epoch
		if m != nil {
			s.unacked[m] = struct{}{}
		}
		b.mu.Unlock()
		if m == nil {
			select {
			case <-changed:
				continue
			case <-s.stop:
				return
			}
		}
		out := m.Message
		out.Received = time.Now()
		out.Acker = &acker{consumer: s, message: m, epoch: epoch}
		fn(&out)
		select {
		case <-s.stop:
			return
		default:
		}
	}
}

// Ready implements oslomsg.Consumer.
func (s *consumer) Ready(ctx context.Context) error {
	b := s.conn.bus
	for {
		b.mu.Lock()
		active, changed := s.active, b.changed
		b.mu.Unlock()
		if active {
			return nil
		}
		select {
		case <-changed:
		case <-s.stop:
			return oslomsg.ErrClosed
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Close implements oslomsg.Consumer. A reply or fanout queue goes with its
// last consumer, at once and not after its expiry.
func (s *consumer) Close() error {
	s.closeOnce.Do(func() { close(s.stop) })
	<-s.done
	b := s.conn.bus
	b.mu.Lock()
	defer b.mu.Unlock()
	s.unsubscribe()
	delete(s.conn.consumers, s)
	if q := b.queues[s.queue.Name]; q != nil && q.kind != oslomsg.TopicQueue && q.consumers <= 0 {
		b.deleteQueue(s.queue.Name)
	}
	return nil
}

// acker settles one message.
type acker struct {
	consumer *consumer
	message  *message
	epoch    int
}

func (a *acker) settle(requeue bool) error {
	s := a.consumer
	b := s.conn.bus
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := s.unacked[a.message]; !ok || a.epoch != s.epoch {
		return errLost
	}
	delete(s.unacked, a.message)
	if requeue {
		b.putBack(s.queue.Name, a.message)
	}
	return nil
}

// Ack implements oslomsg.Acker.
func (a *acker) Ack() error { return a.settle(false) }

// Requeue implements oslomsg.Acker.
func (a *acker) Requeue() error { return a.settle(true) }
