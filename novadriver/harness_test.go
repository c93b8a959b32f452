package novadriver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/conductortest"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/oslomsg/membus"
	"github.com/novalet/novalet/novadriver/ovo"
	"github.com/novalet/novalet/novadriver/placement"
)

// patience is how long a test waits for what must happen; nothing depends on it being short.
const patience = 60 * time.Second

// fakeAgent is a novalet.Compute that records what it is asked.
type fakeAgent struct {
	mu        sync.Mutex
	ops       []*novalet.Operation
	events    []novalet.ExternalEvent
	submitErr error
	tracked   []novalet.TrackedInstance
	resources novalet.HostResources
	attached  *novalet.InterfaceRequest
	vif       *novalet.VIF
	err       error // of everything but Submit
	output    string
	lines     int
	port      int
	user      string // whose password is set
	password  novalet.Secret
	quiesced  []string      // what was asked, in order
	wait      chan struct{} // if set, CacheImages waits for it
}

func (a *fakeAgent) Submit(_ context.Context, op *novalet.Operation) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.submitErr != nil {
		return a.submitErr
	}
	if !slices.ContainsFunc(a.ops, func(o *novalet.Operation) bool { return o.ID == op.ID }) {
		a.ops = append(a.ops, op)
	}
	return nil
}

func (a *fakeAgent) ExternalEvents(_ context.Context, _ novalet.RequestContext, ev []novalet.ExternalEvent) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.events = append(a.events, ev...)
}

func (a *fakeAgent) AttachInterface(_ context.Context, r *novalet.InterfaceRequest) (*novalet.VIF, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.attached = r
	return a.vif, a.err
}

func (a *fakeAgent) ConsoleOutput(_ context.Context, _ string, lines int) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.lines = lines
	return a.output, a.err
}

func (a *fakeAgent) SerialConsole(context.Context, string, time.Duration) (*novalet.ConsoleAccess, error) {
	if a.err != nil {
		return nil, a.err
	}
	return &novalet.ConsoleAccess{Host: "192.0.2.7", Port: a.port}, nil
}

func (a *fakeAgent) ConsolePort(_ context.Context, _ string, port int) (bool, error) {
	return port == a.port, a.err
}

func (a *fakeAgent) Diagnostics(context.Context, string) (*novalet.Diagnostics, error) {
	if a.err != nil {
		return nil, a.err
	}
	return &novalet.Diagnostics{
		State: "running", Uptime: 90 * time.Second, MemoryMB: 512, MemoryUsed: 100, CPUTimes: []time.Duration{3 * time.Second},
		NICs: map[string]novalet.InterfaceStats{"fa:16:3e:11:22:33": {RxBytes: 7, TxPackets: 2}}, Disk: novalet.ContainerStats{DiskReadBytes: 11},
	}, nil
}

func (a *fakeAgent) SetAdminPassword(_ context.Context, _, user string, p novalet.Secret) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.user, a.password = user, p
	return a.err
}

func (a *fakeAgent) Quiesce(_ context.Context, uuid string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.quiesced = append(a.quiesced, "quiesce "+uuid)
	return a.err
}

func (a *fakeAgent) Unquiesce(uuid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.quiesced = append(a.quiesced, "unquiesce "+uuid)
}

func (a *fakeAgent) CacheImages(ctx context.Context, _ novalet.RequestContext, ids []string) (map[string]string, error) {
	if a.wait != nil {
		select {
		case <-a.wait:
		case <-ctx.Done():
		}
	}
	out := map[string]string{}
	for _, id := range ids {
		out[id] = "cached"
	}
	return out, a.err
}

func (a *fakeAgent) Tracked() []novalet.TrackedInstance {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.tracked)
}

func (a *fakeAgent) Resources(context.Context) (novalet.HostResources, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.resources, nil
}

func (a *fakeAgent) operations() []*novalet.Operation {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.ops)
}

func (a *fakeAgent) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// fakeProvider is a Provider that remembers.
type fakeProvider struct {
	mu        sync.Mutex
	want      *placement.Want
	traits    map[string]bool // known to this Placement; nil is all
	calls     []string
	consumers []string
	err       error
}

