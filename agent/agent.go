// Package agent is the life of each instance on this host: boot, power, delete, recovery after a restart, and the
// periodic comparison of what Nova believes with what runs. It serves novalet.Compute and uses the other contracts.
//
// On disk it owns StateDir: one JSON record per instance ("instances/<uuid>.json", readable by root alone) that holds
// the queue of accepted operations and everything needed to undo them, and "finished.log", the ids of operations
// of instances whose record is gone.
//
// One goroutine per instance with work runs its operations in order; it ends when the queue is empty. Run adds the
// periodic goroutines. Close ends them all and leaves every container as it is.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/novalet/novalet"
)

// Causes with which the context of an operation ends.
var (
	// errShutdown: the agent goes; the operation stays in the journal and nothing is undone.
	errShutdown = errors.New("agent is shutting down")
	// errDeleted: a delete came for the instance; the operation undoes what it did and ends.
	errDeleted = errors.New("instance is being deleted")
)

// Config holds the options of nova.conf that concern an instance's life, under Nova's names.
type Config struct {
	// VIFPluggingTimeout is how long a boot waits for Neutron to wire its ports; 0 waits for none.
	VIFPluggingTimeout time.Duration
	// VIFPluggingIsFatal makes a boot fail when they are not wired in time.
	VIFPluggingIsFatal bool
	// MaxConcurrentBuilds bounds builds, rebuilds and unshelves under way; 0 is no bound.
	MaxConcurrentBuilds int
	// MaxConcurrentSnapshots bounds uploads under way; 0 is no bound.
	MaxConcurrentSnapshots int
	// ShutdownTimeout is how long a guest may take to stop when its image does not say.
	ShutdownTimeout time.Duration
	// ResumeGuestsStateOnHostBoot starts the guests that ran before the host was booted.
	ResumeGuestsStateOnHostBoot bool
	// RunningDeletedAction says what happens to a guest whose row is deleted: reap, shutdown, log or noop.
	RunningDeletedAction string
	// RunningDeletedInterval, SyncPowerInterval, ReclaimInstanceInterval and ImageCacheInterval are the periods of the
	// tasks of those names; 0 or less switches the task off.
	RunningDeletedInterval  time.Duration
	SyncPowerInterval       time.Duration
	ReclaimInstanceInterval time.Duration
	ImageCacheInterval      time.Duration
	// ShelvedOffloadTime is how long a shelved instance keeps its host; 0 offloads at once, less never.
	ShelvedOffloadTime time.Duration
	// IntermediateStates saves the task_states networking and block_device_mapping on the way of a boot, as nova-compute
	// does: two calls more to the conductor, for tools that follow them.
	IntermediateStates bool
	// ForceConfigDrive gives every instance a config drive.
	ForceConfigDrive bool
	// DefaultAccessIPNetworkName names the network whose addresses become access_ip_v4 and _v6.
	DefaultAccessIPNetworkName string
	// DHCPDomain is appended to host names in the metadata.
	DHCPDomain string
	// DefaultDNS are name servers for application instances on subnets that name none.
	DefaultDNS []string
	// CPUDedicatedSet lists the host CPUs that instances with hw:cpu_policy=dedicated get, as in "2-7,10".
	CPUDedicatedSet string
	// PIDsLimit bounds the processes of an instance; the image property or flavor key quota:pids overrides it. 0 is none.
	PIDsLimit int64
	// Serial says how the consoles are reached.
	Serial SerialConfig
}

// SerialConfig is section [serial_console].
type SerialConfig struct {
	// ProxyclientAddress is the address that console listeners are bound to; empty switches serial consoles off.
	ProxyclientAddress string
	// PortFirst and PortLast are the port_range, both included.
	PortFirst, PortLast int
	// Allowed lists the addresses or CIDRs of console proxies; others are turned away. Empty allows only addresses of
	// this host.
	Allowed []string
}

