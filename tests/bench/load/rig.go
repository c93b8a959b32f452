package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/agent"
	"github.com/novalet/novalet/internal/fake"
	"github.com/novalet/novalet/novadriver"
	"github.com/novalet/novalet/novadriver/conductortest"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/oslomsg/membus"
	"github.com/novalet/novalet/novadriver/ovo"
)

const (
	hostName = "load1"
	imageID  = "3f0c2d8a-0000-4000-8000-0000000000cc"
	release  = "2025.1"
)

// rig is one agent with its driver on an in-memory bus, between a conductor and fakes that behave. Everything of the
// agent is real, the journal on the disk too; containers, ports and images are the fakes'.
type rig struct {
	bus       *membus.Bus
	conductor *conductortest.Conductor
	world     *fake.World
	handle    *fake.Handle
	agent     *agent.Agent
	driver    *novadriver.Driver
	api       *oslomsg.Client
	records   string
	conns     []*membus.Conn
	next      atomic.Int64
	// userData comes with every server; a long one makes each message and record large, so that one kept too long shows.
	userData string

	mu    sync.Mutex
	ended map[string]chan error // by instance: how its operation ended
}

func newRig(dir string) (_ *rig, err error) {
	r := &rig{bus: membus.New(), world: fake.NewWorld(hostName), ended: map[string]chan error{}, records: filepath.Join(dir, "records", "instances")}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.conductor, err = conductortest.New(r.connect(), release); err != nil {
		return r, err
	}
	r.conductor.Hook(r.hear)
	if r.api, err = oslomsg.NewClient(r.connect(), oslomsg.ClientOptions{}); err != nil {
		return r, err
	}
	r.world.AddImage(&novalet.Image{ID: imageID, Kind: novalet.KindApplication, Size: 1 << 20, Layers: []novalet.Layer{{DiffID: "sha256:a"}},
		Config: novalet.ImageConfig{Cmd: []string{"/bin/sleep", "1d"}}})
	r.handle = r.world.Open()
	log := slog.New(slog.DiscardHandler)
	r.driver, err = novadriver.New(novadriver.Options{Host: hostName, MyIP: "192.0.2.1", StateDir: dir, Transport: r.connect(), Logger: log,
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

func (r *rig) connect() *membus.Conn {
	c := r.bus.Connect()
	r.conns = append(r.conns, c)
	return c
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
	if r.api != nil {
		errs = append(errs, r.api.Close())
	}
	if r.conductor != nil {
		r.conductor.Close()
	}
	for _, c := range r.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// hear listens for the end of operations: the last thing an agent tells of each is the end of its action event.
func (r *rig) hear(q conductortest.Request) conductortest.Fate {
	if q.Action != "event_finish_with_failure" {
		return conductortest.Fate{}
	}
	var a struct {
		Args   []string           `json:"args"`
		Kwargs map[string]*string `json:"kwargs"`
	}
	// Other keyword arguments are no texts; only exc_val matters.
	_ = json.Unmarshal(q.Args, &a)
	if len(a.Args) < 2 {
		return conductortest.Fate{}
	}
	r.mu.Lock()
	ch := r.ended[a.Args[0]]
	r.mu.Unlock()
	if ch != nil {
		var err error
		if v := a.Kwargs["exc_val"]; v != nil {
			err = fmt.Errorf("%s: %s", a.Args[1], *v)
		}
		ch <- err
	}
	return conductortest.Fate{}
}

// step is one cast in a server's life.
type step struct {
	method string
	task   string
	args   map[string]any
}

// life is what every server goes through.
var life = []step{
	{"build_and_run_instance", "scheduling", nil},
	{"stop_instance", "powering-off", map[string]any{"clean_shutdown": true}},
	{"start_instance", "powering-on", nil},
	{"reboot_instance", "rebooting_hard", map[string]any{"reboot_type": "HARD", "block_device_info": nil}},
	{"pause_instance", "pausing", nil},
	{"unpause_instance", "unpausing", nil},
	{"terminate_instance", "deleting", map[string]any{"bdms": nil}},
}

// live takes one server through its life and returns how long each operation took from the cast to its end.
func (r *rig) live(ctx context.Context) ([]time.Duration, error) {
	n := r.next.Add(1)
	uuid := fmt.Sprintf("%08x-0000-4000-8000-%012x", n>>32, n)
	rel, err := ovo.ReleaseNamed(release)
	if err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	r.mu.Lock()
	r.ended[uuid] = ended
	r.mu.Unlock()
	defer r.forget(uuid)
	if err := r.create(rel, uuid); err != nil {
		return nil, err
	}
	var took []time.Duration
	for i, s := range life {
		rctx := oslomsg.AdminContext(time.Now())
		rctx.Set("request_id", fmt.Sprintf("req-%s-%d", uuid, i))
		rctx.Set("project_id", "p")
		r.conductor.Put("InstanceAction", map[string]any{"instance_uuid": uuid, "action": s.method, "request_id": rctx.RequestID()})
		r.conductor.Change("Instance", "uuid", uuid, map[string]any{"task_state": s.task})
		row := r.conductor.Find("Instance", "uuid", uuid)
		if len(row) != 1 {
			return took, fmt.Errorf("instance %s has %d rows", uuid, len(row))
		}
		inst := &ovo.Object{Name: "Instance", Namespace: "nova", Version: rel.Version("Instance"), Data: row[0]}
		args := map[string]any{"instance": inst}
		for k, v := range s.args {
			args[k] = v
		}
		if i == 0 {
			buildArgs(rel, args)
		}
		began := time.Now()
		if err := r.api.Cast(ctx, oslomsg.Target{Topic: "compute", Server: hostName, Version: "6.0"}, s.method, args, rctx); err != nil {
			return took, err
		}
		select {
		case err := <-ended:
			if err != nil {
				return took, fmt.Errorf("%s of %s: %w", s.method, uuid, err)
			}
		case <-ctx.Done():
			return took, fmt.Errorf("%s of %s: %w", s.method, uuid, context.Cause(ctx))
		}
		took = append(took, time.Since(began))
	}
	return took, nil
}

// create makes the row of a server as nova-api does.
func (r *rig) create(rel *ovo.Release, uuid string) error {
	flavor := rel.Minimal("Flavor", map[string]any{"id": 1, "flavorid": "1", "name": "m1.tiny", "memory_mb": 64, "vcpus": 1, "root_gb": 1,
		"ephemeral_gb": 0, "swap": 0, "extra_specs": map[string]string{}})
	inst := rel.Minimal("Instance", map[string]any{"uuid": uuid, "project_id": "p", "user_id": "u", "hostname": "web", "display_name": "web",
		"image_ref": imageID, "host": nil, "node": nil, "vm_state": "building", "task_state": "scheduling", "power_state": 0, "launched_at": nil, "user_data": r.userData,
		"metadata": map[string]string{}, "system_metadata": map[string]string{"image_base_image_ref": imageID}, "flavor": flavor})
	raw, err := json.Marshal(inst)
	if err != nil {
		return err
	}
	return r.conductor.PutWire(raw)
}

func buildArgs(rel *ovo.Release, args map[string]any) {
	net := rel.Minimal("NetworkRequest", map[string]any{"network_id": "5f0c0d6e-0000-4000-8000-000000000001", "tag": nil, "port_id": nil, "address": nil})
	args["image"] = map[string]any{"id": imageID, "name": "demo", "properties": map[string]string{}}
	args["requested_networks"] = ovo.NewList("NetworkRequestList", rel.Version("NetworkRequestList"), []*ovo.Object{net})
	args["block_device_mapping"] = ovo.NewList("BlockDeviceMappingList", rel.Version("BlockDeviceMappingList"), nil)
	args["filter_properties"], args["node"], args["security_groups"] = map[string]any{}, hostName, []string{}
	args["injected_files"], args["admin_password"], args["request_spec"] = []any{}, "secret", nil
}

// forget clears what the controllers would archive.
func (r *rig) forget(uuid string) {
	r.mu.Lock()
	delete(r.ended, uuid)
	r.mu.Unlock()
	r.conductor.Delete("Instance", "uuid", uuid)
	for _, table := range []string{"InstanceAction", "InstanceActionEvent", "InstanceFault", "InstanceInfoCache", "VirtualInterface"} {
		r.conductor.Delete(table, "instance_uuid", uuid)
	}
	r.conductor.Forget()
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
