package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/cgroup"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// Create implements novalet.Runtime.
func (e *Engine) Create(ctx context.Context, s *novalet.SandboxSpec) (*novalet.ContainerStatus, error) {
	if !validID.MatchString(s.ID) {
		return nil, fmt.Errorf("create container: %q is no usable id", s.ID)
	}
	if err := e.ctx.Err(); err != nil {
		return nil, context.Cause(e.ctx)
	}
	in, err := e.claim(s)
	if err != nil {
		return nil, err
	}
	defer in.op.Unlock()
	if st, err := e.current(ctx, in); err != nil {
		return nil, err
	} else if st.State != novalet.ContainerStopped {
		return st, nil
	}
	rec, k := in.get()
	if k != nil {
		if err := e.settle(ctx, in); err != nil {
			return nil, err
		}
	}
	fresh := !in.saved
	rec.Hostname, rec.Limits, rec.BootID = hostname(s.Hostname), s.Limits, e.bootID
	if s.Kind != "" {
		rec.Kind = s.Kind
	}
	e.placeCPUs(&rec)
	status, err := e.build(ctx, in, &rec)
	if err != nil {
		undo := context.WithoutCancel(ctx)
		if fresh {
			return nil, errors.Join(err, e.remove(undo, in))
		}
		return nil, errors.Join(err, e.settle(undo, in))
	}
	return status, nil
}

// claim returns the instance with its op lock held, new with a range of ids unless it exists.
func (e *Engine) claim(s *novalet.SandboxSpec) (*instance, error) {
	for {
		if in := e.lock(s.ID); in != nil {
			return in, nil
		}
		e.mu.Lock()
		if e.instances[s.ID] != nil {
			e.mu.Unlock()
			continue
		}
		warm := e.takeWarm(s.ID)
		var slot int
		var base uint32
		if warm != nil {
			slot, base = warm.slot, warm.base
		} else {
			var err error
			if slot, base, err = e.takeSlot(s.ID); err != nil {
				e.mu.Unlock()
				return nil, err
			}
		}
		in := &instance{warm: warm, userns: -1, rec: record{Version: recordVersion, ID: s.ID, Slot: slot, UIDBase: base, UIDSize: e.o.UIDCount}}
		in.op.Lock()
		e.instances[s.ID] = in
		e.mu.Unlock()
		return in, nil
	}
}

// build makes everything of a container but its root: record, disk, cgroups, and, in a keeper, namespaces and the
// waiting init. On error what it made is left to the caller's settle or remove.
func (e *Engine) build(ctx context.Context, in *instance, rec *record) (*novalet.ContainerStatus, error) {
	if err := os.Mkdir(e.dir(rec.ID), 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("create container: %w", err)
	}
	in.mu.Lock()
	in.rec, in.saved = *rec, true
	in.mu.Unlock()
	var err error
	if in.synced, err = e.save(rec); err != nil {
		return nil, err
	}
	disk := make(chan error, 1)
	go func() { disk <- e.makeDisks(ctx, rec) }()
	var st wire.Status
	err = e.sandbox(ctx, in, rec, &st)
	if err = errors.Join(err, <-disk); err != nil {
		return nil, err
	}
	return e.statusOf(rec, &st), nil
}

func (e *Engine) sandbox(ctx context.Context, in *instance, rec *record, st *wire.Status) error {
	g := e.group(rec.Slot)
	if w := in.warm; w != nil {
		in.warm = nil
		e.later(e.fillWarm)
		err := e.assign(ctx, in, rec, w, st)
		if err == nil {
			e.log.Info("container created", "instance", rec.ID, "uid_base", rec.UIDBase, "prepared", true)
			return nil
		}
		e.log.Warn("prepared sandbox not usable", "instance", rec.ID, "error", err)
	}
	if err := g.Create(rec.UIDBase, &rec.Limits, e.apply(rec)); err != nil {
		return fmt.Errorf("create container %s: %w", rec.ID, err)
	}
	dir, err := os.Open(e.dir(rec.ID))
	if err != nil {
		return fmt.Errorf("create container: %w", err)
	}
	defer dir.Close()
	m := &wire.Create{Slot: rec.Slot, Hostname: rec.Hostname, UIDBase: rec.UIDBase, UIDSize: rec.UIDSize, LogMax: e.o.ConsoleLogBytes}
	fds := []int{int(dir.Fd())}
	defer func() { wire.CloseAll(fds[1:]) }()
	for _, r := range g.Refs() {
		fd, err := unix.Open(r.Path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("create container: open cgroup: %w", err)
		}
		fds = append(fds, fd)
		m.Cgroups = append(m.Cgroups, wire.CgroupRef{Kind: r.Kind, Controller: r.Controller})
	}
	k, err := e.reserve(ctx)
	if err != nil {
		return err
	}
	got, err := k.call(ctx, wire.OpCreate, rec.ID, m, st, fds...)
	if err != nil {
		// The keeper may have it all the same: settle asks.
		in.mu.Lock()
		in.keeper = k
		in.mu.Unlock()
		return fmt.Errorf("create container %s: %w", rec.ID, fromKeeper(err))
	}
	in.mu.Lock()
	in.keeper = k
	in.mu.Unlock()
	in.hold(got)
	e.log.Info("container created", "instance", rec.ID, "uid_base", rec.UIDBase)
	return nil
}

// hold keeps the user namespace that came with a creation.
func (in *instance) hold(fds []int) {
	in.drop()
	if len(fds) == 1 {
		in.userns = fds[0]
		return
	}
	wire.CloseAll(fds)
}

// drop lets go of it.
func (in *instance) drop() {
	wire.CloseAll([]int{in.userns})
	in.userns = -1
}

func (e *Engine) apply(rec *record) cgroup.ApplyOptions {
	return cgroup.ApplyOptions{CPUs: rec.CPUs, Disk: e.o.StateDir}
}

// hostname makes a name that the kernel takes.
func hostname(s string) string {
	s, _, _ = strings.Cut(s, "\x00")
	if len(s) > 64 {
		s = s[:64]
	}
	return s
}

// placeCPUs gives an instance with fewer vcpus than the host has processors a set of that many, the ones that the
// fewest others are on: so that what reads the affinity (nproc, a JVM) sees the flavor's number.
func (e *Engine) placeCPUs(rec *record) {
	rec.CPUs = ""
	n := int(rec.Limits.VCPUs)
	if rec.Limits.CPUSet != "" || n <= 0 || n >= len(e.cpus) {
		return
	}
	used := map[int]int{}
	e.mu.Lock()
	for _, in := range e.instances {
		other, k := in.get()
		if k == nil || other.ID == rec.ID {
			continue
		}
		for f := range strings.SplitSeq(other.CPUs, ",") {
			if c, err := strconv.Atoi(f); err == nil {
				used[c]++
			}
		}
	}
	e.mu.Unlock()
	cpus := slices.Clone(e.cpus)
	slices.SortStableFunc(cpus, func(a, b int) int { return used[a] - used[b] })
	cpus = cpus[:n]
	slices.Sort(cpus)
	var s []string
	for _, c := range cpus {
		s = append(s, strconv.Itoa(c))
	}
	rec.CPUs = strings.Join(s, ",")
}
