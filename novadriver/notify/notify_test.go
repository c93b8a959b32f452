package notify

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet/internal/osloconf"
	"github.com/novalet/novalet/novadriver/oslomsg"
)

func TestPeriod(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse("2006-01-02 15:04:05", s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, c := range []struct{ period, now, begin, end string }{
		{"month", "2026-11-28 04:30:00", "2026-10-01 00:00:00", "2026-11-01 00:00:00"},
		{"month", "2026-01-15 00:00:00", "2025-12-01 00:00:00", "2026-01-01 00:00:00"},
		{"month@15", "2026-01-10 00:00:00", "2025-11-15 00:00:00", "2025-12-15 00:00:00"},
		{"month", "2026-11-01 00:00:00", "2026-09-01 00:00:00", "2026-10-01 00:00:00"},
		{"year", "2026-11-28 04:30:00", "2025-01-01 00:00:00", "2026-01-01 00:00:00"},
		{"year@12", "2026-11-28 04:30:00", "2024-12-01 00:00:00", "2025-12-01 00:00:00"},
		{"day", "2026-11-28 04:30:00", "2026-11-27 00:00:00", "2026-11-28 00:00:00"},
		{"day@18", "2026-11-28 04:30:00", "2026-11-26 18:00:00", "2026-11-27 18:00:00"},
		{"hour", "2026-11-28 04:30:00", "2026-11-28 03:00:00", "2026-11-28 04:00:00"},
		{"hour@45", "2026-11-28 04:30:00", "2026-11-28 02:45:00", "2026-11-28 03:45:00"},
	} {
		p, err := ParsePeriod(c.period)
		if err != nil {
			t.Fatal(err)
		}
		begin, end := p.Last(at(c.now))
		if !begin.Equal(at(c.begin)) || !end.Equal(at(c.end)) {
			t.Errorf("%s at %s: %v to %v, want %s to %s", c.period, c.now, begin, end, c.begin, c.end)
		}
	}
	for _, s := range []string{"", "week", "hour@60", "day@x", "month@31", "day@-1"} {
		if _, err := ParsePeriod(s); err == nil {
			t.Errorf("%q is a period", s)
		}
	}
}

func read(t *testing.T, text string) (Options, error) {
	t.Helper()
	cfg := osloconf.New()
	if err := cfg.Add("nova.conf", []byte(text)); err != nil {
		t.Fatal(err)
	}
	o := ReadOptions(cfg)
	return o, cfg.Err()
}

func TestReadOptions(t *testing.T) {
	o, err := read(t, "")
	if err != nil || o.Enabled() {
		t.Errorf("without options: enabled %v, %v", o.Enabled(), err)
	}
	o, err = read(t, `
[notifications]
notification_format = both
notify_on_state_change = vm_and_task_state
default_level = INFO
versioned_notifications_topics = v1, v2
bdms_in_notifications = true
[oslo_messaging_notifications]
driver = messagingv2
driver = log
topics = notifications,notifications_designate
transport_url = rabbit://u:p@other:5672/n
[glance]
api_servers = http://images/
`)
	if err != nil {
		t.Fatal(err)
	}
	if o.Bus == nil || o.Bus.URL.Hosts[0].Addr() != "other:5672" {
		t.Errorf("bus %+v", o.Bus)
	}
	o.Bus = nil
	want := Options{Envelope: true, Log: true, Topics: []string{"notifications", "notifications_designate"}, VersionedTopics: []string{"v1", "v2"},
		Unversioned: true, Versioned: true, BlockDevices: true, ImageURL: "http://images/", Period: Period{"month", 1}, GlanceInterfaces: []string{"internal", "public"}}
	if diff := cmp.Diff(want, o); diff != "" || !o.Enabled() {
		t.Errorf("options differ (-want +got):\n%s", diff)
	}
	if o, err := read(t, "[oslo_messaging_notifications]\ndriver = noop\n"); err != nil || o.Enabled() {
		t.Errorf("driver noop: enabled %v, %v", o.Enabled(), err)
	}
	for _, c := range []struct{ text, word string }{
		{"[notifications]\nnotification_format = xml\n", "notification_format"},
		{"[notifications]\nnotify_on_state_change = yes\n", "notify_on_state_change"},
		{"[notifications]\ndefault_level = loud\n", "default_level"},
		{"[oslo_messaging_notifications]\ndriver = routing\n", "driver"},
		{"[oslo_messaging_notifications]\ntransport_url = kafka://x\n", "transport_url"},
		{"[DEFAULT]\ninstance_usage_audit_period = week\n", "instance_usage_audit_period"},
	} {
		if _, err := read(t, c.text); err == nil || !strings.Contains(err.Error(), c.word) {
			t.Errorf("%q: error %v", c.text, err)
		}
	}
}

func TestGlanceURL(t *testing.T) {
	rctx := oslomsg.Context{"service_catalog": []byte(`[{"type": "network", "endpoints": [{"internalURL": "http://net"}]},
		{"type": "image", "endpoints": [{"region": "A", "publicURL": "http://a.pub/", "internalURL": "http://a.int"}, {"region": "B", "publicURL": "http://b.pub"}]}]`)}
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{GlanceInterfaces: []string{"internal", "public"}}, "http://a.int"},
		{Options{GlanceInterfaces: []string{"public"}}, "http://a.pub"},
		{Options{GlanceInterfaces: []string{"internal", "public"}, GlanceRegion: "B"}, "http://b.pub"},
		{Options{GlanceInterfaces: []string{"admin"}}, ""},
		{Options{ImageURL: "http://own/"}, "http://own"},
	} {
		if got := c.o.glanceOf(rctx); got != c.want {
			t.Errorf("%+v: %q, want %q", c.o, got, c.want)
		}
	}
	if got := (&Options{GlanceInterfaces: []string{"public"}}).glanceOf(nil); got != "" {
		t.Errorf("without a context: %q", got)
	}
}
