package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/monitor/wire"
)

// keeper is the agent's side of one keeper process.
type keeper struct {
	e    *Engine
	sock string
	pid  int

	mu    sync.Mutex
	count int // instances, as far as known
	watch *wire.Conn
	gone  bool
}

// callTimeout bounds a request whose context has no deadline of its own, and makeTimeout one that makes something, which
// takes some ten milliseconds.
const (
	callTimeout = 5 * time.Minute
	makeTimeout = 30 * time.Second
)

// dial connects and sends a request. The connection closes when ctx ends.
func (k *keeper) dial(ctx context.Context, op, id string, body any, fds ...int) (*wire.Conn, func() bool, error) {
	c, err := wire.Dial(k.sock)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	b, err := json.Marshal(body)
	if err == nil {
		err = c.Send(&wire.Request{V: wire.Version, Op: op, ID: id, Body: b}, fds...)
	}
	if err != nil {
		stop()
		c.Close()
		return nil, nil, fmt.Errorf("ask keeper: %w", err)
	}
	return c, stop, nil
}

// receive reads one response and decodes its body into out.
func receive(ctx context.Context, c *wire.Conn, out any) ([]int, error) {
	var r wire.Response
	fds, err := c.Recv(&r)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("ask keeper: %w", err)
	}
	if r.Error != nil {
		wire.CloseAll(fds)
		return nil, r.Error
	}
	if out != nil && len(r.Body) > 0 {
		if err := json.Unmarshal(r.Body, out); err != nil {
			wire.CloseAll(fds)
			return nil, fmt.Errorf("ask keeper: decode answer: %w", err)
		}
	}
	return fds, nil
}

// call does one request and returns the descriptors of the answer.
func (k *keeper) call(ctx context.Context, op, id string, body, out any, fds ...int) ([]int, error) {
	timeout := callTimeout
	if op == wire.OpCreate || op == wire.OpAssign {
		// Cut off, it might be carried out after the request that is to undo it, and what it makes would be nobody's.
		ctx, timeout = context.WithoutCancel(ctx), makeTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c, stop, err := k.dial(ctx, op, id, body, fds...)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer stop()
	return receive(ctx, c, out)
}

// fromKeeper gives a keeper's refusal its kind.
func fromKeeper(err error) error {
	var we *wire.Error
	if !errors.As(err, &we) {
		return err
	}
	kind := error(nil)
	switch we.Code {
	case wire.CodeNotFound:
		kind = novalet.ErrNotFound
	case wire.CodeState:
		kind = novalet.ErrInvalidState
	case wire.CodeAbort:
		kind = novalet.ErrAbort
	case wire.CodeUnknown:
		kind = novalet.ErrUnsupported
	case wire.CodeFull:
		kind = novalet.ErrReschedule
	default:
		kind = novalet.ErrReschedule
		if we.Text == "" {
			return err
		}
	}
	if we.Text == "" {
		return fmt.Errorf("%w: %s", kind, we.Detail)
	}
	f := &novalet.Fault{Kind: kind, Text: we.Text}
	if we.Detail != "" {
		f.Err = errors.New(we.Detail)
	}
	return f
}

// adopt finds the keepers and reads the records.
func (e *Engine) adopt() error {
	es, err := os.ReadDir(filepath.Join(e.o.StateDir, "instances"))
	if err != nil {
		return fmt.Errorf("read instances: %w", err)
	}
	for _, d := range es {
		id := d.Name()
		r, err := e.load(id)
		if errors.Is(err, os.ErrNotExist) {
			// A creation or a removal that did not get to, or past, its record.
			_, _ = e.putAside(e.dir(id)) // tried again at the next start
			continue
		}
		if err != nil {
			e.log.Error("instance left alone", "instance", id, "error", err)
			// Its range of ids stays in use.
			e.broken[id] = true
			if slot, ok := e.slotOf(id); ok {
				e.slots[slot] = id
			}
			continue
		}
		e.instances[id] = &instance{rec: *r, saved: true, userns: -1}
		e.slots[r.Slot] = id
	}
	ks, err := os.ReadDir(filepath.Join(e.o.RunDir, "keepers"))
	if err != nil {
		return fmt.Errorf("read keepers: %w", err)
	}
	var wg sync.WaitGroup
	for _, d := range ks {
		if filepath.Ext(d.Name()) != ".sock" {
			continue
		}
		k := &keeper{e: e, sock: filepath.Join(e.o.RunDir, "keepers", d.Name())}
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := e.adoptKeeper(k); err != nil {
				e.log.Warn("keeper not adopted", "socket", k.sock, "error", err)
			}
		}()
	}
	wg.Wait()
	return e.tidyCgroups()
}

