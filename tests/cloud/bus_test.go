package cloud_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// The bus, or who answers on it, goes away while servers are made and deleted. The tests run with those that want the cloud for
// themselves: its other services miss the bus, too.

// without kills services of the cloud, runs fn and starts them again.
func without(t *testing.T, fn func(), names ...string) {
	t.Helper()
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(state(t), "run", n+".pid"))
		must(t, err)
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		must(t, err)
		must(t, syscall.Kill(-pid, syscall.SIGKILL)) // each is the head of a group of its own
	}
	defer func() {
		if out, err := sh(context.Background(), "env", "NO_COMPUTE=1", "bash", "../../devstack/up.sh"); err != nil {
			t.Fatalf("start %v again: %v: %s", names, err, out)
		}
	}()
	fn()
}

// agentLog gives what the agent has logged since now.
func agentLog(t *testing.T) func() string {
	t.Helper()
	path := filepath.Join(state(t), "log", "novalet.log")
	read := func() string {
		b, err := os.ReadFile(path)
		must(t, err)
		return string(b)
	}
	before := len(read())
	return func() string { return read()[before:] }
}

// slowImage takes a second or two to be fetched and unpacked, in each run anew.
func slowImage(t *testing.T, u *user) string {
	t.Helper()
	fill := make([]byte, 256<<20)
	_, _ = rand.Read(fill) // never fails
	root := append(busyboxRoot(t), member{name: "fill", mode: 0o644, data: fill})
	return upload(t, u, imageSpec{name: "novalet-test-slow", container: "docker", disk: "raw"}, bytes.NewReader(dockerArchive(t, root, appConfig())))
}

// atWork makes servers and waits until the agent has the messages of all of them. They have no network, for Neutron itself loses
// what its agents need to know of a port when the broker is killed (the port stays DOWN, and no agent asks for it).
func atWork(t *testing.T, u *user, prefix, image string, count int) (ids []string) {
	t.Helper()
	create(t, u, bootOpts{name: prefix, image: image, count: count, noNet: true})
	ids = serversNamed(t, u, prefix)
	if len(ids) != count {
		t.Fatalf("%d servers, want %d", len(ids), count)
	}
	t.Cleanup(func() { deleteAll(t, u, ids) })
	admin := as(t, "admin")
	for deadline := time.Now().Add(long); ; time.Sleep(20 * time.Millisecond) {
		here := 0
		for _, id := range ids {
			// The agent writes the host, when it has the message and room for the server.
			var s struct {
				Host string `json:"OS-EXT-SRV-ATTR:host"`
			}
			must(t, servers.Get(t.Context(), admin.compute, id).ExtractInto(&s))
			if s.Host == computeHost() {
				here++
			}
		}
		if here == count {
			return ids
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d servers are on the host", here, count)
		}
	}
}

