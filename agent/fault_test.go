package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// bootSteps are the calls a boot cannot do without.
var bootSteps = []string{
	"Conductor.SaveInstance", "NetworkAPI.Allocate", "Conductor.SaveNetworkInfo", "ImageStore.Prepare", "Runtime.Create",
	"VIFPlugger.Check", "VIFPlugger.Plug", "Runtime.Start",
}

// Each step of a boot fails in turn, in each way; the host and the cloud end as they began.
func TestEachStepFails(t *testing.T) {
	for _, step := range bootSteps {
		for _, kind := range []error{novalet.ErrAbort, novalet.ErrReschedule, errors.New("unclassified")} {
			for _, may := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%v/%v", step, kind, may), func(t *testing.T) {
					l := newLab(t)
					l.world.AddPort("user-port")
					op := l.server(func(op *novalet.Operation) {
						op.Args.Build.MayReschedule = may
						op.Args.Build.RequestedNetworks = append(op.Args.Build.RequestedNetworks, novalet.NetworkRequest{PortID: "user-port"})
					})
					uuid := op.Instance.UUID
					if step == "Conductor.SaveInstance" {
						// The first save alone: the later ones write the error.
						l.h.Faults.Fail(step, kind, 1)
					} else {
						l.h.Faults.Fail(step, kind, -1)
						if step == "Conductor.SaveNetworkInfo" {
							l.h.Faults.Fail(step, kind, 1)
						}
					}
					l.submit(op)
					rescheduled := may && !errors.Is(kind, novalet.ErrAbort)
					eventually(t, "the build is over", func() bool {
						_, err := l.agent.lookup(uuid)
						return err != nil
					})
					r := l.world.Row(uuid)
					if r.Host != "" || r.Node != "" || r.LaunchedOn != "" {
						t.Errorf("row names host %q, node %q, launched_on %q", r.Host, r.Node, r.LaunchedOn)
					}
					if rescheduled {
						if r.TaskState != novalet.TaskScheduling || !slices.Contains(l.world.Rescheduled(), uuid) || len(r.Faults) > 0 {
							t.Errorf("row %s/%s, rescheduled %v, faults %v", r.VMState, r.TaskState, l.world.Rescheduled(), r.Faults)
						}
					} else {
						if r.VMState != novalet.VMError || r.TaskState != novalet.TaskNone || len(r.Faults) != 1 {
							t.Errorf("row %s/%s, faults %v", r.VMState, r.TaskState, r.Faults)
						}
						if len(r.Faults) > 0 && !strings.Contains(novalet.FaultText(r.Faults[0]), "aborted: ") {
							t.Errorf("fault text %q", novalet.FaultText(r.Faults[0]))
						}
						if len(l.world.Rescheduled()) > 0 {
							t.Error("rescheduled all the same")
						}
					}
					if l.world.Allocated(uuid) {
						t.Error("allocation is left")
					}
					if len(r.VIFRows) > 0 || len(r.Info) > 0 {
						t.Errorf("interfaces are left recorded: %v, %v", r.VIFRows, r.Info)
					}
					if p := l.world.Ports(""); len(p) != 1 || p[0].Host != "" {
						t.Errorf("the user's own port is not as it was: %v", p)
					}
					l.checkNothingLeft(uuid)
				})
			}
		}
	}
}

// What the user wrote in the fault comes through, and the cause's text does not.
func TestFaultText(t *testing.T) {
	l := newLab(t)
	f := novalet.Faultf(novalet.ErrAbort, "ImageUnacceptable", "The image is truncated. Upload it again.")
	f.Err = errors.New("/var/lib/secret/path")
	l.h.Faults.Fail("ImageStore.Prepare", f, 1)
	op := l.server()
	l.submit(op)
	l.await(op.Instance.UUID, novalet.VMError)
	got := novalet.FaultText(l.world.Row(op.Instance.UUID).Faults[0])
	if !strings.Contains(got, "The image is truncated. Upload it again.") || strings.Contains(got, "secret") {
		t.Errorf("fault text %q", got)
	}
}

