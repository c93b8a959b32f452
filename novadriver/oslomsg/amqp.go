package oslomsg

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// amqpTransport is a Transport over RabbitMQ. It keeps one connection for
// publishing and one for consuming, since a broker that slows down a publisher
// stops reading from its whole connection, acks included.
type amqpTransport struct {
	opt     Options
	log     *slog.Logger
	ctx     context.Context
	stop    context.CancelCauseFunc
	pubLink *link
	subLink *link
	running sync.WaitGroup // consumers, and the channels of publishers

	mu        sync.Mutex
	closed    bool
	publisher *publisher // of the last connection used; nil before the first
	grumbled  map[string]time.Time
}

// grumbleInterval is the time between two log lines about the same refusal.
const grumbleInterval = time.Minute

// Dial starts connecting to the brokers of o.URL and returns at once: while
// there is no broker, Publish and Consumer.Ready wait. The error is that the
// options make no sense.
func Dial(o Options) (Transport, error) {
	if len(o.URL.Hosts) == 0 {
		return nil, errors.New("connect to the broker: no hosts")
	}
	if _, err := o.TLS.versions(); err != nil {
		return nil, err
	}
	// One order for both connections, another one for each process, so that
	// the hosts share the load.
	hosts := slices.Clone(o.URL.Hosts)
	rand.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })

	t := &amqpTransport{opt: o, log: logger(o.Logger), grumbled: map[string]time.Time{}}
	t.ctx, t.stop = context.WithCancelCause(context.Background())
	out := newOutages(t.log)
	t.pubLink = newLink("publish", &t.opt, hosts, out)
	t.subLink = newLink("consume", &t.opt, hosts, out)
	go t.pubLink.run(t.ctx)
	go t.subLink.run(t.ctx)
	return t, nil
}

// Health implements Transport.
func (t *amqpTransport) Health() Health {
	return Health{Links: []Link{t.pubLink.health(), t.subLink.health()}}
}

// Close implements Transport.
func (t *amqpTransport) Close() error {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.stop(ErrClosed)
	<-t.pubLink.done
	<-t.subLink.done
	t.running.Wait()
	return nil
}

// Consume implements Transport.
func (t *amqpTransport) Consume(q Queue, fn func(*Message)) (Consumer, error) {
	if q.Name == "" || fn == nil {
		return nil, errors.New("consume: queue and function are needed")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, ErrClosed
	}
	c := &amqpConsumer{transport: t, queue: q, fn: fn, log: t.log.With("queue", q.Name), done: make(chan struct{}), changed: make(chan struct{})}
	c.ctx, c.stop = context.WithCancelCause(t.ctx)
	t.running.Go(c.run)
	return c, nil
}

// Publish implements Transport.
func (t *amqpTransport) Publish(ctx context.Context, p Publishing) error {
	start := time.Now()
	for {
		pub, err := t.connected(ctx)
		if err != nil {
			return err
		}
		if p.DeclareQueue {
			err = pub.declare(&t.opt, t.log, p)
		}
		if err == nil {
			err = pub.publish(ctx, p, time.Since(start))
		}
		switch {
		case err == nil, errors.Is(err, ErrUnroutable), errors.Is(err, ErrRefused):
			return err
		case errors.Is(err, ErrNoExchange):
			if p.Fanout {
				return nil
			}
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, errChannelLost):
			// The connection may be fine: a new channel will do.
			if !sleep(ctx, 50*time.Millisecond) {
				return context.Cause(ctx)
			}
		default:
			t.grumble(p, err)
			if !sleep(ctx, time.Second) {
				return context.Cause(ctx)
			}
		}
	}
}

// grumble logs that a message is not accepted, once a minute for each reason.
func (t *amqpTransport) grumble(p Publishing, err error) {
	t.mu.Lock()
	now, text := time.Now(), err.Error()
	quiet := now.Sub(t.grumbled[text]) < grumbleInterval
	if !quiet {
		maps.DeleteFunc(t.grumbled, func(_ string, at time.Time) bool { return now.Sub(at) >= grumbleInterval })
		t.grumbled[text] = now
	}
	t.mu.Unlock()
	if !quiet {
		t.log.Warn("message is not accepted, trying again", "exchange", p.Exchange, "routing_key", p.RoutingKey, "error", err)
	}
}

// connected returns the publisher of a connection that takes messages.
func (t *amqpTransport) connected(ctx context.Context) (*publisher, error) {
	conn, err := t.pubLink.await(ctx, true)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, ErrClosed
	}
	if t.publisher == nil || t.publisher.conn != conn {
		t.publisher = newPublisher(conn, &t.running)
	}
	return t.publisher, nil
}

// properties are those of every message, as oslo.messaging sets them.
func properties(body []byte, expiration, waited time.Duration) amqp.Publishing {
	p := amqp.Publishing{
		ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: amqp.Persistent, Body: body,
	}
	if expiration > 0 {
		// What was spent on waiting for a broker is gone; small change is
		// left, so that the figure is the round one that oslo sends.
		left := max(expiration-waited.Truncate(time.Second), time.Millisecond)
		p.Expiration = strconv.FormatInt(int64((left+time.Millisecond-1)/time.Millisecond), 10)
	}
	return p
}
