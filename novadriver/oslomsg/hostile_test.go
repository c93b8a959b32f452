package oslomsg_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/oslomsg/membus"
)

func TestHostileMessages(t *testing.T) {
	gz := func(b []byte) []byte {
		var buf bytes.Buffer
		w := gzip.NewWriter(&buf)
		w.Write(b)
		w.Close()
		return buf.Bytes()
	}
	good := map[string]any{"method": "m", "args": map[string]any{"a": 1}, "version": "6.0"}
	var handled atomic.Int32
	var log logBook
	bus := membus.New()
	conn := bus.Connect()
	defer conn.Close()
	tr := &feeder{Transport: conn}
	s, err := oslomsg.Serve(tr, oslomsg.ServerOptions{
		Queues: []string{testQueue}, MaxBody: 1 << 20, Logger: log.logger(),
		Endpoints: methods(map[string]oslomsg.Handler{"m": func(_ context.Context, d *oslomsg.Delivery) { handled.Add(1); d.Reply(nil) }}),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		gone, cancel := context.WithCancel(context.Background())
		cancel() // one call asks for an answer in a queue that is not there
		s.Shutdown(gone)
	}()

	deep := strings.Repeat("[", 100000)
	for _, c := range []struct {
		name        string
		body        []byte
		compression string
		runs        int
		says        string // a word of the log line
	}{
		{"good", envelope(t, good), "", 1, ""},
		{"bare message", []byte(`{"method": "m", "version": "6.0"}`), "", 1, ""},
		{"gzip", gz(envelope(t, good)), "application/x-gzip", 1, ""},
		{"no args", envelope(t, map[string]any{"method": "m", "args": nil, "version": "6.0"}), "", 1, ""},
		{"odd contexts", envelope(t, map[string]any{"method": "m", "version": "6.0", "_context_": 1, "_context_roles": "x", "_timeout": "soon"}), "", 1, ""},
		{"odd ids", envelope(t, map[string]any{"method": "m", "version": "6.0", "_msg_id": 1, "_reply_q": []int{}, "_unique_id": nil}), "", 1, ""},
		{"huge timeout", envelope(t, map[string]any{"method": "m", "version": "6.0", "_timeout": 1e300, "_msg_id": "x", "_reply_q": "gone"}), "", 1, ""},
		{"empty", nil, "", 0, `read envelope`},
		{"no JSON", []byte("PING"), "", 0, `invalid character`},
		{"binary", []byte{0, 0xff, 0x80, 1}, "", 0, ""},
		{"null", []byte("null"), "", 0, ""},
		{"array", []byte("[1, 2]"), "", 0, ""},
		{"text", []byte(`"x"`), "", 0, ""},
		{"nested without end", []byte(deep), "", 0, ""},
		{"nested args", fmt.Appendf(nil, `{"method": "m", "version": "6.0", "args": {"a": %s%s}}`, deep, strings.Repeat("]", 100000)), "", 0, `max depth`},
		{"envelope of another version", []byte(`{"oslo.version": "3.0", "oslo.message": "{}"}`), "", 0, `version \"3.0\"`},
		{"envelope of a newer minor", []byte(`{"oslo.version": "2.1", "oslo.message": "{}"}`), "", 0, `version \"2.1\"`},
		{"envelope without text", []byte(`{"oslo.version": "2.0", "oslo.message": {"method": "m"}}`), "", 0, `message is no text`},
		{"envelope version no text", []byte(`{"oslo.version": 2.0, "oslo.message": "{}"}`), "", 0, ""},
		{"inner no JSON", []byte(`{"oslo.version": "2.0", "oslo.message": "{"}`), "", 0, ""},
		{"no method", envelope(t, map[string]any{"args": map[string]any{}}), "", 0, `no method`},
		{"method no text", envelope(t, map[string]any{"method": 5}), "", 0, ""},
		{"args no object", envelope(t, map[string]any{"method": "m", "args": []int{1}}), "", 0, `args are no object`},
		{"too large", bytes.Repeat([]byte("x"), 1<<20+1), "", 0, `larger than the limit`},
		{"bomb", gz(bytes.Repeat([]byte(" "), 4<<20)), "application/x-gzip", 0, `bytes uncompressed`},
		{"broken gzip", []byte("x"), "application/x-gzip", 0, `uncompress`},
		{"broken bzip2", []byte("BZh9x"), "application/x-bz2", 0, ""},
		{"unknown compression", envelope(t, good), "application/zstd", 0, `application/zstd`},
	} {
		before, lines := handled.Load(), log.count("")
		m := &counter{}
		tr.feed(&oslomsg.Message{Queue: testQueue, Body: c.body, Compression: c.compression, Received: time.Now(), Acker: m})
		waitFor(t, c.name, func() bool { return handled.Load() == before+int32(c.runs) })
		if m.acks.Load() != 1 || m.requeues.Load() != 0 {
			t.Errorf("%s: acked %d times, requeued %d times", c.name, m.acks.Load(), m.requeues.Load())
		}
		if n := log.count("") - lines; c.runs == 0 && n != 1 {
			t.Errorf("%s: logged in %d lines", c.name, n)
		}
		if all := strings.Split(strings.TrimSpace(log.String()), "\n"); c.says != "" && !strings.Contains(all[len(all)-1], c.says) {
			t.Errorf("%s: logged as %s", c.name, all[len(all)-1])
		}
	}
}

// feeder is a transport whose one consumer is fed by hand.
type feeder struct {
	oslomsg.Transport
	fn func(*oslomsg.Message)
}

func (f *feeder) Consume(q oslomsg.Queue, fn func(*oslomsg.Message)) (oslomsg.Consumer, error) {
	f.fn = fn
	return f.Transport.Consume(q, fn)
}

func (f *feeder) feed(m *oslomsg.Message) { f.fn(m) }

// counter counts how a message is settled.
type counter struct{ acks, requeues atomic.Int32 }

func (c *counter) Ack() error     { c.acks.Add(1); return nil }
func (c *counter) Requeue() error { c.requeues.Add(1); return nil }
