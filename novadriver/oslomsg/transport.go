package oslomsg

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Errors of a [Transport]. They are wrapped; ask with errors.Is.
var (
	// ErrUnroutable: a mandatory message reached no queue. The message is
	// lost; sending it again later may work.
	ErrUnroutable = errors.New("no queue takes the message")
	// ErrNoExchange: the exchange does not exist (yet).
	ErrNoExchange = errors.New("exchange does not exist")
	// ErrRefused: the broker will not take this message, now or later; it may
	// be larger than the broker allows.
	ErrRefused = errors.New("broker refuses the message")
	// ErrClosed: the transport, client or server was closed on this side.
	ErrClosed = errors.New("messaging is closed")
)

// A Transport moves messages between this process and a broker. Its methods
// may be called from many goroutines.
type Transport interface {
	// Publish sends p and returns nil once the broker has confirmed it. It
	// blocks while there is no connection, or the broker accepts nothing, and
	// sends again after a reconnect, until ctx ends: a message may therefore
	// arrive twice, and receivers tell by its _unique_id. Returns
	// ErrUnroutable (only when p.Mandatory), ErrNoExchange, ErrRefused,
	// ErrClosed, or the cause of ctx.
	Publish(ctx context.Context, p Publishing) error

	// Consume declares q and delivers its messages to fn, one at a time,
	// until the consumer is closed; it declares and subscribes again after
	// each reconnect. It does not wait for the broker: see Consumer.Ready. fn
	// must settle each message by Ack or Requeue.
	Consume(q Queue, fn func(*Message)) (Consumer, error)

	// Health tells the state of each connection, without blocking.
	Health() Health

	// Close ends every consumer and connection and waits for them. It may be
	// called twice.
	Close() error
}

// A Consumer is one subscription of a [Transport].
type Consumer interface {
	// Ready waits until the queue is consumed; returns the cause of ctx, or
	// ErrClosed.
	Ready(ctx context.Context) error
	// Close stops the deliveries and waits for the one that is in fn. Messages
	// neither acked nor requeued by then go back to the queue. It must not be
	// called from fn.
	Close() error
}

// Publishing is one outgoing message.
type Publishing struct {
	Exchange   string // "" is the default exchange, which routes by queue name
	RoutingKey string
	Mandatory  bool // fail with ErrUnroutable when no queue takes it
	// Fanout marks an exchange made by its listeners only: that it is missing
	// means that nobody listens, which is no error.
	Fanout bool
	// DeclareQueue makes the exchange and a TopicQueue named RoutingKey first, once on each connection.
	DeclareQueue bool
	// Expiration is the time the message may wait in a queue, counted from
	// the call of Publish; 0: for ever.
	Expiration time.Duration
	Body       []byte
}

// QueueKind chooses which of the deployment's options apply to a queue.
type QueueKind int

// The kinds of queue that oslo.messaging knows.
const (
	// TopicQueue: shared, or of one server; bound to Exchange by its own name.
	// Durable, quorum and auto-delete as the deployment says.
	TopicQueue QueueKind = iota
	// ReplyQueue: of one process, reached through the default exchange,
	// expires when nobody consumes it.
	ReplyQueue
	// FanoutQueue: of one process, bound to the fanout exchange Exchange.
	FanoutQueue
)

// Queue names a queue to consume.
type Queue struct {
	Name     string
	Kind     QueueKind
	Exchange string // the exchange it is bound to; "" for a ReplyQueue
}

// Message is one incoming message.
type Message struct {
	Queue       string // the queue it came from
	Exchange    string
	RoutingKey  string
	Compression string        // the header "compression" of kombu; "" for none
	Expiration  time.Duration // the property, as the sender set it; 0 for none
	Timestamp   time.Time     // the property; zero for none (oslo sets none)
	Redelivered bool
	Received    time.Time // when it reached this process
	Body        []byte

	Acker Acker // settles the message; may be nil in tests
}

// Acker settles one message.
type Acker interface {
	// Ack removes the message from the queue. An error means that the broker
	// will deliver it again.
	Ack() error
	// Requeue gives the message back.
	Requeue() error
}

// Ack removes the message from its queue.
func (m *Message) Ack() error {
	if m.Acker == nil {
		return nil
	}
	return m.Acker.Ack()
}

// Requeue gives the message back to its queue.
func (m *Message) Requeue() error {
	if m.Acker == nil {
		return nil
	}
	return m.Acker.Requeue()
}

// Health is the state of a transport at one moment.
type Health struct {
	Links []Link
}

// Link is the state of one connection to the broker.
type Link struct {
	Name      string    // what it is for: "publish", "consume"
	Connected bool      //
	Host      string    // host:port connected to, or tried last
	Since     time.Time // of the present state
	Problem   string    // why it is not connected, or "" (no secrets)
	Blocked   string    // the broker's reason for taking no messages, or ""
}

// Err is nil when every link is connected and not blocked, else an error that
// names each that is not.
func (h Health) Err() error {
	var bad []string
	for _, l := range h.Links {
		switch {
		case !l.Connected:
			bad = append(bad, fmt.Sprintf("%s: not connected (%s): %s", l.Name, l.Host, l.Problem))
		case l.Blocked != "":
			bad = append(bad, fmt.Sprintf("%s: broker %s takes no messages: %s", l.Name, l.Host, l.Blocked))
		}
	}
	if bad == nil {
		return nil
	}
	return errors.New(strings.Join(bad, "; "))
}
