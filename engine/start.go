package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/mnt"
	"github.com/novalet/novalet/engine/monitor/wire"
	"github.com/novalet/novalet/engine/rootfs"
)

// Start implements novalet.Runtime.
func (e *Engine) Start(ctx context.Context, id string, c *novalet.ContainerSpec) error {
	in, err := e.need(id)
	if err != nil {
		return err
	}
	defer in.op.Unlock()
	// What this process has created and not started is known to wait.
	if in.userns < 0 {
		st, err := e.current(ctx, in)
		if err != nil {
			return err
		}
		switch st.State {
		case novalet.ContainerRunning, novalet.ContainerPaused:
			return nil
		case novalet.ContainerStopped:
			return fmt.Errorf("start container %s: %w: it is stopped, create it first", id, novalet.ErrInvalidState)
		}
	}
	defer in.drop()
	rec, k := in.get()
	switch {
	case c == nil && rec.Spec == nil:
		return fmt.Errorf("start container %s: %w: nothing is recorded to start", id, novalet.ErrInvalidState)
	case c == nil:
		c = rec.Spec
		rec.Rescue = nil
	case c.Rescue != "":
		if rec.Spec == nil {
			return fmt.Errorf("start container %s: %w: it has no root to rescue", id, novalet.ErrInvalidState)
		}
		rec.Rescue = c
	default:
		rec.Spec, rec.Rescue = c, nil
	}
	if c.Kind != novalet.KindApplication && c.Kind != novalet.KindMachine {
		return fmt.Errorf("start container %s: %w: kind %q", id, novalet.ErrUnsupported, c.Kind)
	}
	rec.Kind = c.Kind
	// Beside the making of the root; the program does not run before it.
	saving := make(chan error, 1)
	go func() {
		_, err := e.save(&rec)
		saving <- err
	}()
	saved := sync.OnceValue(func() error {
		err := <-saving
		if err == nil {
			in.mu.Lock()
			in.rec = rec
			in.mu.Unlock()
		}
		return err
	})
	err = e.startIn(ctx, k, &rec, c, in.userns, saved)
	if serr := saved(); err == nil {
		err = serr
	}
	// The slot of a new instance is on disk when its start is over.
	if err == nil && in.synced != nil {
		err = <-in.synced
		in.synced = nil
	}
	if err != nil {
		// The init is used up: what is left is a stopped container.
		return errors.Join(fmt.Errorf("start container %s: %w", id, err), e.settle(context.WithoutCancel(ctx), in))
	}
	e.log.Info("container started", "instance", id, "kind", c.Kind)
	return nil
}

// startIn makes the roots and has the keeper start what waits, once saved tells that the record is written.
func (e *Engine) startIn(ctx context.Context, k *keeper, rec *record, c *novalet.ContainerSpec, userns int, saved func() error) error {
	sig, err := parseSignal(c.Process.StopSignal)
	if err != nil {
		return err
	}
	if userns < 0 {
		got, err := k.call(ctx, wire.OpUserNS, rec.ID, nil, nil)
		if err != nil {
			return fromKeeper(err)
		}
		defer wire.CloseAll(got)
		if len(got) != 1 {
			return errors.New("the keeper sent no user namespace")
		}
		userns = got[0]
	}
	if c.Rescue != "" {
		if err := e.clearRescue(rec); err != nil {
			return err
		}
	}
	root, err := e.mountRoot(rec, c, rootName(c), userns)
	if err != nil {
		return err
	}
	fds := []int{root}
	defer func() { wire.CloseAll(fds) }()
	if c.Rescue != "" {
		own, err := e.mountRoot(rec, rec.Spec, rootName(rec.Spec), userns)
		if err != nil {
			return err
		}
		fds = append(fds, own)
	}
	var disks []wire.Disk
	// A rescue system gets the root to mend and nothing else.
	if c.Rescue == "" {
		for n, size := range rec.Limits.EphemeralBytes {
			fd, err := mountEphemeral(e.ephemeral(rec.ID, n), userns)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
			disks = append(disks, wire.Disk{Path: ephemeralPath(n), Name: ephemeralDevice(n), Size: size})
		}
	}
	m := &wire.Start{
		Machine: c.Kind == novalet.KindMachine, StopSignal: sig, DeadlineMS: e.o.StartTimeout.Milliseconds(),
		Process: processOf(&c.Process), Confine: e.confine(rec.ID, c.Kind), Rescue: c.Rescue, Disks: disks,
		CgroupV2: e.cg.Layout.V2 != "" && (c.Kind == novalet.KindMachine || len(e.cg.Layout.V1) == 0),
	}
	if m.Machine && c.Process.StopSignal == "SIGTERM" {
		// A container image's usual default says nothing about an init system.
		m.StopSignal = 0
	}
	for _, f := range c.Files {
		m.Files = append(m.Files, fileOf(&f))
	}
	for _, t := range c.Trees {
		tree := wire.Tree{Path: t.Path}
		for _, f := range t.Files {
			tree.Files = append(tree.Files, fileOf(&f))
		}
		m.Trees = append(m.Trees, tree)
	}
	if err := saved(); err != nil {
		return err
	}
	if _, err := k.call(ctx, wire.OpStart, rec.ID, m, nil, fds...); err != nil {
		return fromKeeper(err)
	}
	return nil
}

