package fake

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/novalet/novalet"
)

type container struct {
	status  novalet.ContainerStatus
	sandbox novalet.SandboxSpec
	spec    *novalet.ContainerSpec
	log     []byte
	viewers map[*terminal]bool
	typed   bytes.Buffer
	stops   []time.Duration
	starts  int
	syncs   []novalet.ContainerState
}

type runtimeState struct {
	rmu        sync.Mutex
	containers map[string]*container
	boot       string
	pids       int
	events     []chan novalet.ContainerEvent
	execs      []novalet.ExecSpec
	execCode   int
}

func newRuntimeState() *runtimeState {
	return &runtimeState{containers: map[string]*container{}, boot: "boot-1", pids: 100}
}

// BootID is the id of the host's boot.
func (s *runtimeState) BootID() string {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	return s.boot
}

// RebootHost ends all containers and changes the boot id.
func (s *runtimeState) RebootHost(id string) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	s.boot = id
	for _, c := range s.containers {
		c.stop(0)
	}
}

// ContainerIDs lists the containers, running or not.
func (s *runtimeState) ContainerIDs() []string {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	return slices.Sorted(maps.Keys(s.containers))
}

// State returns a container's state, "" if there is none.
func (s *runtimeState) State(id string) novalet.ContainerState {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if c := s.containers[id]; c != nil {
		return c.status.State
	}
	return ""
}

// PID returns a container's init, 0 if none runs.
func (s *runtimeState) PID(id string) int {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if c := s.containers[id]; c != nil {
		return c.status.PID
	}
	return 0
}

// Specs returns what a container was made and started with.
func (s *runtimeState) Specs(id string) (novalet.SandboxSpec, *novalet.ContainerSpec) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	c := s.containers[id]
	if c == nil {
		return novalet.SandboxSpec{}, nil
	}
	return c.sandbox, c.spec
}

// Stops returns the timeouts that a container was stopped with.
func (s *runtimeState) Stops(id string) []time.Duration {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if c := s.containers[id]; c != nil {
		return slices.Clone(c.stops)
	}
	return nil
}

// Syncs returns the states in which a container was synced.
func (s *runtimeState) Syncs(id string) []novalet.ContainerState {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if c := s.containers[id]; c != nil {
		return slices.Clone(c.syncs)
	}
	return nil
}

// Execs returns the programs that Exec ran.
func (s *runtimeState) Execs() []novalet.ExecSpec {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	return slices.Clone(s.execs)
}

// Exit makes a container's init end by itself, and tells the listeners.
func (s *runtimeState) Exit(id string, code int) {
	s.rmu.Lock()
	s.containers[id].stop(code)
	s.rmu.Unlock()
	s.Emit(novalet.ContainerEvent{ID: id, Type: novalet.EventExited, ExitCode: code})
}

// Emit sends an event to the listeners.
func (s *runtimeState) Emit(e novalet.ContainerEvent) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	for _, ch := range s.events {
		select {
		case ch <- e:
		default:
		}
	}
}

// Print writes to a container's console.
func (s *runtimeState) Print(id, text string) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	c := s.containers[id]
	c.log = append(c.log, text...)
	for v := range c.viewers {
		v.push([]byte(text))
	}
}

// Typed returns what viewers typed.
func (s *runtimeState) Typed(id string) string {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	return s.containers[id].typed.String()
}

func (c *container) stop(code int) {
	c.status.State, c.status.PID, c.status.NetNS, c.status.ExitCode = novalet.ContainerStopped, 0, "", code
	for v := range c.viewers {
		v.end()
	}
	c.viewers = nil
}

// Runtime is a fake novalet.Runtime.
type Runtime struct {
	*runtimeState
	f *Faults
}

var _ novalet.Runtime = (*Runtime)(nil)

// Create implements novalet.Runtime.
func (r *Runtime) Create(ctx context.Context, s *novalet.SandboxSpec) (*novalet.ContainerStatus, error) {
	if err := r.f.enter(ctx, "Runtime.Create"); err != nil {
		return nil, err
	}
	r.rmu.Lock()
	c := r.containers[s.ID]
	if c == nil {
		c = &container{}
		r.containers[s.ID] = c
	}
	if c.status.State == "" || c.status.State == novalet.ContainerStopped {
		r.pids++
		c.sandbox = *s
		c.status = novalet.ContainerStatus{ID: s.ID, State: novalet.ContainerCreated, PID: r.pids,
			NetNS: fmt.Sprintf("/proc/%d/ns/net", r.pids), BootID: r.boot}
	}
	st := c.status
	r.rmu.Unlock()
	return &st, r.f.leave(ctx, "Runtime.Create")
}

