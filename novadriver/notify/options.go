package notify

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/novalet/novalet/internal/osloconf"
	"github.com/novalet/novalet/novadriver/oslomsg"
)

// Options are Nova's and oslo.messaging's options about notifications, under their names.
type Options struct {
	// Envelope sends messages in the envelope of every other message ([oslo_messaging_notifications] driver messagingv2),
	// Bare without it (messaging), Log writes them to the log. None of them: nothing is told, Nova's default.
	Envelope, Bare, Log bool
	// Topics are those of the old form (topics), VersionedTopics those of the new one ([notifications]
	// versioned_notifications_topics).
	Topics, VersionedTopics []string
	// Unversioned and Versioned choose the forms ([notifications] notification_format).
	Unversioned, Versioned bool
	// BlockDevices lists the volumes also where Nova does only when told to (bdms_in_notifications); Shares likewise
	// (include_share_mapping).
	BlockDevices, Shares bool
	// Bus is a broker of their own (transport_url); nil is the RPC's.
	Bus *oslomsg.Options
	// Audit sends "exists" for every instance once each period (instance_usage_audit, instance_usage_audit_period).
	Audit  bool
	Period Period
	// ImageURL is the image service's address ([glance] endpoint_override or api_servers); "" takes it from the
	// request's service catalog, where GlanceRegion and GlanceInterfaces choose ([glance] region_name, valid_interfaces).
	ImageURL         string
	GlanceRegion     string
	GlanceInterfaces []string
}

// Enabled says whether anything is told to anybody.
func (o *Options) Enabled() bool {
	return (o.Envelope || o.Bare || o.Log) && (o.Unversioned || o.Versioned)
}

const section = "oslo_messaging_notifications"

// ReadOptions reads them. What is wrong with them is told by cfg.Err.
func ReadOptions(cfg *osloconf.Config) Options {
	o := Options{
		Topics:           cfg.List(section, "topics", []string{"notifications"}),
		VersionedTopics:  cfg.List("notifications", "versioned_notifications_topics", []string{"versioned_notifications"}),
		BlockDevices:     cfg.Bool("notifications", "bdms_in_notifications", false),
		Shares:           cfg.Bool("notifications", "include_share_mapping", false),
		Audit:            cfg.Bool(osloconf.DefaultSection, "instance_usage_audit", false),
		GlanceRegion:     cfg.String("glance", "region_name", ""),
		GlanceInterfaces: cfg.List("glance", "valid_interfaces", []string{"internal", "public"}),
		ImageURL:         cfg.String("glance", "endpoint_override", ""),
	}
	if servers := cfg.List("glance", "api_servers", nil); len(servers) > 0 {
		o.ImageURL = servers[0]
	}
	format := cfg.Choice("notifications", "notification_format", "unversioned", "unversioned", "versioned", "both")
	o.Unversioned, o.Versioned = format != "versioned", format != "unversioned"
	// Both are checked here and used elsewhere: the conductor sends compute.instance.update by the first, and no
	// release of Nova uses the second.
	cfg.Choice("notifications", "notify_on_state_change", "", "", "vm_state", "vm_and_task_state")
	cfg.Choice("notifications", "default_level", "INFO", "DEBUG", "INFO", "WARN", "ERROR", "CRITICAL")
	for _, d := range cfg.Multi(section, "driver") {
		switch d {
		case "messagingv2":
			o.Envelope = true
		case "messaging":
			o.Bare = true
		case "log":
			o.Log = true
		case "noop", "test", "":
		default:
			cfg.Errorf(section, "driver", "%q is not supported: messagingv2, messaging, log and noop are", d)
		}
	}
	if cfg.Has(section, "transport_url") {
		bus := oslomsg.ReadOptionsAt(cfg, section, "transport_url")
		o.Bus = &bus
	}
	var err error
	if o.Period, err = ParsePeriod(cfg.String(osloconf.DefaultSection, "instance_usage_audit_period", "month")); err != nil {
		cfg.Errorf(osloconf.DefaultSection, "instance_usage_audit_period", "%v", err)
	}
	return o
}

// Period is an instance_usage_audit_period.
type Period struct {
	Unit   string // hour, day, month, year
	Offset int    // minute, hour, day or month at which it begins
}

// ParsePeriod reads UNIT or UNIT@OFFSET.
func ParsePeriod(s string) (Period, error) {
	unit, at, has := strings.Cut(s, "@")
	p := Period{Unit: unit}
	limits := map[string][2]int{"hour": {0, 59}, "day": {0, 23}, "month": {1, 28}, "year": {1, 12}}
	l, ok := limits[unit]
	if !ok {
		return Period{Unit: "month", Offset: 1}, fmt.Errorf("%q is none of hour, day, month, year", unit)
	}
	p.Offset = l[0]
	if has {
		n, err := strconv.Atoi(at)
		if err != nil || n != 0 && (n < l[0] || n > l[1]) {
			return p, fmt.Errorf("%q: a %s begins at %d to %d", s, unit, l[0], l[1])
		}
		p.Offset = max(n, l[0])
	}
	return p, nil
}

// glanceOf finds the image service in a request's service catalog.
func (o *Options) glanceOf(rctx oslomsg.Context) string {
	if o.ImageURL != "" {
		return strings.TrimSuffix(o.ImageURL, "/")
	}
	var catalog []struct {
		Type      string              `json:"type"`
		Endpoints []map[string]string `json:"endpoints"`
	}
	if unmarshal(rctx["service_catalog"], &catalog) != nil {
		return ""
	}
	for _, want := range o.GlanceInterfaces {
		for _, s := range catalog {
			if s.Type != "image" {
				continue
			}
			i := slices.IndexFunc(s.Endpoints, func(e map[string]string) bool {
				return e[want+"URL"] != "" && (o.GlanceRegion == "" || e["region"] == o.GlanceRegion)
			})
			if i >= 0 {
				return strings.TrimSuffix(s.Endpoints[i][want+"URL"], "/")
			}
		}
	}
	return ""
}
