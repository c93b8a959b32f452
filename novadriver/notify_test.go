package novadriver

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/notify"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/oslomsg/membus"
	"github.com/novalet/novalet/novadriver/ovo"
)

// told is one notification as it is on the bus.
type told struct {
	Exchange, Key string
	Publisher     string          `json:"publisher_id"`
	Event         string          `json:"event_type"`
	Priority      string          `json:"priority"`
	Timestamp     string          `json:"timestamp"`
	MessageID     string          `json:"message_id"`
	UniqueID      string          `json:"_unique_id"`
	Payload       json.RawMessage `json:"payload"`
	Envelope      bool
	raw           string
}

// ear collects the notifications of a bus.
type ear struct {
	t  *testing.T
	mu sync.Mutex
	n  []told
}

func listen(t *testing.T, bus *membus.Bus) *ear {
	e := &ear{t: t}
	bus.Tap(func(p oslomsg.Publishing) {
		if !strings.Contains(p.RoutingKey, "notifications.") {
			return
		}
		m := told{Exchange: p.Exchange, Key: p.RoutingKey, raw: string(p.Body)}
		var env map[string]json.RawMessage
		body := p.Body
		if err := json.Unmarshal(body, &env); err != nil {
			t.Error(err)
		}
		if inner, ok := env["oslo.message"]; ok {
			var text string
			if err := json.Unmarshal(inner, &text); err != nil {
				t.Error(err)
			}
			m.Envelope, body = true, []byte(text)
		}
		if err := json.Unmarshal(body, &m); err != nil {
			t.Error(err)
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.n = append(e.n, m)
	})
	return e
}

func (e *ear) heard() []told {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]told(nil), e.n...)
}

func telling(format string, change ...func(*notify.Options)) func(*Options) {
	return func(o *Options) {
		o.Notify = notify.Options{Envelope: true, Topics: []string{"notifications"}, VersionedTopics: []string{"versioned_notifications"},
			Unversioned: format != "versioned", Versioned: format != "unversioned", ImageURL: "http://127.0.0.1:9292",
			Period: notify.Period{Unit: "month", Offset: 1}}
		for _, f := range change {
			f(&o.Notify)
		}
	}
}