// mountEphemeral makes the detached mount of a further disk. On it ids are as the instance sees them.
func mountEphemeral(d rootfs.Disk, userns int) (int, error) {
	if err := d.Attach(); err != nil {
		return -1, err
	}
	fd, err := mnt.Clone(unix.AT_FDCWD, d.Mount())
	if err != nil {
		return -1, err
	}
	if err := mnt.IDMap(fd, userns); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// ephemeralPath is where an ephemeral disk is mounted: the first where cloud-init mounts ephemeral0.
func ephemeralPath(n int) string {
	if n == 0 {
		return "/mnt"
	}
	return "/mnt" + strconv.Itoa(n)
}

// ephemeralDevice is what a virtual machine would call it: the root is vda.
func ephemeralDevice(n int) string { return "vd" + string(rune('b'+n)) }

func rootName(c *novalet.ContainerSpec) string {
	if c.Rescue != "" {
		return "rescue"
	}
	return "root"
}

// clearRescue removes what an earlier rescue wrote.
func (e *Engine) clearRescue(rec *record) error {
	dir, err := e.rootDir(rec, "rescue")
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(filepath.Dir(dir))
	if err != nil {
		return fmt.Errorf("clear rescue: %w", err)
	}
	defer root.Close()
	if err := root.RemoveAll("rescue"); err != nil {
		return fmt.Errorf("clear rescue: %w", err)
	}
	return nil
}

// mountRoot makes the detached mount of a root.
func (e *Engine) mountRoot(rec *record, c *novalet.ContainerSpec, name string, userns int) (int, error) {
	if len(c.Layers) == 0 {
		return -1, novalet.Faultf(novalet.ErrAbort, "", "the image has no layers")
	}
	var layers []string
	for _, l := range c.Layers {
		layers = append(layers, l.Path)
	}
	dir, err := e.rootDir(rec, name)
	if err != nil {
		return -1, err
	}
	upper, work, err := rootfs.MakeDirs(dir, layers[len(layers)-1], rec.UIDBase, rec.UIDSize)
	if err != nil {
		return -1, err
	}
	return rootfs.Overlay(layers, upper, work, userns)
}

// rootDir is where a root's upper and work lie, made when absent.
func (e *Engine) rootDir(rec *record, name string) (string, error) {
	base := e.dir(rec.ID)
	if e.hasTree(rec.ID) {
		base = e.tree(rec.ID)
	} else if d := e.disk(rec.ID); d.Exists() {
		if err := d.Attach(); err != nil {
			return "", err
		}
		base = d.Mount()
	}
	dir := filepath.Join(base, name)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("make root: %w", err)
	}
	return dir, nil
}

func processOf(p *novalet.ProcessSpec) wire.Process {
	return wire.Process{Args: p.Args, Env: p.Env, Cwd: p.Cwd, User: p.User}
}

func fileOf(f *novalet.File) wire.File {
	return wire.File{Path: f.Path, Mode: f.Mode, Data: f.Data, Append: f.Append, IfAbsent: f.IfAbsent}
}

// parseSignal reads a stop signal as images write it: "SIGTERM", "TERM", "15", "SIGRTMIN+3". Empty is 0.
func parseSignal(s string) (int, error) {
	bad := func() (int, error) {
		return 0, novalet.Faultf(novalet.ErrAbort, "", "the image's stop signal %q is no signal", s)
	}
	if s == "" {
		return 0, nil
	}
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > 64 {
			return bad()
		}
		return n, nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if rest, ok := strings.CutPrefix(name, "SIGRTMIN"); ok {
		if rest == "" {
			return 34, nil
		}
		n, err := strconv.Atoi(strings.TrimPrefix(rest, "+"))
		if err != nil || n < 0 || n > 30 {
			return bad()
		}
		return 34 + n, nil
	}
	if n := unix.SignalNum(name); n != 0 {
		return int(n), nil
	}
	return bad()
}
