package oslomsg

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// defaultPrefetch is used where the deployment sets no limit.
	defaultPrefetch = 32
	// consumeRetry is the pause after a queue could not be consumed, though
	// there is a connection.
	consumeRetry = time.Second
)

// amqpConsumer keeps one queue consumed. Its goroutine runs until it is closed.
type amqpConsumer struct {
	transport *amqpTransport
	queue     Queue
	fn        func(*Message)
	log       *slog.Logger
	ctx       context.Context
	stop      context.CancelCauseFunc
	done      chan struct{}

	mu      sync.Mutex
	ready   bool
	changed chan struct{}
}

// Ready implements Consumer.
func (c *amqpConsumer) Ready(ctx context.Context) error {
	for {
		c.mu.Lock()
		ready, changed := c.ready, c.changed
		c.mu.Unlock()
		if ready {
			return nil
		}
		select {
		case <-changed:
		case <-c.ctx.Done():
			return ErrClosed
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (c *amqpConsumer) setReady(ready bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ready != ready {
		c.ready = ready
		close(c.changed)
		c.changed = make(chan struct{})
	}
}

// Close implements Consumer.
func (c *amqpConsumer) Close() error {
	c.stop(ErrClosed)
	<-c.done
	return nil
}

func (c *amqpConsumer) run() {
	defer close(c.done)
	defer c.stop(ErrClosed)
	said := "" // the trouble that was logged
	for {
		conn, err := c.transport.subLink.await(c.ctx, false)
		if err != nil {
			return
		}
		err = c.consume(conn, func() {
			if said != "" {
				c.log.Info("queue is consumed again")
			}
			said = ""
		})
		c.setReady(false)
		if c.ctx.Err() != nil {
			return
		}
		if conn.IsClosed() {
			continue // the link tells about it
		}
		if text := err.Error(); text != said {
			c.log.Warn("queue is not consumed, trying again", "error", err)
			said = text
		}
		if !sleep(c.ctx, consumeRetry) {
			return
		}
	}
}

// consume declares the queue and delivers from it until the channel ends or
// the consumer is closed.
func (c *amqpConsumer) consume(conn *amqp.Connection, onReady func()) error {
	// A broker that answers no more must not keep Close waiting.
	finished := make(chan struct{})
	defer close(finished)
	defer context.AfterFunc(c.ctx, func() {
		select {
		case <-finished:
		case <-time.After(closeTimeout):
			_ = conn.CloseDeadline(time.Now())
		}
	})()

	d := declarer{conn: conn, opt: &c.transport.opt, log: c.log}
	defer d.close()
	if err := d.declare(c.queue); err != nil {
		return err
	}
	prefetch := c.transport.opt.Prefetch
	if prefetch <= 0 {
		prefetch = defaultPrefetch
	}
	if err := d.ch.Qos(prefetch, 0, false); err != nil {
		return fmt.Errorf("set prefetch: %w", err)
	}
	deliveries, err := d.ch.Consume(c.queue.Name, "", false, false, false, false, d.consumeArgs(c.queue))
	if err != nil {
		return fmt.Errorf("consume: %w", err)
	}
	c.setReady(true)
	onReady()

	// A goroutine of its own stamps the messages as they arrive, while fn may
	// be busy; it ends with the channel.
	stamped := make(chan *Message, prefetch)
	go func() {
		defer close(stamped)
		for m := range deliveries {
			stamped <- c.message(m)
		}
	}()
	defer func() {
		d.close()
		for range stamped {
		}
	}()
	for {
		select {
		case <-c.ctx.Done():
			if c.queue.Kind != TopicQueue && !c.transport.opt.StreamFanout {
				// It would expire by itself; gone at once is tidier.
				_, _ = d.ch.QueueDelete(c.queue.Name, false, false, false)
			}
			return c.ctx.Err()
		case m, ok := <-stamped:
			if !ok {
				return errors.New("the broker ended the subscription")
			}
			if c.ctx.Err() == nil {
				c.fn(m)
			}
		}
	}
}

// message turns a delivery of the library into ours.
func (c *amqpConsumer) message(d amqp.Delivery) *Message {
	m := &Message{
		Queue: c.queue.Name, Exchange: d.Exchange, RoutingKey: d.RoutingKey, Timestamp: d.Timestamp,
		Redelivered: d.Redelivered, Received: time.Now(), Body: d.Body, Acker: amqpAcker{d.Acknowledger, d.DeliveryTag},
	}
	if ms, err := strconv.ParseInt(d.Expiration, 10, 64); err == nil && ms > 0 {
		m.Expiration = time.Duration(min(ms, int64(1000*time.Hour/time.Millisecond))) * time.Millisecond
	}
	if s, ok := d.Headers["compression"].(string); ok {
		m.Compression = s
	}
	return m
}

type amqpAcker struct {
	channel amqp.Acknowledger
	tag     uint64
}

func (a amqpAcker) Ack() error     { return a.channel.Ack(a.tag, false) }
func (a amqpAcker) Requeue() error { return a.channel.Nack(a.tag, false, true) }

// declarer makes exchanges and queues as the deployment has them. A channel
// ends with each refusal, so that it opens new ones.
type declarer struct {
	conn *amqp.Connection
	ch   *amqp.Channel
	opt  *Options
	log  *slog.Logger
}

func (d *declarer) open() error {
	if d.ch != nil && !d.ch.IsClosed() {
		return nil
	}
	ch, err := d.conn.Channel()
	if err != nil {
		return fmt.Errorf("open channel: %w", err)
	}
	d.ch = ch
	return nil
}

func (d *declarer) close() {
	if d.ch != nil {
		_ = d.ch.Close() // it may have ended already
	}
}

// try runs f on an open channel.
func (d *declarer) try(f func(*amqp.Channel) error) error {
	if err := d.open(); err != nil {
		return err
	}
	return f(d.ch)
}

func (d *declarer) declare(q Queue) error {
	o := d.opt
	if q.Exchange != "" {
		if err := d.exchange(q); err != nil {
			return err
		}
	}
	durable, autoDelete := o.DurableQueues || o.QuorumQueue, o.AutoDelete
	switch q.Kind {
	case ReplyQueue:
		durable, autoDelete = o.TransientQuorumQueue, false
	case FanoutQueue:
		durable, autoDelete = o.TransientQuorumQueue || o.StreamFanout, false
	}
	args := o.queueArgs(q.Kind)
	create := func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclare(q.Name, durable, autoDelete, false, false, args)
		return err
	}
	err := d.try(create)
	switch code(err) {
	case amqp.PreconditionFailed:
		// Left by another program or other settings: it serves all the same.
		d.log.Warn("queue exists with other properties and is used as it is", "reason", reason(err))
		err = d.try(func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclarePassive(q.Name, durable, autoDelete, false, false, nil)
			return err
		})
	case amqp.NotFound:
		// The node that had this queue is down, and the queue with it.
		d.log.Warn("queue is out of reach and is made anew", "reason", reason(err))
		err = d.try(func(ch *amqp.Channel) error {
			_, err := ch.QueueDelete(q.Name, false, false, false)
			return err
		})
		if err == nil || code(err) == amqp.NotFound {
			err = d.try(create)
		}
	}
	if err != nil {
		return fmt.Errorf("declare queue: %w", err)
	}
	if q.Exchange == "" {
		return d.open()
	}
	key := q.Name
	if q.Kind == FanoutQueue {
		key = ""
	}
	if err := d.try(func(ch *amqp.Channel) error { return ch.QueueBind(q.Name, key, q.Exchange, false, nil) }); err != nil {
		return fmt.Errorf("bind queue to exchange %s: %w", q.Exchange, err)
	}
	return nil
}

// exchange makes sure that the exchange exists. It is looked for first: the
// controllers made it, with properties that are theirs to choose.
func (d *declarer) exchange(q Queue) error {
	o := d.opt
	kind, durable, autoDelete := amqp.ExchangeTopic, o.DurableQueues || o.QuorumQueue, o.AutoDelete
	if q.Kind == FanoutQueue {
		kind, durable, autoDelete = amqp.ExchangeFanout, o.TransientQuorumQueue || o.StreamFanout, true
	}
	passive := func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(q.Exchange, kind, durable, autoDelete, false, false, nil)
	}
	err := d.try(passive)
	if code(err) == amqp.NotFound {
		err = d.try(func(ch *amqp.Channel) error {
			return ch.ExchangeDeclare(q.Exchange, kind, durable, autoDelete, false, false, nil)
		})
		if code(err) == amqp.PreconditionFailed { // somebody else was quicker
			err = d.try(passive)
		}
	}
	if err != nil {
		return fmt.Errorf("declare exchange %s: %w", q.Exchange, err)
	}
	return nil
}

