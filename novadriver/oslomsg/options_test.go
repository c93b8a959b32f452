package oslomsg

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet/internal/osloconf"
)

func TestParseURL(t *testing.T) {
	guest := Host{Name: "h", Port: 5672, User: "guest", Password: "guest"}
	for _, c := range []struct {
		in   string
		want URL
	}{
		{"rabbit://u:p@h:1234/nova", URL{Hosts: []Host{{"h", 1234, "u", "p"}}, Vhost: "nova"}},
		{"rabbit://u:p%40%2F%3A@h/", URL{Hosts: []Host{{"h", 5672, "u", "p@/:"}}, Vhost: "/"}},
		{"rabbit://u:a:b@h", URL{Hosts: []Host{{"h", 5672, "u", "a:b"}}, Vhost: "/"}},
		{"rabbit://me@corp:p@h//", URL{Hosts: []Host{{"h", 5672, "me@corp", "p"}}, Vhost: "/"}},
		{"rabbit://u:p@h/%2Fx%2Fy", URL{Hosts: []Host{{"h", 5672, "u", "p"}}, Vhost: "/x/y"}},
		{"kombu://h/v", URL{Hosts: []Host{guest}, Vhost: "v"}},
		{"rabbit://", URL{Hosts: []Host{{"localhost", 5672, "guest", "guest"}}, Vhost: "/"}},
		{"rabbit:///v", URL{Hosts: []Host{{"localhost", 5672, "guest", "guest"}}, Vhost: "v"}},
		{"rabbit://u:p@a:1,u2:p2@b,,c:3/v", URL{Hosts: []Host{{"a", 1, "u", "p"}, {"b", 5672, "u2", "p2"}, {"c", 3, "guest", "guest"}}, Vhost: "v"}},
		{"rabbit://u:p@[2001:db8::1]:5671,[::1]/v", URL{Hosts: []Host{{"2001:db8::1", 5671, "u", "p"}, {"::1", 5672, "guest", "guest"}}, Vhost: "v"}},
		{"rabbit://u:p@2001:db8::1/v", URL{Hosts: []Host{{"2001:db8::1", 5672, "u", "p"}}, Vhost: "v"}},
		{"rabbit://h/v?ssl=1&x=a&x=b", URL{Hosts: []Host{guest}, Vhost: "v", Query: map[string]string{"ssl": "1", "x": "a,b"}}},
	} {
		if c.want.Query == nil {
			c.want.Query = map[string]string{}
		}
		got, err := ParseURL(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.in, diff)
		}
	}
	if a := (Host{Name: "::1", Port: 5}).Addr(); a != "[::1]:5" {
		t.Errorf("address %s", a)
	}
	for in, want := range map[string]string{
		"":                              "no scheme",
		"u:hidden@h":                    "no scheme",
		"zmq://u:hidden@h":              `scheme "zmq" is not supported`,
		"rabbit://u:hidden@h:port":      `host 1: port "port" is no port`,
		"rabbit://u:hidden@h:0":         "is no port",
		"rabbit://u:hidden@":            "host name is missing",
		"rabbit://h,u:%zz-hidden@h":     "host 2: user or password has a bad % escape",
		"rabbit://u:hidden@[::1/v":      "[ without ]",
		"rabbit://u:hidden@[::1]x/v":    "text after ]",
		"rabbit://u:hidden@h/%zz":       "the vhost has a bad % escape",
		"rabbit://u:hidden@h/v?a=%zz;x": "options after ?",
	} {
		_, err := ParseURL(in)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hidden") {
			t.Errorf("%s: error %v, want %q", in, err, want)
		}
	}
}

func readConf(t *testing.T, text string) (*osloconf.Config, Options) {
	t.Helper()
	cfg := osloconf.New()
	if err := cfg.Add("nova.conf", []byte(text)); err != nil {
		t.Fatal(err)
	}
	return cfg, ReadOptions(cfg)
}

