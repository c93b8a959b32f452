package oslomsg

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// closeTimeout bounds the goodbye to a broker.
const closeTimeout = 5 * time.Second

// link keeps one connection to a broker alive, for ever. Its goroutine runs
// until the context ends.
type link struct {
	name    string
	opt     *Options
	hosts   []Host
	outages *outages
	done    chan struct{}

	mu      sync.Mutex
	conn    *amqp.Connection // nil while there is none
	changed chan struct{}    // closed and renewed with every change
	status  Link
}

func newLink(name string, opt *Options, hosts []Host, outages *outages) *link {
	l := &link{name: name, opt: opt, hosts: hosts, outages: outages, done: make(chan struct{}), changed: make(chan struct{})}
	l.status = Link{Name: name, Host: hosts[0].Addr(), Since: time.Now(), Problem: "connecting"}
	outages.add(name)
	return l
}

// run connects again and again until ctx ends.
func (l *link) run(ctx context.Context) {
	defer close(l.done)
	for next, failed := 0, 0; ctx.Err() == nil; {
		h := l.hosts[next%len(l.hosts)]
		conn, err := l.opt.dial(ctx, h, l.name)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			l.down(h, err)
			next = l.pick(next)
			sleep(ctx, l.opt.pause(failed))
			failed++
			continue
		}
		failed = 0
		err = l.hold(ctx, h, conn)
		if ctx.Err() != nil {
			return
		}
		l.down(h, err)
		next = l.pick(next)
		sleep(ctx, l.opt.ReconnectDelay+jitter(l.opt.ReconnectSplay))
	}
}

// pick chooses the host to try next.
func (l *link) pick(last int) int {
	if l.opt.ShuffleHosts {
		return rand.IntN(len(l.hosts))
	}
	return (last + 1) % len(l.hosts)
}

// pause is how long to wait after the nth attempt in a row that failed.
func (o *Options) pause(n int) time.Duration {
	d := o.RetryInterval + time.Duration(min(n, 1000))*o.RetryBackoff
	return max(min(d, o.RetryMax), 10*time.Millisecond)
}

func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

// hold keeps conn until it breaks or ctx ends, and returns why it broke.
func (l *link) hold(ctx context.Context, h Host, conn *amqp.Connection) error {
	closed := conn.NotifyClose(make(chan *amqp.Error, 1))
	blocked := conn.NotifyBlocked(make(chan amqp.Blocking, 8))
	l.up(h, conn)
	for {
		select {
		case b, ok := <-blocked:
			if !ok {
				blocked = nil
				continue
			}
			l.block(b)
		case e, ok := <-closed:
			if ok && e != nil {
				return e
			}
			return errors.New("connection closed")
		case <-ctx.Done():
			_ = conn.CloseDeadline(time.Now().Add(closeTimeout)) // it may be broken already
			return ctx.Err()
		}
	}
}

func (l *link) change(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *link) up(h Host, conn *amqp.Connection) {
	l.change(func() {
		l.conn = conn
		l.status = Link{Name: l.name, Connected: true, Host: h.Addr(), Since: time.Now()}
	})
	l.outages.up(l.name, h)
}

func (l *link) down(h Host, err error) {
	l.change(func() {
		since := time.Now()
		if !l.status.Connected {
			since = l.status.Since
		}
		l.conn = nil
		l.status = Link{Name: l.name, Host: h.Addr(), Since: since, Problem: err.Error()}
	})
	l.outages.down(l.name, h, err)
}

func (l *link) block(b amqp.Blocking) {
	l.change(func() {
		l.status.Blocked = ""
		if b.Active {
			l.status.Blocked = b.Reason
			if b.Reason == "" {
				l.status.Blocked = "no reason given"
			}
		}
	})
	if b.Active {
		l.outages.log.Warn("broker takes no messages", "broker", l.health().Host, "connection", l.name, "reason", b.Reason)
	} else {
		l.outages.log.Info("broker takes messages again", "broker", l.health().Host, "connection", l.name)
	}
}

func (l *link) health() Link {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status
}

// await returns the connection once there is one; with unblocked, once the
// broker also takes messages on it.
func (l *link) await(ctx context.Context, unblocked bool) (*amqp.Connection, error) {
	for {
		l.mu.Lock()
		conn, changed, blocked := l.conn, l.changed, l.status.Blocked != ""
		l.mu.Unlock()
		if conn != nil && !conn.IsClosed() && !(unblocked && blocked) {
			return conn, nil
		}
		select {
		case <-changed:
		case <-l.done:
			return nil, ErrClosed
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// outages writes the log of a transport's connections: one line when the
// broker is lost, one more for each further kind of trouble in the same
// outage, and one when every connection is back.
type outages struct {
	log *slog.Logger

	mu     sync.Mutex
	missed map[string]bool // links that are not connected
	said   map[string]bool // kinds of trouble logged in this outage
	since  time.Time
	first  bool // nothing has been connected yet
}

func newOutages(log *slog.Logger) *outages {
	return &outages{log: log, missed: map[string]bool{}, said: map[string]bool{}, since: time.Now(), first: true}
}

func (o *outages) add(link string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.missed[link] = true
}

func (o *outages) down(link string, h Host, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.missed) == 0 {
		o.since = time.Now()
	}
	o.missed[link] = true
	kind := "lost"
	var d *dialError
	if errors.As(err, &d) {
		kind = d.kind
	}
	if o.said[kind] {
		return
	}
	o.said[kind] = true
	switch {
	case d == nil:
		o.log.Warn("lost the broker, reconnecting", "broker", h.Addr(), "error", err)
	case o.first:
		o.log.Warn("waiting for the broker", "error", err)
	case !o.said["lost"] || kind != "unreachable":
		o.log.Warn("cannot connect to the broker again, retrying", "error", err)
	}
}

func (o *outages) up(link string, h Host) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.missed, link)
	if len(o.missed) > 0 {
		return
	}
	if o.first {
		o.log.Info("connected to the broker", "broker", h.Addr())
	} else {
		o.log.Info("connected to the broker again", "broker", h.Addr(), "after", time.Since(o.since).Round(time.Millisecond))
	}
	o.first = false
	clear(o.said)
}
