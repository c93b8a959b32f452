package oslomsg_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet/novadriver/oslomsg"
)

// envelope wraps a message as a sender does.
func envelope(t *testing.T, message any) []byte {
	t.Helper()
	inner, err := json.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]string{"oslo.version": "2.0", "oslo.message": string(inner)})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// inject publishes a body made by hand.
func (p *pair) inject(t *testing.T, body []byte) {
	t.Helper()
	if err := p.near.Publish(t.Context(), oslomsg.Publishing{Exchange: "nova", RoutingKey: testQueue, Body: body}); err != nil {
		t.Fatal(err)
	}
}

func TestDuplicatesAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int32
		p := newPair(t, oslomsg.ServerOptions{
			Queues: []string{testQueue, "compute-alt.host1"},
			Endpoints: methods(map[string]oslomsg.Handler{
				"count": func(_ context.Context, d *oslomsg.Delivery) { n.Add(1); d.Reply(1) },
			}),
		})
		// The confirmation of a publish is lost: the message arrives twice.
		p.near.LoseConfirms(1)
		if _, err := p.call(t, "count", nil); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n.Load() != 1 {
			t.Errorf("carried out %d times", n.Load())
		}
		// The same id again, and on the other queue; then one without an id.
		body := envelope(t, map[string]any{"method": "count", "args": map[string]any{}, "version": "6.0", "_unique_id": "same"})
		for range 3 {
			p.inject(t, body)
		}
		if err := p.near.Publish(t.Context(), oslomsg.Publishing{Exchange: "nova", RoutingKey: "compute-alt.host1", Body: body}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n.Load() != 2 {
			t.Errorf("carried out %d times, want 2", n.Load())
		}
		anon := envelope(t, map[string]any{"method": "count", "version": "6.0"})
		p.inject(t, anon)
		p.inject(t, anon)
		synctest.Wait()
		if n.Load() != 4 {
			t.Errorf("carried out %d times, want 4: without an id nothing is a duplicate", n.Load())
		}
	})
}

func TestSeenForgets(t *testing.T) {
	s := oslomsg.NewSeen(3)
	for _, id := range []string{"a", "b", "b", "c", "d"} {
		s.Add(id)
	}
	for id, want := range map[string]bool{"a": false, "b": true, "c": true, "d": true, "e": false} {
		if s.Has(id) != want {
			t.Errorf("%s: %v", id, !want)
		}
	}
}

// Record, then ack: a message is acked after Accept, and comes again when the
// connection breaks before.
func TestAcceptThenAck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var accepted []string
		var handled []bool // whether it was delivered again
		inAccept, goOn := make(chan struct{}), make(chan struct{})
		first := true
		p := newPair(t, oslomsg.ServerOptions{
			Accept: func(_ context.Context, d *oslomsg.Delivery) error {
				accepted = append(accepted, d.Method)
				if first {
					first = false
					close(inAccept)
					<-goOn
				}
				return nil
			},
			Endpoints: methods(map[string]oslomsg.Handler{
				"m": func(_ context.Context, d *oslomsg.Delivery) { handled = append(handled, d.Redelivered) },
			}),
		})
		if err := p.client.Cast(t.Context(), toHost, "m", nil, nil); err != nil {
			t.Fatal(err)
		}
		<-inAccept
		p.far.Cut() // the ack will fail
		close(goOn)
		synctest.Wait()
		p.far.Restore()
		synctest.Wait()
		if diff := cmp.Diff([]string{"m"}, accepted); diff != "" {
			t.Errorf("accepted: %s", diff)
		}
		if diff := cmp.Diff([]bool{false}, handled); diff != "" {
			t.Errorf("handled: %s", diff)
		}
		if n := p.bus.Queues()[testQueue]; n != 0 {
			t.Errorf("%d messages are left", n)
		}
		if err := p.client.Cast(t.Context(), toHost, "unknown", nil, nil); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(accepted) != 1 {
			t.Error("an unknown method is accepted")
		}
	})
}