// Start implements novalet.Runtime.
func (r *Runtime) Start(ctx context.Context, id string, spec *novalet.ContainerSpec) error {
	return r.on(ctx, "Runtime.Start", id, func(c *container) error {
		if c.status.State == novalet.ContainerRunning || c.status.State == novalet.ContainerPaused {
			return nil
		}
		if c.status.State != novalet.ContainerCreated {
			return fmt.Errorf("start %s: %s: %w", id, c.status.State, novalet.ErrInvalidState)
		}
		if spec != nil {
			c.spec = spec
		}
		if c.spec == nil {
			return fmt.Errorf("start %s: no spec was ever given: %w", id, novalet.ErrInvalidState)
		}
		c.status.State, c.status.StartedAt = novalet.ContainerRunning, time.Now()
		c.starts++
		return nil
	})
}

// Stop implements novalet.Runtime.
func (r *Runtime) Stop(ctx context.Context, id string, o novalet.StopOptions) error {
	if err := r.f.enter(ctx, "Runtime.Stop"); err != nil {
		return err
	}
	r.rmu.Lock()
	if c := r.containers[id]; c != nil && c.status.State != novalet.ContainerStopped {
		c.stops = append(c.stops, o.Timeout)
		c.stop(143)
	}
	r.rmu.Unlock()
	return r.f.leave(ctx, "Runtime.Stop")
}

// Freeze implements novalet.Runtime.
func (r *Runtime) Freeze(ctx context.Context, id string) error {
	return r.on(ctx, "Runtime.Freeze", id, func(c *container) error {
		if c.status.State != novalet.ContainerRunning && c.status.State != novalet.ContainerPaused {
			return fmt.Errorf("freeze %s: %s: %w", id, c.status.State, novalet.ErrInvalidState)
		}
		c.status.State = novalet.ContainerPaused
		return nil
	})
}

// Thaw implements novalet.Runtime.
func (r *Runtime) Thaw(ctx context.Context, id string) error {
	return r.on(ctx, "Runtime.Thaw", id, func(c *container) error {
		if c.status.State != novalet.ContainerRunning && c.status.State != novalet.ContainerPaused {
			return fmt.Errorf("thaw %s: %s: %w", id, c.status.State, novalet.ErrInvalidState)
		}
		c.status.State = novalet.ContainerRunning
		return nil
	})
}

// Sync implements novalet.Runtime.
func (r *Runtime) Sync(ctx context.Context, id string) error {
	return r.on(ctx, "Runtime.Sync", id, func(c *container) error {
		if c.status.State != novalet.ContainerRunning && c.status.State != novalet.ContainerPaused {
			return fmt.Errorf("sync %s: %s: %w", id, c.status.State, novalet.ErrInvalidState)
		}
		c.syncs = append(c.syncs, c.status.State)
		return nil
	})
}

// Update implements novalet.Runtime.
func (r *Runtime) Update(ctx context.Context, id string, l novalet.Limits) error {
	return r.on(ctx, "Runtime.Update", id, func(c *container) error { c.sandbox.Limits = l; return nil })
}

// Destroy implements novalet.Runtime.
func (r *Runtime) Destroy(ctx context.Context, id string, o novalet.DestroyOptions) error {
	if err := r.f.enter(ctx, "Runtime.Destroy"); err != nil {
		return err
	}
	r.rmu.Lock()
	if c := r.containers[id]; c != nil {
		c.stop(137)
		if !o.KeepRoot {
			delete(r.containers, id)
		}
	}
	r.rmu.Unlock()
	return r.f.leave(ctx, "Runtime.Destroy")
}

// Status implements novalet.Runtime.
func (r *Runtime) Status(ctx context.Context, id string) (*novalet.ContainerStatus, error) {
	var st novalet.ContainerStatus
	err := r.on(ctx, "Runtime.Status", id, func(c *container) error { st = c.status; return nil })
	return &st, err
}

// List implements novalet.Runtime.
func (r *Runtime) List(ctx context.Context) ([]novalet.ContainerStatus, error) {
	if err := r.f.enter(ctx, "Runtime.List"); err != nil {
		return nil, err
	}
	r.rmu.Lock()
	defer r.rmu.Unlock()
	var out []novalet.ContainerStatus
	for _, id := range slices.Sorted(maps.Keys(r.containers)) {
		out = append(out, r.containers[id].status)
	}
	return out, nil
}

// Stats implements novalet.Runtime.
func (r *Runtime) Stats(ctx context.Context, id string) (*novalet.ContainerStats, error) {
	st := &novalet.ContainerStats{CPU: time.Second, MemoryBytes: 1 << 20, PIDs: 3, Uptime: time.Minute}
	return st, r.on(ctx, "Runtime.Stats", id, func(c *container) error {
		if c.status.State != novalet.ContainerRunning && c.status.State != novalet.ContainerPaused {
			return fmt.Errorf("stats %s: %s: %w", id, c.status.State, novalet.ErrInvalidState)
		}
		return nil
	})
}