// DefaultConfig returns Nova's defaults where Nova has them.
func DefaultConfig() Config {
	return Config{
		VIFPluggingTimeout:     300 * time.Second,
		VIFPluggingIsFatal:     true,
		MaxConcurrentBuilds:    10,
		MaxConcurrentSnapshots: 5,
		ShutdownTimeout:        60 * time.Second,
		RunningDeletedAction:   "reap",
		RunningDeletedInterval: 30 * time.Minute,
		SyncPowerInterval:      10 * time.Minute,
		ImageCacheInterval:     40 * time.Minute,
		PIDsLimit:              32768,
		Serial:                 SerialConfig{PortFirst: 10000, PortLast: 20000},
	}
}

// Options are what Open needs.
type Options struct {
	// Host is this host's name in Nova ([DEFAULT] host).
	Host string
	// StateDir holds the records; it is created with mode 0700.
	StateDir string
	// InstancesDir is the directory whose file system holds the roots, for Resources; StateDir when empty.
	InstancesDir string
	Config       Config
	Logger       *slog.Logger

	Conductor novalet.Conductor
	Placement novalet.Placement
	Images    novalet.ImageStore
	Network   novalet.NetworkAPI
	Plugger   novalet.VIFPlugger
	Runtime   novalet.Runtime
	// PCI finds the devices that instances may have; nil is none.
	PCI novalet.PCIDevices
	// Notifier tells others than Nova what happens; nil tells nobody.
	Notifier novalet.Notifier

	// BootID tells the host's boot apart from earlier ones; nil reads the kernel's.
	BootID func() (string, error)
	// Now is the wall clock for what Nova stores; nil is time.Now.
	Now func() time.Time
}

// Agent runs the instances of one host. Make one with Open.
type Agent struct {
	host    string
	dir     string // of the roots
	cfg     Config
	log     *slog.Logger
	now     func() time.Time
	bootID  string
	started time.Time

	conductor novalet.Conductor
	placement novalet.Placement
	images    novalet.ImageStore
	network   novalet.NetworkAPI
	plugger   novalet.VIFPlugger
	watcher   bindingWatcher // nil where nobody sees it
	runtime   novalet.Runtime
	notifier  novalet.Notifier   // may be nil
	pci       novalet.PCIDevices // may be nil

	store     *store
	events    *eventTable
	consoles  *consoleTable
	timings   *timingTable
	builds    semaphore
	snapshots semaphore
	repairs   semaphore

	ctx    context.Context // ends with errShutdown
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	cpuMu sync.Mutex // held while host CPUs are handed out
	pciMu sync.Mutex // held while devices are handed out

	mu        sync.Mutex
	instances map[string]*instance
	recovered bool // operations may run
	closed    bool
}

var _ novalet.Compute = (*Agent)(nil)