// TestNotifications compares what is sent with what Nova's own code makes of the same instances
// (testdata/notifications/make.py).
func TestNotifications(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join("testdata", "notifications", "zed.json"))
	if err != nil {
		t.Fatal(err)
	}
	var fixture struct {
		Now   time.Time `json:"now"`
		Cases []struct {
			Action    novalet.Action  `json:"action"`
			Phase     novalet.Phase   `json:"phase"`
			Instance  json.RawMessage `json:"instance"`
			ImageID   string          `json:"image_id"`
			ImageName string          `json:"image_name"`
			Audit     bool            `json:"audit"`
			Error     *struct {
				Class string `json:"class"`
				Text  string `json:"text"`
			} `json:"error"`
			Messages []struct {
				Form      string         `json:"form"`
				Event     string         `json:"event_type"`
				Publisher string         `json:"publisher_id"`
				Priority  string         `json:"priority"`
				Payload   map[string]any `json:"payload"`
			} `json:"messages"`
		} `json:"cases"`
	}
	if err := json.Unmarshal(raw, &fixture); err != nil {
		t.Fatal(err)
	}
	if len(fixture.Cases) < 12 {
		t.Fatalf("%d cases", len(fixture.Cases))
	}
	b := newBench(t, "", telling("both"), func(o *Options) { o.now = func() time.Time { return fixture.Now } })
	d := b.build()
	ear := listen(t, b.bus)
	user := oslomsg.Context{}
	user.Set("request_id", "req-1")
	user.Set("auth_token", "SECRET")
	for _, c := range fixture.Cases {
		t.Run(fmt.Sprintf("%s.%s", c.Action, c.Phase), func(t *testing.T) {
			inst, err := d.decodeInstance(c.Instance)
			if err != nil {
				t.Fatal(err)
			}
			n := &novalet.Notification{Context: novalet.RequestContext{RequestID: "req-1", UserID: "u", ProjectID: "p", Wire: user},
				Action: c.Action, Phase: c.Phase, Instance: inst, ImageID: c.ImageID, ImageName: c.ImageName}
			if c.Error != nil {
				n.Err = novalet.Faultf(novalet.ErrAbort, c.Error.Class, "%s", c.Error.Text)
			}
			before := len(ear.heard())
			if c.Audit {
				n.Context = novalet.RequestContext{RequestID: "req-2", Wire: d.adminContext()}
				begin, end := b.options.Notify.Period.Last(fixture.Now)
				d.notifier.Audit(n, begin, end)
			} else {
				d.Notifier().Notify(n)
			}
			b.eventually("the messages were sent", func() bool { return len(ear.heard()) >= before+len(c.Messages) })
			got := ear.heard()[before:]
			if len(got) != len(c.Messages) {
				t.Fatalf("%d messages, want %d", len(got), len(c.Messages))
			}
			for i, want := range c.Messages {
				m := got[i]
				topic := map[string]string{"unversioned": "notifications", "versioned": "versioned_notifications"}[want.Form]
				if m.Event != want.Event || m.Publisher != want.Publisher || m.Priority != want.Priority || m.Exchange != "nova" ||
					m.Key != topic+"."+strings.ToLower(want.Priority) || !m.Envelope || m.MessageID == "" || m.UniqueID == "" {
					t.Errorf("sent %+v, want %s of %s", m, want.Event, want.Publisher)
				}
				if m.Timestamp != "2026-11-28 04:30:00.250000" {
					t.Errorf("timestamp %q", m.Timestamp)
				}
				if strings.Contains(m.raw, "SECRET") || !strings.Contains(m.raw, "_context_request_id") {
					t.Error("the context is not the safe one")
				}
				var payload map[string]any
				if err := json.Unmarshal(m.Payload, &payload); err != nil {
					t.Fatal(err)
				}
				comparable(t, payload, want.Payload)
				if diff := cmp.Diff(want.Payload, payload); diff != "" {
					t.Errorf("%s: payload differs (-Nova +here):\n%s", want.Event, diff)
				}
			}
		})
	}
}

// comparable takes out what cannot be the same: the places in Python's code, and Python's own print of an exception.
func comparable(t *testing.T, got, want map[string]any) {
	t.Helper()
	if data, ok := got["nova_object.data"].(map[string]any); ok {
		if f, ok := data["fault"].(map[string]any); ok {
			fd := f["nova_object.data"].(map[string]any)
			for _, k := range []string{"module_name", "function_name", "traceback"} {
				if _, ok := fd[k].(string); !ok {
					t.Errorf("the fault has no %s", k)
				}
				delete(fd, k)
			}
		}
	}
	if e, ok := got["exception"].(string); ok {
		if !strings.HasPrefix(e, "{'kwargs': {") || !strings.HasSuffix(e, "'class': 'BuildAbortException'}") {
			t.Errorf("the exception is printed as %s", e)
		}
		delete(got, "exception")
		delete(want, "exception")
	}
}

// Since Nova 31 the payloads have shares, and with them another version.
func TestNotificationVersions(t *testing.T) {
	for release, version := range map[string]string{"zed": "1.8", "2024.1": "1.8", "2025.1": "1.9", "2026.1": "1.9"} {
		b := started(t, release, telling("versioned"))
		ear := listen(t, b.bus)
		inst, err := b.driver.decodeInstance(mustJSON(t, b.instance(nil)))
		if err != nil {
			t.Fatal(err)
		}
		b.driver.Notifier().Notify(&novalet.Notification{Action: novalet.ActionPause, Phase: novalet.PhaseEnd, Instance: inst})
		b.eventually("the message was sent", func() bool { return len(ear.heard()) == 1 })
		var o ovo.Object
		if err := json.Unmarshal(ear.heard()[0].Payload, &o); err != nil {
			t.Fatal(err)
		}
		if o.Version != version || o.Has("shares") != (version == "1.9") {
			t.Errorf("%s: payload version %s, shares %v", release, o.Version, o.Has("shares"))
		}
	}
}

