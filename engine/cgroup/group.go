package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// Ref is one directory of a group.
type Ref struct {
	// Kind is "v1", "base", "payload" or "exec".
	Kind string
	// Controller is the v1 controller, of those mounted together the one that matters most.
	Controller string
	Path       string
}

// Manager makes groups below one name.
type Manager struct {
	Layout *Layout
	name   string
}

// NewManager makes the sub-tree: name is a relative path, whose parents exist or are made, such as "novalet" or
// "novalet.slice/instances". It may be repeated.
func NewManager(l *Layout, name string) (*Manager, error) {
	if !filepath.IsLocal(name) {
		return nil, fmt.Errorf("cgroup name %q is not a relative path", name)
	}
	m := &Manager{Layout: l, name: name}
	for _, r := range l.v1Dirs() {
		if err := m.chain(r.Path, r.Controller == "cpuset" || l.V1["cpuset"] == r.Path); err != nil {
			return nil, err
		}
	}
	for _, p := range l.V1Named {
		if err := m.chain(p, false); err != nil {
			return nil, err
		}
	}
	if l.V2 != "" {
		dir := l.V2
		for _, part := range append(strings.Split(name, "/"), "") {
			for _, c := range controllersV2 {
				if l.HasV2(c) {
					if err := write(dir, "cgroup.subtree_control", "+"+c); err != nil {
						return nil, fmt.Errorf("hand down controller %s: %w", c, err)
					}
				}
			}
			if part == "" {
				break
			}
			dir = filepath.Join(dir, part)
			if err := mkdir(dir); err != nil {
				return nil, err
			}
		}
		if err := mkdir(filepath.Join(dir, "keepers")); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// chain makes name and name/keepers in a v1 hierarchy. A new cpuset group is empty and takes no process until it
// has been given processors and memory nodes.
func (m *Manager) chain(root string, cpuset bool) error {
	dir := root
	for _, part := range append(strings.Split(m.name, "/"), "keepers") {
		parent := dir
		dir = filepath.Join(dir, part)
		if err := mkdir(dir); err != nil {
			return err
		}
		if !cpuset {
			continue
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			v, err := read(parent, f)
			if err != nil {
				return err
			}
			if have, _ := read(dir, f); have == "" {
				if err := write(dir, f, v); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// JoinKeepers moves a process into the keepers' group of every hierarchy: out of the agent's own unit.
func (m *Manager) JoinKeepers(pid int) error {
	dirs := append([]string(nil), m.Layout.V1Named...)
	for _, r := range m.Layout.v1Dirs() {
		dirs = append(dirs, r.Path)
	}
	if p := m.Layout.V1["freezer"]; p != "" && m.Layout.V2 != "" {
		if err := m.chain(p, false); err != nil {
			return err
		}
		dirs = append(dirs, p)
	}
	if m.Layout.V2 != "" {
		dirs = append(dirs, m.Layout.V2)
	}
	for _, d := range dirs {
		if err := write(filepath.Join(d, m.name, "keepers"), "cgroup.procs", strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("move keeper: %w", err)
		}
	}
	return nil
}

// Tidy removes the sub-tree's own directories where nothing is in them.
func (m *Manager) Tidy() {
	dirs := append([]string{m.Layout.V2}, m.Layout.V1Named...)
	for _, p := range m.Layout.V1 {
		dirs = append(dirs, p)
	}
	for _, d := range dirs {
		if d != "" && unix.Rmdir(filepath.Join(d, m.name, "keepers")) == nil {
			_ = unix.Rmdir(filepath.Join(d, m.name))
		}
	}
}

// Group is the cgroups of one instance.
type Group struct {
	m    *Manager
	Name string
}

// Group names a group, existing or not.
func (m *Manager) Group(name string) *Group { return &Group{m: m, Name: name} }

// List returns the names of the groups that exist in any hierarchy.
func (m *Manager) List() ([]string, error) {
	seen := map[string]bool{}
	dirs := []string{m.Layout.V2}
	for _, r := range m.Layout.v1Dirs() {
		dirs = append(dirs, r.Path)
	}
	for _, d := range dirs {
		if d == "" {
			continue
		}
		es, err := os.ReadDir(filepath.Join(d, m.name))
		if err != nil {
			return nil, fmt.Errorf("list cgroups: %w", err)
		}
		for _, e := range es {
			if e.IsDir() && e.Name() != "keepers" {
				seen[e.Name()] = true
			}
		}
	}
	var out []string
	for n := range seen {
		out = append(out, n)
	}
	return out, nil
}

func (g *Group) v1(controller string) string {
	p := g.m.Layout.V1[controller]
	if p == "" {
		return ""
	}
	return filepath.Join(p, g.m.name, g.Name)
}

func (g *Group) v2() string {
	if g.m.Layout.V2 == "" {
		return ""
	}
	return filepath.Join(g.m.Layout.V2, g.m.name, g.Name)
}

// Refs lists the directories.
func (g *Group) Refs() []Ref {
	var out []Ref
	for _, r := range g.m.Layout.v1Dirs() {
		r.Path = filepath.Join(r.Path, g.m.name, g.Name)
		out = append(out, r)
	}
	if p := g.v2(); p != "" {
		out = append(out, Ref{Kind: "base", Path: p}, Ref{Kind: "payload", Path: filepath.Join(p, "payload")},
			Ref{Kind: "exec", Path: filepath.Join(p, "exec")})
	}
	return out
}

// Create makes the directories, gives the payload's to owner (the host's id of the instance's root), and applies
// devices and limits. It may be repeated.
func (g *Group) Create(owner uint32, l *novalet.Limits, o ApplyOptions) error {
	for _, r := range g.Refs() {
		if err := mkdir(r.Path); err != nil {
			return err
		}
		if r.Kind == "base" {
			for _, c := range controllersV2 {
				if g.m.Layout.HasV2(c) {
					if err := write(r.Path, "cgroup.subtree_control", "+"+c); err != nil {
						return err
					}
				}
			}
		}
		if r.Kind == "payload" {
			// What cgroup2 delegates (cgroups(7)): the directory and these files, none that holds a limit.
			for _, f := range []string{"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
				if err := os.Chown(filepath.Join(r.Path, f), int(owner), int(owner)); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("delegate cgroup: %w", err)
				}
			}
		}
	}
	if err := g.cpusetInit(); err != nil {
		return err
	}
	if err := g.devices(); err != nil {
		return err
	}
	return g.Apply(l, o)
}

// cpusetInit fills an empty v1 cpuset from its parent.
func (g *Group) cpusetInit() error {
	dir := g.v1("cpuset")
	if dir == "" {
		return nil
	}
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		if have, err := read(dir, f); err != nil || have != "" {
			continue
		}
		v, err := read(filepath.Dir(dir), f)
		if err != nil {
			return err
		}
		if err := write(dir, f, v); err != nil {
			return err
		}
	}
	return nil
}

// Freeze stops or resumes all processes, and returns when they have, or ctx ends. Processes that cannot all be stopped go on:
// one that waits for a device or a file server does not stop before it has its answer (ErrBusy after 30 seconds).
func (g *Group) Freeze(ctx context.Context, frozen bool) error {
	dir, file, val, back, done := g.v2(), "cgroup.freeze", "0", "0", "frozen 0"
	if frozen {
		val, done = "1", "frozen 1"
	}
	state := "cgroup.events"
	if dir == "" {
		dir, file, state = g.v1("freezer"), "freezer.state", "freezer.state"
		val, back = "THAWED", "THAWED"
		if frozen {
			val = "FROZEN"
		}
		done = val
	}
	if dir == "" {
		return fmt.Errorf("freeze: %w: the host has neither cgroup2 nor a v1 freezer", novalet.ErrUnsupported)
	}
	for deadline := time.Now().Add(30 * time.Second); ; {
		if err := write(dir, file, val); err != nil {
			return fmt.Errorf("freeze: %w", err)
		}
		s, err := read(dir, state)
		if err != nil {
			return fmt.Errorf("freeze: %w", err)
		}
		for line := range strings.SplitSeq(s, "\n") {
			if line == done {
				return nil
			}
		}
		err = context.Cause(ctx)
		if err == nil && time.Now().After(deadline) {
			err = fmt.Errorf("%w: processes did not stop", novalet.ErrBusy)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("freeze: %w", err), write(dir, file, back))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// Frozen tells whether Freeze(true) is in force.
func (g *Group) Frozen() bool {
	if dir := g.v2(); dir != "" {
		s, _ := read(dir, "cgroup.freeze")
		return s == "1"
	}
	if dir := g.v1("freezer"); dir != "" {
		s, _ := read(dir, "freezer.state")
		return s == "FROZEN" || s == "FREEZING"
	}
	return false
}

// Kill kills every process in the group.
func (g *Group) Kill() error {
	if dir := g.v2(); dir != "" {
		err := write(dir, "cgroup.kill", "1")
		if err == nil || errors.Is(err, fs.ErrNotExist) && !exists(dir) {
			return nil
		}
	}
	// Without cgroup.kill: freeze so that nothing forks, signal all, thaw.
	_ = g.Freeze(context.Background(), true)
	defer g.Freeze(context.Background(), false)
	for _, pid := range g.procs() {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	return nil
}

// procs lists the processes in any of the group's directories, sub-groups included.
func (g *Group) procs() []int {
	seen := map[int]bool{}
	for _, r := range g.Refs() {
		_ = filepath.WalkDir(r.Path, func(p string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			s, _ := read(p, "cgroup.procs")
			for _, f := range strings.Fields(s) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
					seen[pid] = true
				}
			}
			return nil
		})
	}
	out := make([]int, 0, len(seen))
	for pid := range seen {
		out = append(out, pid)
	}
	return out
}

// Empty tells whether no process is in the group.
func (g *Group) Empty() bool { return len(g.procs()) == 0 }

// Remove removes the directories, those that the guest made too. Processes that are on their way out are waited
// for; nil when there is nothing.
func (g *Group) Remove() error {
	deadline := time.Now().Add(10 * time.Second)
	for _, r := range g.Refs() {
		if r.Kind == "payload" || r.Kind == "exec" {
			continue // below base
		}
		if r.Kind == "base" {
			// What is in it of ours; what the guest made beside it follows.
			_ = unix.Rmdir(filepath.Join(r.Path, "exec"))
			_ = unix.Rmdir(filepath.Join(r.Path, "payload"))
		}
		for {
			err := rmtree(r.Path)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("remove cgroup: %w", err)
			}
			time.Sleep(2 * time.Millisecond)
		}
	}
	return nil
}

// rmtree removes a cgroup directory and those below it, deepest first. The files in it are the kernel's.
func rmtree(dir string) error {
	if err := unix.Rmdir(dir); err == nil || err == unix.ENOENT {
		return nil
	}
	f, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	es, err := f.ReadDir(-1)
	f.Close()
	if err != nil {
		return err
	}
	for _, e := range es {
		if e.IsDir() {
			if err := rmtree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

func exists(p string) bool {
	_, err := os.Lstat(p)
	return err == nil
}

func mkdir(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make cgroup: %w", err)
	}
	return nil
}

// The files of a cgroup are opened without package os: they can be polled, so that it would register each with the runtime's
// poller, and there are some forty to open for one instance.

func open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, &fs.PathError{Op: "open", Path: path, Err: err}
		}
		return fd, nil
	}
}

func write(dir, file, val string) error {
	path := filepath.Join(dir, file)
	fd, err := open(path, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for {
		_, err := unix.Write(fd, []byte(val))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return &fs.PathError{Op: "write", Path: path, Err: err}
		}
		return nil
	}
}

func read(dir, file string) (string, error) {
	path := filepath.Join(dir, file)
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var text []byte
	for buf := make([]byte, 4096); ; {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return "", &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			return strings.TrimSpace(string(text)), nil
		}
		text = append(text, buf[:n]...)
	}
}
