package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/novalet/novalet"
)

// event is what nova-api forwards.
func (l *lab) event(uuid, name, status, tag string) {
	l.agent.ExternalEvents(context.Background(), novalet.RequestContext{RequestID: "req-event"},
		[]novalet.ExternalEvent{{InstanceUUID: uuid, Name: name, Status: status, Tag: tag}})
}

// A boot waits for Neutron; the event ends the wait, without a question to Neutron.
func TestBootWaitsForTheEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		l.world.SetAutoActive(false)
		op := l.server()
		uuid := op.Instance.UUID
		l.submit(op)
		time.Sleep(time.Second)
		synctest.Wait()
		if s := l.world.State(uuid); s != novalet.ContainerCreated {
			t.Fatalf("container is %q before its port is wired", s)
		}
		l.event(uuid, "network-vif-plugged", "completed", "another port")
		l.event("another", "network-vif-plugged", "completed", l.world.Ports(uuid)[0].ID)
		synctest.Wait()
		if s := l.world.State(uuid); s != novalet.ContainerCreated {
			t.Fatalf("an event of something else started it")
		}
		l.event(uuid, "network-vif-plugged", "completed", l.world.Ports(uuid)[0].ID)
		synctest.Wait()
		if n := l.h.Faults.Calls("NetworkAPI.PortActive"); n > 0 {
			t.Errorf("%d questions to Neutron", n)
		}
		l.await(uuid, novalet.VMActive)
	})
}

// The event gets lost: the question to Neutron rescues the boot within seconds.
func TestLostEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		l.world.OnActive(nil)
		began := time.Now()
		uuid := l.boot()
		if took := time.Since(began); took < pollFirst || took > 10*time.Second {
			t.Errorf("ACTIVE after %v", took)
		}
		l.checkRunning(uuid)
	})
}

func TestPluggingTimeout(t *testing.T) {
	for _, c := range []struct {
		name    string
		fatal   bool
		timeout time.Duration
		want    novalet.VMState
	}{
		{"fatal", true, 300 * time.Second, novalet.VMError},
		{"not fatal", false, 300 * time.Second, novalet.VMActive},
		{"no wait", true, 0, novalet.VMActive},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(t, func(l *lab) { l.cfg.VIFPluggingIsFatal, l.cfg.VIFPluggingTimeout = c.fatal, c.timeout })
				l.world.SetAutoActive(false)
				op := l.server(func(op *novalet.Operation) { op.Args.Build.MayReschedule = true })
				uuid := op.Instance.UUID
				began := time.Now()
				l.submit(op)
				time.Sleep(c.timeout + time.Minute)
				synctest.Wait()
				r := l.world.Row(uuid)
				if r.VMState != c.want || r.TaskState != novalet.TaskNone {
					t.Fatalf("row %s/%s after %v", r.VMState, r.TaskState, time.Since(began))
				}
				if c.want == novalet.VMError {
					if text := novalet.FaultText(r.Faults[0]); !strings.Contains(text, "vif_plugging_timeout") {
						t.Errorf("fault %q", text)
					}
					if n := l.h.Faults.Calls("NetworkAPI.PortActive"); n > 30 {
						t.Errorf("%d questions to Neutron in five minutes", n)
					}
					l.checkNothingLeft(uuid)
				}
			})
		})
	}
}

// Neutron says that the wiring failed.
func TestPluggingFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		l.world.SetAutoActive(false)
		op := l.server()
		l.submit(op)
		time.Sleep(100 * time.Millisecond)
		l.event(op.Instance.UUID, "network-vif-plugged", "failed", l.world.Ports(op.Instance.UUID)[0].ID)
		l.await(op.Instance.UUID, novalet.VMError)
		l.checkNothingLeft(op.Instance.UUID)
	})
}

