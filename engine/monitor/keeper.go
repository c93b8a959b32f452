// Package monitor is the keeper: the process that is the parent of instances' inits and outlives the agent. It
// holds what must not end with the agent: terminals, console logs, exit statuses, limit events, the mounts of
// the roots and the /proc views. One keeper serves many instances.
//
// It imports nothing of the agent. It runs in a mount namespace of its own that holds next to nothing, so that
// a new instance has little to copy and nothing of the host pins. On disk it writes each instance's console
// log and exit record, through directory descriptors that the agent hands in.
//
// Goroutines: one reaper, one per connection, and per running instance one that reads its console, one that
// waits for its exit and one that waits for limit events.
package monitor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"os"
	"os/signal"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/monitor/wire"
	"github.com/novalet/novalet/engine/pid1"
)

// Config is what a keeper is started with.
type Config struct {
	// Listener is a listening unix socket; Program an open file that runs as init, exec and keeper alike.
	Listener int
	Program  int
	// Capacity is how many instances it takes.
	Capacity int
}

// keeper is the process's state.
type keeper struct {
	cfg    Config
	pid1   *os.File // the program of engine/pid1
	reaper *reaper
	l      *wire.Listener

	mu        sync.Mutex
	instances map[string]*instance
	watchers  map[chan wire.Event]struct{}
	conns     sync.WaitGroup
}

// Run serves until the agent asks an empty keeper to exit, or until nobody can ask it any more and nothing runs in it. The process must be in a mount namespace of its own.
func Run(cfg Config) error {
	// A child that has joined an instance's user namespace is a copy of this process until it runs its own
	// program: what is not dumpable cannot be traced from inside.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("become non-dumpable: %w", err)
	}
	// The agent's end, a closed terminal and a stop of the agent's service must not end it.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGPIPE, unix.SIGTERM)
	// Refused where the host's own root has no CAP_SYS_RESOURCE; then it competes like any process.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0)
	closeInherited()
	holes.Read(cfg.Listener)
	p, err := pid1.Open()
	if err != nil {
		return err
	}
	defer p.Close()
	if holes.Open(holes.Trace) {
		if err := os.Chmod("/proc/self/fd/"+strconv.Itoa(int(p.Fd())), 0o555); err != nil {
			return err
		}
	}
	if err := enterOwnRoot(); err != nil {
		return err
	}
	l, err := wire.NewListener(cfg.Listener)
	if err != nil {
		return err
	}
	k := &keeper{cfg: cfg, pid1: p, reaper: newReaper(), l: l, instances: map[string]*instance{}, watchers: map[chan wire.Event]struct{}{}}
	defer k.reaper.stop()
	stop := make(chan struct{})
	var loads sync.WaitGroup
	loads.Go(func() { k.sampleLoads(stop) })
	defer loads.Wait()
	defer close(stop)
	for {
		c, err := l.Accept()
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			// Out of descriptors or memory: the agent tries again, the instances must live.
			fmt.Fprintln(os.Stderr, "keeper:", err)
			time.Sleep(50 * time.Millisecond)
			continue
		}
		if uid, err := c.PeerUID(); err != nil || uid != 0 {
			c.Close()
			continue
		}
		k.conns.Add(1)
		go func() {
			defer k.conns.Done()
			defer c.Close()
			k.serve(c)
		}()
	}
}

// closeInherited closes what the agent had open without close-on-exec, from whoever started it: a keeper lives on and
// would keep it open.
func closeInherited() {
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, e := range es {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= 4 {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			unix.Close(fd)
		}
	}
}

// serve answers the one request of a connection.
func (k *keeper) serve(c *wire.Conn) {
	var req wire.Request
	c.SetDeadline(time.Now().Add(30 * time.Second))
	fds, err := c.Recv(&req)
	if err != nil {
		if !errors.Is(err, io.EOF) {
			fmt.Fprintln(os.Stderr, "keeper:", err)
		}
		return
	}
	c.SetDeadline(time.Time{})
	owned := &fds
	defer func() { wire.CloseAll(*owned) }()
	body, out, err := k.handle(c, &req, owned)
	if err == errStreamed {
		return
	}
	if err := reply(c, body, err, out...); err != nil {
		fmt.Fprintln(os.Stderr, "keeper:", err)
	}
	if req.Op == wire.OpExit && err == nil {
		// Only now: the process ends with its listener, and the answer has to be out.
		k.l.Close()
	}
}

// errStreamed says that the handler has answered itself.
var errStreamed = errors.New("answered")

// reply sends a Response.
func reply(c *wire.Conn, body any, err error, fds ...int) error {
	r := wire.Response{V: wire.Version}
	if err != nil {
		var we *wire.Error
		if !errors.As(err, &we) {
			we = &wire.Error{Code: wire.CodeInternal, Detail: err.Error()}
		}
		r.Error = we
	} else if body != nil {
		b, merr := json.Marshal(body)
		if merr != nil {
			return merr
		}
		r.Body = b
	}
	return c.Send(&r, fds...)
}

