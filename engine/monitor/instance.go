package monitor

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/mnt"
	"github.com/novalet/novalet/engine/monitor/wire"
	"github.com/novalet/novalet/engine/procview"
)

// instance is one container from its creation until the agent has taken note of its end.
//
//	create -> created --start--> running --init exits--> exited --forget--> (gone)
//	             \                  \ guest reboot: init runs again, still running
//	              `-- stop or a failed start --> exited
type instance struct {
	k    *keeper
	id   string
	slot int
	spec wire.Create

	// fixed from create on
	dir     *os.File // the instance's directory
	cgroups []cgroupDir
	console *console
	ready   chan struct{} // closed when the creation is over, well or not

	// op serialises start, stop and the restart after a reboot.
	op sync.Mutex

	mu       sync.Mutex
	state    string
	pid      int
	pidfd    *os.File
	ctl      *wire.Conn
	handing  *wire.Conn // the ctl that handOver reads from, nil when it does not run
	orphan   *wire.Conn // a ctl whose init is gone, which handOver is to close
	userns   int
	netns    int
	devpts   *os.File
	started  *wire.Start // what a reboot starts again; files are written once
	stopSig  unix.Signal
	initName string
	startAt  time.Time
	exitAt   time.Time
	code     int
	oomKills int64
	reboots  int
	stopping bool
	mounted  []string
	exited   chan struct{} // closed when the last init has been reaped and will not run again
	oom      *oomWatch
	cleaned  sync.WaitGroup
	view     *procview.View
	load     [3]float64
	loadCPU  time.Duration // at the last sample
	bootAt   time.Time     // of the current init
	asked    asked
	used     used
}

// create makes the namespaces and a waiting init. An instance that exists is returned as it is.
func (k *keeper) create(id string, m *wire.Create, fds *[]int) (*instance, error) {
	dirs := 1
	if m.Advance {
		dirs = 0
	}
	if len(*fds) != dirs+len(m.Cgroups) {
		return nil, &wire.Error{Code: wire.CodeInternal, Detail: "create: wrong number of descriptors"}
	}
	if id == "" || m.UIDBase == 0 || m.UIDSize == 0 {
		return nil, &wire.Error{Code: wire.CodeInternal, Detail: "create: incomplete"}
	}
	in := &instance{k: k, id: id, slot: m.Slot, spec: *m, state: wire.StateCreated, userns: -1, netns: -1, exited: make(chan struct{}), ready: make(chan struct{})}
	defer close(in.ready)
	if old := k.get(id); old != nil {
		return old, nil
	}
	k.mu.Lock()
	if k.instances[id] != nil {
		k.mu.Unlock()
		return nil, &wire.Error{Code: wire.CodeState, Detail: "it is being created by another request"}
	}
	if len(k.instances) >= k.cfg.Capacity {
		k.mu.Unlock()
		return nil, &wire.Error{Code: wire.CodeFull, Detail: fmt.Sprintf("%d instances", k.cfg.Capacity)}
	}
	k.instances[id] = in
	k.mu.Unlock()

	if !m.Advance {
		in.dir = os.NewFile(uintptr((*fds)[0]), "instance")
	}
	for i, ref := range m.Cgroups {
		in.cgroups = append(in.cgroups, cgroupDir{CgroupRef: ref, dir: os.NewFile(uintptr((*fds)[i+dirs]), "cgroup")})
	}
	*fds = nil
	err := in.prepare()
	if err != nil {
		in.fail()
		k.mu.Lock()
		delete(k.instances, id)
		k.mu.Unlock()
		return nil, err
	}
	return in, nil
}

// prepare starts the waiting init in new namespaces and takes hold of them.
func (in *instance) prepare() error {
	var err error
	if !in.spec.Advance {
		if in.console, err = newConsole(in.dir, in.spec.LogMax); err != nil {
			return err
		}
	}
	if err := in.spawnInit(false); err != nil {
		return err
	}
	if in.userns, err = openNS(in.pid, "user"); err != nil {
		return err
	}
	if in.netns, err = openNS(in.pid, "net"); err != nil {
		return err
	}
	in.oom = watchOOM(in)
	if err := in.makeView(); err != nil {
		// The instance runs without: it then sees the host's numbers.
		fmt.Fprintf(os.Stderr, "keeper: view of %s: %v\n", in.id, err)
	}
	return nil
}

// assign gives an instance made in advance its identity.
func (in *instance) assign(m *wire.Assign, fds *[]int) error {
	in.op.Lock()
	defer in.op.Unlock()
	if in.status().State != wire.StateCreated || in.console != nil {
		return &wire.Error{Code: wire.CodeState, Detail: "not waiting for an identity"}
	}
	if len(*fds) != 1 || m.ID == "" {
		return &wire.Error{Code: wire.CodeInternal, Detail: "assign: incomplete"}
	}
	dir := os.NewFile(uintptr((*fds)[0]), "instance")
	*fds = nil
	console, err := newConsole(dir, m.LogMax)
	if err != nil {
		dir.Close()
		return err
	}
	in.k.mu.Lock()
	defer in.k.mu.Unlock()
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.k.instances[m.ID] != nil || in.state != wire.StateCreated {
		console.close()
		dir.Close()
		return &wire.Error{Code: wire.CodeState, Detail: "the identity is taken, or init is gone"}
	}
	delete(in.k.instances, in.id)
	in.k.instances[m.ID] = in
	in.id, in.dir, in.console = m.ID, dir, console
	in.spec.Hostname, in.spec.LogMax = m.Hostname, m.LogMax
	return nil
}

