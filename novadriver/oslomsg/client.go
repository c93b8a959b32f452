package oslomsg

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Defaults of a client: Nova's rpc_response_timeout, and a number of calls
// that leaves the conductor's workers free for other hosts.
const (
	defaultCallTimeout = 60 * time.Second
	defaultMaxInFlight = 32
	// unroutableRetry is how long a call waits before it tries again to reach
	// a queue that is not there: the other side is starting.
	unroutableRetry = time.Second
)

// Target says where a message goes.
type Target struct {
	Exchange  string // "" means "nova"
	Topic     string // e.g. "conductor"
	Server    string // one server of the topic; "" is whichever is free
	Namespace string // e.g. "compute_task"; "" for none
	Version   string // of the interface; "" means "1.0"
}

func (t Target) exchange() string {
	if t.Exchange == "" {
		return "nova"
	}
	return t.Exchange
}

func (t Target) key() string {
	if t.Server == "" {
		return t.Topic
	}
	return t.Topic + "." + t.Server
}

func (t Target) version() string {
	if t.Version == "" {
		return defaultVersion
	}
	return t.Version
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
	Sent   bool   // the broker confirmed the request
	Reason string // what was being waited for
}

// Error tells what was called and how long was waited.
func (e *TimeoutError) Error() string {
	return fmt.Sprintf("call %s on %s: no answer after %s: %s", e.Method, e.Topic, e.After.Round(time.Millisecond), e.Reason)
}

// Is makes a TimeoutError match context.DeadlineExceeded.
func (e *TimeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// unsent notes how sending ended.
func (e *TimeoutError) unsent(err error) {
	switch {
	case err == nil:
		e.Sent = true
	case errors.Is(err, ErrUnroutable), errors.Is(err, ErrNoExchange):
		e.Reason = err.Error()
	}
}

// Timeout is true, as for a net.Error.
func (e *TimeoutError) Timeout() bool { return true }

// Client sends requests and waits for their answers on a reply queue of its
// own. Its methods may be called from many goroutines.
type Client struct {
	transport Transport
	opt       ClientOptions
	log       *slog.Logger
	replies   Consumer
	slots     chan struct{}
	closed    chan struct{}
	closeOnce sync.Once

	mu      sync.Mutex
	pending map[string]*waiter // by _msg_id
}

// waiter is a call that waits. Its results are guarded by Client.mu until done
// is closed.
type waiter struct {
	beat    chan struct{} // something came; holds one
	done    chan struct{} // closed when the answer is complete
	ended   bool
	result  json.RawMessage
	failure *RemoteError
}

// NewClient starts consuming a reply queue on t. It does not wait for the
// broker. The caller closes the client before t.
func NewClient(t Transport, o ClientOptions) (*Client, error) {
	if o.Timeout <= 0 {
		o.Timeout = defaultCallTimeout
	}
	if o.MaxInFlight <= 0 {
		o.MaxInFlight = defaultMaxInFlight
	}
	if o.MaxBody <= 0 {
		o.MaxBody = defaultMaxBody
	}
	if o.ReplyQueue == "" {
		o.ReplyQueue = "reply_" + newID()
	}
	c := &Client{
		transport: t, opt: o, log: logger(o.Logger),
		slots: make(chan struct{}, o.MaxInFlight), closed: make(chan struct{}),
		pending: map[string]*waiter{},
	}
	var err error
	c.replies, err = t.Consume(Queue{Name: o.ReplyQueue, Kind: ReplyQueue}, c.onReply)
	if err != nil {
		return nil, fmt.Errorf("consume replies: %w", err)
	}
	return c, nil
}

// Ready waits until replies are consumed.
func (c *Client) Ready(ctx context.Context) error { return c.replies.Ready(ctx) }

// Call sends method with args (anything that encodes as a JSON object) and
// waits for the answer: the result as JSON ("null" is a legal one), or
// *RemoteError (the other side's failure), *TimeoutError, ErrClosed, or the
// cause of ctx. It blocks, while MaxInFlight others wait too. A call is not
// sent again once the broker confirmed it; one that no queue takes is, until
// the time is over, since the other side may be starting.
func (c *Client) Call(ctx context.Context, to Target, method string, args any, rctx Context, opts ...CallOption) (json.RawMessage, error) {
	o := callOptions{timeout: c.opt.Timeout}
	for _, f := range opts {
		f(&o)
	}
	start := time.Now()
	timeout := &TimeoutError{Method: method, Topic: to.key()}
	ctx, cancel := context.WithTimeoutCause(ctx, o.timeout, timeout)
	defer cancel()

	timeout.Reason = "too many other calls are waiting"
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return nil, c.ended(ctx, start, timeout)
	case <-c.closed:
		return nil, ErrClosed
	}

	msgID := newID()
	timeout.MsgID = msgID
	more := map[string]any{"_msg_id": msgID, "_reply_q": c.opt.ReplyQueue, "_timeout": nil}
	if o.monitor > 0 {
		more["_timeout"] = int(o.monitor / time.Second)
	}
	body, err := encodeRequest(to, method, args, rctx, more)
	if err != nil {
		return nil, err
	}

	w := &waiter{beat: make(chan struct{}, 1), done: make(chan struct{})}
	c.mu.Lock()
	c.pending[msgID] = w
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, msgID)
		c.mu.Unlock()
	}()

	// The answer may come before the broker's confirmation, or without it when
	// the connection breaks in between: whichever is first counts.
	sent := make(chan error, 1)
	sendCtx, stopSending := context.WithCancel(ctx)
	// Whole seconds, as oslo sends them.
	expiration := (time.Until(deadlineOf(ctx)) + time.Second - 1).Truncate(time.Second)
	go func() { sent <- c.send(sendCtx, to, body, expiration) }()
	sending := true
	defer func() {
		stopSending()
		if sending {
			<-sent
		}
	}()

	timeout.Reason = "the broker has not confirmed the request"
	monitor := newMonitor(o.monitor)
	defer monitor.stop() // it runs from the confirmation on
	for {
		select {
		case err := <-sent:
			sending = false
			if err != nil {
				if ctx.Err() != nil {
					timeout.unsent(err)
					return nil, c.ended(ctx, start, timeout)
				}
				return nil, fmt.Errorf("call %s on %s: %w", method, to.key(), err)
			}
			timeout.Sent, timeout.Reason = true, "the other side is slow, or its answer got lost"
			monitor.restart()
		case <-w.beat:
			monitor.restart()
		case <-w.done:
			switch {
			case w.failure != nil:
				return nil, w.failure
			case w.result == nil:
				return json.RawMessage("null"), nil
			}
			return w.result, nil
		case <-monitor.C():
			timeout.Reason = "heartbeats of the other side ended"
			timeout.After = time.Since(start)
			return nil, timeout
		case <-ctx.Done():
			if sending {
				sending = false
				timeout.unsent(<-sent)
			}
			return nil, c.ended(ctx, start, timeout)
		case <-c.closed:
			return nil, ErrClosed
		}
	}
}