// The agent is killed before and after the effect of each call of a boot, and opened again: the instance ends the same.
func TestCrashAtEachStep(t *testing.T) {
	steps := append([]string{"Conductor.StartEvent", "Conductor.CreateVIF", "Conductor.FinishEvent"}, bootSteps...)
	for _, step := range steps {
		for _, phase := range []fake.Phase{fake.Before, fake.After} {
			for _, nth := range []int{1, 2} {
				if nth == 2 && step != "Conductor.SaveInstance" {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/%d", step, phase, nth), func(t *testing.T) {
					l := newLab(t)
					l.world.AddPort("user-port")
					op := l.server(func(op *novalet.Operation) {
						op.Args.Build.RequestedNetworks = []novalet.NetworkRequest{{PortID: "user-port"}}
					})
					uuid := op.Instance.UUID
					dead := l.killAt(step, phase, nth)
					l.submit(op)
					dead()
					l.open()
					l.awaitAfterCrash(uuid, novalet.VMActive)
					l.checkRunning(uuid)
					if p := l.world.Ports(uuid); len(p) != 1 || p[0].ID != "user-port" || !p[0].Preexisting {
						t.Errorf("ports %v, want the user's own", p)
					}
					if f := l.world.Row(uuid).Faults; len(f) > 0 {
						t.Errorf("faults %v", f)
					}
					l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
					l.awaitGone(uuid)
					l.checkNothingLeft(uuid)
					if p := l.world.Ports(""); len(p) != 1 {
						t.Errorf("the user's port was deleted: %v", p)
					}
				})
			}
		}
	}
}

// What no host of this kind can do ends in ERROR with a text, and is not handed on.
func TestImpossible(t *testing.T) {
	for name, change := range map[string]func(*novalet.Operation){
		"Volumes":  func(op *novalet.Operation) { op.Args.Build.BlockDevices[0].DestinationType = "volume" },
		"no image": func(op *novalet.Operation) { op.Args.Build.Image.ID = "" },
		"mixed": func(op *novalet.Operation) {
			op.Instance.Flavor.ExtraSpecs = map[string]string{"hw:cpu_policy": "mixed"}
		},
		"quota:pids": func(op *novalet.Operation) { op.Instance.Flavor.ExtraSpecs = map[string]string{"quota:pids": "many"} },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			op := l.server(change, func(op *novalet.Operation) { op.Args.Build.MayReschedule = true })
			l.submit(op)
			l.await(op.Instance.UUID, novalet.VMError)
			r := l.world.Row(op.Instance.UUID)
			if len(r.Faults) != 1 || !strings.Contains(novalet.FaultText(r.Faults[0]), name) {
				t.Errorf("faults %v, want one that names %q", r.Faults, name)
			}
			if len(l.world.Rescheduled()) > 0 || l.world.Allocated(op.Instance.UUID) {
				t.Error("handed on, or its allocation is left")
			}
			l.checkNothingLeft(op.Instance.UUID)
		})
	}
}

// awaitAfterCrash is await without a look at the events: those of the killed process stay open.
func (l *lab) awaitAfterCrash(uuid string, vm novalet.VMState) {
	l.t.Helper()
	eventually(l.t, fmt.Sprintf("%s is %s (is %s)", uuid, vm, l.state(uuid)), func() bool {
		r := l.world.Row(uuid)
		in, err := l.agent.lookup(uuid)
		if err == nil {
			in.mu.Lock()
			busy := in.busy || len(in.rec.Ops) > 0 || len(in.tasks) > 0
			in.mu.Unlock()
			if busy {
				return false
			}
		}
		return r.VMState == vm && r.TaskState == novalet.TaskNone
	})
}

// A failed boot is killed while it undoes: it ends as failed, and is not tried a second time.
func TestCrashDuringUndo(t *testing.T) {
	for _, step := range []string{"Runtime.Destroy", "VIFPlugger.Unplug", "ImageStore.Release", "NetworkAPI.Deallocate", "Conductor.CreateFault", "Placement.DeleteAllocation"} {
		for _, phase := range []fake.Phase{fake.Before, fake.After} {
			t.Run(fmt.Sprintf("%s/%s", step, phase), func(t *testing.T) {
				l := newLab(t)
				op := l.server()
				uuid := op.Instance.UUID
				l.h.Faults.Fail("Runtime.Start", novalet.ErrAbort, -1)
				dead := l.killAt(step, phase, 1)
				l.submit(op)
				dead()
				l.open()
				l.awaitAfterCrash(uuid, novalet.VMError)
				l.checkNothingLeft(uuid)
				if l.world.Allocated(uuid) {
					t.Error("allocation is left")
				}
				if n := l.h.Faults.Calls("Runtime.Start"); n > 0 {
					t.Error("the boot was tried a second time")
				}
			})
		}
	}
}

