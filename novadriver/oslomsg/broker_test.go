package oslomsg_test

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/goleak"

	"github.com/novalet/novalet/novadriver/oslomsg"
)

// The tests in this file run against the RabbitMQ that NOVALET_AMQP_URL names,
// a transport_url with a vhost that they may fill as they like.

// broker is one test's corner of the real broker.
type broker struct {
	t    *testing.T
	opt  oslomsg.Options
	addr string
	name string // a word of its own for queues and exchanges
	log  *logBook
}

func newBroker(t *testing.T) *broker {
	t.Helper()
	raw := os.Getenv("NOVALET_AMQP_URL")
	if raw == "" {
		t.Skip("NOVALET_AMQP_URL names no RabbitMQ to test against")
	}
	u, err := oslomsg.ParseURL(raw)
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{t: t, opt: oslomsg.DefaultOptions(), addr: u.Hosts[0].Addr(), log: &logBook{}}
	b.opt.URL = u
	b.opt.Logger = b.log.logger()
	b.opt.RetryInterval, b.opt.RetryBackoff, b.opt.ReconnectDelay = 50*time.Millisecond, 0, 50*time.Millisecond
	b.name = "t" + strconv.FormatInt(time.Now().UnixNano(), 36)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%s", b.log)
		}
	})
	return b
}

// via makes the options lead through a proxy.
func (b *broker) via(p *proxy) *broker {
	host, port, _ := net.SplitHostPort(p.addr)
	h := b.opt.URL.Hosts[0]
	h.Name = host
	h.Port, _ = strconv.Atoi(port)
	b.opt.URL.Hosts = []oslomsg.Host{h}
	return b
}

// dial opens a transport that ends with the test.
func (b *broker) dial() oslomsg.Transport {
	b.t.Helper()
	tr, err := oslomsg.Dial(b.opt)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { tr.Close() })
	return tr
}

// raw opens a plain AMQP channel past the proxy, to look and to meddle.
func (b *broker) raw() *amqp.Channel {
	b.t.Helper()
	u := b.opt.URL
	conn, err := amqp.DialConfig("amqp://"+b.addr, amqp.Config{
		SASL:  []amqp.Authentication{&amqp.PlainAuth{Username: u.Hosts[0].User, Password: u.Hosts[0].Password.Reveal()}},
		Vhost: u.Vhost,
	})
	if err != nil {
		b.t.Fatal(err)
	}
	ch, err := conn.Channel()
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	return ch
}

func (b *broker) exchange() string { return b.name + "-nova" }
func (b *broker) queue() string    { return b.name + ".host1" }
func (b *broker) target() oslomsg.Target {
	return oslomsg.Target{Exchange: b.exchange(), Topic: b.name, Server: "host1", Version: "6.0"}
}

// A notification waits in a queue that the sender made, also after the connection was lost.
func TestNotifyKeepsMessages(t *testing.T) {
	b := newBroker(t)
	ch := b.raw()
	queue := b.name + ".error"
	t.Cleanup(func() {
		ch.QueueDelete(queue, false, false, false)
		ch.ExchangeDelete(b.exchange(), false, false)
	})
	p := newProxy(t, b.addr)
	p.up()
	tr := b.via(p).dial()
	for _, event := range []string{"one", "two"} {
		n := &oslomsg.Notification{Publisher: "compute.host1", Event: event, Priority: "ERROR", Payload: map[string]any{}, At: time.Now()}
		if err := oslomsg.Notify(t.Context(), tr, b.exchange(), b.name, n, oslomsg.Context{}, true); err != nil {
			t.Fatal(err)
		}
		d, ok, err := ch.Get(queue, true)
		if err != nil || !ok || !strings.Contains(string(d.Body), event) || d.ContentType != "application/json" || d.DeliveryMode != amqp.Persistent {
			t.Fatalf("%s: queue gave %v %s, %v", event, ok, d.Body, err)
		}
		p.reset()
	}
}

// tidy removes a queue and the exchange at the end.
func (b *broker) tidy() {
	ch := b.raw()
	b.t.Cleanup(func() {
		ch.QueueDelete(b.queue(), false, false, false)
		ch.ExchangeDelete(b.exchange(), false, false)
	})
}

