package oslomsg

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

var (
	// errChannelLost: it is not known whether the message arrived.
	errChannelLost = errors.New("channel lost")
	errNacked      = errors.New("broker did not accept the message")
	// errForbidden: the user may not publish there. An operator can change
	// that.
	errForbidden = errors.New("broker refuses to publish")
)

// publisher publishes over one connection, with a channel for each exchange: a
// channel ends when its exchange does not exist, and must not take others with
// it.
type publisher struct {
	conn    *amqp.Connection
	running *sync.WaitGroup // the channels' goroutines

	mu       sync.Mutex
	channels map[string]*pubChannel // by exchange

	// Not mu: others publish while the broker is asked to make a queue.
	declareMu sync.Mutex
	declared  map[Queue]bool
}

func newPublisher(conn *amqp.Connection, running *sync.WaitGroup) *publisher {
	return &publisher{conn: conn, running: running, channels: map[string]*pubChannel{}, declared: map[Queue]bool{}}
}

// declare makes the queue that p asks for, unless this connection has.
func (b *publisher) declare(opt *Options, log *slog.Logger, p Publishing) error {
	q := Queue{Name: p.RoutingKey, Kind: TopicQueue, Exchange: p.Exchange}
	b.declareMu.Lock()
	defer b.declareMu.Unlock()
	if b.declared[q] {
		return nil
	}
	d := declarer{conn: b.conn, opt: opt, log: log.With("queue", q.Name)}
	defer d.close()
	if err := d.declare(q); err != nil {
		if b.conn.IsClosed() {
			return fmt.Errorf("%w: %w", errChannelLost, err)
		}
		return err
	}
	b.declared[q] = true
	return nil
}

// publish sends p and waits for the broker's word. waited is how long the
// message has been on its way already.
func (b *publisher) publish(ctx context.Context, p Publishing, waited time.Duration) error {
	c, err := b.channel(p.Exchange)
	if err != nil {
		return err
	}
	return c.publish(ctx, p, waited)
}

// channel returns the open channel for an exchange.
func (b *publisher) channel(exchange string) (*pubChannel, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.channels[exchange]; c != nil && !c.ch.IsClosed() {
		return c, nil
	}
	ch, err := b.conn.Channel()
	if err != nil {
		return nil, fmt.Errorf("%w: open: %w", errChannelLost, err)
	}
	c := &pubChannel{
		ch: ch, requests: make(chan *pubRequest), flush: make(chan chan struct{}), done: make(chan struct{}),
		mandatory: map[[sha256.Size]byte]*pubRequest{},
	}
	closed := ch.NotifyClose(make(chan *amqp.Error, 1))
	returns := ch.NotifyReturn(make(chan amqp.Return))
	if err := ch.Confirm(false); err != nil {
		ch.Close()
		return nil, fmt.Errorf("%w: confirm mode: %w", errChannelLost, err)
	}
	b.running.Go(c.write)
	b.running.Go(func() { c.watch(closed, returns) })
	b.channels[exchange] = c
	return c, nil
}

// pubChannel is one channel in confirm mode. One goroutine writes, so that a
// caller can give up while the broker takes nothing; another hears of messages
// that come back and of the channel's end.
type pubChannel struct {
	ch       *amqp.Channel
	requests chan *pubRequest
	flush    chan chan struct{}
	done     chan struct{} // closed when the channel has ended
	err      error         // why; valid after done

	mu        sync.Mutex
	mandatory map[[sha256.Size]byte]*pubRequest // those that may come back
}

type pubRequest struct {
	ctx     context.Context
	p       Publishing
	message amqp.Publishing
	written chan struct{}
	confirm *amqp.DeferredConfirmation // valid after written
	err     error                      // likewise

	returned bool // guarded by pubChannel.mu
}

// publish hands p to the writer and waits for the confirmation.
func (c *pubChannel) publish(ctx context.Context, p Publishing, waited time.Duration) error {
	r := &pubRequest{ctx: ctx, p: p, message: properties(p.Body, p.Expiration, waited), written: make(chan struct{})}
	if p.Mandatory {
		// A returned message carries no id of ours but its body, which holds
		// a _unique_id.
		key := fingerprint(p.RoutingKey, p.Body)
		c.mu.Lock()
		c.mandatory[key] = r
		c.mu.Unlock()
		defer func() {
			c.mu.Lock()
			if c.mandatory[key] == r {
				delete(c.mandatory, key)
			}
			c.mu.Unlock()
		}()
	}
	select {
	case c.requests <- r:
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case <-r.written:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if r.err != nil {
		return c.lost(r.err)
	}
	select {
	case <-r.confirm.Done():
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if !r.confirm.Acked() {
		// The end of a channel looks like a refusal at first.
		if c.ch.IsClosed() {
			return c.lost(errNacked)
		}
		return errNacked
	}
	if p.Mandatory && c.cameBack(r) {
		return ErrUnroutable
	}
	return nil
}

// lost is the error of a message that the channel's end caught.
func (c *pubChannel) lost(err error) error {
	if !c.ch.IsClosed() {
		return fmt.Errorf("%w: %w", errChannelLost, err)
	}
	<-c.done
	return c.err
}

// cameBack reports whether a confirmed message was returned. The broker sends
// the return before the confirmation; going through watch makes sure that it
// has been seen.
func (c *pubChannel) cameBack(r *pubRequest) bool {
	seen := make(chan struct{})
	select {
	case c.flush <- seen:
		<-seen
	case <-c.done:
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return r.returned
}

// write is the goroutine that publishes.
func (c *pubChannel) write() {
	for {
		select {
		case r := <-c.requests:
			if r.err = r.ctx.Err(); r.err == nil {
				r.confirm, r.err = c.ch.PublishWithDeferredConfirm(r.p.Exchange, r.p.RoutingKey, r.p.Mandatory, false, r.message)
			}
			close(r.written)
		case <-c.done:
			return
		}
	}
}

// watch is the goroutine that hears what the broker sends.
func (c *pubChannel) watch(closed <-chan *amqp.Error, returns <-chan amqp.Return) {
	defer close(c.done)
	var end *amqp.Error
	for returns != nil || closed != nil {
		select {
		case ret, ok := <-returns:
			if !ok {
				returns = nil
				continue
			}
			key := fingerprint(ret.RoutingKey, ret.Body)
			c.mu.Lock()
			if r := c.mandatory[key]; r != nil {
				r.returned = true
			}
			c.mu.Unlock()
		case e, ok := <-closed:
			if !ok {
				closed = nil
				continue
			}
			end = e
		case seen := <-c.flush:
			close(seen)
		}
	}
	switch {
	case end == nil:
		c.err = errChannelLost
	case end.Code == amqp.NotFound && strings.Contains(end.Reason, "exchange"):
		c.err = fmt.Errorf("%w: %s", ErrNoExchange, clip(end.Reason, 200))
	case end.Code == amqp.AccessRefused:
		c.err = fmt.Errorf("%w: %s", errForbidden, clip(end.Reason, 200))
	case end.Code == amqp.PreconditionFailed:
		c.err = fmt.Errorf("%w: %s", ErrRefused, clip(end.Reason, 200))
	default:
		c.err = fmt.Errorf("%w: %w", errChannelLost, end)
	}
}

func fingerprint(key string, body []byte) [sha256.Size]byte {
	h := sha256.New()
	h.Write([]byte(key))
	h.Write([]byte{0})
	h.Write(body)
	return [sha256.Size]byte(h.Sum(nil))
}
