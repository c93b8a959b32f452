package oslomsg

import (
	"log/slog"
	"regexp"
	"strings"
	"time"

	"github.com/novalet/novalet/internal/osloconf"
)

// Options describe a connection to RabbitMQ. The names in the comments are
// those of [oslo_messaging_rabbit].
type Options struct {
	URL URL

	DurableQueues bool // amqp_durable_queues
	AutoDelete    bool // amqp_auto_delete

	QuorumQueue           bool // rabbit_quorum_queue
	QuorumDeliveryLimit   int  // rabbit_quorum_delivery_limit
	QuorumMaxMemoryLength int  // rabbit_quorum_max_memory_length
	QuorumMaxMemoryBytes  int  // rabbit_quorum_max_memory_bytes
	TransientQuorumQueue  bool // rabbit_transient_quorum_queue
	StreamFanout          bool // rabbit_stream_fanout
	HAQueues              bool // rabbit_ha_queues
	CancelOnFailover      bool // enable_cancel_on_failover
	// TransientTTL is after how long without a consumer a reply or fanout
	// queue goes, rabbit_transient_queues_ttl; 0 is never.
	TransientTTL time.Duration
	// Prefetch is how many messages of a queue the broker hands out before
	// they are acked, rabbit_qos_prefetch_count. Where Nova's default 0 means
	// any number, here it means 32: it bounds the memory they take.
	Prefetch int

	TLS TLSOptions

	Heartbeat      time.Duration // heartbeat_timeout_threshold; 0 leaves it to the broker
	RetryInterval  time.Duration // rabbit_retry_interval: before the second attempt to connect
	RetryBackoff   time.Duration // rabbit_retry_backoff: added for each further one
	RetryMax       time.Duration // rabbit_interval_max
	ReconnectDelay time.Duration // kombu_reconnect_delay: before the first attempt after a loss
	ReconnectSplay time.Duration // kombu_reconnect_splay: random addition to it
	ShuffleHosts   bool          // kombu_failover_strategy = shuffle
	LoginMethod    string        // rabbit_login_method: AMQPLAIN, PLAIN, EXTERNAL

	// Name begins the connection's name in the broker's lists; "" means
	// "nova-compute".
	Name   string
	Logger *slog.Logger // nil: nothing is logged
}

// TLSOptions are the ssl options of [oslo_messaging_rabbit].
type TLSOptions struct {
	Enabled  bool   // ssl
	CAFile   string // ssl_ca_file; without it the broker is not verified, as in oslo
	CertFile string // ssl_cert_file
	KeyFile  string // ssl_key_file
	Version  string // ssl_version, e.g. TLSv1_2; "" is 1.2 or newer
	// SkipHostname checks the chain of the broker's certificate and not its
	// name (ssl_enforce_hostname_verification = false).
	SkipHostname bool
}

// DefaultOptions are oslo.messaging's defaults.
func DefaultOptions() Options {
	return Options{
		TransientTTL: 30 * time.Minute, Heartbeat: time.Minute,
		RetryInterval: time.Second, RetryBackoff: 2 * time.Second, RetryMax: 30 * time.Second,
		ReconnectDelay: time.Second, LoginMethod: "AMQPLAIN",
	}
}

const rabbitSection = "oslo_messaging_rabbit"

// optionName is what may stand before = in the query of a transport_url.
var optionName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// ReadOptions reads [DEFAULT] transport_url and [oslo_messaging_rabbit]. What
// is wrong with them is told by cfg.Err.
func ReadOptions(cfg *osloconf.Config) Options {
	return ReadOptionsAt(cfg, osloconf.DefaultSection, "transport_url")
}

// ReadOptionsAt is ReadOptions with the URL in another option, as notifications may have it.
func ReadOptionsAt(cfg *osloconf.Config, section, name string) Options {
	raw := cfg.Required(section, name)
	if raw == "" {
		return DefaultOptions()
	}
	u, err := ParseURL(raw)
	if err != nil {
		cfg.Errorf(section, name, "%s", strings.TrimPrefix(err.Error(), "transport_url: "))
		return DefaultOptions()
	}
	o := readSection(cfg, DefaultOptions())
	o.URL = u
	return o.override(cfg, section, name)
}

