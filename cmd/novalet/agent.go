package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/agent"
	"github.com/novalet/novalet/engine"
	"github.com/novalet/novalet/glancebridge"
	"github.com/novalet/novalet/internal/footprint"
	"github.com/novalet/novalet/internal/httpapi"
	"github.com/novalet/novalet/internal/keystone"
	"github.com/novalet/novalet/network"
	"github.com/novalet/novalet/network/neutron"
	"github.com/novalet/novalet/network/sriov"
	"github.com/novalet/novalet/novadriver"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/placement"
)

func agentCommand() *command {
	return &command{name: "agent", summary: "Run the compute service of this host",
		long: `Reads nova-compute's own configuration files. It waits for the broker and the conductor as long as it takes.
SIGTERM ends it and leaves every instance running; SIGHUP reads the log level (debug) again and looks at the controllers' release.`,
		flags: func(fs *pflag.FlagSet) {
			fs.StringArray("config-file", nil, "an oslo.config file (repeatable; later ones win; default /etc/nova/nova.conf)")
			fs.StringArray("config-dir", nil, "a folder of *.conf files, read in order after the files (repeatable)")
		},
		run: runAgent}
}

// defaultConfig is where Nova's services look.
const defaultConfig = "/etc/nova/nova.conf"

func runAgent(ctx context.Context, fs *pflag.FlagSet) error {
	if fs.NArg() > 0 {
		return usageError("takes no arguments, got %q", fs.Arg(0))
	}
	files, _ := fs.GetStringArray("config-file")
	dirs, _ := fs.GetStringArray("config-dir")
	if len(files) == 0 && len(dirs) == 0 {
		files = []string{defaultConfig}
	}
	s, err := readSettings(files, dirs)
	if err != nil {
		return err
	}
	if err := fit("sudo"); err != nil {
		return err
	}
	level := new(slog.LevelVar)
	level.Set(s.logLevel)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	transport, err := oslomsg.Dial(withLogger(s.bus, log))
	if err != nil {
		return &exitError{exitConfig, fmt.Errorf("option [DEFAULT] transport_url: %w", err)}
	}
	defer transport.Close()
	svc, err := connectServices(s, log)
	if err != nil {
		return err
	}
	if bus := s.driver.Notify.Bus; bus != nil && s.driver.Notify.Enabled() {
		if s.driver.NotifyTransport, err = oslomsg.Dial(withLogger(*bus, log)); err != nil {
			return &exitError{exitConfig, fmt.Errorf("option [oslo_messaging_notifications] transport_url: %w", err)}
		}
		defer s.driver.NotifyTransport.Close()
	}
	h, err := openHost(s, svc, transport, log)
	if err != nil {
		return err
	}
	defer h.close()
	defer onHangup(func() {
		n, err := readSettings(files, dirs)
		if err != nil {
			log.Error("read the configuration again; the old one stays", "error", err)
			return
		}
		level.Set(n.logLevel)
		h.driver.Renegotiate()
		log.Info("configuration read again", "debug", n.logLevel == slog.LevelDebug)
	})()
	return h.run(ctx)
}

// onHangup calls fn at each SIGHUP until the function it returns was called.
func onHangup(fn func()) (stop func()) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range hup {
			fn()
		}
	}()
	return func() {
		signal.Stop(hup)
		close(hup)
		<-done
	}
}

func withLogger(o oslomsg.Options, log *slog.Logger) oslomsg.Options {
	o.Logger, o.Name = log, "nova-compute"
	return o
}

// services are the REST services the agent uses; those of the embedded controller in the demo.
type services struct {
	network   novalet.NetworkAPI
	placement novadriver.Provider
	glance    glancebridge.Glance
	// certificates is nil unless images have to be signed.
	certificates glancebridge.Certificates
	requests     *prometheus.CounterVec
}