// serve starts a server that ends with the test and waits until it consumes.
func (b *broker) serve(tr oslomsg.Transport, m map[string]oslomsg.Handler) *oslomsg.Server {
	b.t.Helper()
	b.tidy()
	s, err := oslomsg.Serve(tr, oslomsg.ServerOptions{
		Exchange: b.exchange(), Queues: []string{b.queue()}, Endpoints: methods(m), Logger: b.opt.Logger,
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		s.Shutdown(ctx)
	})
	b.ready(s.Ready)
	return s
}

// client starts a client that ends with the test.
func (b *broker) client(tr oslomsg.Transport) *oslomsg.Client {
	b.t.Helper()
	c, err := oslomsg.NewClient(tr, oslomsg.ClientOptions{Logger: b.opt.Logger, Timeout: 2 * time.Minute})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

func (b *broker) ready(f func(context.Context) error) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	defer cancel()
	if err := f(ctx); err != nil {
		b.t.Fatal(err)
	}
}

func TestBrokerCalls(t *testing.T) {
	b := newBroker(t)
	tr := b.dial()
	b.serve(tr, map[string]oslomsg.Handler{
		"echo": func(_ context.Context, d *oslomsg.Delivery) {
			if d.Expiration > 2*time.Minute || d.Expiration <= time.Second || d.Expiration%time.Second != 0 {
				t.Errorf("expiration %s", d.Expiration)
			}
			d.Reply(d.Arg("n"))
		},
		"fail": func(_ context.Context, d *oslomsg.Delivery) { d.Fail(oslomsg.NotImplemented("no")) },
	})
	c := b.client(tr)
	var wg sync.WaitGroup
	for i := range 300 {
		wg.Go(func() {
			raw, err := c.Call(t.Context(), b.target(), "echo", map[string]int{"n": i}, nil)
			if err != nil || string(raw) != fmt.Sprint(i) {
				t.Errorf("%d: %s, %v", i, raw, err)
			}
		})
	}
	wg.Wait()
	big := strings.Repeat("x", 2<<20) // many frames
	raw, err := c.Call(t.Context(), b.target(), "echo", map[string]string{"n": big}, nil)
	if err != nil || len(raw) != len(big)+2 {
		t.Errorf("2 MiB: %d bytes back, %v", len(raw), err)
	}
	var remote *oslomsg.RemoteError
	if _, err := c.Call(t.Context(), b.target(), "fail", nil, nil); !errors.As(err, &remote) || remote.Class != "NotImplementedError" {
		t.Errorf("failure: %v", err)
	}
	if err := tr.Health().Err(); err != nil {
		t.Error(err)
	}
	if n := b.log.count("connected to the broker"); n != 1 {
		t.Errorf("%d lines say that the broker is there", n)
	}
}

func TestBrokerRouting(t *testing.T) {
	b := newBroker(t)
	tr := b.dial()
	got := make(chan string, 10)
	for _, q := range []oslomsg.Queue{
		{Name: b.name + "_fanout_1", Kind: oslomsg.FanoutQueue, Exchange: b.name + "_fanout"},
		{Name: b.name + "_fanout_2", Kind: oslomsg.FanoutQueue, Exchange: b.name + "_fanout"},
	} {
		c, err := tr.Consume(q, func(m *oslomsg.Message) { got <- m.Queue + string(m.Body); m.Ack() })
		if err != nil {
			t.Fatal(err)
		}
		b.ready(c.Ready)
		t.Cleanup(func() { c.Close() })
	}
	publish := func(p oslomsg.Publishing) error {
		p.Body = []byte("!")
		return tr.Publish(t.Context(), p)
	}
	if err := publish(oslomsg.Publishing{Exchange: b.name + "_fanout", Fanout: true}); err != nil {
		t.Fatal(err)
	}
	if a, c := <-got, <-got; a == c {
		t.Errorf("fanout reached %s twice", a)
	}
	if err := publish(oslomsg.Publishing{Exchange: b.name + "_none", Fanout: true}); err != nil {
		t.Errorf("fanout to nobody: %v", err)
	}
	for i := range 3 {
		if err := publish(oslomsg.Publishing{Exchange: b.name + "_none", RoutingKey: "x"}); !errors.Is(err, oslomsg.ErrNoExchange) {
			t.Errorf("no exchange, try %d: %v", i, err)
		}
		if err := publish(oslomsg.Publishing{RoutingKey: b.name + "_none", Mandatory: true}); !errors.Is(err, oslomsg.ErrUnroutable) {
			t.Errorf("mandatory without a queue, try %d: %v", i, err)
		}
		if err := publish(oslomsg.Publishing{RoutingKey: b.name + "_none"}); err != nil {
			t.Errorf("not mandatory without a queue, try %d: %v", i, err)
		}
	}
	// Many at once, half of them unroutable: each hears of its own.
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			key := b.name + "_fanout_1"
			if i%2 == 0 {
				key = b.name + "_none"
			}
			err := tr.Publish(t.Context(), oslomsg.Publishing{RoutingKey: key, Mandatory: true, Body: fmt.Appendf(nil, "%d", i)})
			if errors.Is(err, oslomsg.ErrUnroutable) != (i%2 == 0) {
				t.Errorf("%d to %s: %v", i, key, err)
			}
		})
	}
	for range 100 {
		<-got
	}
	wg.Wait()
}

