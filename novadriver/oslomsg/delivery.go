package oslomsg

import (
	"encoding/json"
	"sync"
	"time"
)

// expirySlack is how much the clocks of sender and host may differ before a
// call is thought too old by its context's timestamp.
const expirySlack = 5 * time.Second

// Delivery is one request. Its exported fields are not changed after it was
// made; its methods may be called from any goroutine.
type Delivery struct {
	Queue     string
	Method    string
	Args      json.RawMessage // a JSON object
	Version   string          // "1.0" when the sender gave none
	Namespace string
	Context   Context
	UniqueID  string

	MsgID   string        // set for a call: an answer is expected
	ReplyTo string        // the queue for it
	Timeout time.Duration // call monitor: heartbeats are sent each half of it; 0: none

	Redelivered bool
	Received    time.Time
	Expiration  time.Duration // how long the caller waits, 0 if unknown

	message json.RawMessage // what Args is a part of
	sent    time.Time       // the AMQP timestamp; zero with oslo
	answers *answers

	begun     bool       // set before the handler starts
	heartbeat *heartbeat // likewise; nil without a call monitor

	mu       sync.Mutex
	held     bool
	answered bool
}

// IsCall reports whether the sender waits for an answer.
func (d *Delivery) IsCall() bool { return d.MsgID != "" && d.ReplyTo != "" }

// Arg returns one argument, nil if it was not sent.
func (d *Delivery) Arg(name string) json.RawMessage {
	var m map[string]json.RawMessage
	if json.Unmarshal(d.Args, &m) != nil {
		return nil
	}
	return m[name]
}

// Deadline is when a call's caller stops waiting, as far as is known; zero for
// a cast or when the sender did not say. Messages carry no time of sending, so
// it counts from their arrival; the broker itself drops what outlived its
// expiration in the queue.
func (d *Delivery) Deadline() time.Time {
	if !d.IsCall() || d.Expiration <= 0 {
		return time.Time{}
	}
	if !d.sent.IsZero() && d.sent.Before(d.Received) {
		return d.sent.Add(d.Expiration)
	}
	return d.Received.Add(d.Expiration)
}

// Expired reports whether a call must not be carried out any more. A message
// that is delivered again may have been waiting for any time (a restarted
// broker loses the clock of a queue): then the time its request began, which
// the context tells, decides.
func (d *Delivery) Expired(now time.Time) bool {
	deadline := d.Deadline()
	if deadline.IsZero() {
		return false
	}
	if now.After(deadline) {
		return true
	}
	began := d.Context.Timestamp()
	return d.Redelivered && !began.IsZero() && now.After(began.Add(d.Expiration+expirySlack))
}

// Record is what has to be kept to work on a delivery again after a restart.
// It holds the user's token and must be stored as a secret.
type Record struct {
	Queue      string          `json:"queue"`
	Message    json.RawMessage `json:"message"` // the request without its envelope
	Received   time.Time       `json:"received"`
	Expiration time.Duration   `json:"expiration"` // nanoseconds
}

// Record returns the delivery in a form that can be stored.
func (d *Delivery) Record() Record {
	return Record{Queue: d.Queue, Message: d.message, Received: d.Received, Expiration: d.Expiration}
}

// Hold says that the handler will return before the answer is given. Whoever
// answers later must do so even after an error: Shutdown waits for it.
func (d *Delivery) Hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.held = true
}

// Reply answers a call with result, in the background; for a cast it does
// nothing. The error is that result cannot be encoded: the caller then gets a
// failure. Only the first answer counts.
func (d *Delivery) Reply(result any) error {
	if !d.take() {
		return nil
	}
	raw, err := marshal(result)
	if err != nil {
		d.answers.send(d, nil, &Failure{Module: "builtins", Class: "ValueError", Message: "result of " + d.Method + " cannot be encoded"})
		return err
	}
	d.answers.send(d, raw, nil)
	return nil
}

// Fail answers a call with a failure, in the background; for a cast it does
// nothing. Only the first answer counts.
func (d *Delivery) Fail(f *Failure) {
	if d.take() {
		d.answers.send(d, nil, f)
	}
}

// take claims the right to answer.
func (d *Delivery) take() bool {
	if !d.IsCall() {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	first := !d.answered
	d.answered = true
	return first
}

// returned makes sure that a call whose handler came back gets an answer.
func (d *Delivery) returned() {
	d.mu.Lock()
	held := d.held
	d.mu.Unlock()
	if !held {
		d.Fail(&Failure{Module: "builtins", Class: "RuntimeError", Message: d.Method + " gave no answer"})
	}
}

// attrs are what a log line says about a delivery; no arguments, no token.
func (d *Delivery) attrs() []any {
	return []any{"method", clip(d.Method, 60), "queue", d.Queue, "request_id", clip(d.Context.RequestID(), 60), "unique_id", clip(d.UniqueID, 40)}
}
