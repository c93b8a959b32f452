package agent

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// watcher is a plugger that sees Neutron's side let go of every port once unbound is closed.
type watcher struct {
	novalet.VIFPlugger
	unbound chan struct{}
}

func (w *watcher) AwaitUnbound(ctx context.Context, _ string, _ *novalet.VIF) error {
	select {
	case <-w.unbound:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// unboundLab boots an instance on a host that sees when Neutron's side lets go of a port, and deletes it while Neutron does not
// answer: the instance is as far as it comes without either.
func unboundLab(t *testing.T, prepare ...func(*lab)) (l *lab, uuid string, answer func()) {
	l = newLab(t, func(l *lab) { l.unbound = make(chan struct{}) })
	uuid = l.boot()
	for _, p := range prepare {
		p(l)
	}
	answer = l.h.Faults.Block("NetworkAPI.Deallocate")
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	time.Sleep(time.Second)
	synctest.Wait()
	if l.world.Row(uuid).Deleted {
		t.Fatal("the row went while the port was bound and Neutron had not answered")
	}
	return l, uuid, answer
}

// Who deletes a server does not wait for what Neutron does after the port has gone from its database and from the host.
func TestDeleteUnbound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, uuid, answer := unboundLab(t)
		close(l.unbound)
		synctest.Wait()
		if r := l.world.Row(uuid); !r.Deleted || r.VMState != novalet.VMDeleted {
			t.Errorf("the row waits for Neutron's answer: deleted %v, %s", r.Deleted, r.VMState)
		}
		if _, err := l.agent.lookup(uuid); err != nil {
			t.Error("the delete ended without Neutron's answer")
		}
		answer()
		l.awaitGone(uuid)
		l.checkNothingLeft(uuid)
	})
}

// Neutron's answer counts also where nothing is seen, and alone where an interface goes because it could not be cut.
func TestDeleteNotSeenUnbound(t *testing.T) {
	for name, prepare := range map[string]func(*lab){
		"not seen": func(*lab) {},
		"not cut": func(l *lab) {
			l.h.Faults.Fail("VIFPlugger.Cut", novalet.ErrTryAgain, -1)
			close(l.unbound)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, uuid, answer := unboundLab(t, prepare)
				answer()
				l.awaitGone(uuid)
				l.checkNothingLeft(uuid)
			})
		})
	}
}

// What Neutron says to the contrary after the row has gone is heard: the ports are tried again.
func TestDeleteUnboundButRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, uuid, answer := unboundLab(t)
		l.h.Faults.Fail("NetworkAPI.Deallocate", novalet.ErrTryAgain, -1)
		close(l.unbound)
		synctest.Wait()
		answer()
		synctest.Wait()
		in, err := l.agent.lookup(uuid)
		if err != nil {
			t.Fatal("the ports that are left were forgotten")
		}
		var left *pending
		in.read(func(r *record) { left = r.Pending })
		if left == nil || !left.Ports || !l.world.Row(uuid).Deleted {
			t.Errorf("left %+v of the delete, row deleted: %v", left, l.world.Row(uuid).Deleted)
		}
		l.h.Faults.Clear("NetworkAPI.Deallocate")
		l.undoLeft(uuid)
	})
}

// An agent that dies between the row and Neutron's answer leaves nothing to the next one that it does not find.
func TestDeleteUnboundThenKilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, uuid, _ := unboundLab(t)
		dead := l.killAt("Conductor.DestroyInstance", fake.After, 1)
		close(l.unbound)
		dead()
		if len(l.world.Ports(uuid)) == 0 {
			t.Error("the port went without Neutron's doing")
		}
		l.open()
		l.awaitGone(uuid)
		l.checkNothingLeft(uuid)
	})
}