// readSection reads the options of the section over the defaults in o.
func readSection(cfg *osloconf.Config, o Options) Options {
	const s = rabbitSection
	o.DurableQueues = cfg.Bool(s, "amqp_durable_queues", o.DurableQueues)
	o.AutoDelete = cfg.Bool(s, "amqp_auto_delete", o.AutoDelete)
	o.QuorumQueue = cfg.Bool(s, "rabbit_quorum_queue", o.QuorumQueue)
	o.QuorumDeliveryLimit = cfg.Int(s, "rabbit_quorum_delivery_limit", o.QuorumDeliveryLimit)
	o.QuorumMaxMemoryLength = cfg.Int(s, "rabbit_quorum_max_memory_length", o.QuorumMaxMemoryLength)
	o.QuorumMaxMemoryBytes = cfg.Int(s, "rabbit_quorum_max_memory_bytes", o.QuorumMaxMemoryBytes)
	o.TransientQuorumQueue = cfg.Bool(s, "rabbit_transient_quorum_queue", o.TransientQuorumQueue)
	o.StreamFanout = cfg.Bool(s, "rabbit_stream_fanout", o.StreamFanout)
	o.HAQueues = cfg.Bool(s, "rabbit_ha_queues", o.HAQueues)
	o.CancelOnFailover = cfg.Bool(s, "enable_cancel_on_failover", o.CancelOnFailover)
	o.TransientTTL = cfg.Seconds(s, "rabbit_transient_queues_ttl", o.TransientTTL)
	o.Prefetch = cfg.IntRange(s, "rabbit_qos_prefetch_count", o.Prefetch, 0, 65535)
	o.TLS.Enabled = cfg.Bool(s, "ssl", o.TLS.Enabled)
	o.TLS.CAFile = cfg.String(s, "ssl_ca_file", o.TLS.CAFile)
	o.TLS.CertFile = cfg.String(s, "ssl_cert_file", o.TLS.CertFile)
	o.TLS.KeyFile = cfg.String(s, "ssl_key_file", o.TLS.KeyFile)
	o.TLS.Version = cfg.String(s, "ssl_version", o.TLS.Version)
	o.TLS.SkipHostname = !cfg.Bool(s, "ssl_enforce_hostname_verification", !o.TLS.SkipHostname)
	o.Heartbeat = cfg.Seconds(s, "heartbeat_timeout_threshold", o.Heartbeat)
	o.RetryInterval = cfg.Seconds(s, "rabbit_retry_interval", o.RetryInterval)
	o.RetryBackoff = cfg.Seconds(s, "rabbit_retry_backoff", o.RetryBackoff)
	o.RetryMax = cfg.Seconds(s, "rabbit_interval_max", o.RetryMax)
	o.ReconnectDelay = cfg.Seconds(s, "kombu_reconnect_delay", o.ReconnectDelay)
	o.ReconnectSplay = cfg.Seconds(s, "kombu_reconnect_splay", o.ReconnectSplay)
	strategy := "round-robin"
	if o.ShuffleHosts {
		strategy = "shuffle"
	}
	o.ShuffleHosts = cfg.Choice(s, "kombu_failover_strategy", strategy, "round-robin", "shuffle") == "shuffle"
	o.LoginMethod = cfg.Choice(s, "rabbit_login_method", o.LoginMethod, "AMQPLAIN", "PLAIN", "EXTERNAL")

	if o.QuorumQueue && o.HAQueues {
		cfg.Errorf(s, "rabbit_ha_queues", "cannot be combined with rabbit_quorum_queue")
	}
	if o.StreamFanout && !(o.Prefetch > 0 && o.TransientQuorumQueue) {
		cfg.Errorf(s, "rabbit_stream_fanout", "needs rabbit_transient_quorum_queue and rabbit_qos_prefetch_count > 0")
	}
	if _, err := o.TLS.versions(); err != nil {
		cfg.Errorf(s, "ssl_version", "%s", err)
	}
	if (o.TLS.CertFile == "") != (o.TLS.KeyFile == "") {
		cfg.Errorf(s, "ssl_cert_file", "goes together with ssl_key_file")
	}
	return o
}

// override applies the options in the query of the URL. They are read as if
// they stood in the section; options of other drivers are ignored.
func (o Options) override(cfg *osloconf.Config, section, name string) Options {
	if len(o.URL.Query) == 0 {
		return o
	}
	var text strings.Builder
	text.WriteString("[" + rabbitSection + "]\n")
	for k, v := range o.URL.Query {
		if !optionName.MatchString(k) || strings.ContainsAny(v, "\r\n") {
			cfg.Errorf(section, name, "option %q after ? cannot be read", clip(k, 40))
			continue
		}
		// Quoted, so that the value is taken as it is.
		text.WriteString(k + " = \"" + strings.ReplaceAll(v, "$", "$$") + "\"\n")
	}
	q := osloconf.New()
	if err := q.Add("transport_url", []byte(text.String())); err != nil {
		cfg.Errorf(section, name, "the options after ? cannot be read")
		return o
	}
	out := readSection(q, o)
	out.URL = o.URL
	if err := q.Err(); err != nil {
		for line := range strings.Lines(err.Error()) {
			cfg.Errorf(section, name, "%s", strings.TrimSpace(line))
		}
	}
	return out
}