// queueArgs are the arguments oslo.messaging declares a queue with.
func (o *Options) queueArgs(kind QueueKind) amqp.Table {
	args := amqp.Table{}
	quorum := o.QuorumQueue
	if kind != TopicQueue {
		quorum = o.TransientQuorumQueue
		if o.TransientTTL > 0 {
			args["x-expires"] = o.TransientTTL.Milliseconds()
		}
	}
	if kind == FanoutQueue && o.StreamFanout {
		return amqp.Table{"x-queue-type": "stream", "x-max-age": fmt.Sprintf("%ds", int(o.TransientTTL/time.Second))}
	}
	if o.HAQueues {
		args["x-ha-policy"] = "all"
	}
	if quorum {
		args["x-queue-type"] = "quorum"
		for name, n := range map[string]int{
			"x-delivery-limit": o.QuorumDeliveryLimit, "x-max-in-memory-length": o.QuorumMaxMemoryLength,
			"x-max-in-memory-bytes": o.QuorumMaxMemoryBytes,
		} {
			if n > 0 {
				args[name] = int64(n)
			}
		}
	}
	return args
}

func (d *declarer) consumeArgs(q Queue) amqp.Table {
	args := amqp.Table{}
	if d.opt.CancelOnFailover {
		args["x-cancel-on-ha-failover"] = true
	}
	if q.Kind == FanoutQueue && d.opt.StreamFanout {
		args["x-stream-offset"] = "last"
	}
	return args
}

// code is the AMQP reply code of err, 0 if it has none.
func code(err error) int {
	var e *amqp.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

func reason(err error) string {
	var e *amqp.Error
	if errors.As(err, &e) {
		return clip(strings.TrimSpace(e.Reason), 300)
	}
	return err.Error()
}