// A crash around the moment in which a build goes back to the conductor: it goes back, and what another host has by then
// is left to it.
func TestCrashDuringReschedule(t *testing.T) {
	for _, c := range []struct {
		step  string
		phase fake.Phase
		taken bool // another host has it when the agent comes back
		casts int
		freed bool // the allocation that the agent finds is freed
	}{
		{"Placement.DeleteAllocation", fake.Before, false, 1, true},
		{"Conductor.RescheduleBuild", fake.Before, false, 1, false},
		{"Conductor.RescheduleBuild", fake.After, false, 2, false},
		{"Conductor.RescheduleBuild", fake.After, true, 1, false},
	} {
		t.Run(fmt.Sprintf("%s/%s/%v", c.step, c.phase, c.taken), func(t *testing.T) {
			l := newLab(t)
			op := l.server(func(op *novalet.Operation) { op.Args.Build.MayReschedule = true })
			uuid := op.Instance.UUID
			l.h.Faults.Fail("Runtime.Start", novalet.ErrReschedule, -1)
			dead := l.killAt(c.step, c.phase, 1)
			l.submit(op)
			dead()
			l.world.Allocate(uuid) // of the next host
			if c.taken {
				l.world.SetRow(uuid, func(r *fake.Row) { r.TaskState = novalet.TaskNetworking })
			}
			l.open()
			eventually(t, "the build is out of the agent's hands", func() bool {
				_, err := l.agent.lookup(uuid)
				return err != nil && len(l.world.Rescheduled()) >= c.casts
			})
			if got := l.world.Rescheduled(); len(got) != c.casts {
				t.Errorf("handed back %v, want %d times", got, c.casts)
			}
			if l.world.Allocated(uuid) == c.freed {
				t.Errorf("allocated %v", l.world.Allocated(uuid))
			}
			if r := l.world.Row(uuid); r.VMState != novalet.VMBuilding || r.Host != "" || len(r.Faults) > 0 {
				t.Errorf("row is %s on %q, faults %v", r.VMState, r.Host, r.Faults)
			}
			if s := l.world.State(uuid); s != "" || len(l.world.Ports(uuid)) > 0 || len(l.world.Plugs(uuid)) > 0 {
				t.Error("something of the build is left here")
			}
		})
	}
}