// Root implements novalet.Runtime.
func (r *Runtime) Root(ctx context.Context, id string) (*novalet.RootDirs, error) {
	d := &novalet.RootDirs{Upper: "/fake/" + id + "/upper", UIDBase: 100000, UIDSize: 65536}
	return d, r.on(ctx, "Runtime.Root", id, func(c *container) error {
		if c.spec != nil {
			d.Layers = c.spec.Layers
		}
		return nil
	})
}

// ConsoleLog implements novalet.Runtime.
func (r *Runtime) ConsoleLog(ctx context.Context, id string, limit int) ([]byte, error) {
	var out []byte
	err := r.on(ctx, "Runtime.ConsoleLog", id, func(c *container) error {
		out = bytes.Clone(c.log[max(0, len(c.log)-limit):])
		return nil
	})
	return out, err
}

// Console implements novalet.Runtime.
func (r *Runtime) Console(ctx context.Context, id string) (novalet.Terminal, error) {
	t := &terminal{state: r.runtimeState}
	t.more = sync.NewCond(&t.mu)
	err := r.on(ctx, "Runtime.Console", id, func(c *container) error {
		if c.status.State != novalet.ContainerRunning && c.status.State != novalet.ContainerPaused {
			return fmt.Errorf("console of %s: %s: %w", id, c.status.State, novalet.ErrInvalidState)
		}
		t.of = c
		t.buf = bytes.Clone(c.log)
		if c.viewers == nil {
			c.viewers = map[*terminal]bool{}
		}
		c.viewers[t] = true
		return nil
	})
	return t, err
}

// SetExecCode sets what Exec returns.
func (s *runtimeState) SetExecCode(code int) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	s.execCode = code
}

// Exec implements novalet.Runtime.
func (r *Runtime) Exec(ctx context.Context, id string, e *novalet.ExecSpec) (int, error) {
	code := 0
	err := r.on(ctx, "Runtime.Exec", id, func(c *container) error {
		if c.status.State != novalet.ContainerRunning {
			return fmt.Errorf("exec in %s: %s: %w", id, c.status.State, novalet.ErrInvalidState)
		}
		kept := *e
		if e.Stdin != nil {
			data, err := io.ReadAll(e.Stdin)
			if err != nil {
				return err
			}
			kept.Stdin = bytes.NewReader(data)
		}
		r.execs = append(r.execs, kept)
		code = r.execCode
		return nil
	})
	return code, err
}

// Events implements novalet.Runtime.
func (r *Runtime) Events(ctx context.Context) <-chan novalet.ContainerEvent {
	ch := make(chan novalet.ContainerEvent, 1024)
	r.rmu.Lock()
	r.events = append(r.events, ch)
	r.rmu.Unlock()
	context.AfterFunc(ctx, func() {
		r.rmu.Lock()
		defer r.rmu.Unlock()
		if i := slices.Index(r.events, ch); i >= 0 {
			r.events = slices.Delete(r.events, i, i+1)
			close(ch)
		}
	})
	return ch
}

func (r *Runtime) on(ctx context.Context, name, id string, f func(*container) error) error {
	if err := r.f.enter(ctx, name); err != nil {
		return err
	}
	r.rmu.Lock()
	c := r.containers[id]
	err := fmt.Errorf("container %s: %w", id, novalet.ErrNotFound)
	if c != nil {
		err = f(c)
	}
	r.rmu.Unlock()
	if err != nil {
		return err
	}
	return r.f.leave(ctx, name)
}

type terminal struct {
	state *runtimeState
	of    *container
	mu    sync.Mutex
	more  *sync.Cond
	buf   []byte
	ended bool
}

func (t *terminal) push(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	t.more.Broadcast()
}

func (t *terminal) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	t.more.Broadcast()
}

// Read implements io.Reader.
func (t *terminal) Read(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.buf) == 0 {
		if t.ended {
			return 0, io.EOF
		}
		t.more.Wait()
	}
	n := copy(p, t.buf)
	t.buf = t.buf[n:]
	return n, nil
}

// Write implements io.Writer.
func (t *terminal) Write(p []byte) (int, error) {
	t.state.rmu.Lock()
	defer t.state.rmu.Unlock()
	return t.of.typed.Write(p)
}

// Close implements io.Closer.
func (t *terminal) Close() error {
	t.state.rmu.Lock()
	delete(t.of.viewers, t)
	t.state.rmu.Unlock()
	t.end()
	return nil
}

// Resize implements novalet.Terminal.
func (t *terminal) Resize(uint16, uint16) error { return nil }