// Open reads the records and returns an agent that accepts operations. It starts none before Recover has compared the
// records with Nova and the host. Records that cannot be read are set aside and named in the log.
func Open(o Options) (*Agent, error) {
	switch {
	case o.Host == "":
		return nil, errors.New("open agent: host is empty")
	case o.StateDir == "":
		return nil, errors.New("open agent: state directory is empty")
	case o.Conductor == nil || o.Placement == nil || o.Images == nil || o.Network == nil || o.Plugger == nil || o.Runtime == nil:
		return nil, errors.New("open agent: a contract is missing")
	}
	a := &Agent{
		host: o.Host, dir: o.InstancesDir, cfg: o.Config, log: o.Logger, now: o.Now,
		conductor: o.Conductor, placement: o.Placement, images: o.Images,
		network: o.Network, runtime: o.Runtime, notifier: o.Notifier, pci: o.PCI,
		events: newEventTable(), timings: newTimingTable(), instances: map[string]*instance{},
		builds: newSemaphore(o.Config.MaxConcurrentBuilds), snapshots: newSemaphore(o.Config.MaxConcurrentSnapshots),
		repairs: newSemaphore(4),
	}
	a.plugger = &devicePlugger{o.Plugger, a}
	a.watcher, _ = o.Plugger.(bindingWatcher)
	if a.dir == "" {
		a.dir = o.StateDir
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.now == nil {
		a.now = time.Now
	}
	a.started = a.now()
	bootID := o.BootID
	if bootID == nil {
		bootID = kernelBootID
	}
	var err error
	if a.bootID, err = bootID(); err != nil {
		return nil, fmt.Errorf("open agent: %w", err)
	}
	if _, err := parseCPUList(o.Config.CPUDedicatedSet); err != nil {
		return nil, fmt.Errorf("open agent: cpu_dedicated_set: %w", err)
	}
	if a.consoles, err = newConsoleTable(a, o.Config.Serial); err != nil {
		return nil, fmt.Errorf("open agent: %w", err)
	}
	store, records, err := openStore(o.StateDir, a.log)
	if err != nil {
		return nil, fmt.Errorf("open agent: %w", err)
	}
	a.store = store
	a.ctx, a.cancel = context.WithCancelCause(context.Background())
	for _, r := range records {
		in := newInstance(a, r)
		in.replayed = len(r.Ops) > 0
		a.instances[r.Instance.UUID] = in
	}
	return a, nil
}

// Close stops accepting, ends what runs (it stays in the journal) and waits. Containers are left alone.
func (a *Agent) Close() error {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.cancel(errShutdown)
	a.consoles.closeAll()
	a.wg.Wait()
	a.mu.Lock()
	for _, in := range a.instances {
		in.dropNet()
	}
	a.mu.Unlock()
	return a.store.close()
}

// goRun starts a goroutine that Close waits for. It says false when the agent is closed.
func (a *Agent) goRun(f func()) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false
	}
	a.wg.Go(f)
	return true
}

// insist repeats a call to the conductor until it is answered or ctx ends: a lost bus is no failed operation.
func (a *Agent) insist(ctx context.Context, log *slog.Logger, what string, f func(context.Context) error) error {
	delay := 100 * time.Millisecond
	for said := false; ; {
		err := f(ctx)
		if err == nil || !errors.Is(err, novalet.ErrTryAgain) {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !said {
			// The bus side says aloud that the conductor is away, once for all instances.
			log.Debug("waiting for the conductor", "call", what, "err", err)
			said = true
		}
		if err := sleep(ctx, delay); err != nil {
			return err
		}
		delay = min(2*delay, 5*time.Second)
	}
}

// patiently repeats a call to a REST service a few times when the fault is a passing one.
func patiently(ctx context.Context, f func(context.Context) error) error {
	for delay := time.Second; ; delay *= 2 {
		err := f(ctx)
		if err == nil || !errors.Is(err, novalet.ErrTryAgain) || delay > 4*time.Second {
			return err
		}
		if serr := sleep(ctx, delay); serr != nil {
			return serr
		}
	}
}

// save writes the instance's row, insisting.
func (a *Agent) save(ctx context.Context, in *instance, rc novalet.RequestContext, expected []novalet.TaskState, fields map[string]any) error {
	return a.insist(ctx, in.log, "save instance", func(ctx context.Context) error {
		return a.conductor.SaveInstance(ctx, rc, &novalet.InstanceUpdate{UUID: in.uuid, Fields: fields, Expected: expected})
	})
}

// sleep waits for d or the end of ctx, whose cause it returns.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// semaphore bounds what runs side by side; nil bounds nothing.
type semaphore chan struct{}

func newSemaphore(n int) semaphore {
	if n <= 0 {
		return nil
	}
	return make(semaphore, n)
}

// acquire waits for a slot or the end of ctx.
func (s semaphore) acquire(ctx context.Context) error {
	if s == nil {
		return nil
	}
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s semaphore) release() {
	if s != nil {
		<-s
	}
}

func kernelBootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return string(data[:min(len(data), 36)]), nil
}

// dirOf is where the records lie below a state directory.
func dirOf(stateDir string) string { return filepath.Join(stateDir, "instances") }
