// Package engine runs containers: it serves novalet.Runtime with the kernel's own means and no daemon beside.
//
// What must outlive the agent lives in keepers, small processes of a second program (see engine/monitor): they are
// the parents of the instances' inits. This package finds them again when it opens. Per instance it keeps a
// directory under StateDir, with the record (what was asked for), the writable root and the console log; per
// keeper a socket and a log under RunDir. Where the file system of StateDir has project quota it sets limits of projects there (see
// quota.go). It makes cgroups below one name (see engine/cgroup).
//
// Goroutines: one per keeper, that listens for events; one that removes what Destroy has put aside; one per size of disk, that
// keeps some ready; one per event
// of an exit, that tidies up. Close ends them and leaves keepers and containers running.
package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/cgroup"
	"github.com/novalet/novalet/engine/monitor/wire"
	"github.com/novalet/novalet/engine/rootfs"
	"github.com/novalet/novalet/engine/shim"
)

// Options say where an engine keeps things. Zero values are the defaults.
type Options struct {
	// StateDir survives host boots: records, roots, console logs. Default /var/lib/novalet.
	StateDir string
	// RunDir does not: sockets of the keepers. Default /run/novalet.
	RunDir string
	// CgroupRoot is the sub-tree's name in each hierarchy, a relative path. Default "novalet".
	CgroupRoot string
	// UIDBase is the first host id of the first instance's range, UIDCount the ids of each. Defaults 1<<20 and
	// 65536. UIDMax bounds the ids used; default all 32 bits less the last.
	UIDBase  uint32
	UIDCount uint32
	UIDMax   uint32
	// KeeperCapacity is how many instances one keeper serves. Default 64.
	KeeperCapacity int
	// ConsoleLogBytes bounds an instance's console log on disk. Default 1 MiB.
	ConsoleLogBytes int64
	// StartTimeout bounds the set-up of a root inside. Default one minute.
	StartTimeout time.Duration
	// ShimPath is the second program; empty uses the one that this binary carries (build tag shim).
	ShimPath string
	// DiskPool is how many disks of each size in use are kept ready. Default 2; negative keeps none.
	DiskPool int
	// RootLimits says how Limits.RootBytes is held. Default LimitAuto.
	RootLimits RootLimits
	// WarmSlots is how many sandboxes are kept ready for new instances. Default 2; negative keeps none.
	WarmSlots int
	// MaxInstances bounds the instances of this host; 0 is bounded by ids only.
	MaxInstances int
	// layout stands in for the host's cgroups, and spareTime for the constant, in tests.
	layout    *cgroup.Layout
	spareTime time.Duration
	// Logger gets one line per transition. Default slog.Default.
	Logger *slog.Logger
}

