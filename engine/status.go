package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// current asks the keeper what an instance does.
func (e *Engine) current(ctx context.Context, in *instance) (*novalet.ContainerStatus, error) {
	rec, k := in.get()
	if k == nil {
		return e.statusOf(&rec, nil), nil
	}
	list, err := k.list(ctx)
	if err != nil {
		return nil, err
	}
	return e.statusOf(&rec, list[rec.ID]), nil
}

// list asks a keeper for all its instances.
func (k *keeper) list(ctx context.Context) (map[string]*wire.Status, error) {
	var l []*wire.Status
	if _, err := k.call(ctx, wire.OpList, "", nil, &l); err != nil {
		return nil, err
	}
	m := make(map[string]*wire.Status, len(l))
	for _, s := range l {
		m[s.ID] = s
	}
	return m, nil
}

// statusOf joins the record with what the keeper says; nil is a container that no keeper has.
func (e *Engine) statusOf(rec *record, s *wire.Status) *novalet.ContainerStatus {
	st := &novalet.ContainerStatus{ID: rec.ID, State: novalet.ContainerStopped, BootID: rec.BootID}
	if s == nil {
		e.lastExit(st)
		return st
	}
	st.StartedAt, st.ExitedAt, st.ExitCode, st.OOMKills = s.StartedAt, s.ExitedAt, s.ExitCode, s.OOMKills
	switch s.State {
	case wire.StateCreated:
		st.State = novalet.ContainerCreated
	case wire.StateRunning:
		st.State = novalet.ContainerRunning
		if e.group(rec.Slot).Frozen() {
			st.State = novalet.ContainerPaused
		}
	default:
		return st
	}
	st.PID, st.NetNS = s.PID, fmt.Sprintf("/proc/%d/ns/net", s.PID)
	return st
}

// lastExit reads the exit record that a keeper left.
func (e *Engine) lastExit(st *novalet.ContainerStatus) {
	b, err := os.ReadFile(filepath.Join(e.dir(st.ID), "exit.json"))
	if err != nil {
		return
	}
	var x struct {
		ExitCode  int       `json:"exit_code"`
		ExitedAt  time.Time `json:"exited_at"`
		StartedAt time.Time `json:"started_at"`
		OOMKills  int64     `json:"oom_kills"`
	}
	if json.Unmarshal(b, &x) == nil {
		st.ExitCode, st.ExitedAt, st.StartedAt, st.OOMKills = x.ExitCode, x.ExitedAt, x.StartedAt, x.OOMKills
	}
}

// find returns an instance without its op lock.
func (e *Engine) find(id string) (*instance, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if in := e.instances[id]; in != nil {
		return in, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, novalet.ErrNotFound)
}

// Status implements novalet.Runtime.
func (e *Engine) Status(ctx context.Context, id string) (*novalet.ContainerStatus, error) {
	in, err := e.find(id)
	if err != nil {
		return nil, err
	}
	return e.current(ctx, in)
}