// ended is the error of a call whose context ended: ours is a timeout, the
// caller's is passed on.
func (c *Client) ended(ctx context.Context, start time.Time, timeout *TimeoutError) error {
	timeout.After = time.Since(start)
	cause := context.Cause(ctx)
	if errors.Is(cause, context.DeadlineExceeded) {
		return timeout
	}
	return fmt.Errorf("call %s on %s: %w", timeout.Method, timeout.Topic, cause)
}

// send publishes a call once replies are consumed, again and again while no
// queue takes it.
func (c *Client) send(ctx context.Context, to Target, body []byte, expiration time.Duration) error {
	if err := c.replies.Ready(ctx); err != nil {
		return err
	}
	var missing error // tells more than that the time is over
	for {
		err := c.transport.Publish(ctx, Publishing{
			Exchange: to.exchange(), RoutingKey: to.key(), Mandatory: true, Expiration: expiration, Body: body,
		})
		if !errors.Is(err, ErrUnroutable) && !errors.Is(err, ErrNoExchange) {
			if err != nil && ctx.Err() != nil && missing != nil {
				return missing
			}
			return err
		}
		missing = err
		if !sleep(ctx, unroutableRetry) {
			return missing
		}
	}
}

// Cast sends method to one server and returns once the broker confirmed it;
// that no queue takes it is not noticed, as with every cast. Errors: ErrClosed,
// or the cause of ctx while there is no broker.
func (c *Client) Cast(ctx context.Context, to Target, method string, args any, rctx Context) error {
	return c.post(ctx, Publishing{Exchange: to.exchange(), RoutingKey: to.key()}, to, method, args, rctx)
}

// Fanout sends method to every server of the topic. That nobody listens is no
// error.
func (c *Client) Fanout(ctx context.Context, to Target, method string, args any, rctx Context) error {
	return c.post(ctx, Publishing{Exchange: to.Topic + "_fanout", Fanout: true}, to, method, args, rctx)
}

func (c *Client) post(ctx context.Context, p Publishing, to Target, method string, args any, rctx Context) error {
	select {
	case <-c.closed:
		return ErrClosed
	default:
	}
	var err error
	if p.Body, err = encodeRequest(to, method, args, rctx, nil); err != nil {
		return err
	}
	if err := c.transport.Publish(ctx, p); err != nil {
		return fmt.Errorf("cast %s on %s: %w", method, to.key(), err)
	}
	return nil
}

// onReply hands an answer to the call that waits for it. Answers nobody waits
// for are dropped: their calls timed out.
func (c *Client) onReply(m *Message) {
	if err := m.Ack(); err != nil {
		c.log.Debug("ack reply", "error", err)
	}
	inner, err := open(m, c.opt.MaxBody)
	var r *reply
	if err == nil {
		r, err = parseReply(inner)
	}
	if err != nil {
		c.log.Warn("dropped an unreadable reply", "bytes", len(m.Body), "error", err)
		return
	}
	if !c.deliver(r) {
		c.log.Debug("dropped a reply that nobody waits for", "msg_id", clip(r.msgID, 40))
	}
}

// deliver adds r to what the call that waits for it has got, and reports
// whether there is one. Heartbeats hold nothing; old servers send the payload
// and the end in two messages.
func (c *Client) deliver(r *reply) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.pending[r.msgID]
	if w == nil || w.ended {
		return false
	}
	if r.result != nil {
		w.result = r.result
	}
	if r.failure != nil {
		w.failure = r.failure
	}
	if r.ending {
		w.ended = true
		close(w.done)
	}
	select {
	case w.beat <- struct{}{}:
	default:
	}
	return true
}

// Close ends all waiting calls with ErrClosed and stops consuming. It may be
// called twice.
func (c *Client) Close() error {
	c.closeOnce.Do(func() { close(c.closed) })
	return c.replies.Close()
}

// monitor is the timer of the call monitor; the zero interval never fires.
type monitor struct {
	interval time.Duration
	timer    *time.Timer
}

func newMonitor(d time.Duration) *monitor {
	return &monitor{interval: d}
}

func (m *monitor) C() <-chan time.Time {
	if m.timer == nil {
		return nil
	}
	return m.timer.C
}

func (m *monitor) restart() {
	switch {
	case m.interval <= 0:
	case m.timer == nil:
		m.timer = time.NewTimer(m.interval)
	default:
		m.timer.Reset(m.interval)
	}
}

func (m *monitor) stop() {
	if m.timer != nil {
		m.timer.Stop()
	}
}
