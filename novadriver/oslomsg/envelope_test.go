package oslomsg

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// wireSample is one message as a broker of a real cloud saw it.
type wireSample struct {
	Kind       string `json:"kind"`
	Exchange   string `json:"exchange"`
	RoutingKey string `json:"routing_key"`
	Expiration string `json:"expiration"`
	Body       string `json:"body"`
}

func wireSamples(tb testing.TB) []wireSample {
	tb.Helper()
	raw, err := os.ReadFile("testdata/wire.json")
	if err != nil {
		tb.Fatal(err)
	}
	var out []wireSample
	if err := json.Unmarshal(raw, &out); err != nil {
		tb.Fatal(err)
	}
	return out
}

func decodeAny(t *testing.T, raw []byte) any {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%v in %.200s", err, raw)
	}
	return v
}

// What stock services sent is read, and our encoding of the same is the same
// message.
func TestRecordedMessages(t *testing.T) {
	kinds := map[string]bool{}
	for _, s := range wireSamples(t) {
		kinds[s.Kind] = true
		inner, err := open(&Message{Body: []byte(s.Body)}, defaultMaxBody)
		if err != nil {
			t.Errorf("%s: %v", s.Kind, err)
			continue
		}
		want := decodeAny(t, inner).(map[string]any)
		var again []byte
		switch s.Kind {
		case "reply", "failure":
			r, err := parseReply(inner)
			if err != nil {
				t.Errorf("%s: %v", s.Kind, err)
				continue
			}
			if !r.ending || (r.failure != nil) != (s.Kind == "failure") {
				t.Errorf("%s: read as %+v", s.Kind, r)
			}
			text := ""
			if r.failure != nil {
				if r.failure.Class != "ComputeHostNotFound" || r.failure.Module != "nova.exception" || len(r.failure.Traceback) == 0 {
					t.Errorf("failure: %+v", r.failure)
				}
				f := Failure{Module: r.failure.Module, Class: r.failure.Class, Message: r.failure.Message, Tb: r.failure.Traceback, Kwargs: map[string]any{}}
				for k, v := range r.failure.Kwargs {
					f.Kwargs[k] = v
				}
				for _, a := range r.failure.Args {
					f.Args = append(f.Args, a)
				}
				if text, err = f.encode(); err != nil {
					t.Fatal(err)
				}
				// Compare the third level by meaning.
				if diff := cmp.Diff(decodeAny(t, []byte(want["failure"].(string))), decodeAny(t, []byte(text))); diff != "" {
					t.Errorf("failure (-recorded +ours):\n%s", diff)
				}
				want["failure"] = text
			}
			again, err = encodeReply(r.msgID, r.result, text, r.ending)
			if err != nil {
				t.Fatal(err)
			}
		default:
			d, err := parseRequest(inner)
			if err != nil {
				t.Errorf("%s: %v", s.Kind, err)
				continue
			}
			if d.IsCall() != (s.Kind == "call") || d.UniqueID == "" || d.Context.RequestID() == "" || d.Context.Timestamp().IsZero() {
				t.Errorf("%s: read as %+v", s.Kind, d)
			}
			more := map[string]any{}
			if d.IsCall() {
				more = map[string]any{"_msg_id": d.MsgID, "_reply_q": d.ReplyTo, "_timeout": nil}
			}
			to := Target{Namespace: d.Namespace, Version: d.Version}
			if again, err = encodeRequest(to, d.Method, d.Args, d.Context, more); err != nil {
				t.Fatal(err)
			}
		}
		inner, err = open(&Message{Body: again}, defaultMaxBody)
		if err != nil {
			t.Fatal(err)
		}
		got := decodeAny(t, inner).(map[string]any)
		if got["_unique_id"] == want["_unique_id"] || len(got["_unique_id"].(string)) != 32 {
			t.Errorf("%s: unique id %v", s.Kind, got["_unique_id"])
		}
		delete(got, "_unique_id")
		delete(want, "_unique_id")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-recorded +ours):\n%s", s.Kind, diff)
		}
	}
	for _, k := range []string{"call", "cast", "reply", "failure", "boot", "fanout"} {
		if !kinds[k] {
			t.Errorf("no sample of a %s", k)
		}
	}
}