func (p *fakeProvider) note(call string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, call)
	return p.err
}

func (p *fakeProvider) Sync(_ context.Context, w *placement.Want) (map[string]float64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return nil, p.err
	}
	p.want = w
	r := map[string]float64{}
	for k, c := range w.Classes {
		if r[k] = c.Initial; c.Ratio != nil {
			r[k] = *c.Ratio
		}
	}
	return r, nil
}

func (p *fakeProvider) wanted() *placement.Want {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.want
}

func (p *fakeProvider) did() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.calls)
}

func (p *fakeProvider) SetTrait(_ context.Context, _, trait string, on bool) error {
	if on {
		return p.note("set " + trait)
	}
	return p.note("unset " + trait)
}

func (p *fakeProvider) HasTrait(_ context.Context, trait string) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.traits == nil || p.traits[trait], p.err
}

func (p *fakeProvider) DeleteAllocation(_ context.Context, id string) error {
	return p.note("delete " + id)
}

func (p *fakeProvider) RemoveFromAllocation(_ context.Context, c, _ string) error {
	return p.note("remove from " + c)
}

func (p *fakeProvider) Consumers(context.Context, string) ([]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.consumers), p.err
}

func (p *fakeProvider) MoveAllocation(_ context.Context, from, to string) error {
	return p.note("move " + from + " to " + to)
}

// logBuffer collects log lines.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Count(l.b.Bytes(), []byte(s))
}

// bench is a bus with a conductor, a driver on it, and a client that plays nova-api.
type bench struct {
	t         *testing.T
	bus       *membus.Bus
	conductor *conductortest.Conductor
	driver    *Driver
	conn      *membus.Conn // the driver's
	agent     *fakeAgent
	provider  *fakeProvider
	api       *oslomsg.Client
	logs      *logBuffer
	options   Options
}

// newBench makes all but the running driver. release "" makes no conductor.
func newBench(t *testing.T, release string, change ...func(*Options)) *bench {
	t.Helper()
	b := &bench{t: t, bus: membus.New(), logs: &logBuffer{}, provider: &fakeProvider{}}
	b.agent = &fakeAgent{port: 10007, resources: novalet.HostResources{VCPUs: 8, MemoryMB: 16000, DiskGB: 100, DiskFreeGB: 90, Arch: "x86_64"}}
	if release != "" {
		b.serveConductor(release)
	}
	apiConn := b.bus.Connect()
	api, err := oslomsg.NewClient(apiConn, oslomsg.ClientOptions{Timeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	b.api = api
	b.conn = b.bus.Connect()
	b.options = Options{
		Host: "host1", Node: "node1", MyIP: "192.0.2.1", StateDir: t.TempDir(), Transport: b.conn, Placement: b.provider,
		Logger: slog.New(slog.NewTextHandler(b.logs, &slog.HandlerOptions{Level: slog.LevelDebug})), RPCTimeout: patience,
		ReportInterval: 20 * time.Millisecond, SerialConsole: true, TrackInstanceChanges: true,
		Resources: ResourceOptions{ReservedMemoryMB: 512}, pause: 5 * time.Millisecond, uptime: func() string { return "up 1 day" },
	}
	for _, f := range change {
		f(&b.options)
	}
	t.Cleanup(func() {
		if b.driver != nil {
			if err := b.driver.Close(); err != nil {
				t.Errorf("close the driver: %v", err)
			}
		}
		_ = api.Close()
		if b.conductor != nil {
			b.conductor.Close()
		}
		_ = apiConn.Close()
		_ = b.conn.Close()
	})
	return b
}

func (b *bench) serveConductor(release string) {
	b.t.Helper()
	conn := b.bus.Connect()
	c, err := conductortest.New(conn, release)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = conn.Close() })
	b.conductor = c
}

// build makes the driver without starting it.
func (b *bench) build() *Driver {
	b.t.Helper()
	d, err := New(b.options)
	if err != nil {
		b.t.Fatal(err)
	}
	d.SetCompute(b.agent)
	b.driver = d
	return d
}