// A queue whose delivery cannot be recorded does not hold up the other; the
// same message there is taken for a duplicate.
func TestAcceptHoldsOneQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		goOn := make(chan struct{})
		var handled []string
		var mu sync.Mutex
		p := newPair(t, oslomsg.ServerOptions{
			Queues: []string{testQueue, "compute-alt.host1"},
			Accept: func(_ context.Context, d *oslomsg.Delivery) error {
				if d.UniqueID == "slow" {
					<-goOn
				}
				return nil
			},
			Endpoints: methods(map[string]oslomsg.Handler{"m": func(_ context.Context, d *oslomsg.Delivery) {
				mu.Lock()
				defer mu.Unlock()
				handled = append(handled, d.UniqueID+" "+d.Queue)
			}}),
		})
		for _, m := range [][2]string{{testQueue, "slow"}, {"compute-alt.host1", "slow"}, {"compute-alt.host1", "quick"}} {
			body := envelope(t, map[string]any{"method": "m", "version": "6.0", "_unique_id": m[1]})
			if err := p.near.Publish(t.Context(), oslomsg.Publishing{Exchange: "nova", RoutingKey: m[0], Body: body}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if diff := cmp.Diff([]string{"quick compute-alt.host1"}, handled); diff != "" {
			t.Errorf("meanwhile: %s", diff)
		}
		close(goOn)
		synctest.Wait()
		if diff := cmp.Diff([]string{"quick compute-alt.host1", "slow compute.host1"}, handled); diff != "" {
			t.Errorf("in the end: %s", diff)
		}
	})
}

func TestAcceptFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logBook
		var tries atomic.Int32
		var handled atomic.Int32
		p := newPair(t, oslomsg.ServerOptions{
			Logger: log.logger(),
			Accept: func(context.Context, *oslomsg.Delivery) error {
				if tries.Add(1) < 10 {
					return errors.New("no space left on device")
				}
				return nil
			},
			Endpoints: methods(map[string]oslomsg.Handler{
				"m": func(_ context.Context, d *oslomsg.Delivery) { handled.Add(1) },
			}),
		})
		if err := p.client.Cast(t.Context(), toHost, "m", nil, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if handled.Load() != 0 {
			t.Error("handled, though it was not recorded")
		}
		time.Sleep(5 * time.Second)
		if handled.Load() != 1 || tries.Load() != 10 {
			t.Errorf("handled %d times after %d tries", handled.Load(), tries.Load())
		}
		if n := log.count("no space left"); n != 1 {
			t.Errorf("the trouble is logged %d times", n)
		}
	})
}

// A reply whose queue is not there is tried for 60 s; then the queue counts as
// dead for a while.
func TestReplyQueueMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logBook
		p := newPair(t, oslomsg.ServerOptions{Logger: log.logger(), Endpoints: methods(map[string]oslomsg.Handler{
			"m": func(_ context.Context, d *oslomsg.Delivery) { d.Reply("here") },
		})})
		var tries atomic.Int32
		p.bus.Tap(func(pub oslomsg.Publishing) {
			if pub.RoutingKey == "reply_gone" {
				tries.Add(1)
			}
		})
		request := func(id string) []byte {
			return envelope(t, map[string]any{"method": "m", "version": "6.0", "_msg_id": id, "_reply_q": "reply_gone", "_unique_id": id})
		}
		p.inject(t, request("1"))
		time.Sleep(30 * time.Second)
		if n := tries.Load(); n < 100 || n > 130 {
			t.Errorf("%d attempts in 30 s, want about 120", n)
		}
		time.Sleep(40 * time.Second)
		if n := tries.Load(); n < 200 || n > 250 {
			t.Errorf("%d attempts in all, want about 240", n)
		}
		if n := log.count("send reply"); n != 1 {
			t.Errorf("the lost reply is logged %d times", n)
		}
		before := tries.Load()
		p.inject(t, request("2"))
		time.Sleep(10 * time.Second)
		if n := tries.Load() - before; n != 1 {
			t.Errorf("%d attempts to a dead queue, want 1", n)
		}

		// It comes back: after its time it is tried again, and a reply waiting
		// for it gets through.
		time.Sleep(replyDeadTime)
		p.inject(t, request("3"))
		time.Sleep(10 * time.Second)
		got := make(chan []byte, 1)
		c, err := p.near.Consume(oslomsg.Queue{Name: "reply_gone", Kind: oslomsg.ReplyQueue}, func(m *oslomsg.Message) { got <- m.Body; m.Ack() })
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if body := string(<-got); !strings.Contains(body, `\"_msg_id\":\"3\"`) {
			t.Errorf("reply %s", body)
		}
	})
}

