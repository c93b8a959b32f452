// Package membus is a broker inside the process: topic, fanout and default
// exchange, named queues, redelivery. It takes the place of RabbitMQ in tests
// and in the embedded demo; what travels through it are the very bytes that
// travel through AMQP.
//
// A [Bus] is the broker, a [Conn] one connection to it. Each consumer has a
// goroutine, which Close waits for. Nothing is kept on disk.
package membus

import (
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/novalet/novalet/novadriver/oslomsg"
)

// errLost is what settling a message returns after its connection broke.
var errLost = errors.New("connection lost")

// Bus is a broker. Its methods may be called from many goroutines.
type Bus struct {
	mu        sync.Mutex
	exchanges map[string][]binding
	queues    map[string]*queue
	changed   chan struct{} // closed and renewed when a queue got work or a connection changed
	taps      []func(oslomsg.Publishing)
}

type binding struct {
	key   string // "" matches all, as for a fanout exchange
	queue string
}

type queue struct {
	kind      oslomsg.QueueKind
	messages  []*message
	consumers int
}

type message struct {
	oslomsg.Message
	expires time.Time // zero: never
}

// New makes an empty broker.
func New() *Bus {
	return &Bus{exchanges: map[string][]binding{}, queues: map[string]*queue{}, changed: make(chan struct{})}
}

// Connect opens a connection.
func (b *Bus) Connect() *Conn {
	return &Conn{bus: b, up: true, since: time.Now(), consumers: map[*consumer]struct{}{}, closed: make(chan struct{})}
}

// Tap calls fn with everything published from now on, routed or not, before it
// is delivered. fn must not call the bus.
func (b *Bus) Tap(fn func(oslomsg.Publishing)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.taps = append(b.taps, fn)
}

// DeleteQueue removes a queue and what is in it, as when it expired. A
// consumer of it makes it anew only after its connection was cut.
func (b *Bus) DeleteQueue(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.deleteQueue(name)
}

// Queues returns how many messages wait in each queue.
func (b *Bus) Queues() map[string]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make(map[string]int, len(b.queues))
	for n, q := range b.queues {
		out[n] = len(q.messages)
	}
	return out
}

func (b *Bus) deleteQueue(name string) {
	delete(b.queues, name)
	for ex, bs := range b.exchanges {
		kept := bs[:0:0]
		for _, bd := range bs {
			if bd.queue != name {
				kept = append(kept, bd)
			}
		}
		b.exchanges[ex] = kept
	}
}

// declare makes a queue, its exchange and its binding.
func (b *Bus) declare(q oslomsg.Queue) {
	if b.queues[q.Name] == nil {
		b.queues[q.Name] = &queue{kind: q.Kind}
	}
	if q.Exchange == "" {
		return
	}
	bd := binding{key: q.Name, queue: q.Name}
	if q.Kind == oslomsg.FanoutQueue {
		bd.key = ""
	}
	for _, have := range b.exchanges[q.Exchange] {
		if have == bd {
			return
		}
	}
	b.exchanges[q.Exchange] = append(b.exchanges[q.Exchange], bd)
}

// route puts a message into the queues bound for it and returns how many.
func (b *Bus) route(p oslomsg.Publishing) (int, error) {
	for _, tap := range b.taps {
		tap(p)
	}
	if p.DeclareQueue {
		b.declare(oslomsg.Queue{Name: p.RoutingKey, Kind: oslomsg.TopicQueue, Exchange: p.Exchange})
	}
	var names []string
	if p.Exchange == "" {
		if b.queues[p.RoutingKey] != nil {
			names = []string{p.RoutingKey}
		}
	} else {
		bindings, ok := b.exchanges[p.Exchange]
		if !ok && !p.Fanout {
			return 0, oslomsg.ErrNoExchange
		}
		for _, bd := range bindings {
			if bd.key == "" || matches(bd.key, p.RoutingKey) {
				names = append(names, bd.queue)
			}
		}
	}
	for _, n := range names {
		m := &message{Message: oslomsg.Message{
			Queue: n, Exchange: p.Exchange, RoutingKey: p.RoutingKey, Expiration: p.Expiration, Body: p.Body,
		}}
		if p.Expiration > 0 {
			m.expires = time.Now().Add(p.Expiration)
		}
		b.queues[n].messages = append(b.queues[n].messages, m)
	}
	if len(names) > 0 {
		b.wake()
	}
	return len(names), nil
}

// take removes the next message that has not expired.
func (b *Bus) take(name string) *message {
	q := b.queues[name]
	if q == nil {
		return nil
	}
	now := time.Now()
	for len(q.messages) > 0 {
		m := q.messages[0]
		q.messages[0] = nil
		q.messages = q.messages[1:]
		if m.expires.IsZero() || now.Before(m.expires) {
			return m
		}
	}
	return nil
}

// putBack returns messages to the head of their queue.
func (b *Bus) putBack(name string, ms ...*message) {
	q := b.queues[name]
	if q == nil || len(ms) == 0 {
		return
	}
	for _, m := range ms {
		m.Redelivered = true
	}
	q.messages = append(append([]*message{}, ms...), q.messages...)
	b.wake()
}

// wake makes every consumer and publisher look again.
func (b *Bus) wake() {
	close(b.changed)
	b.changed = make(chan struct{})
}

// matches compares a routing key with a binding key of a topic exchange: *
// stands for one word, # for any number.
func matches(pattern, key string) bool {
	return matchWords(strings.Split(pattern, "."), strings.Split(key, "."))
}

func matchWords(pattern, key []string) bool {
	for i, p := range pattern {
		if p == "#" {
			for j := i; j <= len(key); j++ {
				if matchWords(pattern[i+1:], key[j:]) {
					return true
				}
			}
			return false
		}
		if i >= len(key) || p != "*" && p != key[i] {
			return false
		}
	}
	return len(pattern) == len(key)
}