// The properties of a message are those that oslo.messaging sets.
func TestProperties(t *testing.T) {
	p := properties([]byte("x"), time.Minute, 900*time.Millisecond)
	if p.ContentType != "application/json" || p.ContentEncoding != "utf-8" || p.DeliveryMode != 2 || p.Priority != 0 || p.Headers != nil ||
		p.Expiration != "60000" || p.ReplyTo+p.CorrelationId+p.MessageId+p.Type+p.UserId+p.AppId != "" {
		t.Errorf("%+v", p)
	}
	for _, c := range []struct {
		expiration, waited time.Duration
		want               string
	}{
		{0, time.Hour, ""}, {time.Minute, 20*time.Second + 5*time.Millisecond, "40000"}, {time.Second, time.Minute, "1"}, {1500 * time.Microsecond, 0, "2"},
	} {
		if got := properties(nil, c.expiration, c.waited).Expiration; got != c.want {
			t.Errorf("%s after %s: %q, want %q", c.expiration, c.waited, got, c.want)
		}
	}
}

func TestTwoMessageReplies(t *testing.T) {
	// The old form: the payload, then the end.
	first, err := parseReply(json.RawMessage(`{"result": {"a": 1}, "failure": null, "ending": false, "_msg_id": "m"}`))
	if err != nil || first.ending || string(first.result) != `{"a": 1}` {
		t.Errorf("%+v, %v", first, err)
	}
	second, err := parseReply(json.RawMessage(`{"result": null, "failure": null, "ending": true, "_msg_id": "m"}`))
	if err != nil || !second.ending || second.result != nil || second.failure != nil {
		t.Errorf("%+v, %v", second, err)
	}
	for _, bad := range []string{``, `[]`, `{}`, `{"_msg_id": 5}`, `"x"`} {
		if _, err := parseReply(json.RawMessage(bad)); err == nil {
			t.Errorf("%s is a reply", bad)
		}
	}
}

func TestDecodeFailure(t *testing.T) {
	for _, c := range []struct{ raw, class, module, message string }{
		{`"{\"class\": \"X_Remote\", \"module\": \"nova.exception_Remote\", \"message\": \"m\"}"`, "X", "nova.exception", "m"},
		{`{"class": "X", "module": "builtins", "message": "m"}`, "X", "builtins", "m"},
		{`"{\"class\": \"X\", \"args\": 5, \"kwargs\": [], \"tb\": {}}"`, "X", "", ""},
		{`"{}"`, "RemoteError", "", ""},
		{`"plain text"`, "RemoteError", "", "unreadable failure: plain text"},
		{`17`, "RemoteError", "", "unreadable failure: 17"},
	} {
		e := decodeFailure(json.RawMessage(c.raw))
		if e.Class != c.class || e.Module != c.module || e.Message != c.message {
			t.Errorf("%s: %+v", c.raw, e)
		}
	}
}

