package oslomsg_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/novalet/novalet/novadriver/oslomsg"
)

// The broker, or the way to it, goes away in every manner.

// ctl runs rabbitmqctl. Tests that would disturb other users of the broker ask
// for one of their own.
func (b *broker) ctl(own bool, args ...string) {
	b.t.Helper()
	words := strings.Fields(os.Getenv("NOVALET_RABBITMQCTL"))
	if len(words) == 0 {
		b.t.Skip("NOVALET_RABBITMQCTL names no command that runs rabbitmqctl")
	}
	if own && os.Getenv("NOVALET_RABBITMQ_OWN") != "1" {
		b.t.Skip("NOVALET_RABBITMQ_OWN=1 does not say that the broker serves these tests alone")
	}
	if out, err := exec.Command(words[0], append(words[1:], args...)...).CombinedOutput(); err != nil {
		b.t.Fatalf("rabbitmqctl %v: %v: %s", args, err, out)
	}
}

// The broker runs out of memory: nothing is published until it has some again,
// what is consumed still comes, and Health tells.
func TestBrokerBlocks(t *testing.T) {
	b := newBroker(t)
	b.ctl(true, "set_vm_memory_high_watermark", "0.4")
	tr := b.dial()
	b.serve(tr, map[string]oslomsg.Handler{"echo": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(1) }})
	c := b.client(tr)
	t.Cleanup(func() { b.ctl(true, "set_vm_memory_high_watermark", "0.4") })
	b.ctl(true, "set_vm_memory_high_watermark", "0.00000001")
	// The broker tells a connection when it publishes.
	result := make(chan error, 1)
	go func() {
		_, err := c.Call(t.Context(), b.target(), "echo", nil, nil)
		result <- err
	}()
	waitFor(t, "the broker to block", func() bool {
		err := tr.Health().Err()
		return err != nil && strings.Contains(err.Error(), "takes no messages: low on memory")
	})
	select {
	case err := <-result:
		t.Errorf("the call came through: %v", err)
	default:
	}
	b.ctl(true, "set_vm_memory_high_watermark", "0.4")
	if err := <-result; err != nil {
		t.Error(err)
	}
	waitFor(t, "the end of the block", func() bool { return tr.Health().Err() == nil })
	if b.log.count("broker takes no messages") != 1 || b.log.count("broker takes messages again") != 1 {
		t.Error("the log does not tell once each")
	}
}

// The broker restarts and has forgotten every queue: all are made anew, calls
// made meanwhile go through, and those in flight end in time.
func TestBrokerRestarts(t *testing.T) {
	b := newBroker(t)
	tr := b.dial()
	hold := make(chan struct{})
	b.serve(tr, map[string]oslomsg.Handler{
		"echo": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(1) },
		"hold": func(_ context.Context, d *oslomsg.Delivery) { <-hold; d.Reply(1) },
	})
	c := b.client(tr)
	held := make(chan error, 1)
	go func() {
		_, err := c.Call(t.Context(), b.target(), "hold", nil, nil)
		held <- err
	}()
	if _, err := c.Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
		t.Fatal(err)
	}
	b.ctl(true, "stop_app")
	waitFor(t, "the loss", func() bool { return tr.Health().Err() != nil })
	meanwhile := make(chan error, 1)
	go func() {
		_, err := c.Call(t.Context(), b.target(), "echo", nil, nil)
		meanwhile <- err
	}()
	b.ctl(true, "start_app")
	if err := <-meanwhile; err != nil {
		t.Errorf("a call made while the broker was away: %v", err)
	}
	close(hold)
	if err := <-held; err != nil {
		t.Errorf("a call carried out meanwhile: %v", err) // its reply queue is there again
	}
	if b.log.count("lost the broker") != 1 || b.log.count("connected to the broker again") != 1 {
		t.Error("the log does not tell once each")
	}
}

func TestBrokerClosesConnections(t *testing.T) {
	b := newBroker(t)
	tr := b.dial()
	b.serve(tr, map[string]oslomsg.Handler{
		"echo": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(1) },
	})
	c := b.client(tr)
	for i := range 2 {
		b.ctl(false, "close_all_connections", "--vhost", b.opt.URL.Vhost, "a test")
		if _, err := c.Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
			t.Fatalf("call after loss %d: %v", i+1, err)
		}
		waitFor(t, "both connections", func() bool { return tr.Health().Err() == nil })
	}
	if n := b.log.count("CONNECTION_FORCED"); n < 1 || n > 4 {
		t.Errorf("%d lines tell of the losses", n)
	}
}

