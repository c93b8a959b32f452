package main

import (
	"crypto/sha256"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/novalet/novalet/agent"
	"github.com/novalet/novalet/engine"
	"github.com/novalet/novalet/internal/keystone"
	"github.com/novalet/novalet/internal/osloconf"
	"github.com/novalet/novalet/network/sriov"
	"github.com/novalet/novalet/novadriver"
	"github.com/novalet/novalet/novadriver/oslomsg"
)

// settings is nova.conf as this program understands it. Names and defaults are Nova's (nova/conf); what Nova does not
// have is in [novalet].
type settings struct {
	host, statePath      string
	stateDir             string // [novalet] state_dir: records, images, roots
	runDir               string // [novalet] run_dir: sockets of the keepers
	socket               string // [novalet] socket
	shimPath             string // [novalet] shim_path
	cgroupRoot           string // [novalet] cgroup_root
	logLevel             slog.Level
	bus                  oslomsg.Options
	driver               novadriver.Options
	agent                agent.Config
	neutron, placement   keystone.Options
	glance, serviceUser  keystone.Options
	sendServiceToken     bool
	ovsBridge, ovsdb     string
	imageMinAge          time.Duration
	imageKeepUnused      bool
	imageHigh, imageLow  int   // percent of the file system
	imageMax             int64 // bytes
	imageWhole           bool
	imageDeltas          bool     // [novalet] snapshot_deltas
	imageSigned          bool     // [glance] verify_glance_signatures
	imageValidated       bool     // [glance] enable_certificate_validation
	imageTrusted         []string // the default list of trusted certificates, when they are validated
	keyManager           bool     // it is Barbican
	barbican             string   // [barbican] barbican_endpoint
	idBase, maxInstances int
	rootLimits           engine.RootLimits // [novalet] root_limits
	devices              []sriov.Spec      // [pci] device_spec
}

// readSettings reads the files. The error names every option that is missing or wrong, with file and line.
func readSettings(files, dirs []string) (*settings, error) {
	cfg, err := osloconf.Load(files, dirs)
	if err != nil {
		return nil, &exitError{exitConfig, err}
	}
	s := &settings{}
	s.driver = novadriver.ReadOptions(cfg)
	s.driver.HypervisorVersion = hypervisorVersion(version)
	s.host, s.statePath = s.driver.Host, s.driver.StateDir
	if strings.ContainsAny(s.host, " /\t") {
		cfg.Errorf("DEFAULT", "host", "%q is no host name", s.host)
	}
	s.stateDir = cfg.String("novalet", "state_dir", defaultState)
	s.runDir = cfg.String("novalet", "run_dir", "/run/novalet")
	if cfg.Has("novalet", "state_dir") && !cfg.Has("novalet", "run_dir") {
		s.runDir = filepath.Join(s.stateDir, "run")
	}
	s.socket = cfg.String("novalet", "socket", "")
	if s.socket == "" {
		s.socket = defaultSocket
		if cfg.Has("novalet", "state_dir") {
			s.socket = filepath.Join(s.stateDir, "novalet.sock")
		}
	}
	s.shimPath = cfg.String("novalet", "shim_path", "")
	s.cgroupRoot = cfg.String("novalet", "cgroup_root", "")
	if s.cgroupRoot == "" {
		s.cgroupRoot = cgroupRootFor(s.stateDir)
	}
	s.idBase = cfg.IntRange("novalet", "id_base", 1<<20, 1<<16, 1<<31-1)
	limits := []string{string(engine.LimitAuto), string(engine.LimitQuota), string(engine.LimitPool)}
	s.rootLimits = engine.RootLimits(cfg.Choice("novalet", "root_limits", limits[0], limits...))
	s.maxInstances = cfg.IntRange("novalet", "max_instances", 0, 0, 32000)
	if cfg.Bool("DEFAULT", "debug", false) {
		s.logLevel = slog.LevelDebug
	}
	cfg.Required("DEFAULT", "transport_url")
	s.bus = oslomsg.ReadOptions(cfg)

	s.agent = readAgent(cfg, s.driver.SerialConsole)
	s.readServices(cfg)
	s.devices = readDevices(cfg)
	s.ovsBridge = cfg.String("neutron", "ovs_bridge", "br-int")
	s.ovsdb = cfg.String("os_vif_ovs", "ovsdb_connection", "")
	s.imageKeepUnused = !cfg.Bool("image_cache", "remove_unused_base_images", true)
	s.imageMinAge = cfg.Seconds("image_cache", "remove_unused_original_minimum_age_seconds", 24*time.Hour)
	s.readImageMarks(cfg)
	if err := cfg.Err(); err != nil {
		return nil, &exitError{exitConfig, err}
	}
	if unread := cfg.Unread("novalet"); len(unread) > 0 {
		return nil, &exitError{exitConfig, fmt.Errorf("option [novalet] %s is unknown (docs/configuration.md lists them)", strings.Join(unread, ", "))}
	}
	return s, nil
}