func (o *Options) fill() {
	if o.StateDir == "" {
		o.StateDir = "/var/lib/novalet"
	}
	if o.RunDir == "" {
		o.RunDir = "/run/novalet"
	}
	if o.CgroupRoot == "" {
		o.CgroupRoot = "novalet"
	}
	if o.UIDBase == 0 {
		o.UIDBase = 1 << 20
	}
	if o.UIDCount == 0 {
		o.UIDCount = 65536
	}
	if o.UIDMax == 0 {
		o.UIDMax = 1<<32 - 2
	}
	if o.KeeperCapacity <= 0 {
		o.KeeperCapacity = 64
	}
	if o.ConsoleLogBytes <= 0 {
		o.ConsoleLogBytes = 1 << 20
	}
	if o.WarmSlots == 0 {
		o.WarmSlots = 2
	}
	if o.DiskPool == 0 {
		o.DiskPool = 2
	}
	if o.spareTime == 0 {
		o.spareTime = spareTime
	}
	if o.StartTimeout <= 0 {
		o.StartTimeout = time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
}

// Engine is a novalet.Runtime.
type Engine struct {
	o      Options
	log    *slog.Logger
	cg     *cgroup.Manager
	prog   *os.File
	bootID string
	cpus   []int // that instances may be put on
	shut   map[novalet.Kind]wire.Confine
	trees  map[novalet.Kind]wire.Confine // of instances whose root is a tree

	projects *projects

	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	mu        sync.Mutex
	instances map[string]*instance
	slots     map[int]string
	broken    map[string]bool // records that could not be read; fixed once open
	keepers   map[string]*keeper
	subs      map[*subscriber]struct{}
	filling   map[string]bool
	warm      []*warmSlot
	warming   bool
	spawning  sync.Mutex
	trash     atomic.Int64  // who wants it emptied
	syncs     chan struct{} // syncsAtOnce
	pool      sync.Mutex    // taking a disk made in advance, and mounting it where it waits
	// fresh is the room of unused disks, by the directory where they wait. pool is held.
	fresh map[string]rootfs.Room
}

var _ novalet.Runtime = (*Engine)(nil)

// errClosed is the cause of an engine's end.
var errClosed = errors.New("engine closed")

// instance is the agent's side of one container. op orders the operations on it; rec and keeper change under op and
// mu, and are read under either.
type instance struct {
	op sync.Mutex

	mu     sync.Mutex
	rec    record
	keeper *keeper   // nil when no keeper has it
	saved  bool      // the record is on disk
	warm   *warmSlot // taken, not yet assigned

	// Of a container that this process created and has not started yet; under op. They save asking the keeper.
	userns int // the user namespace, -1 when not held
	synced <-chan error
}

// Open finds the keepers and instances of an earlier agent and takes them over. An instance whose record cannot be
// read is left alone and named in the log. It needs root.
func Open(o Options) (*Engine, error) {
	o.fill()
	for _, d := range []string{o.StateDir, o.RunDir} {
		if !filepath.IsAbs(d) {
			return nil, fmt.Errorf("open engine: %s is not an absolute path", d)
		}
	}
	for _, d := range []string{o.StateDir, filepath.Join(o.StateDir, "instances"), filepath.Join(o.StateDir, "trash"), filepath.Join(o.StateDir, "pool"), o.RunDir, filepath.Join(o.RunDir, "keepers")} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, fmt.Errorf("open engine: %w", err)
		}
	}
	if err := os.Chmod(filepath.Join(o.RunDir, "keepers"), 0o700); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	layout, err := o.layout, error(nil)
	if layout == nil {
		if layout, err = cgroup.Detect(); err != nil {
			return nil, fmt.Errorf("open engine: %w", err)
		}
	}
	cg, err := cgroup.NewManager(layout, o.CgroupRoot)
	if err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	prog, err := shim.Open(o.ShimPath)
	if err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		prog.Close()
		return nil, fmt.Errorf("open engine: %w", err)
	}
	e := &Engine{o: o, log: o.Logger, syncs: make(chan struct{}, syncsAtOnce), cg: cg, prog: prog, bootID: strings.TrimSpace(string(boot)),
		instances: map[string]*instance{}, slots: map[int]string{}, broken: map[string]bool{}, keepers: map[string]*keeper{}, subs: map[*subscriber]struct{}{}, filling: map[string]bool{}, fresh: map[string]rootfs.Room{}}
	for i := range runtime.NumCPU() {
		e.cpus = append(e.cpus, i)
	}
	e.shut, err = confinements(false)
	if err == nil {
		e.trees, err = confinements(true)
	}
	if err == nil {
		e.projects, err = openProjects(o.StateDir, o.RootLimits)
	}
	if err != nil {
		prog.Close()
		return nil, fmt.Errorf("open engine: %w", err)
	}
	e.ctx, e.cancel = context.WithCancelCause(context.Background())
	if err := e.adopt(); err != nil {
		e.Close()
		return nil, fmt.Errorf("open engine: %w", err)
	}
	e.dropUnfinished()
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		e.emptyTrash()
		if err := e.projects.dropEmpty(); err != nil {
			e.log.Error("free projects", "error", err)
		}
		e.openPool()
	}()
	e.fillWarm()
	return e, nil
}

// Close lets go of the keepers, which keep the containers running; a keeper without containers ends. It waits for
// the engine's goroutines.
func (e *Engine) Close() error {
	e.cancel(errClosed)
	e.dropWarm()
	e.mu.Lock()
	var ks []*keeper
	for _, k := range e.keepers {
		ks = append(ks, k)
	}
	e.mu.Unlock()
	for _, k := range ks {
		k.release()
	}
	e.wg.Wait()
	e.closePool()
	e.projects.close()
	e.cg.Tidy()
	return e.prog.Close()
}

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)

// lock returns the instance with its op lock held, or nil.
func (e *Engine) lock(id string) *instance {
	for {
		e.mu.Lock()
		in := e.instances[id]
		e.mu.Unlock()
		if in == nil {
			return nil
		}
		in.op.Lock()
		e.mu.Lock()
		same := e.instances[id] == in
		e.mu.Unlock()
		if same {
			return in
		}
		in.op.Unlock()
	}
}

// need is lock with an error.
func (e *Engine) need(id string) (*instance, error) {
	in := e.lock(id)
	if in == nil {
		return nil, fmt.Errorf("container %s: %w", id, novalet.ErrNotFound)
	}
	return in, nil
}

func (in *instance) get() (record, *keeper) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.rec, in.keeper
}

func (e *Engine) dir(id string) string { return filepath.Join(e.o.StateDir, "instances", id) }

func (e *Engine) group(slot int) *cgroup.Group { return e.cg.Group(fmt.Sprintf("i%d", slot)) }