// adoptKeeper connects to a keeper; the socket of one that is gone is removed.
func (e *Engine) adoptKeeper(k *keeper) error {
	if err := e.listen(k); err != nil {
		if errors.Is(err, unix.ECONNREFUSED) {
			os.Remove(k.sock)
			os.Remove(logOf(k.sock))
			return nil
		}
		return err
	}
	var hello wire.Hello
	if _, err := k.call(e.ctx, wire.OpHello, "", nil, &hello); err != nil {
		return err
	}
	k.pid = hello.PID
	var list []wire.Status
	if _, err := k.call(e.ctx, wire.OpList, "", nil, &list); err != nil {
		return err
	}
	e.mu.Lock()
	e.keepers[k.sock] = k
	e.mu.Unlock()
	for i := range list {
		st := &list[i]
		e.mu.Lock()
		in := e.instances[st.ID]
		e.mu.Unlock()
		k.add(1)
		if e.broken[st.ID] {
			e.mu.Lock()
			e.slots[st.Slot] = st.ID
			e.mu.Unlock()
			continue
		}
		if in == nil || in.rec.Slot != st.Slot {
			if !strings.HasPrefix(st.ID, warmPrefix) {
				e.log.Warn("ending a container that no record knows", "instance", st.ID)
			}
			if _, err := k.call(e.ctx, wire.OpStop, st.ID, &wire.Stop{}, nil); err != nil {
				return err
			}
			if _, err := k.call(e.ctx, wire.OpForget, st.ID, nil, nil); err != nil {
				return err
			}
			k.add(-1)
			continue
		}
		in.mu.Lock()
		in.keeper = k
		in.mu.Unlock()
		if st.State == wire.StateExited {
			e.settleLater(st.ID)
		}
	}
	return nil
}

// tidyCgroups ends what runs without a keeper and removes the groups that no container needs.
func (e *Engine) tidyCgroups() error {
	names, err := e.cg.List()
	if err != nil {
		return err
	}
	for _, n := range names {
		slot, err := strconv.Atoi(n[min(1, len(n)):])
		if err != nil || n != e.group(slot).Name {
			continue
		}
		id := e.slots[slot]
		if in := e.instances[id]; in != nil && in.keeper != nil || e.broken[id] {
			continue
		}
		g := e.group(slot)
		if !g.Empty() {
			e.log.Warn("ending processes whose keeper is gone", "cgroup", n)
		}
		if err := errors.Join(g.Kill(), g.Remove()); err != nil {
			e.log.Error("cgroup left", "cgroup", n, "error", err)
		}
	}
	return nil
}

func logOf(sock string) string { return sock[:len(sock)-len(".sock")] + ".log" }

// listen opens the keeper's stream of events and starts the goroutine that reads it.
func (e *Engine) listen(k *keeper) error {
	c, stop, err := k.dial(e.ctx, wire.OpWatch, "", nil)
	if err != nil {
		return err
	}
	if _, err := receive(e.ctx, c, nil); err != nil {
		stop()
		c.Close()
		return err
	}
	k.watch = c
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		defer c.Close()
		defer stop()
		for {
			var ev wire.Event
			if _, err := receive(e.ctx, c, &ev); err != nil {
				if e.ctx.Err() == nil {
					e.lost(k, err)
				}
				return
			}
			e.happened(&ev)
		}
	}()
	return nil
}

// lost handles the end of a keeper: what it kept cannot be looked after any more, so it is ended and reported.
func (e *Engine) lost(k *keeper, err error) {
	k.mu.Lock()
	k.gone = true
	k.mu.Unlock()
	// A keeper that cut off a slow listener still answers.
	if again := e.listen(k); again == nil {
		k.mu.Lock()
		k.gone = false
		k.mu.Unlock()
		return
	}
	var lostSlots []int
	if !errors.Is(err, io.EOF) {
		e.log.Error("keeper lost", "socket", k.sock, "error", err)
	} else {
		e.log.Error("keeper ended", "socket", k.sock)
	}
	e.mu.Lock()
	delete(e.keepers, k.sock)
	e.warm = slices.DeleteFunc(e.warm, func(w *warmSlot) bool {
		if w.keeper == k {
			delete(e.slots, w.slot)
			lostSlots = append(lostSlots, w.slot)
		}
		return w.keeper == k
	})
	var ids []string
	for id, in := range e.instances {
		if _, of := in.get(); of == k {
			ids = append(ids, id)
		}
	}
	e.mu.Unlock()
	k.reap()
	os.Remove(k.sock)
	os.Remove(logOf(k.sock))
	for _, slot := range lostSlots {
		if err := errors.Join(e.group(slot).Kill(), e.group(slot).Remove()); err != nil {
			e.log.Error("cgroup left", "slot", slot, "error", err)
		}
	}
	for _, id := range ids {
		in := e.lock(id)
		if in == nil {
			continue
		}
		rec, of := in.get()
		if of == k {
			g := e.group(rec.Slot)
			if err := errors.Join(g.Kill(), g.Remove()); err != nil {
				e.log.Error("cgroup left", "instance", id, "error", err)
			}
			in.mu.Lock()
			in.keeper = nil
			in.mu.Unlock()
			e.publish(novalet.ContainerEvent{ID: id, Type: novalet.EventExited, ExitCode: 128 + int(unix.SIGKILL), At: time.Now()})
		}
		in.op.Unlock()
	}
}