func TestBrokerRefusesUser(t *testing.T) {
	b := newBroker(t)
	b.opt.URL.Hosts[0].Password = "not-the-password"
	tr := b.dial()
	want := fmt.Sprintf("broker refuses user %s at %s (ACCESS_REFUSED)", b.opt.URL.Hosts[0].User, b.addr)
	waitFor(t, "the refusal", func() bool {
		err := tr.Health().Err()
		return err != nil && strings.Count(err.Error(), want) == 2
	})
	if n := b.log.count(want); n != 1 {
		t.Errorf("%d lines say %q", n, want)
	}
	if strings.Contains(b.log.String(), "not-the-password") {
		t.Error("the password is in the log")
	}

	b.opt.URL = func() oslomsg.URL { u, _ := oslomsg.ParseURL(os.Getenv("NOVALET_AMQP_URL")); return u }()
	b.opt.URL.Vhost = b.name
	tr = b.dial()
	waitFor(t, "the refusal of the vhost", func() bool {
		err := tr.Health().Err()
		return err != nil && strings.Contains(err.Error(), fmt.Sprintf("refuses vhost %q", b.name))
	})
}

// Queues and exchanges that others made with other properties are used.
func TestBrokerPropertiesDiffer(t *testing.T) {
	b := newBroker(t)
	ch := b.raw()
	if err := ch.ExchangeDeclare(b.exchange(), "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := ch.QueueDeclare(b.queue(), true, false, false, false, amqp.Table{"x-expires": 600000}); err != nil {
		t.Fatal(err)
	}
	tr := b.dial()
	b.serve(tr, map[string]oslomsg.Handler{"echo": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(1) }})
	if _, err := b.client(tr).Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
		t.Error(err)
	}
	if b.log.count("queue exists with other properties") != 1 {
		t.Error("the log does not tell that the queue is another one's")
	}
	// A queue deleted under the consumer is made anew.
	if _, err := ch.QueueDelete(b.queue(), false, false, false); err != nil {
		t.Fatal(err)
	}
	if _, err := b.client(tr).Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
		t.Error(err)
	}
}

func TestBrokerQuorumQueues(t *testing.T) {
	b := newBroker(t)
	b.opt.QuorumQueue, b.opt.QuorumDeliveryLimit = true, 5
	tr := b.dial()
	b.serve(tr, map[string]oslomsg.Handler{"echo": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(1) }})
	if _, err := b.client(tr).Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
		t.Error(err)
	}
	// The very arguments of oslo.messaging: declared again, they are equal.
	_, err := b.raw().QueueDeclare(b.queue(), true, false, false, false, amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": 5})
	if err != nil {
		t.Error(err)
	}
}