// The connection is reset in the middle of publishes, again and again: every
// call is answered and none is carried out twice.
func TestBrokerConnectionsBreak(t *testing.T) {
	b := newBroker(t)
	far := newProxy(t, b.addr)
	far.up()
	server := b.via(far).dial()
	var mu sync.Mutex
	done := map[string]int{}
	b.serve(server, map[string]oslomsg.Handler{
		"count": func(_ context.Context, d *oslomsg.Delivery) {
			mu.Lock()
			done[string(d.Arg("n"))]++
			mu.Unlock()
			d.Reply(map[string]json.RawMessage{"n": d.Arg("n"), "fill": d.Arg("fill")})
		},
	})
	near := newProxy(t, b.addr)
	near.up()
	c := b.client(b.via(near).dial())
	fill := strings.Repeat("x", 30000)
	const calls = 200
	var left atomic.Int32
	left.Store(calls)
	var wg sync.WaitGroup
	for i := range calls {
		wg.Go(func() {
			defer left.Add(-1)
			args := map[string]any{"n": i, "fill": fill}
			if _, err := c.Call(t.Context(), b.target(), "count", args, nil); err != nil {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	for i := 1; i <= 6 && left.Load() > 0; i++ {
		before := near.connections() + far.connections()
		near.cut(100000 * i)
		far.cut(80000 * i)
		waitFor(t, "a new connection", func() bool {
			return near.connections()+far.connections() > before || left.Load() == 0
		})
	}
	near.cut(0)
	far.cut(0)
	wg.Wait()
	if n := near.connections() + far.connections(); n < 6 {
		t.Errorf("only %d connections were made: nothing was cut", n)
	}
	for n, times := range done {
		if times != 1 {
			t.Errorf("call %s was carried out %d times", n, times)
		}
	}
}

func TestBrokerComesLater(t *testing.T) {
	b := newBroker(t)
	p := newProxy(t, b.addr)
	b.via(p)
	tr := b.dial()
	c := b.client(tr)
	b.tidy()
	s, err := oslomsg.Serve(tr, oslomsg.ServerOptions{
		Exchange: b.exchange(), Queues: []string{b.queue()},
		Endpoints: methods(map[string]oslomsg.Handler{"echo": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(1) }}),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown(context.Background())
	waitFor(t, "the complaint", func() bool { return b.log.count("waiting for the broker") == 1 })
	for range 3 { // several attempts, one line
		time.Sleep(100 * time.Millisecond)
	}
	if err := tr.Health().Err(); err == nil || !strings.Contains(err.Error(), "cannot reach broker "+p.addr) {
		t.Errorf("health: %v", err)
	}
	p.up()
	if _, err := c.Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
		t.Error(err)
	}
	waitFor(t, "both connections", func() bool { return tr.Health().Err() == nil })
	p.down()
	waitFor(t, "the loss", func() bool { return b.log.count("lost the broker") == 1 })
	p.up()
	waitFor(t, "both connections", func() bool { return tr.Health().Err() == nil })
	if _, err := c.Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
		t.Error(err)
	}
	for text, want := range map[string]int{
		"waiting for the broker": 1, "lost the broker": 1, "connected to the broker again": 1, "connected to the broker\"": 1,
	} {
		if n := b.log.count(text); n != want {
			t.Errorf("%d lines %q, want %d", n, text, want)
		}
	}
}

func TestBrokerGoesSilent(t *testing.T) {
	b := newBroker(t)
	p := newProxy(t, b.addr)
	p.up()
	b.via(p)
	b.opt.Heartbeat = time.Second
	tr := b.dial()
	b.serve(tr, map[string]oslomsg.Handler{"echo": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(1) }})
	c := b.client(tr)
	if _, err := c.Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
		t.Fatal(err)
	}
	before := p.connections()
	p.freeze(true)
	waitFor(t, "the heartbeats to notice", func() bool { return b.log.count("lost the broker") > 0 })
	p.freeze(false)
	waitFor(t, "a new connection", func() bool { return p.connections() > before })
	if _, err := c.Call(t.Context(), b.target(), "echo", nil, nil); err != nil {
		t.Error(err)
	}
}

// Two ways to the broker, one after the other goes away, the last one without a word: whichever is there is used, each change is
// told once, and what was asked meanwhile is done, once.
func TestBrokerFailsOver(t *testing.T) {
	b := newBroker(t)
	first, second := newProxy(t, b.addr), newProxy(t, b.addr)
	hosts := b.via(first).opt.URL.Hosts
	b.opt.URL.Hosts = append(hosts, b.via(second).opt.URL.Hosts...)
	b.opt.Heartbeat = time.Second
	first.up()
	tr := b.dial()
	var done atomic.Int32
	b.serve(tr, map[string]oslomsg.Handler{"echo": func(_ context.Context, d *oslomsg.Delivery) { done.Add(1); d.Reply(d.Arg("n")) }})
	c := b.client(tr)
	waitFor(t, "both connections", func() bool { return tr.Health().Err() == nil })
	for i, way := range [][2]*proxy{{first, second}, {second, first}, {first, second}} {
		from, to := way[0], way[1]
		answers := make(chan error, 1)
		to.up()
		if i < 2 {
			from.down()
		} else {
			from.freeze(true)
		}
		go func() {
			raw, err := c.Call(t.Context(), b.target(), "echo", map[string]int{"n": i}, nil)
			if err == nil && string(raw) != fmt.Sprint(i) {
				err = fmt.Errorf("answered %s", raw)
			}
			answers <- err
		}()
		if err := <-answers; err != nil {
			t.Fatalf("after change %d: %v", i+1, err)
		}
		waitFor(t, "both connections", func() bool { return tr.Health().Err() == nil })
		for _, l := range tr.Health().Links {
			if l.Host != to.addr {
				t.Errorf("after change %d connection %s is to %s", i+1, l.Name, l.Host)
			}
		}
		for _, text := range []string{"lost the broker", "connected to the broker again"} {
			if n := b.log.count(text); n != i+1 {
				t.Errorf("after change %d %q stands %d times in the log", i+1, text, n)
			}
		}
	}
	if n := done.Load(); n != 3 {
		t.Errorf("three calls were carried out %d times", n)
	}
}
