package oslomsg

import (
	"context"
	"encoding/json"
	"log/slog"
	"time"
)

// A Handler works on one delivery, in a goroutine of its own. ctx ends when
// the server is shut down for good, or a call's caller has certainly gone. A
// call is answered by exactly one d.Reply or d.Fail; a handler that hands the
// delivery on and answers after it returned calls d.Hold first, otherwise the
// server fails the call so that its caller does not hang.
type Handler func(ctx context.Context, d *Delivery)

// Endpoint is one interface that a server offers.
type Endpoint struct {
	Namespace string // "" for the main one
	Version   string // the newest served, e.g. "6.5"
	// AnyMinor accepts every minor version of the same major: newer senders
	// add arguments, which a handler sees when it knows them.
	AnyMinor bool
	Methods  map[string]Handler
}

// ServerOptions describe a [Server].
type ServerOptions struct {
	Exchange  string   // "" means "nova"
	Queues    []string // e.g. compute.host1, compute-alt.host1
	Endpoints []Endpoint

	// Accept, if set, is called for each new delivery to a known method,
	// before it is acked and handled: record it here. It may be called again
	// for the same UniqueID when the process ended between Accept and the
	// ack. After an error the message stays unacked and Accept is tried again
	// each second, and no further delivery of that queue is taken.
	Accept func(ctx context.Context, d *Delivery) error

	Seen    Seen         // remembers the ids handled; nil: the last 10,000, in memory
	Workers int          // deliveries handled at a time; 0: 64
	MaxBody int          // bytes of a message after unpacking; 0: 64 MiB
	Ping    bool         // answer oslo_rpc_server_ping
	Logger  *slog.Logger // nil: nothing is logged
}

// Server consumes the queues of one host and dispatches what arrives.
type Server struct{}

// Serve starts a server on t. It does not wait for the broker: see Ready.
func Serve(t Transport, o ServerOptions) (*Server, error) { return nil, ErrClosed }

// Ready waits until every queue is consumed.
func (s *Server) Ready(ctx context.Context) error { return ErrClosed }

// Drain stops consuming the queues named (all, if none is) and returns when no
// further delivery of theirs will be dispatched. Handlers go on.
func (s *Server) Drain(queues ...string) {}

// Shutdown drains every queue and waits for handlers and replies; when ctx
// ends first the handlers' contexts end, their replies are given up, and the
// cause of ctx is returned.
func (s *Server) Shutdown(ctx context.Context) error { return nil }

// Resume dispatches a recorded delivery again, as after a restart: nothing is
// acked and Accept is not called. It may be replied to like a new one.
func (s *Server) Resume(r Record) error { return ErrClosed }

// Delivery is one request.
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
}

// IsCall reports whether the sender waits for an answer.
func (d *Delivery) IsCall() bool { return d.MsgID != "" && d.ReplyTo != "" }

// Record is what has to be kept to work on a delivery again after a restart.
// It holds the user's token and must be stored as a secret.
type Record struct {
	Queue      string          `json:"queue"`
	Message    json.RawMessage `json:"message"` // the request without its envelope
	Received   time.Time       `json:"received"`
	Expiration time.Duration   `json:"expiration"` // nanoseconds
}

// Record returns the delivery in a form that can be stored.
func (d *Delivery) Record() Record { return Record{} }

// Hold says that the handler will return before the answer is given.
func (d *Delivery) Hold() {}

// Reply answers a call with result, in the background; for a cast it does
// nothing. The error is that result cannot be encoded: the caller then gets a
// failure. Only the first answer counts.
func (d *Delivery) Reply(result any) error { return nil }

// Fail answers a call with a failure, in the background; for a cast it does
// nothing. Only the first answer counts.
func (d *Delivery) Fail(f *Failure) {}
