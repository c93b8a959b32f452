package oslomsg_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/oslomsg/membus"
)

// pair is a client and a server with a connection each, inside a synctest
// bubble.
type pair struct {
	bus    *membus.Bus
	near   *membus.Conn // the client's
	far    *membus.Conn // the server's
	client *oslomsg.Client
	server *oslomsg.Server
}

const testQueue = "compute.host1"

var toHost = oslomsg.Target{Topic: "compute", Server: "host1", Version: "6.0"}

// newPair starts both and stops them at the end of the test.
func newPair(t *testing.T, o oslomsg.ServerOptions) *pair {
	t.Helper()
	p := &pair{bus: membus.New()}
	p.near, p.far = p.bus.Connect(), p.bus.Connect()
	if o.Queues == nil {
		o.Queues = []string{testQueue}
	}
	var err error
	if p.server, err = oslomsg.Serve(p.far, o); err != nil {
		t.Fatal(err)
	}
	if p.client, err = oslomsg.NewClient(p.near, oslomsg.ClientOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		p.client.Close()
		p.server.Shutdown(ctx)
		p.near.Close()
		p.far.Close()
	})
	return p
}

// methods makes the one endpoint of most tests.
func methods(m map[string]oslomsg.Handler) []oslomsg.Endpoint {
	return []oslomsg.Endpoint{{Version: "6.5", AnyMinor: true, Methods: m}}
}

func (p *pair) call(t *testing.T, method string, args any, opts ...oslomsg.CallOption) (string, error) {
	t.Helper()
	raw, err := p.client.Call(t.Context(), toHost, method, args, oslomsg.Context{}, opts...)
	return string(raw), err
}

func TestCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rctx := oslomsg.AdminContext(time.Now())
		var got *oslomsg.Delivery
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"echo": func(_ context.Context, d *oslomsg.Delivery) {
				got = d
				if err := d.Reply(map[string]any{"was": d.Arg("text")}); err != nil {
					t.Error(err)
				}
			},
			"nothing": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(nil) },
		})})
		raw, err := p.client.Call(t.Context(), toHost, "echo", map[string]any{"text": "<ü> \u2028"}, rctx)
		if err != nil {
			t.Fatal(err)
		}
		if want := `{"was":"<ü> \u2028"}`; string(raw) != want {
			t.Errorf("result %s, want %s", raw, want)
		}
		if got.Version != "6.0" || got.Namespace != "" || !got.IsCall() || got.Expiration != time.Minute || got.Redelivered {
			t.Errorf("delivery %+v", got)
		}
		if diff := cmp.Diff(rctx, got.Context); diff != "" {
			t.Errorf("context (-sent +received):\n%s", diff)
		}
		if raw, err := p.call(t, "nothing", nil); err != nil || raw != "null" {
			t.Errorf("null result: %q, %v", raw, err)
		}
	})
}

func TestFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"stop": func(_ context.Context, d *oslomsg.Delivery) {
				d.Fail(&oslomsg.Failure{
					Module: "nova.exception", Class: "InstanceNotFound", Message: `Instance "x" could not be found.`,
					Kwargs: map[string]any{"instance_id": "x", "code": 404},
				})
				d.Reply("too late")
			},
			"bad_result": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(func() {}) },
			"bad_failure": func(_ context.Context, d *oslomsg.Delivery) {
				d.Fail(&oslomsg.Failure{Class: "Odd", Kwargs: map[string]any{"f": func() {}}})
			},
			"silent":   func(context.Context, *oslomsg.Delivery) {},
			"panics":   func(context.Context, *oslomsg.Delivery) { panic("oops") },
			"_private": func(_ context.Context, d *oslomsg.Delivery) { d.Reply("reached") },
		})})
		_, err := p.call(t, "stop", nil)
		var remote *oslomsg.RemoteError
		if !errors.As(err, &remote) {
			t.Fatalf("error %v", err)
		}
		want := &oslomsg.RemoteError{
			Module: "nova.exception", Class: "InstanceNotFound", Message: `Instance "x" could not be found.`,
			Args:      []json.RawMessage{json.RawMessage(`"Instance \"x\" could not be found."`)},
			Kwargs:    map[string]json.RawMessage{"instance_id": json.RawMessage(`"x"`), "code": json.RawMessage("404")},
			Traceback: []string{},
		}
		if diff := cmp.Diff(want, remote); diff != "" {
			t.Errorf("failure (-want +got):\n%s", diff)
		}
		if !errors.Is(err, oslomsg.NovaError("InstanceNotFound")) || errors.Is(err, oslomsg.NovaError("Other")) {
			t.Error("errors.Is does not tell the class")
		}
		for method, class := range map[string]string{
			"bad_result": "ValueError", "bad_failure": "Odd", "silent": "RuntimeError", "panics": "RuntimeError",
			"unknown": "NoSuchMethod", "_private": "NoSuchMethod",
		} {
			if _, err := p.call(t, method, nil); !errors.As(err, &remote) || remote.Class != class {
				t.Errorf("%s: error %v, want class %s", method, err, class)
			}
		}
	})
}

