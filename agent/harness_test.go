package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testHost  = "host1"
	appImage  = "3f0c2d8a-0000-4000-8000-0000000000cc"
	diskImage = "3f0c2d8a-0000-4000-8000-0000000000dd"
)

// What a guest does.
const run, off, ice = novalet.ContainerRunning, novalet.ContainerStopped, novalet.ContainerPaused

// lab is a world with one agent on it.
type lab struct {
	t     testing.TB
	dir   string
	world *fake.World
	cfg   Config
	agent *Agent
	h     *fake.Handle
	told  fake.Notifier
	pci   novalet.PCIDevices
	// unbound, when not nil, has the plugger see when Neutron's side lets go of a port: when it is closed.
	unbound chan struct{}
	next    int
}

func newLab(t testing.TB, options ...func(*lab)) *lab {
	t.Helper()
	l := &lab{t: t, dir: t.TempDir(), world: fake.NewWorld(testHost), cfg: DefaultConfig()}
	l.world.AddImage(&novalet.Image{ID: appImage, Kind: novalet.KindApplication, Size: 1 << 20,
		Layers: []novalet.Layer{{DiffID: "sha256:a"}}, Config: novalet.ImageConfig{Cmd: []string{"/bin/sleep", "1d"}, Env: []string{"A=image", "B=image"}}})
	l.world.AddImage(&novalet.Image{ID: diskImage, Kind: novalet.KindMachine, Size: 1 << 20, Init: "/sbin/init",
		Layers: []novalet.Layer{{DiffID: "sha256:d"}}})
	for _, o := range options {
		o(l)
	}
	l.open()
	t.Cleanup(l.close)
	return l
}

// open starts an agent process on the world: the first, or the next one.
func (l *lab) open() {
	l.t.Helper()
	if err := l.tryOpen(); err != nil {
		l.t.Fatal(err)
	}
	if err := l.agent.Recover(context.Background()); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) tryOpen() error {
	l.h = l.world.Open()
	var plugger novalet.VIFPlugger = l.h.Plugger
	if l.unbound != nil {
		plugger = &watcher{l.h.Plugger, l.unbound}
	}
	a, err := Open(Options{Host: testHost, StateDir: l.dir, Config: l.cfg,
		Logger:    testLogger(),
		Conductor: l.h.Conductor, Placement: l.h.Placement, Images: l.h.Images, Network: l.h.Network,
		Plugger: plugger, PCI: l.pci, Runtime: l.h.Runtime, Notifier: &l.told, BootID: func() (string, error) { return l.world.BootID(), nil }})
	if err != nil {
		return err
	}
	a.store.sync = false // the disk's own speed is no part of these tests
	l.agent = a
	l.world.OnActive(func(p *fake.Port) {
		a.ExternalEvents(context.Background(), novalet.RequestContext{}, []novalet.ExternalEvent{{InstanceUUID: p.Device, Name: "network-vif-plugged", Status: "completed", Tag: p.ID}})
	})
	return nil
}

func (l *lab) close() {
	if l.agent == nil {
		return
	}
	if err := l.agent.Close(); err != nil {
		l.t.Error(err)
	}
	l.agent = nil
}

// crash ends the agent as SIGKILL does: nothing more of it reaches the disk or the world.
func (l *lab) crash() {
	l.agent.store.frozen.Store(true)
	l.h.Faults.Kill()
	l.close()
}

// killAt has the agent die at the nth time that a step is before or after its effect. The function it returns waits for that
// and has nothing more of this agent happen.
func (l *lab) killAt(step string, phase fake.Phase, nth int) (dead func()) {
	reached := make(chan struct{})
	var n atomic.Int64
	agent, faults := l.agent, l.h.Faults
	faults.Hook(func(_ context.Context, name string, p fake.Phase) {
		if name == step && p == phase && n.Add(1) == int64(nth) {
			agent.store.frozen.Store(true)
			faults.Kill()
			close(reached)
		}
	})
	return func() {
		l.t.Helper()
		select {
		case <-reached:
		case <-l.t.Context().Done():
			l.t.Fatalf("%s was never reached", step)
		}
		l.crash()
	}
}