// A delete comes while a boot waits at each of its steps: it wins at once, and nothing is left.
func TestDeleteDuringBuild(t *testing.T) {
	for _, step := range append([]string{"Conductor.StartEvent"}, bootSteps...) {
		if step == "VIFPlugger.Check" {
			continue // takes no context: it does not block
		}
		t.Run(step, func(t *testing.T) {
			l := newLab(t)
			op := l.server()
			uuid := op.Instance.UUID
			reached := make(chan struct{}, 100)
			release := l.h.Faults.Block(step)
			l.h.Faults.Hook(func(_ context.Context, name string, p fake.Phase) {
				if name == step && p == fake.Before {
					reached <- struct{}{}
				}
			})
			l.submit(op)
			<-reached
			del := l.message(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
			if strings.HasPrefix(step, "Conductor.") {
				// The delete itself needs the conductor; it goes on as soon as the conductor does.
				l.submit(del)
				release()
			} else {
				l.submit(del)
				defer release()
			}
			l.awaitGone(uuid)
			l.checkNothingLeft(uuid)
			if l.world.Allocated(uuid) {
				t.Error("allocation is left")
			}
			if f := l.world.Row(uuid).Faults; len(f) > 0 {
				t.Errorf("faults %v", f)
			}
		})
	}
}

// Each step of a delete fails once in a passing way, or the agent is killed at it: in the end nothing is left.
func TestDeleteIsFinished(t *testing.T) {
	steps := []string{"Runtime.Destroy", "ImageStore.Release", "VIFPlugger.Cut", "VIFPlugger.Unplug", "NetworkAPI.Deallocation", "NetworkAPI.Deallocate", "Conductor.DeleteVIFs",
		"Conductor.SaveInstance", "Conductor.DestroyInstance", "Placement.DeleteAllocation"}
	for _, step := range steps {
		for _, phase := range []fake.Phase{fake.Before, fake.After} {
			t.Run(fmt.Sprintf("crash/%s/%s", step, phase), func(t *testing.T) {
				l := newLab(t)
				uuid := l.boot()
				dead := l.killAt(step, phase, 1)
				op := l.message(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
				err := l.agent.Submit(context.Background(), op)
				dead()
				l.open()
				if err != nil { // the kill came before the journal: the message was not acked, and comes again
					l.submit(op)
				}
				l.awaitGone(uuid)
				l.checkNothingLeft(uuid)
				if l.world.Allocated(uuid) {
					t.Error("allocation is left")
				}
				if r := l.world.Row(uuid); r.VMState != novalet.VMDeleted || r.TerminatedAt == nil {
					t.Errorf("the row's last state is %s, ended %v", r.VMState, r.TerminatedAt)
				}
			})
		}
	}
}

// Neutron and Placement are away: the user's delete is done all the same, and the rest follows when they are back.
func TestDeleteWithoutNeutron(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	for _, call := range []string{"NetworkAPI.Deallocate", "Placement.DeleteAllocation", "ImageStore.Release", "VIFPlugger.Cut", "VIFPlugger.Unplug"} {
		l.h.Faults.Fail(call, novalet.ErrTryAgain, -1)
	}
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	eventually(t, "the row is deleted", func() bool { return l.world.Row(uuid).Deleted && l.idle(uuid) })
	if len(l.world.Ports(uuid)) != 1 {
		t.Error("the port is gone: the fault did not bite")
	}
	l.crash()
	l.open() // what is left to undo survives a restart
	eventually(t, "what was left is undone", func() bool {
		for _, in := range l.agent.all() {
			in.retryUndo()
		}
		_, err := l.agent.lookup(uuid)
		return err != nil
	})
	l.checkNothingLeft(uuid)
	if l.world.Allocated(uuid) {
		t.Error("allocation is left")
	}
}

// What is left to undo is not undone to an instance that found another host.
func TestPendingSparesAnotherHost(t *testing.T) {
	l := newLab(t)
	op := l.server()
	uuid := op.Instance.UUID
	l.h.Faults.Fail("Runtime.Start", novalet.ErrAbort, -1)
	l.h.Faults.Fail("NetworkAPI.Deallocate", novalet.ErrTryAgain, -1)
	l.submit(op)
	l.await(uuid, novalet.VMError)
	l.world.SetRow(uuid, func(r *fake.Row) { r.Host, r.VMState = "host2", novalet.VMActive })
	l.h.Faults.Clear("NetworkAPI.Deallocate")
	eventually(t, "the record is gone", func() bool {
		for _, in := range l.agent.all() {
			in.retryUndo()
		}
		_, err := l.agent.lookup(uuid)
		return err != nil
	})
	if len(l.world.Ports(uuid)) != 1 {
		t.Error("the ports of an instance on another host were freed")
	}
}

// A container that cannot be destroyed: ERROR, its addresses off the host, and a second delete works.
func TestDeleteOfAStuckContainer(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	l.h.Faults.Fail("Runtime.Destroy", errors.New("stuck in the kernel"), 1)
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.await(uuid, novalet.VMError)
	if len(l.world.Plugs(uuid)) > 0 {
		t.Error("a container that lives on kept its addresses")
	}
	if f := l.world.Row(uuid).Faults; len(f) != 1 || strings.Contains(novalet.FaultText(f[0]), "kernel") {
		t.Errorf("faults %v", f)
	}
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(uuid)
	l.checkNothingLeft(uuid)
}

// The conductor is away for the whole of a boot, a stop and a delete: all three happen when it is back.
func TestConductorAway(t *testing.T) {
	l := newLab(t)
	op := l.server()
	uuid := op.Instance.UUID
	calls := []string{"Conductor.SaveInstance", "Conductor.StartEvent", "Conductor.FinishEvent", "Conductor.CreateVIF", "Conductor.SaveNetworkInfo",
		"Conductor.SaveBlockDevice", "Conductor.DeleteVIFs", "Conductor.DestroyInstance"}
	away := func(on bool) {
		for _, c := range calls {
			if on {
				l.h.Faults.Fail(c, novalet.ErrTryAgain, -1)
			} else {
				l.h.Faults.Clear(c)
			}
		}
	}
	away(true)
	l.submit(op)
	eventually(t, "a few tries", func() bool { return l.h.Faults.Calls("Conductor.SaveInstance") >= 3 })
	away(false)
	l.await(uuid, novalet.VMActive)
	l.checkRunning(uuid)
	away(true)
	n := l.h.Faults.Calls("Conductor.SaveInstance")
	l.cast(uuid, novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{CleanShutdown: true})
	eventually(t, "a few tries", func() bool { return l.h.Faults.Calls("Conductor.SaveInstance") >= n+2 })
	away(false)
	l.await(uuid, novalet.VMStopped)
	away(true)
	l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	eventually(t, "a few tries", func() bool { return l.h.Faults.Calls("Conductor.DestroyInstance") >= 2 })
	away(false)
	l.awaitGone(uuid)
	l.checkNothingLeft(uuid)
	// An event that was refused at first is tried again later and later.
	eventually(t, "all three events end", func() bool { return len(l.world.ActionEvents(uuid)) == 3 && l.idle(uuid) })
}