// connectServices makes clients of Keystone, Neutron, Placement and Glance. It does not connect.
func connectServices(s *settings, log *slog.Logger) (*services, error) {
	svc := &services{requests: requestCounter()}
	observe := func(r keystone.Request) {
		svc.requests.WithLabelValues(r.Service, r.Method, statusClass(r.Status)).Inc()
	}
	session := func(o keystone.Options) (*keystone.Session, error) {
		o.Observe = observe
		k, err := keystone.New(o)
		if err != nil {
			return nil, &exitError{exitConfig, err}
		}
		return k, nil
	}
	if s.sendServiceToken {
		su, err := session(s.serviceUser)
		if err != nil {
			return nil, err
		}
		s.neutron.ServiceUser, s.glance.ServiceUser = su, su
	}
	nk, err := session(s.neutron)
	if err != nil {
		return nil, err
	}
	if svc.network, err = neutron.New(neutron.Options{Session: nk, Host: s.host, OVSBridge: s.ovsBridge, Logger: log}); err != nil {
		return nil, err
	}
	pk, err := session(s.placement)
	if err != nil {
		return nil, err
	}
	svc.placement = placement.New(func(ctx context.Context) (*gophercloud.ServiceClient, error) { return pk.Client(ctx, "placement") }, log)
	gk, err := session(s.glance)
	if err != nil {
		return nil, err
	}
	svc.glance = glancebridge.NewGlance(gk)
	if s.keyManager {
		o := s.glance
		o.Section, o.EndpointOverride = "barbican", s.barbican
		bk, err := session(o)
		if err != nil {
			return nil, err
		}
		svc.certificates = glancebridge.NewBarbican(bk)
	}
	return svc, nil
}

func requestCounter() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "novalet_rest_requests_total",
		Help: "Requests to the cloud's REST services, by service, method and class of answer."}, []string{"service", "method", "answer"})
}

func statusClass(code int) string {
	if code == 0 {
		return "none"
	}
	return fmt.Sprintf("%dxx", code/100)
}

// host is one running agent with its parts.
type host struct {
	log       *slog.Logger
	transport oslomsg.Transport
	lock      *os.File
	engine    *engine.Engine
	images    *glancebridge.Store
	plugger   *network.Plugger
	agent     *agent.Agent
	driver    *novadriver.Driver
	api       *httpapi.Server
	started   atomic.Bool
}

// openHost joins the parts. On error everything opened is closed again.
func openHost(s *settings, svc *services, transport oslomsg.Transport, log *slog.Logger) (_ *host, err error) {
	h := &host{log: log, transport: transport}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	if h.lock, err = lockState(s.stateDir); err != nil {
		return nil, err
	}
	if h.engine, err = engine.Open(s.engine(log)); err != nil {
		return nil, fmt.Errorf("open the engine: %w", err)
	}
	images := s.images(svc.glance, log)
	images.VerifySignatures, images.Certificates = s.imageSigned, svc.certificates
	images.ValidateCertificates, images.TrustedCertificates = s.imageValidated, s.imageTrusted
	if h.images, err = glancebridge.Open(images); err != nil {
		return nil, fmt.Errorf("open the image store: %w", err)
	}
	if h.plugger, err = network.New(network.Options{OVSDB: s.ovsdb, Owner: owner(s.stateDir), Logger: log}); err != nil {
		return nil, fmt.Errorf("open the network: %w", err)
	}
	d := s.driver
	d.Transport, d.Placement, d.Logger = transport, svc.placement, log
	d.Recover = func(ctx context.Context) error { return h.agent.Recover(ctx) }
	if h.driver, err = novadriver.New(d); err != nil {
		return nil, &exitError{exitConfig, err}
	}
	var freePlacement novalet.Placement = noPlacement{}
	if svc.placement != nil {
		freePlacement = svc.placement
	}
	var devices novalet.PCIDevices
	if len(s.devices) > 0 {
		devices = sriov.New(s.devices)
	}
	if h.agent, err = agent.Open(agent.Options{Host: s.host, StateDir: filepath.Join(s.stateDir, "records"), InstancesDir: s.stateDir,
		Config: s.agent, Logger: log, Conductor: h.driver.Conductor(), Placement: freePlacement, Images: h.images, Network: svc.network,
		Plugger: h.plugger, PCI: devices, Runtime: h.engine, Notifier: h.driver.Notifier()}); err != nil {
		return nil, fmt.Errorf("open the agent: %w", err)
	}
	h.driver.SetCompute(h.agent)
	reg := prometheus.NewRegistry()
	if err := h.register(reg, svc); err != nil {
		return nil, err
	}
	if h.api, err = httpapi.Listen(httpapi.Options{Path: s.socket, Compute: h.agent, Runtime: h.engine, Images: h.images,
		Health: h.health, Metrics: reg, Logger: log}); err != nil {
		return nil, err
	}
	return h, nil
}