const replyDeadTime = time.Minute

// The broker goes away while a call is being carried out: its answer waits.
func TestReplyWaitsForTheBroker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"m": func(_ context.Context, d *oslomsg.Delivery) { p := 5 * time.Second; time.Sleep(p); d.Reply("here") },
		})})
		time.AfterFunc(time.Second, p.far.Cut)
		time.AfterFunc(2*time.Second, p.near.Cut)
		time.AfterFunc(40*time.Second, p.near.Restore)
		time.AfterFunc(50*time.Second, p.far.Restore)
		if raw, err := p.call(t, "m", nil); err != nil || raw != `"here"` {
			t.Errorf("%s, %v", raw, err)
		}
	})
}

func TestBlockedBroker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"m": func(_ context.Context, d *oslomsg.Delivery) { d.Reply("here") },
		})})
		p.near.Block("low on memory")
		if err := p.near.Health().Err(); err == nil || !strings.Contains(err.Error(), "low on memory") {
			t.Errorf("health: %v", err)
		}
		start := time.Now()
		time.AfterFunc(10*time.Second, func() { p.near.Block("") })
		if raw, err := p.call(t, "m", nil); err != nil || raw != `"here"` || time.Since(start) != 10*time.Second {
			t.Errorf("%s, %v after %s", raw, err, time.Since(start))
		}
		if err := p.near.Health().Err(); err != nil {
			t.Errorf("health: %v", err)
		}
	})
}

func TestExpiredCallsAreNotCarriedOut(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	began := func(d time.Duration) oslomsg.Context {
		c := oslomsg.Context{}
		c.Set("timestamp", now.Add(d).Format("2006-01-02T15:04:05.000000"))
		return c
	}
	for _, c := range []struct {
		name   string
		change func(*oslomsg.Delivery)
		after  time.Duration
		want   bool
	}{
		{"fresh", func(*oslomsg.Delivery) {}, 59 * time.Second, false},
		{"waited here", func(*oslomsg.Delivery) {}, 61 * time.Second, true},
		{"a cast never expires", func(d *oslomsg.Delivery) { d.MsgID = "" }, time.Hour, false},
		{"no expiration known", func(d *oslomsg.Delivery) { d.Expiration = 0 }, time.Hour, false},
		{"a long request calls late", func(d *oslomsg.Delivery) { d.Context = began(-time.Hour) }, time.Second, false},
		{"again, and old", func(d *oslomsg.Delivery) { d.Redelivered, d.Context = true, began(-time.Hour) }, time.Second, true},
		{"again, and young", func(d *oslomsg.Delivery) { d.Redelivered, d.Context = true, began(-50*time.Second) }, time.Second, false},
		{"again, odd timestamp", func(d *oslomsg.Delivery) {
			d.Redelivered, d.Context = true, oslomsg.Context{"timestamp": json.RawMessage("17")}
		}, time.Second, false},
	} {
		d := &oslomsg.Delivery{MsgID: "m", ReplyTo: "r", Expiration: time.Minute, Received: now}
		c.change(d)
		if got := d.Expired(now.Add(c.after)); got != c.want {
			t.Errorf("%s: expired %v", c.name, got)
		}
	}

	// End to end: the connection is lost before the ack, and the broker gives
	// the message out again after its caller has gone.
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int32
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"m": func(_ context.Context, d *oslomsg.Delivery) { n.Add(1); d.Reply(1) },
		})})
		body := envelope(t, map[string]any{
			"method": "m", "version": "6.0", "_msg_id": "old", "_reply_q": "reply_old", "_unique_id": "u",
			"_context_timestamp": time.Now().Add(-time.Hour).UTC().Format("2006-01-02T15:04:05.000000"),
		})
		replies := make(chan []byte, 1)
		c, err := p.near.Consume(oslomsg.Queue{Name: "reply_old", Kind: oslomsg.ReplyQueue}, func(m *oslomsg.Message) { replies <- m.Body; m.Ack() })
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		p.server.Drain()
		if err := p.near.Publish(t.Context(), oslomsg.Publishing{Exchange: "nova", RoutingKey: testQueue, Expiration: time.Minute, Body: body}); err != nil {
			t.Fatal(err)
		}
		// Somebody takes it and does not ack.
		cut := p.bus.Connect()
		taken := make(chan struct{})
		if _, err := cut.Consume(oslomsg.Queue{Name: testQueue, Exchange: "nova"}, func(*oslomsg.Message) { close(taken) }); err != nil {
			t.Fatal(err)
		}
		<-taken
		cut.Cut()
		defer cut.Close()
		s, err := oslomsg.Serve(p.far, oslomsg.ServerOptions{
			Queues:    []string{testQueue},
			Endpoints: methods(map[string]oslomsg.Handler{"m": func(context.Context, *oslomsg.Delivery) { n.Add(1) }}),
		})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Shutdown(context.Background())
		if body := string(<-replies); !strings.Contains(body, "MessagingTimeout") {
			t.Errorf("the caller is told %s", body)
		}
		if n.Load() != 0 {
			t.Error("carried out")
		}
	})
}

