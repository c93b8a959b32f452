package membus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet/novadriver/oslomsg"
)

// sink collects what a consumer gets.
type sink struct {
	mu   sync.Mutex
	got  []string
	keep bool // do not ack
}

func (s *sink) take(m *oslomsg.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	text := string(m.Body)
	if m.Redelivered {
		text += " again"
	}
	s.got = append(s.got, text)
	if !s.keep {
		m.Ack()
	}
}

func (s *sink) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string{}, s.got...)
}

func consume(t *testing.T, c *Conn, q oslomsg.Queue, s *sink) oslomsg.Consumer {
	t.Helper()
	con, err := c.Consume(q, s.take)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { con.Close() })
	return con
}

func publish(t *testing.T, c *Conn, exchange, key, body string) {
	t.Helper()
	if err := c.Publish(t.Context(), oslomsg.Publishing{Exchange: exchange, RoutingKey: key, Body: []byte(body)}); err != nil {
		t.Fatal(err)
	}
}

func TestRouting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New()
		c := b.Connect()
		defer c.Close()
		var one, two, all, reply sink
		consume(t, c, oslomsg.Queue{Name: "compute.h1", Exchange: "nova"}, &one)
		consume(t, c, oslomsg.Queue{Name: "compute.h2", Exchange: "nova"}, &two)
		consume(t, c, oslomsg.Queue{Name: "compute.#", Exchange: "nova"}, &all)
		consume(t, c, oslomsg.Queue{Name: "reply_1", Kind: oslomsg.ReplyQueue}, &reply)
		var tapped []string
		b.Tap(func(p oslomsg.Publishing) { tapped = append(tapped, p.RoutingKey) })
		publish(t, c, "nova", "compute.h1", "a")
		publish(t, c, "nova", "compute.h2", "b")
		publish(t, c, "nova", "nobody", "c")
		publish(t, c, "", "reply_1", "d")
		publish(t, c, "", "compute.h1", "e")
		synctest.Wait()
		for _, q := range []struct {
			s    *sink
			want []string
		}{{&one, []string{"a", "e"}}, {&two, []string{"b"}}, {&all, []string{"a", "b"}}, {&reply, []string{"d"}}} {
			if diff := cmp.Diff(q.want, q.s.all()); diff != "" {
				t.Error(diff)
			}
		}
		if diff := cmp.Diff([]string{"compute.h1", "compute.h2", "nobody", "reply_1", "compute.h1"}, tapped); diff != "" {
			t.Errorf("tapped: %s", diff)
		}
		for _, p := range []struct {
			p    oslomsg.Publishing
			want error
		}{
			{oslomsg.Publishing{Exchange: "nova", RoutingKey: "nobody", Mandatory: true}, oslomsg.ErrUnroutable},
			{oslomsg.Publishing{RoutingKey: "nobody", Mandatory: true}, oslomsg.ErrUnroutable},
			{oslomsg.Publishing{Exchange: "none", RoutingKey: "x"}, oslomsg.ErrNoExchange},
			{oslomsg.Publishing{Exchange: "none_fanout", Fanout: true}, nil},
		} {
			if err := c.Publish(t.Context(), p.p); !errors.Is(err, p.want) {
				t.Errorf("%+v: %v", p.p, err)
			}
		}
	})
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, key string
		want         bool
	}{
		{"a.b", "a.b", true}, {"a.b", "a", false}, {"a", "a.b", false}, {"a.*", "a.b", true}, {"a.*", "a.b.c", false},
		{"a.#", "a", true}, {"a.#", "a.b.c", true}, {"#.c", "a.b.c", true}, {"#", "", true}, {"*.#.c", "a.c", true}, {"*.#.c", "c", false},
	} {
		if got := matches(c.pattern, c.key); got != c.want {
			t.Errorf("%s on %s: %v", c.pattern, c.key, got)
		}
	}
}

func TestMessagesWaitAndExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New()
		c := b.Connect()
		defer c.Close()
		q := oslomsg.Queue{Name: "q", Exchange: "nova"}
		con := consume(t, c, q, &sink{})
		con.Close()
		for i := range 3 {
			publish(t, c, "nova", "q", fmt.Sprint(i))
		}
		if err := c.Publish(t.Context(), oslomsg.Publishing{Exchange: "nova", RoutingKey: "q", Expiration: time.Second, Body: []byte("short")}); err != nil {
			t.Fatal(err)
		}
		publish(t, c, "nova", "q", "3")
		time.Sleep(2 * time.Second)
		if n := b.Queues()["q"]; n != 5 {
			t.Errorf("%d wait", n)
		}
		var s sink
		consume(t, c, q, &s)
		synctest.Wait()
		if diff := cmp.Diff([]string{"0", "1", "2", "3"}, s.all()); diff != "" {
			t.Error(diff)
		}
	})
}

func TestUnackedComesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New()
		c, other := b.Connect(), b.Connect()
		defer c.Close()
		defer other.Close()
		keep := sink{keep: true}
		con := consume(t, c, oslomsg.Queue{Name: "q", Exchange: "nova"}, &keep)
		publish(t, other, "nova", "q", "x")
		synctest.Wait()
		c.Cut()
		if err := con.Ready(canceled(t)); err == nil {
			t.Error("ready without a connection")
		}
		if err := c.Publish(canceled(t), oslomsg.Publishing{RoutingKey: "q"}); !errors.Is(err, context.Canceled) {
			t.Errorf("publish without a connection: %v", err)
		}
		if c.Health().Err() == nil {
			t.Error("healthy without a connection")
		}
		if n := b.Queues()["q"]; n != 1 {
			t.Errorf("%d messages are back, want 1", n)
		}
		c.Restore()
		synctest.Wait()
		if diff := cmp.Diff([]string{"x", "x again"}, keep.all()); diff != "" {
			t.Error(diff)
		}
		con.Close()
		if n := b.Queues()["q"]; n != 1 {
			t.Errorf("%d messages are back after close, want 1", n)
		}
	})
}

func TestSettlingLateFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New()
		c := b.Connect()
		defer c.Close()
		messages := make(chan *oslomsg.Message, 2)
		con, err := c.Consume(oslomsg.Queue{Name: "q", Exchange: "nova"}, func(m *oslomsg.Message) { messages <- m })
		if err != nil {
			t.Fatal(err)
		}
		defer con.Close()
		publish(t, c, "nova", "q", "x")
		first := <-messages
		c.Cut()
		c.Restore()
		second := <-messages
		if err := first.Ack(); err == nil {
			t.Error("a message of the lost connection is acked")
		}
		if err := second.Ack(); err != nil {
			t.Error(err)
		}
		if err := second.Ack(); err == nil {
			t.Error("acked twice")
		}
	})
}

func TestQueuesOfOneProcessGoWithIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New()
		c := b.Connect()
		var s sink
		consume(t, c, oslomsg.Queue{Name: "reply_1", Kind: oslomsg.ReplyQueue}, &s)
		consume(t, c, oslomsg.Queue{Name: "x_fanout_1", Kind: oslomsg.FanoutQueue, Exchange: "x_fanout"}, &s)
		consume(t, c, oslomsg.Queue{Name: "topic", Exchange: "nova"}, &s)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(map[string]int{"topic": 0}, b.Queues()); diff != "" {
			t.Error(diff)
		}
		b.DeleteQueue("topic")
		if len(b.Queues()) != 0 {
			t.Error("a deleted queue is there")
		}
		if err := c.Publish(t.Context(), oslomsg.Publishing{}); !errors.Is(err, oslomsg.ErrClosed) {
			t.Errorf("publish after close: %v", err)
		}
		if _, err := c.Consume(oslomsg.Queue{Name: "q"}, s.take); !errors.Is(err, oslomsg.ErrClosed) {
			t.Errorf("consume after close: %v", err)
		}
	})
}

func canceled(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}