func TestVersionsAndNamespaces(t *testing.T) {
	ok := func(_ context.Context, d *oslomsg.Delivery) { d.Reply(d.Namespace) }
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{
			Ping: true,
			Endpoints: []oslomsg.Endpoint{
				{Version: "6.5", AnyMinor: true, Methods: map[string]oslomsg.Handler{"m": ok}},
				{Namespace: "strict", Version: "2.3", Methods: map[string]oslomsg.Handler{"m": ok}},
				oslomsg.BaseAPI("compute"),
			},
		})
		for _, c := range []struct{ namespace, version, method, want string }{
			{"", "6.0", "m", `""`},
			{"", "6.99", "m", `""`},
			{"", "6.99.9", "m", `""`},
			{"", "5.13", "m", "UnsupportedVersion"},
			{"", "7.0", "m", "UnsupportedVersion"},
			{"", "abc", "m", "UnsupportedVersion"},
			{"", "1.0", "oslo_rpc_server_ping", `"pong"`},
			{"strict", "2.3", "m", `"strict"`},
			{"strict", "2.0", "m", `"strict"`},
			{"strict", "2.3.1", "m", "UnsupportedVersion"},
			{"strict", "2.4", "m", "UnsupportedVersion"},
			{"strict", "2.1", "other", "NoSuchMethod"},
			{"other", "1.0", "m", "UnsupportedVersion"},
			{"baseapi", "1.0", "ping", `{"arg":null,"service":"compute"}`},
			{"baseapi", "1.1", "get_backdoor_port", "null"},
		} {
			to := oslomsg.Target{Topic: "compute", Server: "host1", Namespace: c.namespace, Version: c.version}
			raw, err := p.client.Call(t.Context(), to, c.method, nil, nil)
			got := string(raw)
			var remote *oslomsg.RemoteError
			if errors.As(err, &remote) {
				got = remote.Class
			}
			if got != c.want {
				t.Errorf("%+v: got %s, %v", c, got, err)
			}
		}
	})
}

func TestCastAndFanout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int32
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"count": func(_ context.Context, d *oslomsg.Delivery) {
				if d.IsCall() || d.Expiration != 0 {
					t.Error("a cast looks like a call")
				}
				d.Reply(1) // nobody asked
				n.Add(1)
			},
		})})
		if err := p.client.Cast(t.Context(), toHost, "count", nil, nil); err != nil {
			t.Fatal(err)
		}
		if err := p.client.Cast(t.Context(), oslomsg.Target{Topic: "nobody"}, "count", nil, nil); err != nil {
			t.Errorf("cast to nobody: %v", err)
		}
		if err := p.client.Fanout(t.Context(), oslomsg.Target{Topic: "scheduler"}, "sync", nil, nil); err != nil {
			t.Errorf("fanout to nobody: %v", err)
		}
		var heard [2]atomic.Int32
		for i, name := range []string{"a", "b"} {
			_, err := p.far.Consume(oslomsg.Queue{Name: "scheduler_fanout_" + name, Kind: oslomsg.FanoutQueue, Exchange: "scheduler_fanout"},
				func(m *oslomsg.Message) { heard[i].Add(1); m.Ack() })
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := p.client.Fanout(t.Context(), oslomsg.Target{Topic: "scheduler"}, "sync", nil, nil); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n.Load() != 1 || heard[0].Load() != 1 || heard[1].Load() != 1 {
			t.Errorf("%d casts, fanout heard %d and %d times", n.Load(), heard[0].Load(), heard[1].Load())
		}
		if err := p.client.Cast(t.Context(), toHost, "count", []int{1}, nil); err == nil {
			t.Error("args that are no object are sent")
		}
	})
}

func TestHeartbeatKeepsALongCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"slow": func(_ context.Context, d *oslomsg.Delivery) {
				time.Sleep(10 * time.Minute)
				d.Reply("done")
			},
		})})
		var beats atomic.Int32
		p.bus.Tap(func(pub oslomsg.Publishing) {
			if strings.HasPrefix(pub.RoutingKey, "reply_") && strings.Contains(string(pub.Body), `\"ending\":false`) {
				beats.Add(1)
			}
		})
		raw, err := p.call(t, "slow", nil, oslomsg.WithTimeout(30*time.Minute), oslomsg.WithCallMonitor(time.Minute))
		if err != nil || raw != `"done"` {
			t.Fatalf("%s, %v", raw, err)
		}
		if n := beats.Load(); n != 19 && n != 20 {
			t.Errorf("%d heartbeats in 10 minutes at a monitor of 60 s", n)
		}
	})
}

func TestMonitorGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"slow": func(_ context.Context, d *oslomsg.Delivery) {
				p := time.Second * 90
				time.Sleep(p)
				d.Reply("done")
			},
		})})
		start := time.Now()
		go func() {
			time.Sleep(45 * time.Second)
			p.far.Cut()
			time.Sleep(10 * time.Minute)
			p.far.Restore()
		}()
		_, err := p.call(t, "slow", nil, oslomsg.WithTimeout(30*time.Minute), oslomsg.WithCallMonitor(time.Minute))
		var timeout *oslomsg.TimeoutError
		if !errors.As(err, &timeout) || !timeout.Sent {
			t.Fatalf("error %v", err)
		}
		if d := time.Since(start); d != 90*time.Second {
			t.Errorf("gave up after %s, want 30 s + 60 s", d)
		}
		time.Sleep(15 * time.Minute) // the late answer is dropped
		if raw, err := p.call(t, "slow", nil, oslomsg.WithTimeout(2*time.Minute)); err != nil {
			t.Errorf("next call: %s, %v", raw, err)
		}
	})
}

func TestTimeouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"stuck": func(ctx context.Context, d *oslomsg.Delivery) { <-release; d.Reply(1) },
		})})
		defer close(release)
		var timeout *oslomsg.TimeoutError

		start := time.Now()
		_, err := p.call(t, "stuck", nil)
		if !errors.As(err, &timeout) || !timeout.Sent || !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Minute {
			t.Errorf("no answer: %v after %s", err, time.Since(start))
		}

		start = time.Now()
		_, err = p.client.Call(t.Context(), oslomsg.Target{Topic: "conductor"}, "ping", nil, nil, oslomsg.WithTimeout(10*time.Second))
		if !errors.As(err, &timeout) || timeout.Sent || !strings.Contains(err.Error(), oslomsg.ErrUnroutable.Error()) || time.Since(start) != 10*time.Second {
			t.Errorf("nobody there: %v after %s", err, time.Since(start))
		}

		p.near.Cut()
		_, err = p.call(t, "stuck", nil)
		if !errors.As(err, &timeout) || timeout.Sent {
			t.Errorf("no broker: %v", err)
		}
		p.near.Restore()

		ctx, cancel := context.WithCancelCause(t.Context())
		stop := errors.New("enough")
		time.AfterFunc(time.Second, func() { cancel(stop) })
		if _, err = p.client.Call(ctx, toHost, "stuck", nil, nil); !errors.Is(err, stop) {
			t.Errorf("cancelled: %v", err)
		}
		ctx2, cancel2 := context.WithTimeout(t.Context(), time.Second)
		defer cancel2()
		if _, err = p.client.Call(ctx2, toHost, "stuck", nil, nil); !errors.As(err, &timeout) {
			t.Errorf("deadline of the caller: %v", err)
		}
	})
}

func TestCallWaitsForTheOtherSideToStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{})
		time.AfterFunc(20*time.Second, func() {
			s, err := oslomsg.Serve(p.far, oslomsg.ServerOptions{Queues: []string{"conductor"}, Endpoints: []oslomsg.Endpoint{oslomsg.BaseAPI("conductor")}})
			if err != nil {
				t.Error(err)
			}
			t.Cleanup(func() { s.Shutdown(context.Background()) })
		})
		if _, err := p.client.Call(t.Context(), oslomsg.Target{Topic: "conductor", Namespace: "baseapi"}, "ping", nil, nil); err != nil {
			t.Error(err)
		}
	})
}

func TestInFlightIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most atomic.Int32
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"work": func(_ context.Context, d *oslomsg.Delivery) {
				most.Store(max(most.Load(), now.Add(1)))
				time.Sleep(time.Second)
				now.Add(-1)
				d.Reply(nil)
			},
		})})
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if _, err := p.call(t, "work", nil); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if most.Load() != 32 {
			t.Errorf("%d calls at a time, want 32", most.Load())
		}
	})
}

func TestWorkersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var running, accepted atomic.Int32
		p := newPair(t, oslomsg.ServerOptions{
			Workers: 3,
			Accept:  func(context.Context, *oslomsg.Delivery) error { accepted.Add(1); return nil },
			Endpoints: methods(map[string]oslomsg.Handler{
				"work": func(context.Context, *oslomsg.Delivery) { running.Add(1); <-release },
			}),
		})
		for range 10 {
			if err := p.client.Cast(t.Context(), toHost, "work", nil, nil); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if running.Load() != 3 || accepted.Load() != 3 {
			t.Errorf("%d running, %d accepted, want 3 each", running.Load(), accepted.Load())
		}
		if n := p.bus.Queues()[testQueue]; n != 6 {
			t.Errorf("%d messages left with the broker, want 6 (one is in hand)", n)
		}
		close(release)
		synctest.Wait()
		if running.Load() != 10 {
			t.Errorf("%d handled in the end", running.Load())
		}
	})
}

func TestClientClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"slow": func(_ context.Context, d *oslomsg.Delivery) { time.Sleep(time.Second); d.Reply(1) },
		})})
		time.AfterFunc(time.Millisecond, func() { p.client.Close() })
		if _, err := p.call(t, "slow", nil); !errors.Is(err, oslomsg.ErrClosed) {
			t.Errorf("waiting call: %v", err)
		}
		if err := p.client.Cast(t.Context(), toHost, "slow", nil, nil); !errors.Is(err, oslomsg.ErrClosed) {
			t.Errorf("later cast: %v", err)
		}
		if _, err := p.call(t, "slow", nil); !errors.Is(err, oslomsg.ErrClosed) {
			t.Errorf("later call: %v", err)
		}
	})
}

// Old servers send the payload and the end in two messages; strangers send
// anything.
func TestRepliesOfOtherForms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{})
		c, err := p.far.Consume(oslomsg.Queue{Name: "old.host1", Exchange: "nova"}, func(m *oslomsg.Message) {
			m.Ack()
			var outer map[string]string
			var inner struct {
				ID    string `json:"_msg_id"`
				Queue string `json:"_reply_q"`
			}
			if err := json.Unmarshal(m.Body, &outer); err != nil {
				t.Error(err)
			}
			if err := json.Unmarshal([]byte(outer["oslo.message"]), &inner); err != nil {
				t.Error(err)
			}
			reply := func(more map[string]any) {
				more["_msg_id"] = inner.ID
				err := p.far.Publish(context.Background(), oslomsg.Publishing{RoutingKey: inner.Queue, Body: envelope(t, more)})
				if err != nil {
					t.Error(err)
				}
			}
			for _, junk := range []string{"junk", `{"_msg_id": "somebody else's", "ending": true}`, `{"ending": true}`} {
				if err := p.far.Publish(context.Background(), oslomsg.Publishing{RoutingKey: inner.Queue, Body: []byte(junk)}); err != nil {
					t.Error(err)
				}
			}
			for range 100 { // more heartbeats than anybody waits for
				reply(map[string]any{"result": nil, "ending": false})
			}
			reply(map[string]any{"result": "payload", "failure": nil, "ending": false})
			time.Sleep(time.Second)
			reply(map[string]any{"result": nil, "failure": nil, "ending": true})
			reply(map[string]any{"result": "too late", "failure": nil, "ending": true})
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		raw, err := p.client.Call(t.Context(), oslomsg.Target{Topic: "old", Server: "host1"}, "m", nil, nil)
		if err != nil || string(raw) != `"payload"` {
			t.Errorf("%s, %v", raw, err)
		}
	})
}

func TestManyCallsSideBySide(t *testing.T) {
	p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
		"echo": func(_ context.Context, d *oslomsg.Delivery) { d.Reply(d.Arg("n")) },
	})})
	var wg sync.WaitGroup
	for i := range 500 {
		wg.Go(func() {
			if raw, err := p.call(t, "echo", map[string]int{"n": i}); err != nil || raw != fmt.Sprint(i) {
				t.Errorf("%d: %s, %v", i, raw, err)
			}
		})
	}
	wg.Wait()
}