// A delivery recorded by one server is resumed by the next, and answered.
func TestResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var records []oslomsg.Record
		p := newPair(t, oslomsg.ServerOptions{
			Accept: func(_ context.Context, d *oslomsg.Delivery) error { records = append(records, d.Record()); return nil },
			Endpoints: methods(map[string]oslomsg.Handler{
				"m": func(_ context.Context, d *oslomsg.Delivery) { d.Hold() }, // the process dies with it
			}),
		})
		rctx := oslomsg.AdminContext(time.Now())
		var wg sync.WaitGroup
		wg.Go(func() {
			raw, err := p.client.Call(t.Context(), toHost, "m", map[string]any{"x": 1}, rctx)
			if err != nil || string(raw) != `"resumed"` {
				t.Errorf("%s, %v", raw, err)
			}
		})
		synctest.Wait()
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		p.server.Shutdown(gone)

		stored, err := json.Marshal(records)
		if err != nil {
			t.Fatal(err)
		}
		records = nil
		if err := json.Unmarshal(stored, &records); err != nil {
			t.Fatal(err)
		}
		var got *oslomsg.Delivery
		s, err := oslomsg.Serve(p.far, oslomsg.ServerOptions{
			Queues:    []string{testQueue},
			Accept:    func(context.Context, *oslomsg.Delivery) error { t.Error("accepted again"); return nil },
			Endpoints: methods(map[string]oslomsg.Handler{"m": func(_ context.Context, d *oslomsg.Delivery) { got = d; d.Reply("resumed") }}),
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range records {
			if err := s.Resume(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
		wg.Wait()
		if !got.Redelivered || got.Expiration != time.Minute || string(got.Arg("x")) != "1" || got.Queue != testQueue {
			t.Errorf("resumed %+v", got)
		}
		if diff := cmp.Diff(rctx, got.Context); diff != "" {
			t.Errorf("context:\n%s", diff)
		}

		old := records[0]
		old.Received = old.Received.Add(-time.Hour)
		if err := s.Resume(t.Context(), old); !errors.Is(err, oslomsg.ErrExpired) {
			t.Errorf("old: %v", err)
		}
		if err := s.Resume(t.Context(), oslomsg.Record{Message: json.RawMessage("{}")}); err == nil {
			t.Error("a damaged record is resumed")
		}
		other := records[0]
		other.Message = json.RawMessage(`{"method": "unknown", "version": "6.0"}`)
		var f *oslomsg.Failure
		if err := s.Resume(t.Context(), other); !errors.As(err, &f) || f.Class != "NoSuchMethod" {
			t.Errorf("unknown method: %v", err)
		}
		s.Shutdown(t.Context())
		if err := s.Resume(t.Context(), records[0]); !errors.Is(err, oslomsg.ErrClosed) {
			t.Errorf("after shutdown: %v", err)
		}
	})
}
