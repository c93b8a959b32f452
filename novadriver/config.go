package novadriver

import (
	"net"
	"os"
	"time"

	"github.com/novalet/novalet/internal/osloconf"
	"github.com/novalet/novalet/novadriver/notify"
	"github.com/novalet/novalet/novadriver/ovo"
)

// ReadOptions reads what the driver takes from Nova's own options. What is wrong with them is told by cfg.Err. The
// caller adds Transport, NotifyTransport when Notify.Bus is set, Placement, Recover and Logger.
func ReadOptions(cfg *osloconf.Config) Options {
	const def = osloconf.DefaultSection
	hostname, _ := os.Hostname() // an empty one is told below
	o := Options{
		Host:            cfg.String(def, "host", hostname),
		MyIP:            cfg.String(def, "my_ip", ""),
		StateDir:        cfg.String(def, "state_path", "/var/lib/nova"),
		ControlExchange: cfg.String(def, "control_exchange", "nova"),
		RPCTimeout:      cfg.Seconds(def, "rpc_response_timeout", time.Minute),
		ReportInterval:  cfg.Seconds(def, "report_interval", 10*time.Second),
		UpdateInterval:  cfg.Seconds(def, "update_resources_interval", 0),
		GracefulTimeout: cfg.Seconds(def, "graceful_shutdown_timeout", time.Minute),

		TrackInstanceChanges: cfg.Bool("filter_scheduler", "track_instance_changes", true),
		InstanceNameTemplate: cfg.String(def, "instance_name_template", "instance-%08x"),
		ConsoleTokenTTL:      cfg.Seconds("consoleauth", "token_ttl", 10*time.Minute),
		SerialConsole:        cfg.Bool("serial_console", "enabled", false),
		SerialBaseURL:        cfg.String("serial_console", "base_url", "ws://127.0.0.1:6083/"),
		Resources: ResourceOptions{
			ReservedCPUs:     int64(cfg.IntRange(def, "reserved_host_cpus", 0, 0, 1<<20)),
			ReservedMemoryMB: int64(cfg.IntRange(def, "reserved_host_memory_mb", 512, 0, 1<<40)),
			ReservedDiskMB:   int64(cfg.IntRange(def, "reserved_host_disk_mb", 0, 0, 1<<50)),
			CPURatio:         ratio(cfg, "cpu_allocation_ratio"),
			RAMRatio:         ratio(cfg, "ram_allocation_ratio"),
			DiskRatio:        ratio(cfg, "disk_allocation_ratio"),
			InitialCPURatio:  cfg.Float(def, "initial_cpu_allocation_ratio", 4),
			InitialRAMRatio:  cfg.Float(def, "initial_ram_allocation_ratio", 1),
			InitialDiskRatio: cfg.Float(def, "initial_disk_allocation_ratio", 1),
		},
		Notify:  notify.ReadOptions(cfg),
		Node:    cfg.String("novalet", "hypervisor_hostname", ""),
		Release: cfg.String("novalet", "release", ""),
	}
	dir := cfg.String("compute", "provider_config_location", "/etc/nova/provider_config/")
	var err error
	if o.Providers, err = ReadProviderConfigs(dir); err != nil {
		cfg.Errorf("compute", "provider_config_location", "%v", err)
	}
	// Nova reads interval 0 as "every periodic run"; the default of fill is the same minute.
	if o.Host == "" {
		cfg.Errorf(def, "host", "is not set and this machine has no name")
	}
	if o.MyIP == "" {
		o.MyIP = ownAddress()
	} else if net.ParseIP(o.MyIP) == nil {
		cfg.Errorf(def, "my_ip", "%q is no address", o.MyIP)
	}
	if !nameTemplate.MatchString(o.InstanceNameTemplate) {
		cfg.Errorf(def, "instance_name_template", "only one number verb for the id is understood")
	}
	if o.Release != "" {
		if _, err := ovo.ReleaseNamed(o.Release); err != nil {
			cfg.Errorf("novalet", "release", "%q is no release known here", o.Release)
		}
	}
	return o
}

// ratio reads an allocation ratio; 0 and absent both mean that none is configured, as in Nova.
func ratio(cfg *osloconf.Config, name string) *float64 {
	v := cfg.Float(osloconf.DefaultSection, name, 0)
	if v < 0 {
		cfg.Errorf(osloconf.DefaultSection, name, "is negative")
	}
	if v <= 0 {
		return nil
	}
	return &v
}

// ownAddress is the address that traffic to the outside leaves from, as oslo.utils finds it: a connected UDP socket
// sends nothing.
func ownAddress() string {
	c, err := net.Dial("udp", "192.0.2.1:9")
	if err != nil {
		return "127.0.0.1"
	}
	defer c.Close()
	if a, ok := c.LocalAddr().(*net.UDPAddr); ok {
		return a.IP.String()
	}
	return "127.0.0.1"
}