// started makes a bench with a driver that serves.
func started(t *testing.T, release string, change ...func(*Options)) *bench {
	t.Helper()
	b := newBench(t, release, change...)
	d := b.build()
	if err := d.Start(b.ctx()); err != nil {
		t.Fatal(err)
	}
	if err := d.Ready(b.ctx()); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	b.t.Cleanup(cancel)
	return ctx
}

// eventually waits for something to become true.
func (b *bench) eventually(what string, f func() bool) {
	b.t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			b.logs.mu.Lock()
			defer b.logs.mu.Unlock()
			b.t.Fatalf("waited in vain: %s\n%s", what, b.logs.b.String())
		}
	}
}

func userContext() oslomsg.Context {
	c := oslomsg.AdminContext(time.Now())
	c.Set("request_id", "req-11111111-1111-4111-8111-111111111111")
	c.Set("user_id", "user1")
	c.Set("project_id", "project1")
	c.Set("auth_token", "TOKEN")
	c.Set("is_admin", false)
	c.Set("roles", []string{"member"})
	return c
}

func (b *bench) target() oslomsg.Target {
	return oslomsg.Target{Topic: "compute", Server: "host1", Version: "6.0"}
}

func (b *bench) call(method string, args any) (json.RawMessage, error) {
	return b.api.Call(b.ctx(), b.target(), method, args, userContext())
}

func (b *bench) cast(method string, args any) {
	b.t.Helper()
	if err := b.api.Cast(b.ctx(), b.target(), method, args, userContext()); err != nil {
		b.t.Fatal(err)
	}
}

// refused calls a method that must fail, and returns its failure.
func (b *bench) refused(method string, args any) *oslomsg.RemoteError {
	b.t.Helper()
	_, err := b.call(method, args)
	var e *oslomsg.RemoteError
	if !errors.As(err, &e) {
		b.t.Fatalf("%s: want a failure, got %v", method, err)
	}
	return e
}

const instUUID = "5d1f7c1e-0000-4000-8000-000000000001"

// instance makes an Instance object, and its row.
func (b *bench) instance(fields map[string]any) *ovo.Object {
	f := map[string]any{
		"id": 1, "host": "host1", "node": "node1", "vm_state": "active", "task_state": nil, "power_state": 1, "project_id": "project1",
		"hostname": "web-1", "image_ref": "3f0c2d8a-0000-4000-8000-0000000000cc", "metadata": map[string]string{}, "system_metadata": map[string]string{},
	}
	maps.Copy(f, fields)
	o := ovo.Releases()[0].Minimal("Instance", f).Key("uuid", instUUID)
	o.ResetChanges()
	raw, err := json.Marshal(o)
	if err != nil {
		b.t.Fatal(err)
	}
	if len(b.conductor.Find("Instance", "uuid", instUUID)) == 0 {
		if err := b.conductor.PutWire(raw); err != nil {
			b.t.Fatal(err)
		}
		b.conductor.Put("InstanceAction", map[string]any{"instance_uuid": instUUID, "action": "x", "request_id": userContext().RequestID()})
	}
	return o
}

// recorded reads a recorded message.
func recorded(t *testing.T, release, method string) (routingKey string, message map[string]json.RawMessage) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", release, method+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		Key     string                     `json:"routing_key"`
		Message map[string]json.RawMessage `json:"message"`
	}
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	return f.Key, f.Message
}

// publish puts a recorded message on the bus as its sender did, for host1.
func (b *bench) publish(message map[string]json.RawMessage, queue string) {
	b.t.Helper()
	inner, err := json.Marshal(message)
	if err != nil {
		b.t.Fatal(err)
	}
	body, err := json.Marshal(map[string]string{"oslo.version": "2.0", "oslo.message": string(inner)})
	if err != nil {
		b.t.Fatal(err)
	}
	conn := b.bus.Connect()
	defer conn.Close()
	if err := conn.Publish(b.ctx(), oslomsg.Publishing{Exchange: "nova", RoutingKey: queue, Mandatory: true, Body: body}); err != nil {
		b.t.Fatal(err)
	}
}