// The conductor is away for ten minutes in the middle of a boot.
func TestConductorAwayForMinutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		op := l.server()
		l.h.Faults.Fail("Conductor.SaveInstance", novalet.ErrTryAgain, -1)
		l.submit(op)
		time.Sleep(10 * time.Minute)
		if n := l.h.Faults.Calls("Conductor.SaveInstance"); n > 200 {
			t.Errorf("%d tries in ten minutes", n)
		}
		l.h.Faults.Clear("Conductor.SaveInstance")
		l.await(op.Instance.UUID, novalet.VMActive)
		l.checkRunning(op.Instance.UUID)
	})
}

// A delete does not wait longer than a bound for a Neutron that hangs.
func TestDeleteWithHangingNeutron(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, func(l *lab) {
			l.cfg.SyncPowerInterval = 0
			l.cfg.RunningDeletedInterval = 0
			l.cfg.ImageCacheInterval = 0
		})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); l.agent.Run(ctx) }()
		uuid := l.boot()
		release := l.h.Faults.Block("NetworkAPI.Deallocate")
		// A refresh hangs too, and holds the interfaces.
		releaseRefresh := l.h.Faults.Block("NetworkAPI.Refresh")
		l.event(uuid, "network-changed", "completed", "")
		synctest.Wait()
		l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
		time.Sleep(freePortsTime + time.Second)
		synctest.Wait()
		if !l.world.Row(uuid).Deleted {
			t.Error("the delete waits for Neutron")
		}
		release()
		releaseRefresh()
		time.Sleep(2 * undoInterval)
		synctest.Wait()
		l.checkNothingLeft(uuid)
		cancel()
		<-done
	})
}

func TestNetworkChanged(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	port := l.world.Ports(uuid)[0].ID
	l.world.SetAddress(port, "10.0.0.99")
	l.event(uuid, "network-changed", "completed", port)
	eventually(t, "the address is shown and set", func() bool {
		r := l.world.Row(uuid)
		return r.Info[0].Network.Subnets[0].IPs[0].Address == "10.0.0.99" && l.world.Plugs(uuid)[port].Address == "10.0.0.99"
	})
	// What changes nothing costs no conductor call.
	n, asked := l.h.Faults.Calls("Conductor.SaveNetworkInfo"), l.h.Faults.Calls("NetworkAPI.Refresh")
	l.event(uuid, "network-changed", "completed", port)
	eventually(t, "it was asked", func() bool { return l.h.Faults.Calls("NetworkAPI.Refresh") > asked })
	if got := l.h.Faults.Calls("Conductor.SaveNetworkInfo"); got != n {
		t.Error("an unchanged list was saved")
	}
	// It does not wait for the queue.
	release := l.h.Faults.Block("Runtime.Freeze")
	l.cast(uuid, novalet.MethodPause, novalet.TaskPausing, novalet.OperationArgs{})
	l.world.SetAddress(port, "10.0.0.100")
	l.event(uuid, "network-changed", "completed", port)
	eventually(t, "the address is shown", func() bool { return l.world.Row(uuid).Info[0].Network.Subnets[0].IPs[0].Address == "10.0.0.100" })
	release()
	l.await(uuid, novalet.VMPaused)
}

// A change during a boot is looked at when the boot is over.
func TestNetworkChangedDuringBoot(t *testing.T) {
	l := newLab(t)
	op := l.server()
	uuid := op.Instance.UUID
	release := l.h.Faults.Block("Runtime.Start")
	l.submit(op)
	eventually(t, "the boot is at its start", func() bool { return l.h.Faults.Calls("Runtime.Start") > 0 })
	l.world.SetAddress(l.world.Ports(uuid)[0].ID, "10.0.0.77")
	l.event(uuid, "network-changed", "completed", "")
	release()
	eventually(t, "the new address is shown", func() bool {
		r := l.world.Row(uuid)
		return r.VMState == novalet.VMActive && r.Info[0].Network.Subnets[0].IPs[0].Address == "10.0.0.77"
	})
}

func TestVIFDeleted(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	port := l.world.Ports(uuid)[0].ID
	l.event(uuid, "network-vif-deleted", "completed", "another")
	l.world.DropPort(port)
	l.event(uuid, "network-vif-deleted", "completed", port)
	eventually(t, "the interface is gone", func() bool {
		return len(l.world.Row(uuid).Info) == 0 && len(l.world.Plugs(uuid)) == 0
	})
}