// throughFault lets a fault of the bus happen while four servers are made, one is stopped and one is deleted, and checks what it
// must leave: all that was asked is done, once, nothing else has happened, and the log says lines once.
func throughFault(t *testing.T, fault func(said func() string), lines ...string) {
	t.Helper()
	needAlone(t)
	u := as(t, "demo")
	image, slow := appImage.id(t, u), slowImage(t, u)
	leavesNothing(t)
	running := boot(t, u, bootOpts{name: "bus-running", image: image})
	deleted := boot(t, u, bootOpts{name: "bus-deleted", image: image})
	stopped := boot(t, u, bootOpts{name: "bus-stopped", image: image})
	was := initPID(t, running.ID)
	said := agentLog(t)
	made := atWork(t, u, "bus-made", slow, 4)
	must(t, servers.Stop(t.Context(), u.compute, stopped.ID).ExtractErr())
	must(t, servers.Delete(t.Context(), u.compute, deleted.ID).ExtractErr())
	// Nothing tells when the agent has these two messages: they are on their way for some ten milliseconds.
	time.Sleep(60 * time.Millisecond)
	fault(said)

	for _, id := range made {
		waitStatus(t, u, id, "ACTIVE")
		// An answer that was lost is waited for for a minute (rpc_response_timeout); then the agent asks again.
		eventually(t, long, "the build is an event that has ended", func() error {
			if ended, open := hostEvents(t, u, id); !slices.Equal(ended, []string{"create"}) || len(open) > 0 {
				return fmt.Errorf("server %s: events of %v, open %v", id, ended, open)
			}
			return nil
		})
	}
	waitStatus(t, u, stopped.ID, "SHUTOFF")
	waitGone(t, u, deleted.ID)
	eventually(t, long, "the service is up", func() error {
		if out, err := novalet("health"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if state, _ := serviceState(t); state != "up" {
			return fmt.Errorf("state %q", state)
		}
		return nil
	})
	if now := initPID(t, running.ID); now != was {
		t.Errorf("init was %s, is %s", was, now)
	}
	for _, l := range lines {
		if n := strings.Count(said(), l); n != 1 {
			t.Errorf("said %d times %q:\n%s", n, l, tail(said(), 3000))
		}
	}
}

// TestBrokerRestarts: RabbitMQ is killed, and has forgotten every queue when it is back.
func TestBrokerRestarts(t *testing.T) {
	throughFault(t, func(said func() string) {
		without(t, func() {
			eventually(t, long, "the agent says that the broker is lost", func() error {
				if !strings.Contains(said(), "lost the broker") {
					return fmt.Errorf("it says %q", tail(said(), 500))
				}
				return nil
			})
			time.Sleep(10 * time.Second)
		}, "rabbitmq")
	}, "lost the broker", "connected to the broker again")
}

// TestConductorAway: the conductor is away for longer than an answer is waited for.
func TestConductorAway(t *testing.T) {
	throughFault(t, func(func() string) {
		without(t, func() { time.Sleep(100 * time.Second) }, "nova-conductor")
	}, "the conductor does not answer; waiting", "the conductor answers")
}

// way is a way to the cloud's broker that can be closed and opened again.
type way struct {
	t    *testing.T
	addr string

	mu       sync.Mutex
	listener net.Listener // nil while it is closed
	conns    []net.Conn
}

func newWay(t *testing.T) *way {
	w := &way{t: t, addr: "127.0.0.1:0"}
	w.open()
	t.Cleanup(w.close)
	return w
}

func (w *way) open() {
	l, err := net.Listen("tcp", w.addr)
	must(w.t, err)
	w.mu.Lock()
	w.listener, w.addr = l, l.Addr().String()
	w.mu.Unlock()
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return // closed
			}
			far, err := net.Dial("tcp", "127.0.0.1:5672")
			if err != nil {
				near.Close()
				continue
			}
			w.mu.Lock()
			w.conns = append(w.conns, near, far)
			if w.listener != l {
				near.Close()
				far.Close()
			}
			w.mu.Unlock()
			// What one end closes is closed at the other.
			go func() { defer near.Close(); _, _ = io.Copy(near, far) }()
			go func() { defer far.Close(); _, _ = io.Copy(far, near) }()
		}
	}()
}

func (w *way) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.listener != nil {
		w.listener.Close()
	}
	for _, c := range w.conns {
		c.Close()
	}
	w.listener, w.conns = nil, nil
}

// TestTwoBrokers: of two brokers one goes away while a server is made, then the other while it is deleted.
func TestTwoBrokers(t *testing.T) {
	needAlone(t)
	admin := as(t, "admin")
	leavesNothing(t)
	first, second := newWay(t), newWay(t)
	second.close() // the agent begins with either, as oslo.messaging does
	user := "openstack:" + admin.env["OS_PASSWORD"]
	h := newSecondHost(t, "novalet-two", fmt.Sprintf("\n[DEFAULT]\ntransport_url = rabbit://%s@%s,%s@%s/\n", user, first.addr, user, second.addr))
	second.open()
	image := slowImage(t, admin)
	go func() {
		time.Sleep(time.Second)
		first.close()
	}()
	s := bootOn(t, admin, h.name, bootOpts{name: "two-brokers", image: image, noNet: true})
	if ids := h.containers(); !strings.Contains(ids, s.ID) {
		t.Errorf("server %s does not run there: %s", s.ID, ids)
	}
	eventually(t, long, "the agent is at the second broker", func() error {
		if !strings.Contains(h.out.String(), "connected to the broker again\" broker="+second.addr) {
			return fmt.Errorf("it says %s", tail(h.out.String(), 500))
		}
		return nil
	})
	first.open()
	must(t, servers.Delete(t.Context(), admin.compute, s.ID).ExtractErr())
	second.close()
	remove(t, admin, s.ID)
	eventually(t, long, "the agent is at the first broker again", func() error {
		if !strings.Contains(h.out.String(), "connected to the broker again\" broker="+first.addr) {
			return fmt.Errorf("it says %s", tail(h.out.String(), 500))
		}
		return nil
	})
	if ids := strings.TrimSpace(h.containers()); ids != "" {
		t.Errorf("left there: %s", ids)
	}
	for text, want := range map[string]int{"lost the broker": 2, "connected to the broker again": 2} {
		if n := strings.Count(h.out.String(), text); n != want {
			t.Errorf("said %d times %q:\n%s", n, text, h.out.String())
		}
	}
}
