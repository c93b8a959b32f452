package oslomsg_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet/novadriver/oslomsg"
)

// While Accept fails the server can still be shut down, and the message stays
// with the broker.
func TestShutdownDuringAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, oslomsg.ServerOptions{
			Accept:    func(context.Context, *oslomsg.Delivery) error { return errors.New("no") },
			Endpoints: methods(map[string]oslomsg.Handler{"m": func(context.Context, *oslomsg.Delivery) {}}),
		})
		if err := p.client.Cast(t.Context(), toHost, "m", nil, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := p.server.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if n := p.bus.Queues()[testQueue]; n != 1 {
			t.Errorf("%d messages are left, want 1", n)
		}
	})
}

func TestShutdownWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var held *oslomsg.Delivery
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"slow":  func(_ context.Context, d *oslomsg.Delivery) { time.Sleep(20 * time.Second); d.Reply("slow") },
			"later": func(_ context.Context, d *oslomsg.Delivery) { d.Hold(); held = d },
			"never": func(ctx context.Context, d *oslomsg.Delivery) { <-ctx.Done() },
		})})
		var wg sync.WaitGroup
		for _, m := range []string{"slow", "later"} {
			wg.Go(func() {
				if raw, err := p.call(t, m, nil); err != nil || raw != `"`+m+`"` {
					t.Errorf("%s: %s, %v", m, raw, err)
				}
			})
		}
		synctest.Wait()
		time.AfterFunc(30*time.Second, func() { held.Reply("later") })
		start := time.Now()
		if err := p.server.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d != 30*time.Second {
			t.Errorf("shut down after %s, want 30 s", d)
		}
		wg.Wait()
		if err := p.client.Cast(t.Context(), toHost, "slow", nil, nil); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := p.bus.Queues()[testQueue]; n != 1 {
			t.Errorf("%d messages wait for the next start, want 1", n)
		}
	})
}

func TestShutdownRunsOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := false
		p := newPair(t, oslomsg.ServerOptions{Endpoints: methods(map[string]oslomsg.Handler{
			"never": func(ctx context.Context, d *oslomsg.Delivery) { <-ctx.Done(); ended = true },
			"held":  func(_ context.Context, d *oslomsg.Delivery) { d.Hold() },
		})})
		for _, m := range []string{"never", "held"} {
			go p.client.Call(t.Context(), toHost, m, nil, nil)
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := p.server.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) || !ended {
			t.Errorf("error %v, handler ended: %v", err, ended)
		}
	})
}

func TestDrainOneQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		p := newPair(t, oslomsg.ServerOptions{
			Queues: []string{testQueue, "compute-alt.host1"},
			Endpoints: methods(map[string]oslomsg.Handler{
				"m": func(_ context.Context, d *oslomsg.Delivery) { got = append(got, d.Queue) },
			}),
		})
		p.server.Drain(testQueue)
		for _, topic := range []string{"compute", "compute-alt"} {
			to := toHost
			to.Topic = topic
			if err := p.client.Cast(t.Context(), to, "m", nil, nil); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if diff := cmp.Diff([]string{"compute-alt.host1"}, got); diff != "" {
			t.Errorf("handled: %s", diff)
		}
		if n := p.bus.Queues()[testQueue]; n != 1 {
			t.Errorf("%d messages wait in the drained queue, want 1", n)
		}
	})
}
