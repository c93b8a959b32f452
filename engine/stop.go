package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// Stop implements novalet.Runtime.
func (e *Engine) Stop(ctx context.Context, id string, o novalet.StopOptions) error {
	in := e.lock(id)
	if in == nil {
		return nil
	}
	defer in.op.Unlock()
	if err := e.end(ctx, in, o.Timeout); err != nil {
		return fmt.Errorf("stop container %s: %w", id, err)
	}
	return nil
}

// end stops what runs and lets go of it.
func (e *Engine) end(ctx context.Context, in *instance, timeout time.Duration) error {
	rec, k := in.get()
	if k == nil {
		return nil
	}
	g := e.group(rec.Slot)
	if g.Frozen() {
		if err := g.Freeze(ctx, false); err != nil {
			return err
		}
	}
	began := time.Now()
	if _, err := k.call(ctx, wire.OpStop, rec.ID, &wire.Stop{TimeoutMS: timeout.Milliseconds()}, nil); err != nil {
		if err = fromKeeper(err); !errors.Is(err, novalet.ErrNotFound) {
			return err
		}
	}
	if err := e.settle(ctx, in); err != nil {
		return err
	}
	e.log.Info("container stopped", "instance", rec.ID, "took", time.Since(began))
	return nil
}

// settle makes the keeper forget a container that has ended, ending it if it has not, and removes its cgroups. It
// may be repeated.
func (e *Engine) settle(ctx context.Context, in *instance) error {
	in.drop()
	rec, k := in.get()
	if k != nil {
		// Most have ended: the keeper refuses to forget one that has not.
		_, err := k.call(ctx, wire.OpForget, rec.ID, nil, nil)
		if errors.Is(fromKeeper(err), novalet.ErrInvalidState) {
			if _, err = k.call(ctx, wire.OpStop, rec.ID, &wire.Stop{}, nil); err == nil {
				_, err = k.call(ctx, wire.OpForget, rec.ID, nil, nil)
			}
		}
		if err = fromKeeper(err); err != nil && !errors.Is(err, novalet.ErrNotFound) {
			return err
		}
		k.add(-1)
		in.mu.Lock()
		in.keeper = nil
		in.mu.Unlock()
	}
	return e.group(rec.Slot).Remove()
}

// settleLater tidies up after a container that ended by itself.
func (e *Engine) settleLater(id string) {
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		in := e.lock(id)
		if in == nil {
			return
		}
		defer in.op.Unlock()
		rec, k := in.get()
		if k == nil {
			return
		}
		var list []wire.Status
		if _, err := k.call(e.ctx, wire.OpList, "", nil, &list); err != nil {
			return
		}
		for _, s := range list {
			// By now it may have been created anew.
			if s.ID == id && s.State == wire.StateExited {
				if err := e.settle(context.WithoutCancel(e.ctx), in); err != nil {
					e.log.Error("tidy up after exit", "instance", rec.ID, "error", err)
				}
			}
		}
	}()
}

// Destroy implements novalet.Runtime.
func (e *Engine) Destroy(ctx context.Context, id string, o novalet.DestroyOptions) error {
	in := e.lock(id)
	if in == nil {
		return nil
	}
	defer in.op.Unlock()
	err := e.end(ctx, in, 0)
	if err == nil && o.KeepRoot {
		err = detachDisks(e.dir(id))
	} else if err == nil {
		err = e.remove(ctx, in)
	}
	if err != nil {
		return fmt.Errorf("destroy container %s: %w", id, err)
	}
	e.log.Info("container destroyed", "instance", id)
	return nil
}

// remove drops everything of a container, its range of ids last. Its directory is put aside at once and emptied
// later: an unmount and a large tree take time that nobody has to wait for.
func (e *Engine) remove(ctx context.Context, in *instance) error {
	if err := e.settle(ctx, in); err != nil {
		return err
	}
	rec, _ := in.get()
	aside, err := e.putAside(e.dir(rec.ID))
	if err != nil {
		return err
	}
	disk, again := e.reclaim(aside, rec.Limits.RootBytes, rec.Limits.RootInodes)
	e.mu.Lock()
	delete(e.instances, rec.ID)
	delete(e.slots, rec.Slot)
	e.mu.Unlock()
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		if again {
			e.recycle(disk, rec.Limits.RootBytes, rec.Limits.RootInodes)
		}
		e.emptyTrash()
	}()
	return nil
}

// putAside moves an instance's directory into the trash, and tells its place there.
func (e *Engine) putAside(dir string) (string, error) {
	to := filepath.Join(e.o.StateDir, "trash", fmt.Sprintf("%s.%d", filepath.Base(dir), time.Now().UnixNano()))
	if err := os.Rename(dir, to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("put aside: %w", err)
	}
	return to, nil
}

// emptyTrash removes what was put aside. One does at a time: others would stumble over the same trees. Who comes meanwhile
// leaves it to that one to look again.
func (e *Engine) emptyTrash() {
	if e.trash.Add(1) > 1 {
		return
	}
	for {
		n := e.trash.Load()
		e.emptyTrashOnce()
		if e.trash.CompareAndSwap(n, 0) {
			return
		}
	}
}

// emptyTrashOnce removes what is there. The trees have been tenants': they are removed through os.Root, which no
// link in them leads out of.
func (e *Engine) emptyTrashOnce() {
	dir := filepath.Join(e.o.StateDir, "trash")
	es, err := os.ReadDir(dir)
	if err != nil {
		e.log.Error("empty trash", "error", err)
		return
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		e.log.Error("empty trash", "error", err)
		return
	}
	defer root.Close()
	var projects []uint32
	for _, d := range es {
		disks := filepath.Join(dir, d.Name())
		project, err := e.projects.treeProject(disks)
		if err == nil {
			err = detached(func() error { return detachDisks(disks) })
		}
		if err == nil {
			err = root.RemoveAll(d.Name())
		}
		if err == nil && project != 0 {
			projects = append(projects, project)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			e.log.Error("empty trash", "name", d.Name(), "error", err)
		}
	}
	if err := e.dropLater(projects); err != nil {
		e.log.Error("empty trash", "error", err)
	}
}
