package engine

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/rootfs"
)

// Where the file system of StateDir enforces project quota, a root of limited size is a directory in it, the tree, with a
// project of its own: no disk has to be made. Which project a tree has is written on the tree. A project is
// taken by giving it a limit, and free when it has none and nothing is in it, so there is no list to be kept.

// RootLimits says how the size of roots is limited.
type RootLimits string

// The choices of Options.RootLimits.
const (
	LimitAuto  RootLimits = "auto"  // by quota if the file system has it
	LimitQuota RootLimits = "quota" // by project quota; without it the engine does not open
	LimitPool  RootLimits = "pool"  // by disks in image files
)

const treeName = "tree"

// tree is the directory that holds an instance's roots, if their size is limited by quota.
func (e *Engine) tree(id string) string { return filepath.Join(e.dir(id), treeName) }

func (e *Engine) hasTree(id string) bool {
	_, err := os.Lstat(e.tree(id))
	return err == nil
}

// limiter is *rootfs.Quota.
type limiter interface {
	Get(project uint32) (rootfs.Usage, error)
	Next(project uint32) (uint32, rootfs.Usage, bool, error)
	Set(project uint32, bytes, inodes int64) error
	Close() error
}

// projects hands out the projects of one StateDir: those of a range chosen by its name, less those in use by others.
type projects struct {
	quota limiter // nil when there is none
	trees bool    // new roots are trees
	first uint32

	mu   sync.Mutex // from taking a project until something is in it
	next uint32
}

const projectRange = 1 << 16

func openProjects(dir string, limits RootLimits) (*projects, error) {
	h := fnv.New32a()
	_, _ = h.Write([]byte(dir))
	p := &projects{first: 1<<30 + h.Sum32()%(1<<14)*projectRange}
	q, err := rootfs.OpenQuota(dir)
	switch limits {
	case "", LimitAuto, LimitPool:
	case LimitQuota:
		if err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("root limits %q are not known", limits)
	}
	if err == nil {
		p.quota, p.trees = q, limits != LimitPool
	}
	return p, nil
}

func (p *projects) close() {
	if p.quota != nil {
		p.quota.Close()
	}
}

// inodesFor is how many inodes a root may have that nothing is said of: as mkfs.ext4 gives a disk of that size.
func inodesFor(bytes, inodes int64) int64 {
	switch {
	case inodes > 0 || bytes <= 0:
		return inodes
	case bytes < 512<<20:
		return bytes / 4096
	}
	return bytes / 16384
}

// limitRoot gives an instance's root the limits of its record.
func (e *Engine) limitRoot(rec *record) error {
	bytes, inodes := rec.Limits.RootBytes, inodesFor(rec.Limits.RootBytes, rec.Limits.RootInodes)
	p := e.projects
	if !e.hasTree(rec.ID) {
		if err := p.makeTree(e.tree(rec.ID), bytes, inodes); err != nil {
			return fmt.Errorf("make root: %w", err)
		}
		return nil
	}
	if p.quota == nil {
		e.log.Warn("root_gb is no limit any more: the file system has been mounted without project quota", "instance", rec.ID)
		return nil
	}
	project, err := rootfs.ProjectOf(e.tree(rec.ID))
	if err != nil {
		return err
	}
	return p.quota.Set(project, bytes, inodes)
}

// makeTree makes a tree with a project of its own. It appears whole or not at all.
func (p *projects) makeTree(tree string, bytes, inodes int64) error {
	tmp := tree + unfinished
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	project, err := p.free()
	if err != nil {
		return err
	}
	if err := p.quota.Set(project, bytes, inodes); err != nil {
		return err
	}
	err = rootfs.SetProject(tmp, project)
	if err == nil {
		err = os.Rename(tmp, tree)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp), p.quota.Set(project, 0, 0))
	}
	return nil
}

// free finds a project that nobody uses. p.mu is held.
func (p *projects) free() (uint32, error) {
	for range projectRange {
		project := p.first + p.next
		p.next = (p.next + 1) % projectRange
		u, err := p.quota.Get(project)
		if err != nil || u == (rootfs.Usage{}) {
			return project, err
		}
	}
	return 0, errors.New("no project is free")
}

// drop frees a project whose tree has been removed. It tells whether nothing is in it any more: XFS removes inodes
// a while after their names.
func (p *projects) drop(project uint32) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u, err := p.quota.Get(project)
	if err != nil || u.Inodes > 0 {
		return false, err
	}
	return true, p.quota.Set(project, 0, 0)
}

// treeProject is the project of the tree in an instance's directory, 0 without one.
func (p *projects) treeProject(dir string) (uint32, error) {
	if p.quota == nil {
		return 0, nil
	}
	project, err := rootfs.ProjectOf(filepath.Join(dir, treeName))
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	return project, err
}

// dropLater frees projects once they are empty. What is not empty after some seconds stays until the next Open.
func (e *Engine) dropLater(ps []uint32) error {
	for range 200 {
		var left []uint32
		for _, project := range ps {
			done, err := e.projects.drop(project)
			if err != nil {
				return err
			}
			if !done {
				left = append(left, project)
			}
		}
		if ps = left; len(ps) == 0 {
			return nil
		}
		select {
		case <-e.ctx.Done():
			return nil
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// dropEmpty frees the projects of this range that have a limit and nothing in them: what a killed agent had not got to.
func (p *projects) dropEmpty() error {
	if p.quota == nil {
		return nil
	}
	for at := p.first; ; at++ {
		project, _, ok, err := p.quota.Next(at)
		if err != nil || !ok || project-p.first >= projectRange {
			return err
		}
		if _, err := p.drop(project); err != nil {
			return err
		}
		at = project
	}
}
