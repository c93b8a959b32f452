package oslomsg

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"
)

// Target says where a message goes.
type Target struct {
	Exchange  string // "" means "nova"
	Topic     string // e.g. "conductor"
	Server    string // one server of the topic; "" is whichever is free
	Namespace string // e.g. "compute_task"; "" for none
	Version   string // of the interface; "" means "1.0"
}

// ClientOptions tune a [Client]. The zero value is good.
type ClientOptions struct {
	Timeout     time.Duration // of a call without WithTimeout; 0: 60 s, Nova's rpc_response_timeout
	MaxInFlight int           // calls waiting for an answer; 0: 32
	MaxBody     int           // bytes of a reply after unpacking; 0: 64 MiB
	ReplyQueue  string        // "" makes a name as oslo does
	Logger      *slog.Logger  // nil: nothing is logged
}

// A CallOption changes one call.
type CallOption func(*callOptions)

type callOptions struct {
	timeout time.Duration
	monitor time.Duration
}

// WithTimeout bounds one call, instead of ClientOptions.Timeout. An earlier
// deadline of the context wins.
func WithTimeout(d time.Duration) CallOption { return func(o *callOptions) { o.timeout = d } }

// WithCallMonitor asks the server for heartbeats and gives the call up when
// none arrives for d (whole seconds). For calls that may take long.
func WithCallMonitor(d time.Duration) CallOption { return func(o *callOptions) { o.monitor = d } }

// TimeoutError: no answer came in time. Whether the other side did the work is
// unknown if Sent.
type TimeoutError struct {
	Method string
	Topic  string
	MsgID  string
	After  time.Duration
	Sent   bool // the broker confirmed the request
	Reason string
}

// Error tells what was called and how long was waited.
func (e *TimeoutError) Error() string {
	return fmt.Sprintf("call %s on %s: no answer after %s (%s)", e.Method, e.Topic, e.After.Round(time.Millisecond), e.Reason)
}

// Is makes a TimeoutError match context.DeadlineExceeded.
func (e *TimeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// Timeout is true; it makes TimeoutError a net.Error-like timeout.
func (e *TimeoutError) Timeout() bool { return true }

// Client sends requests and waits for their answers on a reply queue of its
// own.
type Client struct{}

// NewClient starts consuming a reply queue on t. It does not wait for the
// broker. The caller closes the client before t.
func NewClient(t Transport, o ClientOptions) (*Client, error) { return nil, ErrClosed }

// Call sends method with args (anything that encodes as a JSON object) and
// waits for the answer: the result as JSON ("null" is a legal one), or
// *RemoteError (the other side's failure), *TimeoutError, ErrClosed, or the
// cause of ctx. It blocks, while MaxInFlight others wait too. A call is not
// sent again once the broker confirmed it.
func (c *Client) Call(ctx context.Context, to Target, method string, args any, rctx Context, opts ...CallOption) (json.RawMessage, error) {
	return nil, ErrClosed
}

// Cast sends method to one server and returns once the broker confirmed it.
func (c *Client) Cast(ctx context.Context, to Target, method string, args any, rctx Context) error {
	return ErrClosed
}

// Fanout sends method to every server of the topic. That nobody listens is no
// error.
func (c *Client) Fanout(ctx context.Context, to Target, method string, args any, rctx Context) error {
	return ErrClosed
}

// Close ends all waiting calls with ErrClosed and stops consuming.
func (c *Client) Close() error { return nil }