// testLogger is silent unless NOVALET_TEST_LOG=1.
func testLogger() *slog.Logger {
	if os.Getenv("NOVALET_TEST_LOG") != "1" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// server makes the row and allocation of a new server, and the operation that builds it.
func (l *lab) server(change ...func(*novalet.Operation)) *novalet.Operation {
	l.next++
	uuid := fmt.Sprintf("%08d-0000-4000-8000-000000000000", l.next)
	zero := int64(0)
	op := &novalet.Operation{
		ID: "build-" + uuid, Method: novalet.MethodBuild, Context: novalet.RequestContext{RequestID: "req-" + uuid},
		Instance: novalet.Instance{ID: int64(l.next), UUID: uuid, Name: "instance-1", ProjectID: "p", Hostname: "web", DisplayName: "web",
			ImageRef: appImage, VMState: novalet.VMBuilding, TaskState: novalet.TaskScheduling,
			Metadata: map[string]string{"B": "meta", "C": "meta", "not a name": "x"}, SystemMetadata: map[string]string{"image_base_image_ref": appImage},
			Flavor: novalet.Flavor{MemoryMB: 64, VCPUs: 1, RootGB: 1}},
		Args: novalet.OperationArgs{Build: &novalet.BuildArgs{Image: novalet.ImageMeta{ID: appImage}, Node: testHost,
			RequestedNetworks: []novalet.NetworkRequest{{NetworkID: "net"}},
			BlockDevices:      []novalet.BlockDevice{{SourceType: "image", DestinationType: "local", BootIndex: &zero}}}},
	}
	for _, c := range change {
		c(op)
	}
	l.world.PutRow(op.Instance)
	l.world.Allocate(uuid)
	return op
}

func (l *lab) submit(op *novalet.Operation) {
	l.t.Helper()
	if err := l.agent.Submit(context.Background(), op); err != nil {
		l.t.Fatalf("submit %s: %v", op.Method, err)
	}
}

// boot builds a server and waits until it is ACTIVE.
func (l *lab) boot(change ...func(*novalet.Operation)) string {
	l.t.Helper()
	op := l.server(change...)
	l.submit(op)
	l.await(op.Instance.UUID, novalet.VMActive)
	return op.Instance.UUID
}

var opCounter atomic.Int64

// cast sets the task_state as nova-api does and submits a method for an existing server.
func (l *lab) cast(uuid string, m novalet.Method, task novalet.TaskState, args novalet.OperationArgs) *novalet.Operation {
	l.t.Helper()
	op := l.message(uuid, m, task, args)
	l.submit(op)
	return op
}

func (l *lab) message(uuid string, m novalet.Method, task novalet.TaskState, args novalet.OperationArgs) *novalet.Operation {
	l.world.SetRow(uuid, func(r *fake.Row) { r.TaskState = task })
	n := opCounter.Add(1)
	return &novalet.Operation{ID: fmt.Sprintf("op-%d", n), Method: m, Context: novalet.RequestContext{RequestID: fmt.Sprintf("req-%d", n)},
		Instance: l.world.Row(uuid).Instance, Args: args}
}

// eventually polls: nothing here depends on how fast the machine is.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}

// await waits for a vm_state without a task_state, and for the agent to be done with it.
func (l *lab) await(uuid string, vm novalet.VMState) {
	l.t.Helper()
	eventually(l.t, fmt.Sprintf("%s is %s (is %+v)", uuid, vm, l.state(uuid)), func() bool {
		r := l.world.Row(uuid)
		return r != nil && r.VMState == vm && r.TaskState == novalet.TaskNone && l.idle(uuid)
	})
}

func (l *lab) state(uuid string) string {
	r := l.world.Row(uuid)
	if r == nil {
		return "no row"
	}
	return fmt.Sprintf("%s/%s history %v", r.VMState, r.TaskState, r.History)
}

// idle says whether the agent has nothing to do for an instance and its events are written.
func (l *lab) idle(uuid string) bool {
	if in, err := l.agent.lookup(uuid); err == nil {
		in.mu.Lock()
		busy := in.busy || len(in.rec.Ops) > 0 || len(in.tasks) > 0
		in.mu.Unlock()
		if busy {
			return false
		}
	}
	for _, e := range l.world.ActionEvents(uuid) {
		if !e.Finished && e.Name != "interrupted" {
			return false
		}
	}
	return true
}

func (l *lab) awaitGone(uuid string) {
	l.t.Helper()
	eventually(l.t, uuid+" is deleted", func() bool {
		r := l.world.Row(uuid)
		_, err := l.agent.lookup(uuid)
		return r != nil && r.Deleted && err != nil
	})
}

// undoLeft has the agent try again, in a bubble, what a delete has left, and asserts that nothing is left then.
func (l *lab) undoLeft(uuid string) {
	l.t.Helper()
	in, err := l.agent.lookup(uuid)
	if err != nil {
		l.t.Fatal("the ports that are left were forgotten")
	}
	in.retryUndo()
	synctest.Wait()
	l.checkNothingLeft(uuid)
}

// checkNothingLeft asserts that host and cloud hold nothing of the instance.
func (l *lab) checkNothingLeft(uuid string) {
	l.t.Helper()
	if s := l.world.State(uuid); s != "" {
		l.t.Errorf("container is left: %s", s)
	}
	if p := l.world.Plugs(uuid); len(p) > 0 {
		l.t.Errorf("plugs are left: %v", p)
	}
	if p := l.world.Ports(uuid); len(p) > 0 {
		l.t.Errorf("ports are left: %v", p)
	}
	for _, id := range l.world.Leased() {
		if id == uuid {
			l.t.Error("image lease is left")
		}
	}
	if l.world.Announced(uuid) {
		l.t.Error("the resource tracker still counts it")
	}
	eventually(l.t, "the record is gone", func() bool {
		_, err := os.Stat(filepath.Join(l.dir, "instances", uuid+".json"))
		return os.IsNotExist(err)
	})
	entries, err := os.ReadDir(filepath.Join(l.dir, "instances"))
	if err != nil {
		l.t.Fatal(err)
	}
	for _, e := range entries {
		if strings.Contains(e.Name(), uuid) {
			l.t.Errorf("state file %s is left", e.Name())
		}
	}
}

// checkRunning asserts that an ACTIVE instance is whole.
func (l *lab) checkRunning(uuid string) {
	l.t.Helper()
	r := l.world.Row(uuid)
	if r.VMState != novalet.VMActive || r.TaskState != novalet.TaskNone || r.PowerState != novalet.PowerRunning || r.Host != testHost {
		l.t.Errorf("row is %s/%s power %d on %q", r.VMState, r.TaskState, r.PowerState, r.Host)
	}
	if s := l.world.State(uuid); s != novalet.ContainerRunning {
		l.t.Errorf("container is %q", s)
	}
	ports := l.world.Ports(uuid)
	if len(ports) != 1 || len(r.Info) != 1 || r.Info[0].ID != ports[0].ID {
		l.t.Errorf("ports %v, network info %v", ports, r.Info)
	}
	plugs := l.world.Plugs(uuid)
	if len(plugs) != 1 {
		l.t.Errorf("plugs %v", plugs)
	}
	if !l.world.Allocated(uuid) || !l.world.Announced(uuid) {
		l.t.Errorf("allocated %v, announced %v", l.world.Allocated(uuid), l.world.Announced(uuid))
	}
}