// readImageMarks reads when images go that nothing uses although they are not old, and how they come.
func (s *settings) readImageMarks(cfg *osloconf.Config) {
	s.imageHigh = cfg.IntRange("novalet", "image_cache_high_watermark_percent", 90, 0, 100)
	s.imageLow = cfg.IntRange("novalet", "image_cache_low_watermark_percent", min(80, s.imageHigh), 0, 100)
	if s.imageLow > s.imageHigh {
		cfg.Errorf("novalet", "image_cache_low_watermark_percent", "%d is above image_cache_high_watermark_percent, %d", s.imageLow, s.imageHigh)
	}
	s.imageWhole = !cfg.Bool("novalet", "image_partial_downloads", true)
	s.imageDeltas = cfg.Bool("novalet", "snapshot_deltas", false)
	s.imageSigned = cfg.Bool("glance", "verify_glance_signatures", false)
	if s.imageValidated = cfg.Bool("glance", "enable_certificate_validation", false); s.imageValidated {
		s.imageTrusted = cfg.List("glance", "default_trusted_certificate_ids", nil)
	}
	// A user's own list of trusted certificates asks for the key manager whatever the options say, so another one than
	// Barbican is an error only where every boot would fail of it.
	backends := []string{"barbican", "castellan.key_manager.barbican_key_manager.BarbicanKeyManager"}
	if s.imageSigned || len(s.imageTrusted) > 0 {
		cfg.Choice("key_manager", "backend", backends[0], backends...)
	}
	if s.keyManager = slices.Contains(backends, cfg.String("key_manager", "backend", backends[0])); s.keyManager {
		s.barbican = cfg.String("barbican", "barbican_endpoint", "")
	}
	s.imageMax = int64(cfg.IntRange("novalet", "image_cache_max_gb", 0, 0, 1<<20)) << 30
}

// readDevices reads the devices that instances may have, under the option's two older names too.
func readDevices(cfg *osloconf.Config) []sriov.Spec {
	section, name := "pci", "device_spec"
	for _, old := range [][2]string{{"pci", "passthrough_whitelist"}, {"DEFAULT", "pci_passthrough_whitelist"}} {
		if !cfg.Has(section, name) && cfg.Has(old[0], old[1]) {
			section, name = old[0], old[1]
		}
	}
	specs, err := sriov.ParseSpecs(cfg.Multi(section, name))
	if err != nil {
		cfg.Errorf(section, name, "%v", err)
	}
	if cfg.Bool("pci", "report_in_placement", false) {
		cfg.Errorf("pci", "report_in_placement", "devices are not reported to Placement; leave it out")
	}
	return specs
}