func TestCompatible(t *testing.T) {
	for _, c := range []struct {
		want, have string
		anyMinor   bool
		ok         bool
	}{
		{"6.0", "6.5", false, true}, {"6.5", "6.5", false, true}, {"6.6", "6.5", false, false}, {"6.6", "6.5", true, true},
		{"5.0", "6.5", true, false}, {"6", "6.5", false, true}, {"6.5.1", "6.5", false, false}, {"6.4.9", "6.5", false, true},
		{"6.5", "6.5.1", false, true}, {"", "6.5", true, false}, {"6.x", "6.5", true, false}, {"6.-1", "6.5", true, false}, {"1.2.3.4", "1.9", true, false},
	} {
		if got := compatible(c.want, c.have, c.anyMinor); got != c.ok {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestContext(t *testing.T) {
	c := AdminContext(time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC))
	if !c.Bool("is_admin") || c.String("read_deleted") != "no" || !strings.HasPrefix(c.RequestID(), "req-") || len(c.RequestID()) != 40 {
		t.Errorf("%v", c)
	}
	if got := c.String("timestamp"); got != "2026-03-01T12:00:00.123456" {
		t.Errorf("timestamp %s", got)
	}
	if got := c.Timestamp(); !got.Equal(time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC)) {
		t.Errorf("timestamp %s", got)
	}
	d := c.Clone()
	d.Set("auth_token", "very-secret")
	d.Set("roles", []string{"member", "admin"})
	if c.String("auth_token") != "" {
		t.Error("a clone shares state")
	}
	if diff := cmp.Diff([]string{"member", "admin"}, d.Strings("roles")); diff != "" {
		t.Error(diff)
	}
	if text := d.LogValue().String(); strings.Contains(text, "secret") || !strings.Contains(text, c.RequestID()) {
		t.Errorf("logged as %s", text)
	}
	d.Set("odd", func() {})
	if string(d["odd"]) != "null" {
		t.Errorf("odd %s", d["odd"])
	}
}

// fuzzSeeds are bodies of messages, good and bad.
func fuzzSeeds(f *testing.F) {
	for _, s := range wireSamples(f) {
		f.Add([]byte(s.Body), "")
	}
	for _, s := range []string{
		``, `{}`, `[]`, `null`, `{"oslo.version": "2.0"}`, `{"oslo.version": "2.0", "oslo.message": "{\"method\": \"m\"}"}`,
		`{"method": "m", "args": {}, "version": "6.0", "_timeout": -1e9, "_context_x": []}`, `{"_msg_id": "m", "failure": "{}", "ending": 1}`,
	} {
		f.Add([]byte(s), "")
	}
	f.Add([]byte("\x1f\x8b"), "application/x-gzip")
	f.Add([]byte("BZh9"), "application/x-bz2")
}

func FuzzEnvelope(f *testing.F) {
	fuzzSeeds(f)
	f.Fuzz(func(t *testing.T, body []byte, compression string) {
		inner, err := open(&Message{Body: body, Compression: compression}, 1<<16)
		if err != nil {
			return
		}
		if len(inner) > 1<<16 {
			t.Fatalf("%d bytes came out", len(inner))
		}
		r, err := parseReply(inner)
		if err != nil {
			return
		}
		out, err := encodeReply(r.msgID, r.result, "", r.ending)
		if err != nil {
			t.Fatal(err)
		}
		inner, err = open(&Message{Body: out}, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseReply(inner); err != nil || again.msgID != r.msgID || again.ending != r.ending {
			t.Fatalf("%+v became %+v, %v", r, again, err)
		}
	})
}

func FuzzDelivery(f *testing.F) {
	fuzzSeeds(f)
	f.Fuzz(func(t *testing.T, body []byte, compression string) {
		inner, err := open(&Message{Body: body, Compression: compression}, 1<<16)
		if err != nil {
			return
		}
		d, err := parseRequest(inner)
		if err != nil {
			return
		}
		if d.Method == "" || d.Args[0] != '{' || d.Timeout < 0 {
			t.Fatalf("%+v", d)
		}
		d.Arg("instance")
		d.Expired(time.Now())
		d.Context.LogValue()
		stored, err := json.Marshal(d.Record())
		if err != nil {
			t.Fatal(err)
		}
		var r Record
		if err := json.Unmarshal(stored, &r); err != nil {
			t.Fatal(err)
		}
		again, err := parseRequest(r.Message)
		if err != nil || again.Method != d.Method || again.UniqueID != d.UniqueID || len(again.Context) != len(d.Context) {
			t.Fatalf("%+v became %+v, %v", d, again, err)
		}
	})
}