// handle does one request. It takes over descriptors by removing them from fds.
func (k *keeper) handle(c *wire.Conn, req *wire.Request, fds *[]int) (body any, out []int, err error) {
	switch req.Op {
	case wire.OpHello:
		k.mu.Lock()
		defer k.mu.Unlock()
		return &wire.Hello{PID: os.Getpid(), Capacity: k.cfg.Capacity, Count: len(k.instances)}, nil, nil
	case wire.OpList:
		return k.list(), nil, nil
	case wire.OpExit:
		return nil, nil, k.exit()
	case wire.OpWatch:
		k.watch(c)
		return nil, nil, errStreamed
	case wire.OpCreate:
		var m wire.Create
		if err := decode(req, &m); err != nil {
			return nil, nil, err
		}
		in, err := k.create(req.ID, &m, fds)
		if err != nil {
			return nil, nil, err
		}
		return in.status(), in.userNSOf(), nil
	}
	in := k.get(req.ID)
	switch req.Op {
	case wire.OpAssign, wire.OpStart, wire.OpStop, wire.OpForget, wire.OpUserNS, wire.OpExec, wire.OpConsole:
		if in == nil {
			return nil, nil, &wire.Error{Code: wire.CodeNotFound, Detail: "instance " + req.ID}
		}
	}
	switch req.Op {
	case wire.OpAssign:
		var m wire.Assign
		if err := decode(req, &m); err != nil {
			return nil, nil, err
		}
		if err := in.assign(&m, fds); err != nil {
			return nil, nil, err
		}
		return in.status(), in.userNSOf(), nil
	case wire.OpStart:
		var m wire.Start
		if err := decode(req, &m); err != nil {
			return nil, nil, err
		}
		if err := in.start(&m, fds); err != nil {
			return nil, nil, err
		}
		return in.status(), nil, nil
	case wire.OpStop:
		var m wire.Stop
		if err := decode(req, &m); err != nil {
			return nil, nil, err
		}
		if err := in.stop(time.Duration(m.TimeoutMS) * time.Millisecond); err != nil {
			return nil, nil, err
		}
		return in.status(), nil, nil
	case wire.OpForget:
		return nil, nil, k.forget(in)
	case wire.OpUserNS:
		fd, err := in.userNS()
		if err != nil {
			return nil, nil, err
		}
		return nil, []int{fd}, nil
	case wire.OpExec:
		var m wire.Exec
		if err := decode(req, &m); err != nil {
			return nil, nil, err
		}
		return nil, nil, in.exec(c, &m, fds)
	case wire.OpConsole:
		return nil, nil, in.viewer(c)
	}
	return nil, nil, &wire.Error{Code: wire.CodeUnknown, Detail: req.Op}
}

func decode(req *wire.Request, v any) error {
	if err := json.Unmarshal(req.Body, v); err != nil {
		return &wire.Error{Code: wire.CodeInternal, Detail: "decode " + req.Op + ": " + err.Error()}
	}
	return nil
}

// get returns an instance once its creation is over.
func (k *keeper) get(id string) *instance {
	k.mu.Lock()
	in := k.instances[id]
	k.mu.Unlock()
	if in == nil {
		return nil
	}
	<-in.ready
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.instances[id]
}

// list describes all instances. Those that are being made, by a request whose agent may have gone, are waited for:
// an agent that takes over has to see them.
func (k *keeper) list() []*wire.Status {
	k.mu.Lock()
	var ins []*instance
	for _, in := range k.instances {
		ins = append(ins, in)
	}
	k.mu.Unlock()
	out := make([]*wire.Status, 0, len(ins))
	for _, in := range ins {
		<-in.ready
		k.mu.Lock()
		known := k.instances[in.id] == in
		k.mu.Unlock()
		if known {
			out = append(out, in.status())
		}
	}
	return out
}

// exit ends an empty keeper.
func (k *keeper) exit() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.instances) > 0 {
		return &wire.Error{Code: wire.CodeState, Detail: fmt.Sprintf("%d instances", len(k.instances))}
	}
	k.cfg.Capacity = 0
	return nil
}

// forget drops an instance that has exited, or never started and is gone.
func (k *keeper) forget(in *instance) error {
	if in.status().State != wire.StateExited {
		return &wire.Error{Code: wire.CodeState, Detail: "still " + in.status().State}
	}
	in.released()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.instances[in.id] == in {
		delete(k.instances, in.id)
	}
	return nil
}

// watch streams events until the peer goes. A watcher that does not keep up is cut off: it then reads the list.
func (k *keeper) watch(c *wire.Conn) {
	ch := make(chan wire.Event, 1024)
	k.mu.Lock()
	k.watchers[ch] = struct{}{}
	k.mu.Unlock()
	defer func() {
		k.mu.Lock()
		delete(k.watchers, ch)
		k.mu.Unlock()
	}()
	if reply(c, nil, nil) != nil {
		return
	}
	gone := make(chan struct{})
	k.conns.Add(1)
	go func() {
		defer k.conns.Done()
		defer close(gone)
		var b [1]byte
		c.Read(b[:])
	}()
	for {
		select {
		case ev, ok := <-ch:
			if !ok || reply(c, ev, nil) != nil {
				return
			}
		case <-gone:
			return
		}
	}
}

// tell sends an event to all watchers.
func (k *keeper) tell(ev wire.Event) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for ch := range k.watchers {
		select {
		case ch <- ev:
		default:
			delete(k.watchers, ch)
			close(ch)
		}
	}
}