// name is the id, which an instance made in advance gets late.
func (in *instance) name() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.id
}

func openNS(pid int, name string) (int, error) {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/ns/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s namespace: %w", name, err)
	}
	return fd, nil
}

// spawnInit starts the program as the init of new namespaces, or, after a reboot of the guest, of new
// namespaces beside its old user and network namespace.
func (in *instance) spawnInit(again bool) error {
	ctl, child, err := wire.Pair()
	if err != nil {
		return err
	}
	defer unix.Close(child)
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		ctl.Close()
		return fmt.Errorf("open null device: %w", err)
	}
	defer unix.Close(null)
	const inner = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC
	joins, err := in.groups(wire.CgroupPayload)
	if err != nil {
		ctl.Close()
		return err
	}
	s := &spawnSpec{
		groups: joins,
		files:  []int{null, null, null, child, int(in.k.pid1.Fd())},
		prog:   in.k.cfg.Program,
		argv:   []string{"init"},
		env:    append(runtimeEnv[:len(runtimeEnv):len(runtimeEnv)], holes.Env()...),
		attach: func(pid int) error { return in.attach(pid, again) },
	}
	flags := uintptr(inner)
	if again {
		s.join = []call{
			{nr: unix.SYS_SETNS, a: [5]uintptr{uintptr(in.userns), unix.CLONE_NEWUSER}},
			{nr: unix.SYS_SETNS, a: [5]uintptr{uintptr(in.netns), unix.CLONE_NEWNET}},
		}
		s.fork = &flags
	} else {
		s.flags = flags | unix.CLONE_NEWUSER | unix.CLONE_NEWNET
	}
	pid, pidfd, done, err := in.k.reaper.spawn(s)
	if err != nil {
		ctl.Close()
		return err
	}
	in.mu.Lock()
	in.pid, in.pidfd, in.ctl = pid, pidfd, ctl
	in.mu.Unlock()
	in.k.conns.Add(1)
	go func() {
		defer in.k.conns.Done()
		in.ended(pid, <-done)
	}()
	return nil
}

// runtimeEnv is for the Go runtime of an init or exec helper: one processor and next to no collector, since they wait
// and do not compute; and no look at cgroup files, which would be the guest's.
var runtimeEnv = []string{"GOMAXPROCS=1", "GOGC=off", "GOMEMLIMIT=8MiB", "GODEBUG=containermaxprocs=0,updatemaxprocs=0"}

// attach runs while the child waits: id maps, the score of the out-of-memory killer.
func (in *instance) attach(pid int, again bool) error {
	p := "/proc/" + strconv.Itoa(pid) + "/"
	if !again {
		base := in.spec.UIDBase
		if holes.Open(holes.UserNS) {
			base = 0
		}
		m := []byte(fmt.Sprintf("0 %d %d\n", base, in.spec.UIDSize))
		for _, f := range []string{"uid_map", "gid_map"} {
			if err := os.WriteFile(p+f, m, 0); err != nil {
				return fmt.Errorf("write %s: %w", f, err)
			}
		}
	}
	return resetOOM(pid)
}

// resetOOM takes the keeper's own protection from the out-of-memory killer off a child. Written from here, by a process
// with CAP_SYS_RESOURCE, it is also the least that the guest can choose.
func resetOOM(pid int) error {
	if err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte("0"), 0); err != nil {
		return fmt.Errorf("reset oom score: %w", err)
	}
	return nil
}

// status is the instance as the agent sees it.
func (in *instance) status() *wire.Status {
	in.mu.Lock()
	defer in.mu.Unlock()
	s := &wire.Status{ID: in.id, Slot: in.slot, State: in.state, PID: in.pid, StartedAt: in.startAt, ExitedAt: in.exitAt,
		ExitCode: in.code, OOMKills: in.oomKills, Reboots: in.reboots, Init: in.initName}
	if in.state == wire.StateExited {
		s.PID = 0
	}
	return s
}

// userNS returns the user namespace.
func (in *instance) userNS() (int, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.userns < 0 {
		return -1, &wire.Error{Code: wire.CodeState, Detail: "no namespaces"}
	}
	return in.userns, nil
}

// userNSOf is userNS for an answer that may go without.
func (in *instance) userNSOf() []int {
	if fd, err := in.userNS(); err == nil {
		return []int{fd}
	}
	return nil
}