// engine are the engine's options of these settings.
func (s *settings) engine(log *slog.Logger) engine.Options {
	return engine.Options{StateDir: s.stateDir, RunDir: s.runDir, ShimPath: s.shimPath, CgroupRoot: s.cgroupRoot, UIDBase: uint32(s.idBase),
		UIDMax: imageIDs - 1, MaxInstances: s.maxInstances, RootLimits: s.rootLimits, Logger: log}
}

// images are the image store's options of these settings.
func (s *settings) images(from glancebridge.Glance, log *slog.Logger) glancebridge.Options {
	return glancebridge.Options{Dir: filepath.Join(s.stateDir, "images"), Glance: from, Logger: log, IDBase: imageIDs, KeepUnused: s.imageKeepUnused,
		MinAge: s.imageMinAge, WholeImages: s.imageWhole, DeltaSnapshots: s.imageDeltas, HighPercent: s.imageHigh, LowPercent: s.imageLow, HighWater: s.imageMax, LowWater: s.imageMax / 10 * 9}
}

// noPlacement is for the embedded controller, which has none.
type noPlacement struct{}

func (noPlacement) DeleteAllocation(context.Context, string) error { return nil }

// imageIDs is the first host id of the range that images are unpacked in; instances get those below it.
const imageIDs = 0xB0000000

// lockState keeps a second agent from the same state.
func lockState(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make the state folder: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the state folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("state folder %s: another agent uses it", dir)
	}
	return f, nil
}

// run registers the host and serves until ctx ends.
func (h *host) run(ctx context.Context) error {
	h.log.Info("starting", "version", version)
	if err := h.driver.Start(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	h.started.Store(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.agent.Run(ctx)
	}()
	trimmed := make(chan struct{})
	go func() {
		defer close(trimmed)
		h.logged("keep the resident memory small", footprint.Keep(ctx, 10*time.Second, 5*time.Minute))
	}()
	<-ctx.Done()
	<-done
	<-trimmed
	h.log.Info("ending; instances go on")
	return nil
}

// close ends the parts, the last opened first; instances stay. It may be called on a half-opened host.
func (h *host) close() {
	if h.driver != nil {
		h.driver.Drain()
	}
	if h.api != nil {
		h.logged("close the local socket", h.api.Close())
	}
	if h.agent != nil {
		h.logged("close the agent", h.agent.Close())
	}
	if h.driver != nil {
		h.logged("close the bus", h.driver.Close())
	}
	if h.plugger != nil {
		h.logged("close the network", h.plugger.Close())
	}
	if h.images != nil {
		h.logged("close the image store", h.images.Close())
	}
	if h.engine != nil {
		h.logged("close the engine", h.engine.Close())
	}
	if h.lock != nil {
		h.lock.Close()
	}
}

func (h *host) logged(what string, err error) {
	if err != nil {
		h.log.Error(what, "error", err)
	}
}

// health says what is away.
func (h *host) health() httpapi.Health {
	out := httpapi.Health{Status: "ok", Version: version, Reasons: map[string]string{}}
	if err := h.transport.Health().Err(); err != nil {
		out.Reasons["bus"] = err.Error()
	}
	if !h.started.Load() {
		out.Reasons["start"] = "not registered yet: waiting for the conductor or Placement"
	}
	st := h.driver.Status()
	if st.Away {
		out.Reasons["conductor"] = "does not answer"
	}
	if st.ForcedDown {
		out.Reasons["service"] = "forced down by an operator"
	}
	if len(out.Reasons) > 0 {
		out.Status = "degraded"
	}
	return out
}

// register makes the metrics. They are computed when read.
func (h *host) register(reg *prometheus.Registry, svc *services) error {
	gauge := func(name, help string, fn func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, fn)
	}
	for _, c := range []prometheus.Collector{
		svc.requests,
		gauge("novalet_instances", "Instances of this host.", func() float64 { return float64(len(h.agent.Tracked())) }),
		gauge("novalet_up", "1 when the service is registered and the bus is connected.", func() float64 {
			if h.health().Status == "ok" {
				return 1
			}
			return 0
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "novalet_conductor_calls_total", Help: "Calls to nova-conductor."},
			func() float64 { return float64(h.driver.Calls()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "novalet_resident_bytes", Help: "Resident memory of the agent."}, residentBytes),
	} {
		if err := reg.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}

// residentBytes reads /proc/self/statm.
func residentBytes() float64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(b), &size, &resident); err != nil {
		return 0
	}
	return float64(resident * int64(os.Getpagesize()))
}