func TestAttachAndDetach(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	first := l.world.Ports(uuid)[0].ID
	l.world.AddPort("user-port")
	attach := func(r novalet.NetworkRequest) (*novalet.VIF, error) {
		return l.agent.AttachInterface(context.Background(), &novalet.InterfaceRequest{Instance: l.world.Row(uuid).Instance, Network: r})
	}
	vif, err := attach(novalet.NetworkRequest{PortID: "user-port"})
	if err != nil {
		t.Fatal(err)
	}
	if vif.ID != "user-port" || !vif.PreserveOnDelete || l.world.Plugs(uuid)["user-port"].Index != 1 || len(l.world.Row(uuid).Info) != 2 || l.world.Row(uuid).VIFRows["user-port"] == "" {
		t.Errorf("vif %+v, plug %+v, info %v", vif, l.world.Plugs(uuid)["user-port"], l.world.Row(uuid).Info)
	}
	// eth1 stays eth1 when eth0 goes, also over a restart of the guest.
	l.cast(uuid, novalet.MethodDetachIface, novalet.TaskNone, novalet.OperationArgs{PortID: first})
	eventually(t, "the first is detached", func() bool { return len(l.world.Row(uuid).Info) == 1 && l.idle(uuid) })
	l.cast(uuid, novalet.MethodReboot, novalet.TaskRebootingHard, novalet.OperationArgs{RebootType: "HARD"})
	l.await(uuid, novalet.VMActive)
	if p := l.world.Plugs(uuid); len(p) != 1 || p["user-port"].Index != 1 {
		t.Errorf("plugs %+v", p)
	}
	if vif, err = attach(novalet.NetworkRequest{NetworkID: "net"}); err != nil || l.world.Plugs(uuid)[vif.ID].Index != 0 {
		t.Errorf("the next interface is number %d, %v; want the free 0", l.world.Plugs(uuid)[vif.ID].Index, err)
	}
	l.cast(uuid, novalet.MethodDetachIface, novalet.TaskNone, novalet.OperationArgs{PortID: "user-port"})
	eventually(t, "the second is detached", func() bool { return len(l.world.Row(uuid).Info) == 1 && l.idle(uuid) })
	if p := l.world.Ports(""); len(p) != 1 || p[0].ID != "user-port" {
		t.Errorf("the user's port is not as it was: %v", p)
	}
	// A failure leaves no port.
	before := len(l.world.Ports(uuid))
	l.h.Faults.Fail("VIFPlugger.Plug", errors.New("boom"), 1)
	if _, err := attach(novalet.NetworkRequest{NetworkID: "net"}); err == nil {
		t.Fatal("attached although plugging failed")
	}
	if got := len(l.world.Ports(uuid)); got != before || len(l.world.Row(uuid).Info) != 1 {
		t.Errorf("%d ports, want %d", got, before)
	}
	var f *novalet.Fault
	l.h.Faults.Fail("NetworkAPI.Allocate", novalet.Faultf(novalet.ErrAbort, "PortInUse", "Port is in use."), 1)
	if _, err := attach(novalet.NetworkRequest{PortID: "x"}); !errors.As(err, &f) || f.Class != "PortInUse" {
		t.Errorf("error %v, want the network's own", err)
	}
}

// An interface attached to a stopped instance is there after its start.
func TestAttachWhileStopped(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	l.cast(uuid, novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{})
	l.await(uuid, novalet.VMStopped)
	if _, err := l.agent.AttachInterface(context.Background(), &novalet.InterfaceRequest{Instance: l.world.Row(uuid).Instance, Network: novalet.NetworkRequest{NetworkID: "net"}}); err != nil {
		t.Fatal(err)
	}
	l.cast(uuid, novalet.MethodStart, novalet.TaskPoweringOn, novalet.OperationArgs{})
	l.await(uuid, novalet.VMActive)
	if p := l.world.Plugs(uuid); len(p) != 2 {
		t.Errorf("plugs %v", p)
	}
}