// start hands the root to the waiting init and returns when its program runs.
func (in *instance) start(m *wire.Start, fds *[]int) error {
	in.op.Lock()
	defer in.op.Unlock()
	switch in.status().State {
	case wire.StateRunning:
		return nil
	case wire.StateExited:
		return &wire.Error{Code: wire.CodeState, Detail: "exited"}
	}
	if in.console == nil {
		return &wire.Error{Code: wire.CodeState, Detail: "it has no identity yet"}
	}
	want := 1
	if m.Rescue != "" {
		want = 2
	}
	want += len(m.Disks)
	if len(*fds) != want {
		return &wire.Error{Code: wire.CodeInternal, Detail: "start: wrong number of descriptors"}
	}
	for i, fd := range *fds {
		if err := in.hold(fd, i); err != nil {
			in.kill()
			return err
		}
	}
	return in.run(m)
}

// hold attaches a root mount in the keeper's own mount namespace. It lives there until the instance has ended: so
// the last unmount, which syncs a whole file system, waits in the keeper and in nobody else, and a reboot of
// the guest finds the same root.
func (in *instance) hold(fd, i int) error {
	path := fmt.Sprintf("%s/%d.%d", rootsDir, in.slot, i)
	if err := unix.Mkdir(path, 0o700); err != nil && err != unix.EEXIST {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("hold root: %w", err)
	}
	if holes.Open(holes.Propagation) && i > 0 {
		if err := unix.Mount("", path, "", unix.MS_SHARED, ""); err != nil {
			return err
		}
	}
	in.mu.Lock()
	in.mounted = append(in.mounted, path)
	in.mu.Unlock()
	return nil
}

// run sends the start to the current init and waits until its program runs. On error the instance has ended.
func (in *instance) run(m *wire.Start) error {
	err := in.handOver(m)
	if err == nil {
		return nil
	}
	in.kill()
	return err
}

func (in *instance) handOver(m *wire.Start) error {
	var roots []int
	defer func() { wire.CloseAll(roots) }()
	in.mu.Lock()
	mounted, ctl := in.mounted, in.ctl
	in.handing = ctl
	in.mu.Unlock()
	defer func() {
		in.mu.Lock()
		defer in.mu.Unlock()
		in.handing = nil
		if in.orphan == ctl {
			in.orphan = nil
			ctl.Close()
		}
	}()
	for _, p := range mounted {
		fd, err := mnt.Clone(unix.AT_FDCWD, p)
		if err != nil {
			return err
		}
		roots = append(roots, fd)
	}
	in.mu.Lock()
	viewed := in.view != nil && !holes.Open(holes.View)
	if viewed {
		in.view.Renew()
	}
	in.bootAt = time.Now()
	in.mu.Unlock()
	in.used.forget()
	cfg := &wire.InitConfig{Start: *m, ID: in.name(), Hostname: in.spec.Hostname}
	if viewed {
		fd, err := mnt.Clone(unix.AT_FDCWD, in.viewPath())
		if err != nil {
			return err
		}
		roots = append(roots, fd)
		cfg.View = viewFiles()
	}
	deadline := time.Duration(m.DeadlineMS) * time.Millisecond
	if deadline <= 0 {
		deadline = time.Minute
	}
	ctl.SetDeadline(time.Now().Add(deadline))
	if err := ctl.Send(cfg, roots...); err != nil {
		return fmt.Errorf("hand over to init: %w", err)
	}
	var rep wire.InitReport
	got, err := ctl.Recv(&rep)
	if err != nil {
		return in.initFailed(err)
	}
	if rep.Error != nil || len(got) != 2 {
		wire.CloseAll(got)
		if rep.Error == nil {
			return errors.New("init reported without its terminal")
		}
		return rep.Error
	}
	if err := in.console.attach(got[0]); err != nil {
		wire.CloseAll(got)
		return err
	}
	in.mu.Lock()
	in.devpts = os.NewFile(uintptr(got[1]), "devpts")
	in.stopSig, in.initName = unix.Signal(rep.StopSignal), rep.Init
	kept := *m
	kept.Files = nil
	in.started = &kept
	in.mu.Unlock()
	if err := ctl.Send(struct{}{}); err != nil {
		return fmt.Errorf("let init go: %w", err)
	}
	// Init closes the socket by running its last program: a machine's the image's own init, an application's what waits for
	// the tenant's program, which runs then.
	rep, err = in.lastReport(ctl)
	if err != nil && !isEOF(err) {
		return in.initFailed(err)
	}
	if rep.Error != nil {
		return rep.Error
	}
	ctl.SetDeadline(time.Time{})
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.state == wire.StateExited {
		// It ran and ended already: that is a start, and an exit.
		return nil
	}
	in.state = wire.StateRunning
	if in.startAt.IsZero() {
		in.startAt = time.Now()
	}
	return nil
}

// initFailed explains an init that went away or hung while it set up.
func (in *instance) initFailed(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &wire.Error{Code: wire.CodeInternal, Text: "the set-up of the instance's root did not finish in time", Detail: err.Error()}
	}
	if in.oomNow() > 0 {
		return &wire.Error{Code: wire.CodeAbort, Text: "the flavor's memory is too small to start the instance", Detail: err.Error()}
	}
	return fmt.Errorf("init ended during the set-up: %w", err)
}