func readAgent(cfg *osloconf.Config, serial bool) agent.Config {
	c := agent.DefaultConfig()
	c.VIFPluggingTimeout = cfg.Seconds("DEFAULT", "vif_plugging_timeout", c.VIFPluggingTimeout)
	c.VIFPluggingIsFatal = cfg.Bool("DEFAULT", "vif_plugging_is_fatal", c.VIFPluggingIsFatal)
	c.MaxConcurrentBuilds = cfg.IntRange("DEFAULT", "max_concurrent_builds", c.MaxConcurrentBuilds, 0, 1<<20)
	c.MaxConcurrentSnapshots = cfg.IntRange("DEFAULT", "max_concurrent_snapshots", c.MaxConcurrentSnapshots, 0, 1<<20)
	c.ShutdownTimeout = cfg.Seconds("DEFAULT", "shutdown_timeout", c.ShutdownTimeout)
	c.ResumeGuestsStateOnHostBoot = cfg.Bool("DEFAULT", "resume_guests_state_on_host_boot", false)
	c.RunningDeletedAction = cfg.Choice("DEFAULT", "running_deleted_instance_action", c.RunningDeletedAction, "reap", "shutdown", "log", "noop")
	c.RunningDeletedInterval = cfg.Seconds("DEFAULT", "running_deleted_instance_poll_interval", c.RunningDeletedInterval)
	c.SyncPowerInterval = cfg.Seconds("DEFAULT", "sync_power_state_interval", c.SyncPowerInterval)
	c.ReclaimInstanceInterval = cfg.Seconds("DEFAULT", "reclaim_instance_interval", 0)
	c.ImageCacheInterval = cfg.Seconds("image_cache", "manager_interval", c.ImageCacheInterval)
	c.ShelvedOffloadTime = time.Duration(cfg.Int("DEFAULT", "shelved_offload_time", 0)) * time.Second
	c.ForceConfigDrive = cfg.Bool("DEFAULT", "force_config_drive", false)
	c.DefaultAccessIPNetworkName = cfg.String("DEFAULT", "default_access_ip_network_name", "")
	c.IntermediateStates = cfg.Bool("novalet", "intermediate_task_states", false)
	c.DHCPDomain = cfg.String("api", "dhcp_domain", "novalocal")
	c.DefaultDNS = cfg.List("novalet", "dns_servers", nil)
	c.CPUDedicatedSet = cfg.String("compute", "cpu_dedicated_set", "")
	c.PIDsLimit = int64(cfg.IntRange("novalet", "pids_limit", int(c.PIDsLimit), 0, 4<<20))
	if serial {
		c.Serial.ProxyclientAddress = cfg.String("serial_console", "proxyclient_address", "127.0.0.1")
	}
	first, last, ok := strings.Cut(cfg.String("serial_console", "port_range", "10000:20000"), ":")
	a, err1 := strconv.Atoi(first)
	b, err2 := strconv.Atoi(last)
	if !ok || err1 != nil || err2 != nil || a < 1 || b > 65535 || a >= b {
		cfg.Errorf("serial_console", "port_range", "want FIRST:LAST with ports from 1 to 65535")
	}
	c.Serial.PortFirst, c.Serial.PortLast = a, b
	c.Serial.Allowed = cfg.List("novalet", "console_proxies", nil)
	return c
}

// readServices reads the sections with credentials.
func (s *settings) readServices(cfg *osloconf.Config) {
	section := func(name string) keystone.Options {
		o, err := keystone.OptionsFrom(name, func(key string) (string, bool) {
			if !cfg.Has(name, key) {
				return "", false
			}
			return cfg.String(name, key, ""), true
		})
		if err != nil {
			cfg.Errorf(name, "auth_url", "%v", err)
		}
		return o
	}
	for _, name := range []string{"neutron", "placement"} {
		cfg.Required(name, "auth_url")
		cfg.Required(name, "auth_type")
	}
	s.neutron, s.placement = section("neutron"), section("placement")
	s.sendServiceToken = cfg.Bool("service_user", "send_service_user_token", false)
	if s.sendServiceToken || cfg.Has("service_user", "auth_url") {
		s.serviceUser = section("service_user")
	}
	// Glance has no credentials of its own in nova.conf: images are read as the user, and as the service user where the
	// user's token has run out. Without [service_user] that is Placement's account.
	s.glance = s.serviceUser
	if s.glance.AuthURL == "" {
		s.glance = s.placement
		s.glance.EndpointOverride = ""
	}
	s.glance.Section = "glance"
	s.glance.RegionName = cfg.String("glance", "region_name", s.glance.RegionName)
	if v := cfg.List("glance", "valid_interfaces", nil); v != nil {
		s.glance.ValidInterfaces = v
	}
	if v := cfg.String("glance", "endpoint_override", ""); v != "" {
		s.glance.EndpointOverride = v
	} else if v := cfg.List("glance", "api_servers", nil); len(v) > 0 {
		s.glance.EndpointOverride = v[0]
	}
	s.glance.CAFile = cfg.String("glance", "cafile", s.glance.CAFile)
	s.glance.Insecure = cfg.Bool("glance", "insecure", s.glance.Insecure)
}

// defaultState is where the only agent of a host keeps its state.
const defaultState = "/var/lib/novalet"

// owner tells agents of one host apart by their state; "" is the usual one.
func owner(stateDir string) string {
	if stateDir == defaultState {
		return ""
	}
	return fmt.Sprintf("%x", sha256.Sum256([]byte(stateDir)))[:8]
}

// cgroupRootFor keeps agents with different state in sub-trees of their own.
func cgroupRootFor(stateDir string) string {
	if o := owner(stateDir); o != "" {
		return "novalet-" + o
	}
	return "novalet"
}

// hypervisorVersion makes Nova's number of a version text: major*1000000 + minor*1000 + patch.
func hypervisorVersion(v string) int {
	v, _, _ = strings.Cut(v, "-")
	n := 0
	for i, p := range strings.SplitN(v, ".", 3) {
		x, err := strconv.Atoi(p)
		if err != nil {
			break
		}
		n += x * []int{1000000, 1000, 1}[i]
	}
	return n
}