// A message the broker will never take is an error at once; a right that is
// missing is waited for.
func TestBrokerRefusesMessages(t *testing.T) {
	b := newBroker(t)
	size := func(n string) {
		b.ctl(true, "eval", "application:set_env(rabbit, max_message_size, "+n+").")
	}
	t.Cleanup(func() { size("134217728") })
	size("1000")
	tr := b.dial()
	big := oslomsg.Publishing{RoutingKey: b.name, Body: make([]byte, 2000)}
	if err := tr.Publish(t.Context(), big); !errors.Is(err, oslomsg.ErrRefused) {
		t.Errorf("too big: %v", err)
	}
	if err := tr.Publish(t.Context(), oslomsg.Publishing{RoutingKey: b.name}); err != nil {
		t.Errorf("small, after it: %v", err)
	}
	b.serve(tr, map[string]oslomsg.Handler{"big": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(strings.Repeat("x", 2000)) }})
	var remote *oslomsg.RemoteError
	if _, err := b.client(tr).Call(t.Context(), b.target(), "big", nil, nil); !errors.As(err, &remote) || remote.Class != "ValueError" {
		t.Errorf("an answer that is too big: %v", err)
	}
	size("134217728")

	b.ctl(true, "add_user", b.name, "pw")
	t.Cleanup(func() { b.ctl(true, "delete_user", b.name) })
	b.ctl(true, "set_permissions", "-p", b.opt.URL.Vhost, b.name, ".*", "", ".*")
	b.opt.URL.Hosts[0].User, b.opt.URL.Hosts[0].Password = b.name, "pw"
	tr = b.dial()
	done := make(chan error, 1)
	go func() {
		done <- tr.Publish(t.Context(), oslomsg.Publishing{Exchange: b.exchange(), RoutingKey: "x"})
	}()
	waitFor(t, "the refusal", func() bool { return b.log.count("ACCESS_REFUSED") > 0 })
	b.ctl(true, "set_permissions", "-p", b.opt.URL.Vhost, b.name, ".*", ".*", ".*")
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := b.log.count("ACCESS_REFUSED"); n > 5 { // once a minute
		t.Errorf("the refusal is logged %d times", n)
	}
}

func TestBrokerOverTLS(t *testing.T) {
	b := newBroker(t)
	web := httptest.NewTLSServer(nil) // for its certificate, which names 127.0.0.1
	web.Close()
	p := newProxy(t, b.addr)
	p.tls = &tls.Config{Certificates: web.TLS.Certificates}
	p.up()
	b.via(p)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	b.opt.TLS = oslomsg.TLSOptions{Enabled: true, CAFile: ca}
	tr := b.dial()
	b.serve(tr, map[string]oslomsg.Handler{"echo": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(1) }})
	if _, err := b.client(tr).Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
		t.Error(err)
	}
}

// Close leaves no goroutine behind.
func TestBrokerCloseIsTidy(t *testing.T) {
	b := newBroker(t)
	b.tidy()
	before := goleak.IgnoreCurrent()
	tr, err := oslomsg.Dial(b.opt)
	if err != nil {
		t.Fatal(err)
	}
	s, err := oslomsg.Serve(tr, oslomsg.ServerOptions{Exchange: b.exchange(), Queues: []string{b.queue()}, Endpoints: []oslomsg.Endpoint{oslomsg.BaseAPI("compute")}})
	if err != nil {
		t.Fatal(err)
	}
	c, err := oslomsg.NewClient(tr, oslomsg.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	to := b.target()
	to.Namespace, to.Version = "baseapi", "1.0"
	if _, err := c.Call(t.Context(), to, "ping", nil, nil); err != nil {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	waitFor(t, "every goroutine to end", func() bool { return goleak.Find(before) == nil })
}

// What was taken and not acked when the process ends comes again.
func TestBrokerRedelivers(t *testing.T) {
	b := newBroker(t)
	b.tidy()
	var ids []string
	serve := func(accept func(context.Context, *oslomsg.Delivery) error, handled chan *oslomsg.Delivery) (oslomsg.Transport, *oslomsg.Server) {
		tr := b.dial()
		s, err := oslomsg.Serve(tr, oslomsg.ServerOptions{
			Exchange: b.exchange(), Queues: []string{b.queue()}, Accept: accept, Logger: b.opt.Logger,
			Endpoints: methods(map[string]oslomsg.Handler{"m": func(_ context.Context, d *oslomsg.Delivery) { handled <- d }}),
		})
		if err != nil {
			t.Fatal(err)
		}
		b.ready(s.Ready)
		return tr, s
	}
	asked := make(chan struct{}, 100)
	tr, s := serve(func(_ context.Context, d *oslomsg.Delivery) error {
		ids = append(ids, d.UniqueID)
		asked <- struct{}{}
		return errors.New("disk full")
	}, nil)
	if err := b.client(tr).Cast(t.Context(), b.target(), "m", nil, nil); err != nil {
		t.Fatal(err)
	}
	<-asked
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	tr.Close()

	handled := make(chan *oslomsg.Delivery, 1)
	_, s = serve(nil, handled)
	defer s.Shutdown(context.Background())
	d := <-handled
	if !d.Redelivered || d.UniqueID != ids[0] {
		t.Errorf("redelivered %v, id %s, want %s", d.Redelivered, d.UniqueID, ids[0])
	}
}