// Builds are bounded; calls never wait behind them.
func TestConcurrentBuilds(t *testing.T) {
	l := newLab(t, func(l *lab) { l.cfg.MaxConcurrentBuilds = 2 })
	ready := l.boot()
	l.world.Print(ready, "hello\n")
	release := l.h.Faults.Block("ImageStore.Prepare")
	n := l.h.Faults.Calls("ImageStore.Prepare")
	var uuids []string
	submit := func(n int) {
		for range n {
			op := l.server()
			uuids = append(uuids, op.Instance.UUID)
			l.submit(op)
		}
	}
	submit(2)
	eventually(t, "two builds are under way", func() bool { return l.h.Faults.Calls("ImageStore.Prepare") == n+2 })
	submit(3)
	if out, err := l.agent.ConsoleOutput(context.Background(), ready, -1); err != nil || out != "hello\n" {
		t.Errorf("console output %q, %v", out, err)
	}
	// A build that waits for its turn can be deleted.
	l.cast(uuids[4], novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(uuids[4])
	if got := l.h.Faults.Calls("ImageStore.Prepare"); got != n+2 {
		t.Errorf("%d builds under way, want 2", got-n)
	}
	release()
	for _, uuid := range uuids[:4] {
		l.await(uuid, novalet.VMActive)
	}
}

// A machine's addresses are its own; an application whose image is slow is plugged before its kind is known and gets its
// addresses all the same.
func TestPlugBeforeTheImage(t *testing.T) {
	l := newLab(t)
	release := l.h.Faults.Block("ImageStore.Prepare")
	op := l.server()
	uuid := op.Instance.UUID
	l.submit(op)
	eventually(t, "it is plugged", func() bool { return len(l.world.Plugs(uuid)) == 1 })
	release()
	l.await(uuid, novalet.VMActive)
	for _, p := range l.world.Plugs(uuid) {
		if !p.Static || p.Address == "" {
			t.Errorf("plug %+v, want static with an address", p)
		}
	}
	machine := l.boot(func(op *novalet.Operation) { op.Args.Build.Image.ID = diskImage })
	for _, p := range l.world.Plugs(machine) {
		if p.Static {
			t.Errorf("plug %+v, want one that the guest configures", p)
		}
	}
}

// Saves of one instance are never side by side, and the journal keeps their order.
func TestOrder(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	l.cast(uuid, novalet.MethodPause, novalet.TaskPausing, novalet.OperationArgs{})
	l.await(uuid, novalet.VMPaused)
	l.cast(uuid, novalet.MethodUnpause, novalet.TaskUnpausing, novalet.OperationArgs{})
	l.await(uuid, novalet.VMActive)
	if h := l.world.Row(uuid).History; !slices.Equal(h, []string{"building/spawning", "active/", "paused/", "active/"}) {
		t.Errorf("history %v", h)
	}
}

// A delete does not wait for the undo of a failed boot that hangs at Neutron.
func TestDeleteDuringUndo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		op := l.server()
		uuid := op.Instance.UUID
		l.h.Faults.Fail("Runtime.Start", novalet.ErrAbort, -1)
		release := l.h.Faults.Block("NetworkAPI.Deallocate")
		l.submit(op)
		synctest.Wait()
		l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
		time.Sleep(freePortsTime + time.Second)
		synctest.Wait()
		if !l.world.Row(uuid).Deleted {
			t.Error("the delete waits for the undo")
		}
		release()
		l.undoLeft(uuid)
	})
}

// Glance and Neutron stutter: a passing fault does not fail the boot.
func TestPassingFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		l.h.Faults.Fail("ImageStore.Prepare", novalet.ErrTryAgain, 2)
		l.h.Faults.Fail("NetworkAPI.Allocate", novalet.ErrTryAgain, 2)
		l.checkRunning(l.boot())
		l.h.Faults.Fail("ImageStore.Prepare", novalet.ErrTryAgain, -1)
		op := l.server()
		l.submit(op)
		l.await(op.Instance.UUID, novalet.VMError)
		l.checkNothingLeft(op.Instance.UUID)
	})
}