func mustJSON(t *testing.T, v any) json.RawMessage {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// Without a driver nothing is told, and nothing is made for it.
func TestNoNotifications(t *testing.T) {
	b := newBench(t, "")
	if d := b.build(); d.Notifier() != nil {
		t.Error("there is a notifier")
	}
}

// A lost broker blocks nobody: what fits is sent when it is back, the rest is dropped and told.
func TestNotificationsWithoutBroker(t *testing.T) {
	b := newBench(t, "", telling("unversioned"))
	d := b.build()
	ear := listen(t, b.bus)
	inst := &novalet.Instance{UUID: instUUID}
	b.conn.Cut()
	const many = 5000
	for i := range many {
		d.Notifier().Notify(&novalet.Notification{Context: novalet.RequestContext{RequestID: fmt.Sprint(i)}, Action: novalet.ActionPause, Phase: novalet.PhaseStart, Instance: inst})
	}
	if n := len(ear.heard()); n != 0 {
		t.Fatalf("%d messages were sent without a broker", n)
	}
	b.eventually("the loss was told", func() bool { return b.logs.count("takes no notifications") == 1 })
	b.conn.Restore()
	b.eventually("the broker is used again", func() bool { return b.logs.count("takes notifications again") == 1 })
	d.Notifier().Notify(&novalet.Notification{Action: novalet.ActionUnpause, Phase: novalet.PhaseStart, Instance: inst})
	b.eventually("the last one came", func() bool {
		n := ear.heard()
		return len(n) > 0 && n[len(n)-1].Event == "compute.instance.unpause.start"
	})
	if n := len(ear.heard()); n >= many {
		t.Errorf("%d messages were kept", n)
	}
}

// Close sends what is queued.
func TestNotificationsAtClose(t *testing.T) {
	b := newBench(t, "", telling("unversioned"))
	d := b.build()
	ear := listen(t, b.bus)
	for range 100 {
		d.Notifier().Notify(&novalet.Notification{Action: novalet.ActionPause, Phase: novalet.PhaseEnd, Instance: &novalet.Instance{UUID: instUUID}})
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if n := len(ear.heard()); n != 100 {
		t.Errorf("%d of 100 were sent", n)
	}
	d.Notifier().Notify(&novalet.Notification{Action: novalet.ActionPause, Phase: novalet.PhaseEnd, Instance: &novalet.Instance{UUID: instUUID}})
}

// The audit of a period tells of each instance once, and never again for the same period.
func TestAudit(t *testing.T) {
	b := started(t, "zed", telling("both", func(o *notify.Options) { o.Audit = true }))
	b.instance(nil)
	ear := listen(t, b.bus)
	begin, end := time.Date(2026, 10, 1, 0, 0, 0, 0, time.UTC), time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for range 2 {
		if err := b.driver.auditPeriod(b.ctx(), begin, end); err != nil {
			t.Fatal(err)
		}
	}
	b.eventually("both forms were sent", func() bool { return len(ear.heard()) == 2 })
	var p struct {
		ID    string `json:"instance_id"`
		Begin string `json:"audit_period_beginning"`
		End   string `json:"audit_period_ending"`
	}
	n := ear.heard()
	if err := json.Unmarshal(n[0].Payload, &p); err != nil {
		t.Fatal(err)
	}
	if n[0].Event != "compute.instance.exists" || p.ID != instUUID || p.Begin != "2026-10-01 00:00:00" || p.End != "2026-11-01 00:00:00" {
		t.Errorf("told %s %+v", n[0].Event, p)
	}
	if log := b.conductor.Find("TaskLog", "host", "host1"); len(log) != 1 || log[0].Str("state") != "DONE" || log[0].Int("task_items") != 1 {
		t.Errorf("task log %v", log)
	}
}

// Ceilometer's default consumer reads a queue that nobody has made before the first message.
func TestNotificationQueue(t *testing.T) {
	b := newBench(t, "", telling("unversioned"))
	d := b.build()
	d.Notifier().Notify(&novalet.Notification{Action: novalet.ActionPause, Phase: novalet.PhaseEnd, Instance: &novalet.Instance{UUID: instUUID}})
	b.eventually("the queue holds the message", func() bool { return b.bus.Queues()["notifications.info"] == 1 })
}
