package novadriver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/notify"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
	"github.com/novalet/novalet/novadriver/placement"
)

// Options describe this host to Nova. Names in brackets are Nova's options.
type Options struct {
	// Host is the name of the compute service ([DEFAULT] host) as Nova and Neutron know it.
	Host string
	// Node is the hypervisor hostname, unique in the cell and the name of the resource provider. "" is that of the compute
	// node this host already has, such as a replaced nova-compute's, else Host.
	Node string
	// MyIP is the address of this host ([DEFAULT] my_ip).
	MyIP string
	// StateDir holds the file compute_id ([DEFAULT] state_path).
	StateDir string

	// Transport is the bus. The driver does not close it.
	Transport oslomsg.Transport
	// Placement keeps the resource provider; nil leaves Placement alone, as where there is none.
	Placement Provider
	// Recover runs when the service record was looked up and before anything is registered or consumed, as stock's
	// init_host does. It may use the Conductor. Its error ends the start.
	Recover func(ctx context.Context) error

	// Release pins the controllers' release ("zed", "2025.1", …); "" asks them.
	Release string
	// ControlExchange is control_exchange; "" is "nova".
	ControlExchange string
	// RPCTimeout is rpc_response_timeout; 0 is 60 s.
	RPCTimeout time.Duration
	// ReportInterval is report_interval; 0 is 10 s.
	ReportInterval time.Duration
	// UpdateInterval is update_resources_interval; 0 is 60 s.
	UpdateInterval time.Duration
	// NegotiateInterval is how often the controllers' release is looked at again; 0 is 5 minutes.
	NegotiateInterval time.Duration
	// GracefulTimeout is graceful_shutdown_timeout: how long Close waits for calls under way; 0 is 60 s.
	GracefulTimeout time.Duration
	// TrackInstanceChanges is [filter_scheduler] track_instance_changes: the schedulers are told what runs here.
	TrackInstanceChanges bool
	// InstanceNameTemplate is instance_name_template; "" is "instance-%08x".
	InstanceNameTemplate string
	// ConsoleTokenTTL is [consoleauth] token_ttl; 0 is 600 s.
	ConsoleTokenTTL time.Duration
	// SerialConsole is [serial_console] enabled, SerialBaseURL its base_url; "" is "ws://127.0.0.1:6083/".
	SerialConsole bool
	SerialBaseURL string
	// Resources are what is held back of the host, and the allocation ratios.
	Resources ResourceOptions
	// Providers are the operator's additions to resource providers ([compute] provider_config_location).
	Providers []ProviderConfig
	// HypervisorVersion is major*1000000 + minor*1000 + patch of this program.
	HypervisorVersion int
	// ImageFormats are the Glance disk_formats that boot here; nil is raw and qcow2.
	ImageFormats []string

	// Notify says what is told outside of Nova, NotifyTransport where; nil is Transport. The driver does not close it.
	Notify          notify.Options
	NotifyTransport oslomsg.Transport

	// Logger; nil logs nothing.
	Logger *slog.Logger

	anyNode bool // Node was not chosen by the caller

	now    func() time.Time
	uptime func() string
	// pause is how long a request waits that failed at once, before it is sent again.
	pause time.Duration
}

// ResourceOptions are what an operator sets about resources. A nil ratio is not configured: then Placement's own
// holds, and the Initial one when Placement has none yet.
type ResourceOptions struct {
	ReservedCPUs     int64 // reserved_host_cpus
	ReservedMemoryMB int64 // reserved_host_memory_mb
	ReservedDiskMB   int64 // reserved_host_disk_mb

	CPURatio, RAMRatio, DiskRatio                      *float64 // cpu_allocation_ratio, …
	InitialCPURatio, InitialRAMRatio, InitialDiskRatio float64  // initial_…; 0 is 4, 1 and 1
}

// Provider is what the driver asks of Placement. Served by *placement.Client. Errors are novalet's kinds.
type Provider interface {
	novalet.Placement
	// Sync makes the provider what want says and returns the allocation ratios in force by class.
	Sync(ctx context.Context, want *placement.Want) (map[string]float64, error)
	// SetTrait puts a trait on the provider or takes it away.
	SetTrait(ctx context.Context, uuid, trait string, on bool) error
	// HasTrait says whether this Placement knows a trait.
	HasTrait(ctx context.Context, trait string) (bool, error)
	// RemoveFromAllocation takes a provider out of what a consumer holds.
	RemoveFromAllocation(ctx context.Context, consumer, providerUUID string) error
	// Consumers lists who holds resources of a provider.
	Consumers(ctx context.Context, providerUUID string) ([]string, error)
	// MoveAllocation gives to one consumer what another holds.
	MoveAllocation(ctx context.Context, from, to string) error
}

// nameTemplate is the only form of instance_name_template that is understood: one verb for the id.
var nameTemplate = regexp.MustCompile(`^[^%]*%(0?[0-9]{0,2}[dxXo]|\(id\)(0?[0-9]{0,2})[dxXo])[^%]*$`)

// fill sets the defaults and says what is missing or wrong.
func (o *Options) fill() error {
	if o.Host == "" {
		return errors.New("novadriver: the option host is empty")
	}
	if o.Transport == nil {
		return errors.New("novadriver: no transport")
	}
	if o.StateDir == "" {
		return errors.New("novadriver: the option state_path is empty")
	}
	if o.Release != "" {
		if _, err := ovo.ReleaseNamed(o.Release); err != nil {
			return fmt.Errorf("novadriver: %w", err)
		}
	}
	if o.Node == "" {
		o.Node, o.anyNode = o.Host, true
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&o.RPCTimeout, time.Minute)
	def(&o.ReportInterval, 10*time.Second)
	def(&o.UpdateInterval, time.Minute)
	def(&o.NegotiateInterval, 5*time.Minute)
	def(&o.GracefulTimeout, time.Minute)
	def(&o.ConsoleTokenTTL, 10*time.Minute)
	def(&o.pause, time.Second)
	if o.ControlExchange == "" {
		o.ControlExchange = "nova"
	}
	if o.InstanceNameTemplate == "" {
		o.InstanceNameTemplate = "instance-%08x"
	}
	if !nameTemplate.MatchString(o.InstanceNameTemplate) {
		return fmt.Errorf("novadriver: instance_name_template %q: only one number verb for the id is understood", o.InstanceNameTemplate)
	}
	if o.SerialBaseURL == "" {
		o.SerialBaseURL = "ws://127.0.0.1:6083/"
	}
	r := &o.Resources
	for p, v := range map[*float64]float64{&r.InitialCPURatio: 4, &r.InitialRAMRatio: 1, &r.InitialDiskRatio: 1} {
		if *p <= 0 {
			*p = v
		}
	}
	if o.ImageFormats == nil {
		o.ImageFormats = []string{"raw", "qcow2"}
	}
	if o.HypervisorVersion <= 0 {
		o.HypervisorVersion = 1000
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.now == nil {
		o.now = time.Now
	}
	if o.uptime == nil {
		o.uptime = func() string { return hostUptime("/proc", o.now()) }
	}
	return nil
}