func TestReadOptions(t *testing.T) {
	cfg, o := readConf(t, `[DEFAULT]
transport_url = rabbit://u:p@a,u:p@b/v?heartbeat_timeout_threshold=15&ssl=yes&ssl_ca_file=/x$$y
[oslo_messaging_rabbit]
amqp_durable_queues = true
rabbit_quorum_queue = true
rabbit_quorum_delivery_limit = 3
rabbit_transient_queues_ttl = 60
rabbit_qos_prefetch_count = 7
heartbeat_timeout_threshold = 30
rabbit_retry_interval = 2
kombu_reconnect_delay = 0.5
kombu_failover_strategy = shuffle
rabbit_login_method = PLAIN
ssl_version = TLSv1_2
ssl_enforce_hostname_verification = false
`)
	if err := cfg.Err(); err != nil {
		t.Fatal(err)
	}
	want := DefaultOptions()
	want.URL = o.URL
	want.DurableQueues, want.QuorumQueue, want.QuorumDeliveryLimit = true, true, 3
	want.TransientTTL, want.Prefetch, want.Heartbeat = time.Minute, 7, 15*time.Second
	want.RetryInterval, want.ReconnectDelay, want.ShuffleHosts, want.LoginMethod = 2*time.Second, 500*time.Millisecond, true, "PLAIN"
	want.TLS = TLSOptions{Enabled: true, CAFile: "/x$y", Version: "TLSv1_2", SkipHostname: true}
	if diff := cmp.Diff(want, o); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(o.URL.Hosts) != 2 || o.URL.Vhost != "v" {
		t.Errorf("url %+v", o.URL)
	}

	for text, want := range map[string]string{
		"[DEFAULT]\n":                                       "option [DEFAULT] transport_url: is required",
		"[DEFAULT]\ntransport_url = http://x:p@":            `option [DEFAULT] transport_url: scheme "http" is not supported, only rabbit (nova.conf:2)`,
		"[DEFAULT]\ntransport_url = rabbit://h?ssl=perhaps": `option [DEFAULT] transport_url: option [oslo_messaging_rabbit] ssl: "perhaps" is neither true nor false (transport_url:2) (nova.conf:2)`,
		"[DEFAULT]\ntransport_url = rabbit://h?%0a=1":       `after ? cannot be read (nova.conf:2)`,
		"[DEFAULT]\ntransport_url = rabbit://h\n[oslo_messaging_rabbit]\nssl_version = SSLv3":                       `option [oslo_messaging_rabbit] ssl_version: "SSLv3" is not supported (nova.conf:4)`,
		"[DEFAULT]\ntransport_url = rabbit://h\n[oslo_messaging_rabbit]\nrabbit_stream_fanout = 1":                  "rabbit_stream_fanout: needs rabbit_transient_quorum_queue",
		"[DEFAULT]\ntransport_url = rabbit://h\n[oslo_messaging_rabbit]\nssl_key_file = /x":                         "goes together with ssl_key_file",
		"[DEFAULT]\ntransport_url = rabbit://h\n[oslo_messaging_rabbit]\nrabbit_ha_queues=1\nrabbit_quorum_queue=1": "cannot be combined",
	} {
		cfg, _ := readConf(t, text)
		if err := cfg.Err(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

// The arguments of queues, as oslo.messaging declares them.
func TestQueueArgs(t *testing.T) {
	all := DefaultOptions()
	all.QuorumQueue, all.TransientQuorumQueue, all.QuorumDeliveryLimit, all.QuorumMaxMemoryLength, all.QuorumMaxMemoryBytes = true, true, 1, 2, 3
	stream := all
	stream.StreamFanout = true
	ha := DefaultOptions()
	ha.HAQueues, ha.TransientTTL = true, 0
	for _, c := range []struct {
		name string
		o    Options
		kind QueueKind
		want string
	}{
		{"topic", DefaultOptions(), TopicQueue, "map[]"},
		{"reply", DefaultOptions(), ReplyQueue, "map[x-expires:1800000]"},
		{"fanout", DefaultOptions(), FanoutQueue, "map[x-expires:1800000]"},
		{"quorum topic", all, TopicQueue, "map[x-delivery-limit:1 x-max-in-memory-bytes:3 x-max-in-memory-length:2 x-queue-type:quorum]"},
		{"quorum reply", all, ReplyQueue, "map[x-delivery-limit:1 x-expires:1800000 x-max-in-memory-bytes:3 x-max-in-memory-length:2 x-queue-type:quorum]"},
		{"stream", stream, FanoutQueue, "map[x-max-age:1800s x-queue-type:stream]"},
		{"ha", ha, ReplyQueue, "map[x-ha-policy:all]"},
	} {
		if got := fmt.Sprint(map[string]any(c.o.queueArgs(c.kind))); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func FuzzURL(f *testing.F) {
	for _, s := range []string{"rabbit://u:p@h:1/v?a=b", "rabbit://[::1],h//", "rabbit://u@@h,,", "x://%zz"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURL(s)
		if err != nil {
			return
		}
		if len(u.Hosts) == 0 || u.Vhost == "" {
			t.Fatalf("%+v", u)
		}
		for _, h := range u.Hosts {
			if h.Name == "" || h.Port < 1 || h.Port > 65535 {
				t.Fatalf("%+v", h)
			}
		}
		cfg := osloconf.New()
		if cfg.Add("f", []byte("[DEFAULT]\ntransport_url = "+s)) == nil {
			ReadOptions(cfg)
		}
	})
}