func (k *keeper) add(n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.count += n
}

// reserve takes a place in a keeper with room, starting one if there is none.
func (e *Engine) reserve(ctx context.Context) (*keeper, error) {
	e.spawning.Lock()
	defer e.spawning.Unlock()
	e.mu.Lock()
	for _, k := range e.keepers {
		k.mu.Lock()
		ok := !k.gone && k.count < e.o.KeeperCapacity
		if ok {
			k.count++
		}
		k.mu.Unlock()
		if ok {
			e.mu.Unlock()
			return k, nil
		}
	}
	e.mu.Unlock()
	k, err := e.spawnKeeper(ctx)
	if err != nil {
		return nil, err
	}
	k.add(1)
	return k, nil
}

// spawnKeeper starts a keeper: a session of its own, the keepers' cgroups, a mount namespace of its own.
func (e *Engine) spawnKeeper(ctx context.Context) (*keeper, error) {
	k := &keeper{e: e, sock: filepath.Join(e.o.RunDir, "keepers", fmt.Sprintf("%d-%d.sock", os.Getpid(), time.Now().UnixNano()))}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start keeper: open socket: %w", err)
	}
	l := os.NewFile(uintptr(fd), "listener")
	defer l.Close()
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: k.sock}); err != nil {
		return nil, fmt.Errorf("start keeper: bind socket: %w", err)
	}
	fail := func(err error) (*keeper, error) {
		os.Remove(k.sock)
		os.Remove(logOf(k.sock))
		return nil, fmt.Errorf("start keeper: %w", err)
	}
	if err := errors.Join(os.Chmod(k.sock, 0o600), unix.Listen(fd, 512)); err != nil {
		return fail(err)
	}
	out, err := os.OpenFile(logOf(k.sock), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fail(err)
	}
	defer out.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	defer null.Close()
	// Above the numbers that the child fills, so that the name of the program stays good.
	high, err := unix.FcntlInt(e.prog.Fd(), unix.F_DUPFD_CLOEXEC, 64)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(high)
	p, err := os.StartProcess(fmt.Sprintf("/proc/self/fd/%d", high), []string{"keeper", strconv.Itoa(e.o.KeeperCapacity)}, &os.ProcAttr{
		Dir: "/", Env: []string{"GOMAXPROCS=2", "GOGC=50", "GODEBUG=containermaxprocs=0,updatemaxprocs=0"}, Files: []*os.File{null, out, out, l, e.prog},
		Sys: &syscall.SysProcAttr{Setsid: true, Unshareflags: syscall.CLONE_NEWNS},
	})
	if err != nil {
		return fail(err)
	}
	k.pid = p.Pid
	// Reaped by pid when it ends: it may well outlive this process.
	p.Release()
	if err := e.cg.JoinKeepers(k.pid); err != nil {
		unix.Kill(k.pid, unix.SIGKILL)
		k.reap()
		return fail(err)
	}
	if err := e.listen(k); err != nil {
		unix.Kill(k.pid, unix.SIGKILL)
		k.reap()
		return fail(err)
	}
	e.mu.Lock()
	e.keepers[k.sock] = k
	e.mu.Unlock()
	e.log.Info("keeper started", "pid", k.pid)
	return k, nil
}

// reap takes note of the end of a keeper that is this process's child; one of an earlier agent is not, and is nobody's
// concern. A keeper that is told to end does so at once: it is waited for so long and no longer.
func (k *keeper) reap() {
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		pid, err := unix.Wait4(k.pid, nil, unix.WNOHANG, nil)
		if pid == k.pid || err == unix.ECHILD {
			return
		}
	}
}

// release lets a keeper go at Close: an empty one ends.
func (k *keeper) release() {
	k.mu.Lock()
	gone := k.gone
	k.mu.Unlock()
	if gone {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := k.call(ctx, wire.OpExit, "", nil, nil); err == nil || errors.Is(err, io.EOF) {
		k.reap()
		os.Remove(k.sock)
		os.Remove(logOf(k.sock))
	}
}
