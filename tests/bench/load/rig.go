package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/agent"
	"github.com/novalet/novalet/internal/fake"
	"github.com/novalet/novalet/internal/minicloud"
	"github.com/novalet/novalet/novadriver"
	"github.com/novalet/novalet/novadriver/oslomsg/membus"
)

const (
	hostName  = "load1"
	imageID   = "3f0c2d8a-0000-4000-8000-0000000000cc"
	networkID = "5f0c0d6e-0000-4000-8000-000000000001"
	release   = "2025.1"
)

// rig is one agent with its driver on an in-memory bus, between the embedded controller and fakes that behave. Everything of
// the agent is real, the journal on the disk too; containers, ports and images are the fakes'.
type rig struct {
	bus     *membus.Bus
	conn    *membus.Conn // the agent's
	cloud   *minicloud.Cloud
	world   *fake.World
	handle  *fake.Handle
	agent   *agent.Agent
	driver  *novadriver.Driver
	records string
	// userData comes with every server; a long one makes each message and record large, so that one kept too long shows.
	userData []byte
}

func newRig(dir string) (_ *rig, err error) {
	r := &rig{bus: membus.New(), world: fake.NewWorld(hostName), records: filepath.Join(dir, "records", "instances")}
	r.conn = r.bus.Connect()
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	log := slog.New(slog.DiscardHandler)
	r.cloud, err = minicloud.New(minicloud.Options{Transport: r.bus.Connect(), Host: hostName, Logger: log, Release: release})
	if err != nil {
		return r, err
	}
	r.world.AddImage(&novalet.Image{ID: imageID, Kind: novalet.KindApplication, Size: 1 << 20, Layers: []novalet.Layer{{DiffID: "sha256:a"}},
		Config: novalet.ImageConfig{Cmd: []string{"/bin/sleep", "1d"}}})
	r.handle = r.world.Open()
	r.driver, err = novadriver.New(novadriver.Options{Host: hostName, MyIP: "192.0.2.1", StateDir: dir, Transport: r.conn, Logger: log,
		TrackInstanceChanges: true, Recover: func(ctx context.Context) error { return r.agent.Recover(ctx) }})
	if err != nil {
		return r, err
	}
	r.agent, err = agent.Open(agent.Options{Host: hostName, StateDir: filepath.Join(dir, "records"), Config: agent.DefaultConfig(), Logger: log,
		Conductor: r.driver.Conductor(), Placement: r.handle.Placement, Images: r.handle.Images, Network: r.handle.Network,
		Plugger: r.handle.Plugger, Runtime: r.handle.Runtime})
	if err != nil {
		return r, err
	}
	r.driver.SetCompute(r.agent)
	r.world.OnActive(func(p *fake.Port) {
		r.agent.ExternalEvents(context.Background(), novalet.RequestContext{},
			[]novalet.ExternalEvent{{InstanceUUID: p.Device, Name: "network-vif-plugged", Status: "completed", Tag: p.ID}})
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err = r.driver.Start(ctx); err == nil {
		err = r.driver.Ready(ctx)
	}
	return r, err
}

func (r *rig) close() error {
	var errs []error
	if r.driver != nil {
		r.driver.Drain()
	}
	if r.agent != nil {
		errs = append(errs, r.agent.Close())
	}
	if r.driver != nil {
		errs = append(errs, r.driver.Close())
	}
	if r.cloud != nil {
		errs = append(errs, r.cloud.Close())
	}
	return errors.Join(append(errs, r.conn.Close())...)
}

// step is one operation in a server's life, after its boot.
type step struct {
	method novalet.Method
	task   novalet.TaskState
	args   map[string]any
}

// life is what every server goes through once it is booted.
var life = []step{
	{novalet.MethodStop, novalet.TaskPoweringOff, map[string]any{"clean_shutdown": true}},
	{novalet.MethodStart, novalet.TaskPoweringOn, nil},
	{novalet.MethodReboot, novalet.TaskRebootingHard, map[string]any{"reboot_type": "HARD", "block_device_info": nil}},
	{novalet.MethodPause, novalet.TaskPausing, nil},
	{novalet.MethodUnpause, novalet.TaskUnpausing, nil},
	{novalet.MethodTerminate, novalet.TaskDeleting, nil},
}

// live takes one server through its life and returns how long each operation took from the cast to its end.
func (r *rig) live(ctx context.Context) ([]time.Duration, error) {
	began := time.Now()
	id, err := r.cloud.Boot(ctx, minicloud.BootRequest{Name: "web", Image: novalet.ImageMeta{ID: imageID, Name: "demo"}, Network: networkID,
		Flavor: novalet.Flavor{FlavorID: "1", Name: "m1.tiny", MemoryMB: 64, VCPUs: 1, RootGB: 1}, UserData: r.userData})
	if err != nil {
		return nil, err
	}
	var took []time.Duration
	for i := 0; ; i++ {
		// The last thing an agent tells of an operation is the end of its action event.
		s, err := r.cloud.Wait(ctx, id, func(s *minicloud.Server) bool { return len(s.Events) > i && s.Events[i].Result != "" })
		if err == nil && s.Events[i].Result != "Success" {
			err = fmt.Errorf("%s of %s: %s %s", s.Events[i].Name, id, s.Events[i].Result, s.Fault)
		}
		if err != nil {
			return took, err
		}
		took = append(took, time.Since(began))
		if i == len(life) {
			return took, r.cloud.Archive(id)
		}
		began = time.Now()
		if err := r.cloud.Do(ctx, id, life[i].method, life[i].task, life[i].args); err != nil {
			return took, err
		}
	}
}

// window is what was seen of a number of lives.
type window struct {
	latency    time.Duration // median
	perSecond  float64
	heap       float64 // MiB after a collection, when nothing is under way
	goroutines int
	records    int
}

// run takes servers through their lives, some side by side, and looks at the agent when all are gone.
func (r *rig) run(ctx context.Context, lives, parallel int) (window, error) {
	var mu sync.Mutex
	var all []time.Duration
	var failed error
	todo := make(chan struct{}, lives)
	for range lives {
		todo <- struct{}{}
	}
	close(todo)
	began := time.Now()
	var wg sync.WaitGroup
	for range parallel {
		wg.Go(func() {
			for range todo {
				took, err := r.live(ctx)
				mu.Lock()
				all = append(all, took...)
				failed = errors.Join(failed, err)
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	if failed != nil {
		return window{}, failed
	}
	w := window{perSecond: float64(len(all)) / time.Since(began).Seconds(), latency: median(all)}
	// The last records go after the last events.
	for {
		w.records = r.left()
		if w.records == 0 && len(r.agent.Tracked()) == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return w, fmt.Errorf("%d records are left: %w", w.records, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
	r.handle.Faults.Log() // what the fakes remember of calls is not the agent's
	w.heap, w.goroutines = heapMiB(), runtime.NumGoroutine()
	return w, nil
}

// left counts the records on disk.
func (r *rig) left() int {
	es, err := os.ReadDir(r.records)
	if err != nil {
		return -1
	}
	return len(es)
}

// heapMiB is what is in use after a collection.
func heapMiB() float64 {
	runtime.GC()
	runtime.GC() // what finalizers let go of
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}