// List implements novalet.Runtime. It asks each keeper once.
func (e *Engine) List(ctx context.Context) ([]novalet.ContainerStatus, error) {
	e.mu.Lock()
	var ins []*instance
	for _, in := range e.instances {
		ins = append(ins, in)
	}
	var ks []*keeper
	for _, k := range e.keepers {
		ks = append(ks, k)
	}
	e.mu.Unlock()
	var mu sync.Mutex
	var wg sync.WaitGroup
	lists := map[*keeper]map[string]*wire.Status{}
	var failed error
	for _, k := range ks {
		wg.Go(func() {
			l, err := k.list(ctx)
			mu.Lock()
			defer mu.Unlock()
			lists[k] = l
			if err != nil {
				failed = err
			}
		})
	}
	wg.Wait()
	if failed != nil {
		return nil, fmt.Errorf("list containers: %w", failed)
	}
	out := make([]novalet.ContainerStatus, 0, len(ins))
	for _, in := range ins {
		rec, k := in.get()
		out = append(out, *e.statusOf(&rec, lists[k][rec.ID]))
	}
	slices.SortFunc(out, func(a, b novalet.ContainerStatus) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// Stats implements novalet.Runtime.
func (e *Engine) Stats(ctx context.Context, id string) (*novalet.ContainerStats, error) {
	st, err := e.Status(ctx, id)
	if err != nil {
		return nil, err
	}
	if st.State != novalet.ContainerRunning && st.State != novalet.ContainerPaused {
		return nil, fmt.Errorf("read counters of %s: %w: it is %s", id, novalet.ErrInvalidState, st.State)
	}
	in, err := e.find(id)
	if err != nil {
		return nil, err
	}
	rec, _ := in.get()
	s := e.group(rec.Slot).Stats()
	s.Uptime = time.Since(st.StartedAt)
	if project, err := e.projects.treeProject(e.dir(id)); err == nil && project != 0 {
		if u, err := e.projects.quota.Get(project); err == nil {
			s.RootBytes, s.RootInodes = u.Bytes, u.Inodes
		}
	} else if d := e.disk(id); d.Exists() {
		if b, n, err := d.Usage(); err == nil {
			s.RootBytes, s.RootInodes = b, n
		}
	}
	for n := range rec.Limits.EphemeralBytes {
		if b, _, err := e.ephemeral(id, n).Usage(); err == nil {
			s.EphemeralBytes += b
		}
	}
	return s, nil
}

// Root implements novalet.Runtime.
func (e *Engine) Root(_ context.Context, id string) (*novalet.RootDirs, error) {
	in, err := e.find(id)
	if err != nil {
		return nil, err
	}
	rec, _ := in.get()
	if rec.Spec == nil {
		return nil, fmt.Errorf("root of %s: %w: it has never been started", id, novalet.ErrInvalidState)
	}
	dir, err := e.rootDir(&rec, "root")
	if err != nil {
		return nil, err
	}
	return &novalet.RootDirs{Upper: filepath.Join(dir, "upper"), Layers: rec.Spec.Layers, UIDBase: rec.UIDBase, UIDSize: rec.UIDSize}, nil
}

// Freeze implements novalet.Runtime.
func (e *Engine) Freeze(ctx context.Context, id string) error { return e.freeze(ctx, id, true) }

// Thaw implements novalet.Runtime.
func (e *Engine) Thaw(ctx context.Context, id string) error { return e.freeze(ctx, id, false) }

func (e *Engine) freeze(ctx context.Context, id string, on bool) error {
	in, err := e.need(id)
	if err != nil {
		return err
	}
	defer in.op.Unlock()
	st, err := e.current(ctx, in)
	if err != nil {
		return err
	}
	if st.State != novalet.ContainerRunning && st.State != novalet.ContainerPaused {
		return fmt.Errorf("freeze container %s: %w: it is %s", id, novalet.ErrInvalidState, st.State)
	}
	return e.group(in.rec.Slot).Freeze(ctx, on)
}

// Update implements novalet.Runtime.
func (e *Engine) Update(ctx context.Context, id string, l novalet.Limits) error {
	in, err := e.need(id)
	if err != nil {
		return err
	}
	defer in.op.Unlock()
	rec, k := in.get()
	rec.Limits = l
	e.placeCPUs(&rec)
	if k != nil {
		if err := e.group(rec.Slot).Apply(&l, e.apply(&rec)); err != nil {
			return fmt.Errorf("update container %s: %w", id, err)
		}
	}
	if e.hasTree(id) {
		if err := e.limitRoot(&rec); err != nil {
			return fmt.Errorf("update container %s: %w", id, err)
		}
	}
	if _, err := e.save(&rec); err != nil {
		return err
	}
	in.mu.Lock()
	in.rec = rec
	in.mu.Unlock()
	return nil
}
