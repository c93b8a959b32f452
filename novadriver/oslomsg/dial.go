package oslomsg

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/sys/unix"
)

const (
	dialTimeout = 30 * time.Second
	// minWriteTimeout bounds one write to the broker. A broker that takes
	// nothing for so long without saying that it is blocked is lost.
	minWriteTimeout = 30 * time.Second
)

// dialError says what is wrong with a broker, in an operator's words. kind is
// the same for the same fault at any host.
type dialError struct {
	kind string
	text string
	err  error
}

func (e *dialError) Error() string { return e.text }
func (e *dialError) Unwrap() error { return e.err }

// dial opens one connection to h.
func (o *Options) dial(ctx context.Context, h Host, purpose string) (*amqp.Connection, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	d := net.Dialer{KeepAlive: 30 * time.Second, Control: o.control}
	raw, err := d.DialContext(ctx, "tcp", h.Addr())
	if err != nil {
		return nil, &dialError{kind: "unreachable", text: fmt.Sprintf("cannot reach broker %s: %v", h.Addr(), rootCause(err)), err: err}
	}
	// Ends the handshake, whatever it waits for, together with ctx.
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	conn, err := o.handshake(ctx, raw, h, purpose)
	if err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

func (o *Options) handshake(ctx context.Context, raw net.Conn, h Host, purpose string) (*amqp.Connection, error) {
	stream := raw
	if o.TLS.Enabled {
		c, err := o.TLS.config(h.Name)
		if err == nil {
			t := tls.Client(raw, c)
			err = t.HandshakeContext(ctx)
			stream = t
		}
		if err != nil {
			return nil, &dialError{kind: "tls", text: fmt.Sprintf("TLS with broker %s: %s", h.Addr(), tlsCause(err)), err: err}
		}
	}
	name := o.Name
	if name == "" {
		name = "nova-compute"
	}
	conn, err := amqp.Open(&boundedConn{Conn: stream, timeout: max(2*o.Heartbeat, minWriteTimeout)}, amqp.Config{
		SASL: o.sasl(h), Vhost: o.URL.Vhost, Heartbeat: o.Heartbeat, Locale: "en_US",
		Properties: amqp.Table{
			"product": "novalet", "platform": "Go",
			"connection_name": fmt.Sprintf("%s:%d:%s", name, os.Getpid(), newUUID()),
			"information":     purpose,
		},
	})
	if err != nil {
		return nil, o.explain(err, h)
	}
	return conn, nil
}

// sasl lists the mechanisms to offer, the configured one first. Stock defaults
// to AMQPLAIN, which some brokers have turned off; PLAIN says the same.
func (o *Options) sasl(h Host) []amqp.Authentication {
	plain := &amqp.PlainAuth{Username: h.User, Password: h.Password.Reveal()}
	amqplain := &amqp.AMQPlainAuth{Username: h.User, Password: h.Password.Reveal()}
	switch o.LoginMethod {
	case "EXTERNAL":
		return []amqp.Authentication{&amqp.ExternalAuth{}}
	case "PLAIN":
		return []amqp.Authentication{plain, amqplain}
	}
	return []amqp.Authentication{amqplain, plain}
}

// explain turns the error of a handshake into an operator's words.
func (o *Options) explain(err error, h Host) *dialError {
	var e *amqp.Error
	if !errors.As(err, &e) {
		e = &amqp.Error{}
	}
	switch {
	case errors.Is(err, amqp.ErrSASL):
		return &dialError{kind: "login method", text: fmt.Sprintf("broker %s offers no login method that rabbit_login_method allows", h.Addr()), err: err}
	case errors.Is(err, amqp.ErrCredentials):
		return &dialError{kind: "refused", text: fmt.Sprintf("broker refuses user %s at %s (ACCESS_REFUSED)", h.User, h.Addr()), err: err}
	case e.Server && e.Code == amqp.AccessRefused:
		return &dialError{kind: "refused", text: fmt.Sprintf("broker refuses user %s at %s (ACCESS_REFUSED): %s", h.User, h.Addr(), clip(e.Reason, 200)), err: err}
	case e.Server, errors.Is(err, amqp.ErrVhost):
		return &dialError{kind: "vhost", text: fmt.Sprintf("broker %s refuses vhost %q for user %s: %s", h.Addr(), o.URL.Vhost, h.User, clip(e.Reason, 200)), err: err}
	}
	return &dialError{kind: "no AMQP", text: fmt.Sprintf("no AMQP with broker %s (is it RabbitMQ, and ssl as configured?): %v", h.Addr(), err), err: err}
}

// control sets TCP_USER_TIMEOUT as oslo.messaging does: what is not
// acknowledged within two heartbeats breaks the connection.
func (o *Options) control(_, _ string, c syscall.RawConn) error {
	if o.Heartbeat <= 0 {
		return nil
	}
	// Best effort: without it a dead peer is noticed by the heartbeats.
	_ = c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int((2 * o.Heartbeat).Milliseconds()))
	})
	return nil
}

// boundedConn gives each write a deadline: the AMQP library holds a lock while
// it writes, so that a write without end would keep even Close waiting.
type boundedConn struct {
	net.Conn
	timeout time.Duration
}

func (c *boundedConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.timeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// rootCause drops the address that net repeats.
func rootCause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// tlsCause adds a hint to the errors that operators meet.
func tlsCause(err error) string {
	var name x509.HostnameError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &name):
		return err.Error() + " (ssl_enforce_hostname_verification = false skips this check)"
	case errors.As(err, &record):
		return err.Error() + " (is this the broker's TLS port?)"
	}
	return err.Error()
}
