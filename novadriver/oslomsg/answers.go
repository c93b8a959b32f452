package oslomsg

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"sync"
	"time"
)

// How a reply whose queue is not there is handled, as in oslo.messaging
// (kombu_missing_consumer_retry_timeout).
const (
	replyRetry    = 250 * time.Millisecond
	replyPatience = 60 * time.Second
	replyDead     = 60 * time.Second
	// replyLimit bounds a reply while there is no broker, when the caller did
	// not say how long it waits: the longest of Nova's timeouts.
	replyLimit = 30 * time.Minute
	// onceLimit bounds the one attempt to answer a call given up.
	onceLimit = 10 * time.Second
	// minHeartbeat: oslo sends none when half the timeout is below a second.
	minHeartbeat = time.Second
)

// answers sends the replies and heartbeats of a server.
type answers struct {
	ctx       context.Context
	transport Transport
	log       *slog.Logger
	running   sync.WaitGroup

	mu     sync.Mutex
	closed bool                 // no further goroutine may start
	open   int                  // calls begun whose reply is not through
	idle   chan struct{}        // closed while open is 0
	dead   map[string]time.Time // reply queues that are gone, until when that is believed
}

func newAnswers(ctx context.Context, t Transport, log *slog.Logger) *answers {
	a := &answers{ctx: ctx, transport: t, log: log, idle: make(chan struct{}), dead: map[string]time.Time{}}
	close(a.idle)
	return a
}

// start runs fn in a goroutine that close waits for.
func (a *answers) start(fn func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	a.running.Go(fn)
}

// count changes the number of open calls.
func (a *answers) count(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.open == 0 {
		a.idle = make(chan struct{})
	}
	if a.open += n; a.open == 0 {
		close(a.idle)
	}
}

// wait returns when every call has been answered and every reply is through,
// or the server's context ended.
func (a *answers) wait() {
	for {
		a.mu.Lock()
		idle, open := a.idle, a.open
		a.mu.Unlock()
		if open == 0 {
			return
		}
		select {
		case <-idle:
		case <-a.ctx.Done():
			return
		}
	}
}

// close waits for the goroutines, after the server's context ended.
func (a *answers) close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.running.Wait()
}

// heartbeat is the goroutine that keeps one caller waiting.
type heartbeat struct {
	stop context.CancelFunc
	done chan struct{}
}

// begin is called once for each delivery that will be handled.
func (a *answers) begin(d *Delivery) {
	if !d.IsCall() {
		return
	}
	a.count(1)
	d.begun = true
	interval := d.Timeout / 2
	if interval < minHeartbeat {
		return
	}
	ctx, stop := context.WithCancel(a.ctx)
	h := &heartbeat{stop: stop, done: make(chan struct{})}
	d.heartbeat = h
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		stop()
		close(h.done)
		return
	}
	a.running.Go(func() {
		defer close(h.done)
		a.beat(ctx, d, interval)
	})
}

// beat sends a heartbeat each interval until ctx ends or the caller has gone.
func (a *answers) beat(ctx context.Context, d *Delivery, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if deadline := d.Deadline(); !deadline.IsZero() && time.Now().After(deadline) {
			return
		}
		body, err := encodeReply(d.MsgID, nil, "", false)
		if err == nil {
			one, cancel := context.WithTimeout(ctx, interval)
			err = a.publish(one, d, body)
			cancel()
		}
		if err != nil && ctx.Err() == nil {
			a.log.Debug("send heartbeat", append(d.attrs(), "error", err)...)
		}
	}
}

// send publishes an answer in the background.
func (a *answers) send(d *Delivery, result json.RawMessage, f *Failure) {
	a.start(func() {
		if d.begun {
			defer a.count(-1)
		}
		if d.heartbeat != nil {
			d.heartbeat.stop()
			<-d.heartbeat.done // a heartbeat must not follow the answer
		}
		body, err := encodeAnswer(d, result, f)
		if err == nil {
			err = a.deliver(d, body)
		}
		if errors.Is(err, ErrRefused) {
			// The caller shall not wait for what can never come.
			bare := &Failure{Module: "builtins", Class: "ValueError", Message: "the answer of " + d.Method + " is too large for the broker"}
			if body, encErr := encodeAnswer(d, nil, bare); encErr == nil {
				_ = a.deliver(d, body) // the first error is the one to log
			}
		}
		if err != nil {
			a.log.Warn("send reply", append(d.attrs(), "error", err)...)
		}
	})
}

func encodeAnswer(d *Delivery, result json.RawMessage, f *Failure) ([]byte, error) {
	if f == nil {
		return encodeReply(d.MsgID, result, "", true)
	}
	text, err := f.encode()
	if err != nil {
		// The failure's own details are at fault: say it without them.
		bare := Failure{Module: f.Module, Class: f.Class, Message: f.Message}
		if text, err = bare.encode(); err != nil {
			return nil, err
		}
	}
	return encodeReply(d.MsgID, nil, text, true)
}

// deliver publishes body until the caller has it, has gone, or its queue has
// been missing for too long.
func (a *answers) deliver(d *Delivery, body []byte) error {
	limit := replyLimit
	if deadline := d.Deadline(); !deadline.IsZero() {
		limit = max(time.Until(deadline), replyPatience)
	}
	ctx, cancel := context.WithTimeout(a.ctx, limit)
	defer cancel()
	var missing time.Time
	for {
		err := a.publish(ctx, d, body)
		if !errors.Is(err, ErrUnroutable) {
			return err
		}
		switch now := time.Now(); {
		case a.isDead(d.ReplyTo, now):
			return err
		case missing.IsZero():
			missing = now
		case now.Sub(missing) >= replyPatience:
			a.bury(d.ReplyTo, now)
			return err
		}
		if !sleep(ctx, replyRetry) {
			return err
		}
	}
}

// once answers a call that is not carried out, with a single attempt: its
// caller has most likely gone.
func (a *answers) once(d *Delivery, f *Failure) {
	if !d.take() {
		return
	}
	a.start(func() {
		ctx, cancel := context.WithTimeout(a.ctx, onceLimit)
		defer cancel()
		body, err := encodeAnswer(d, nil, f)
		if err == nil {
			err = a.publish(ctx, d, body)
		}
		if err != nil {
			a.log.Debug("send reply", append(d.attrs(), "error", err)...)
		}
	})
}

func (a *answers) publish(ctx context.Context, d *Delivery, body []byte) error {
	return a.transport.Publish(ctx, Publishing{RoutingKey: d.ReplyTo, Mandatory: true, Body: body})
}

func (a *answers) isDead(queue string, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return now.Before(a.dead[queue])
}

// bury remembers that a reply queue is gone.
func (a *answers) bury(queue string, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for q, until := range a.dead {
		if !now.Before(until) {
			delete(a.dead, q)
		}
	}
	a.dead[queue] = now.Add(replyDead)
}