// Ports that are looked for once the row has gone, and are not found out about, are left for later.
func TestDeleteUnsure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		uuid := l.boot()
		synctest.Wait()
		l.h.Faults.Hook(func(_ context.Context, name string, p fake.Phase) {
			if name == "Conductor.DestroyInstance" && p == fake.After {
				l.h.Faults.Fail("NetworkAPI.Deallocate", novalet.ErrTryAgain, 1)
			}
		})
		l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
		time.Sleep(containerAside)
		synctest.Wait()
		l.undoLeft(uuid)
	})
}

// Neutron is asked first. The rest of a delete begins later, where there are ports that Neutron takes its time for; it does not
// wait for Neutron, and where there is none the whole delete is done at once.
func TestDeleteAside(t *testing.T) {
	begin := func(t *testing.T, change ...func(*novalet.Operation)) (l *lab, uuid string, events int) {
		l = newLab(t)
		uuid = l.boot(change...)
		synctest.Wait()
		events = l.h.Faults.Calls("Conductor.StartEvent")
		return l, uuid, events
	}
	t.Run("ports", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, uuid, events := begin(t)
			answer := l.h.Faults.Block("NetworkAPI.Deallocate")
			l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
			synctest.Wait()
			check := func(when string, container, event bool) {
				t.Helper()
				if got := l.world.State(uuid) != ""; got != container {
					t.Errorf("%s: container there %v, want %v", when, got, container)
				}
				if got := l.h.Faults.Calls("Conductor.StartEvent") > events; got != event {
					t.Errorf("%s: event written %v, want %v", when, got, event)
				}
			}
			if l.h.Faults.Calls("NetworkAPI.Deallocate") == 0 {
				t.Error("Neutron is not asked at once")
			}
			check("at once", true, false)
			time.Sleep(containerAside)
			synctest.Wait()
			check("a little later", false, false)
			time.Sleep(eventAside - containerAside)
			synctest.Wait()
			check("while Neutron takes its time", false, true)
			answer()
			l.awaitGone(uuid)
			l.checkNothingLeft(uuid)
		})
	})
	t.Run("no ports", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, uuid, events := begin(t, func(op *novalet.Operation) { op.Args.Build.RequestedNetworks = nil })
			began := time.Now()
			l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
			synctest.Wait()
			if took := time.Since(began); took > 0 || !l.world.Row(uuid).Deleted {
				t.Errorf("after %v the row is deleted: %v", took, l.world.Row(uuid).Deleted)
			}
			if n := l.h.Faults.Calls("Conductor.StartEvent") - events; n != 1 {
				t.Errorf("%d events, want 1", n)
			}
			l.awaitGone(uuid)
			l.checkNothingLeft(uuid)
		})
	})
}

// A delete goes on where nothing can be written, as on a full disk that it is to make room on. Its message is not accepted, and
// comes again: while the delete is under way, or after it, when it is not carried out a second time.
func TestDeleteOnFullDisk(t *testing.T) {
	for name, under := range map[string]bool{"again while under way": true, "again afterwards": false} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			uuid := l.boot()
			l.agent.store.frozen.Store(true)
			answer := func() {}
			if under {
				answer = l.h.Faults.Block("NetworkAPI.Deallocate")
			}
			defer answer()
			op := l.message(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
			if err := l.agent.Submit(context.Background(), op); err == nil {
				t.Fatal("accepted without a record")
			}
			if under {
				eventually(t, "the delete has come to the ports", func() bool { return l.h.Faults.Calls("NetworkAPI.Deallocate") > 0 })
				if err := l.agent.Submit(context.Background(), op); err == nil {
					t.Error("accepted since it came before")
				}
			} else {
				eventually(t, "the row goes", func() bool { return l.world.Row(uuid).Deleted && l.idle(uuid) })
				if err := l.agent.Submit(context.Background(), op); err != nil {
					t.Errorf("what is done is not accepted: %v", err)
				}
			}
			l.agent.store.frozen.Store(false)
			l.submit(op)
			answer()
			l.awaitGone(uuid)
			l.checkNothingLeft(uuid)
			if n := l.h.Faults.Calls("Conductor.DestroyInstance"); n != 1 {
				t.Errorf("deleted %d times", n)
			}
		})
	}
}
