package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// quiesce quiesces an instance and asserts that it stands.
func (l *lab) quiesce(uuid string) {
	l.t.Helper()
	if err := l.agent.Quiesce(context.Background(), uuid); err != nil {
		l.t.Fatal(err)
	}
	if s := l.world.State(uuid); s != ice {
		l.t.Fatalf("quiesced, the guest is %s", s)
	}
}

// quiesceHangs begins a quiesce and leaves it waiting for a disk that hangs until release is called.
func (l *lab) quiesceHangs(uuid string) (ended <-chan error, release func()) {
	l.t.Helper()
	release = l.h.Faults.Block("Runtime.Sync")
	answer := make(chan error, 1)
	go func() { answer <- l.agent.Quiesce(context.Background(), uuid) }()
	eventually(l.t, "the quiesce is under way", func() bool { return l.h.Faults.Calls("Runtime.Sync") > 0 })
	return answer, release
}

// goesOn waits until the guest runs, and asserts that Nova sees no difference and no mark is left.
func (l *lab) goesOn(uuid string) {
	l.t.Helper()
	eventually(l.t, "the guest goes on", func() bool { return l.world.State(uuid) == run && l.idle(uuid) })
	l.checkRunning(uuid)
	if l.marked(uuid) {
		l.t.Error("it is still marked")
	}
}

// marked says whether an instance's record has it quiesced.
func (l *lab) marked(uuid string) (yes bool) {
	l.t.Helper()
	in, err := l.agent.lookup(uuid)
	if err != nil {
		l.t.Fatal(err)
	}
	in.read(func(r *record) { yes = r.Quiesced != nil })
	return yes
}

// What the guest has written is on disk twice: most of it before it stops, all of it after.
func TestQuiesce(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	for range 2 { // it may be repeated
		l.quiesce(uuid)
	}
	if got := l.world.Syncs(uuid); !slices.Equal(got, []novalet.ContainerState{run, ice, ice, ice}) {
		t.Errorf("synced while %v", got)
	}
	// To Nova nothing has happened, whatever is compared meanwhile.
	l.world.SetRow(uuid, func(r *fake.Row) { r.PowerState = novalet.PowerNoState })
	eventually(t, "the agent is idle", func() bool { return l.idle(uuid) }) // else the comparison leaves it for later
	if err := l.agent.syncPower(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the power state is compared", func() bool { return l.idle(uuid) && l.world.Row(uuid).PowerState == novalet.PowerRunning })
	if s := l.world.State(uuid); s != ice {
		t.Errorf("the comparison left it %s", s)
	}
	for range 2 {
		l.agent.Unquiesce(uuid)
		l.goesOn(uuid)
	}
	l.agent.Unquiesce("8a7b2c1e-0000-4000-8000-000000000001") // of nothing
}

func TestQuiesceRefused(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	refused := func(want error) {
		t.Helper()
		if err := l.agent.Quiesce(t.Context(), uuid); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	// Each step fails once: the guest goes on.
	broken := errors.New("input/output error")
	for _, step := range []string{"Runtime.Status", "Runtime.Sync", "Runtime.Freeze"} {
		l.h.Faults.Fail(step, broken, 1)
		refused(broken)
		l.goesOn(uuid)
	}
	var syncs int
	l.h.Faults.Hook(func(_ context.Context, name string, p fake.Phase) {
		if name == "Runtime.Freeze" && p == fake.After {
			syncs++
			l.h.Faults.Fail("Runtime.Sync", broken, 1)
		}
	})
	refused(broken)
	l.goesOn(uuid)
	if syncs != 1 {
		t.Errorf("frozen %d times", syncs)
	}
	l.h.Faults.Hook(nil)
	l.cast(uuid, novalet.MethodPause, novalet.TaskPausing, novalet.OperationArgs{})
	l.await(uuid, novalet.VMPaused)
	refused(novalet.ErrInvalidState)
	l.agent.Unquiesce(uuid)
	eventually(t, "nothing is to be done", func() bool { return l.idle(uuid) })
	if s := l.world.State(uuid); s != ice {
		t.Errorf("a paused guest was unquiesced and is %s", s)
	}
	l.cast(uuid, novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{})
	l.await(uuid, novalet.VMStopped)
	refused(novalet.ErrInvalidState)
	uuid = "8a7b2c1e-0000-4000-8000-000000000001"
	refused(novalet.ErrNotFound)
}

// A caller that has gone when all is done is told that the guest is not quiesced, so it goes on.
func TestQuiesceCallerGone(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	ctx, gone := context.WithCancel(t.Context())
	returned := make(chan struct{})
	syncs := 0
	l.h.Faults.Hook(func(_ context.Context, name string, p fake.Phase) {
		if name == "Runtime.Sync" && p == fake.After {
			if syncs++; syncs == 2 {
				gone()
				<-returned
			}
		}
	})
	err := l.agent.Quiesce(ctx, uuid)
	close(returned)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("it was told %v", err)
	}
	l.goesOn(uuid)
	if syncs != 2 {
		t.Errorf("synced %d times", syncs)
	}
}

// Nothing that is under way is waited for.
func TestQuiesceBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		uuid := l.boot()
		busy := func(with string) {
			t.Helper()
			began := time.Now()
			if err := l.agent.Quiesce(context.Background(), uuid); !errors.Is(err, novalet.ErrBusy) || !time.Now().Equal(began) {
				t.Errorf("beside %s: %v after %v", with, err, time.Since(began))
			}
		}
		ended, release := l.quiesceHangs(uuid)
		busy("another one")
		release()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		l.agent.Unquiesce(uuid)
		l.goesOn(uuid)
		release = l.h.Faults.Block("Runtime.Stop")
		l.cast(uuid, novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{})
		busy("a stop")
		release()
		l.await(uuid, novalet.VMStopped)
	})
}

// A guest that nobody unquiesces goes on after a time, also one that cannot be thawed at once; and a disk that hangs ends the
// call before nova-api stops waiting for it.
func TestQuiesceEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); l.agent.Run(ctx) }()
		defer func() { cancel(); <-done }()
		uuid := l.boot()
		l.quiesce(uuid)
		time.Sleep(quiesceTime - time.Minute)
		l.quiesce(uuid) // its time begins anew
		time.Sleep(quiesceTime - time.Minute)
		synctest.Wait()
		if s := l.world.State(uuid); s != ice {
			t.Errorf("before its time is over it is %s", s)
		}
		l.h.Faults.Fail("Runtime.Thaw", novalet.ErrBusy, 1)
		time.Sleep(time.Minute + 3*undoInterval)
		l.goesOn(uuid)

		release := l.h.Faults.Block("Runtime.Sync")
		defer release()
		began := time.Now()
		if err := l.agent.Quiesce(ctx, uuid); !errors.Is(err, novalet.ErrBusy) || time.Since(began) > time.Minute {
			t.Errorf("with a disk that hangs: %v after %v", err, time.Since(began))
		}
		l.goesOn(uuid)
	})
}

// Operations find a guest that runs, and end a quiesce that is being done; a delete does not wait for it. What the guest has no
// part in leaves it quiesced.
func TestQuiesceOvertaken(t *testing.T) {
	stop := func(l *lab, uuid string) {
		l.cast(uuid, novalet.MethodStop, novalet.TaskPoweringOff, novalet.OperationArgs{CleanShutdown: true})
		l.await(uuid, novalet.VMStopped)
	}
	pause := func(l *lab, uuid string) {
		l.cast(uuid, novalet.MethodPause, novalet.TaskPausing, novalet.OperationArgs{})
		l.await(uuid, novalet.VMPaused)
		l.agent.Unquiesce(uuid) // too late
		eventually(l.t, "the agent is idle", func() bool { return l.idle(uuid) })
		if s := l.world.State(uuid); s != ice {
			l.t.Errorf("paused it is %s", s)
		}
	}
	reboot := func(l *lab, uuid string) {
		l.cast(uuid, novalet.MethodReboot, novalet.TaskRebooting, novalet.OperationArgs{RebootType: "SOFT"})
		l.await(uuid, novalet.VMActive)
		l.goesOn(uuid)
	}
	snapshot := func(l *lab, uuid string) {
		l.cast(uuid, novalet.MethodSnapshot, novalet.TaskSnapshotPending, novalet.OperationArgs{ImageID: "snap"})
		l.await(uuid, novalet.VMActive)
		l.goesOn(uuid)
	}
	remove := func(l *lab, uuid string) {
		l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
		l.awaitGone(uuid)
		l.checkNothingLeft(uuid)
	}
	for name, operate := range map[string]func(*lab, string){"stop": stop, "pause": pause, "reboot": reboot, "snapshot": snapshot, "delete": remove} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			uuid := l.boot()
			l.quiesce(uuid)
			operate(l, uuid)
		})
		t.Run(name+" while it is being done", func(t *testing.T) {
			l := newLab(t)
			uuid := l.boot()
			ended, release := l.quiesceHangs(uuid)
			defer release()
			operate(l, uuid) // the disk hangs all the while
			if err := <-ended; !errors.Is(err, novalet.ErrBusy) {
				t.Errorf("the quiesce ended with %v", err)
			}
		})
	}
	t.Run("pause of a guest that could not be thawed", func(t *testing.T) {
		l := newLab(t)
		uuid := l.boot()
		l.quiesce(uuid)
		l.h.Faults.Fail("Runtime.Thaw", novalet.ErrBusy, 1)
		pause(l, uuid)
		if l.marked(uuid) {
			t.Error("it is still marked")
		}
		if err := l.agent.syncPower(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the agent is idle", func() bool { return l.idle(uuid) })
		if p := l.world.Row(uuid).PowerState; p != novalet.PowerPaused {
			t.Errorf("its power state is %d", p)
		}
	})
	t.Run("a detached interface", func(t *testing.T) {
		l := newLab(t)
		uuid := l.boot()
		l.quiesce(uuid)
		port := l.world.Ports(uuid)[0].ID
		l.cast(uuid, novalet.MethodDetachIface, novalet.TaskNone, novalet.OperationArgs{PortID: port})
		eventually(t, "the interface is gone", func() bool { return len(l.world.Plugs(uuid)) == 0 && l.idle(uuid) })
		// One that fails writes what the guest does.
		l.cast(uuid, novalet.MethodDetachIface, novalet.TaskNone, novalet.OperationArgs{PortID: port})
		eventually(t, "the second one has ended", func() bool { return l.idle(uuid) })
		if s, p := l.world.State(uuid), l.world.Row(uuid).PowerState; s != ice || p != novalet.PowerRunning {
			t.Errorf("the guest is %s, its power state %d", s, p)
		}
		l.agent.Unquiesce(uuid)
		eventually(t, "the guest goes on", func() bool { return l.world.State(uuid) == run })
	})
	t.Run("unquiesce while it is being done", func(t *testing.T) {
		l := newLab(t)
		uuid := l.boot()
		ended, release := l.quiesceHangs(uuid)
		l.agent.Unquiesce(uuid)
		release()
		if err := <-ended; !errors.Is(err, novalet.ErrBusy) {
			t.Errorf("the quiesce ended with %v", err)
		}
		l.goesOn(uuid)
	})
}

// An agent that is killed leaves quiesced what it has said is, and what it has not goes on with the next one.
func TestCrashWhileQuiescing(t *testing.T) {
	for _, c := range []struct {
		step string
		nth  int
	}{{"Runtime.Status", 1}, {"Runtime.Sync", 1}, {"Runtime.Freeze", 1}, {"Runtime.Sync", 2}} {
		for _, phase := range []fake.Phase{fake.Before, fake.After} {
			t.Run(fmt.Sprintf("%s %d/%s", c.step, c.nth, phase), func(t *testing.T) {
				l := newLab(t)
				uuid := l.boot()
				dead := l.killAt(c.step, phase, c.nth)
				ended := make(chan error)
				go func() { ended <- l.agent.Quiesce(context.Background(), uuid) }()
				dead()
				if err := <-ended; err == nil {
					t.Error("a dead agent answered")
				}
				l.open()
				l.goesOn(uuid)
			})
		}
	}
	for name, task := range map[string]novalet.TaskState{"quiesced": novalet.TaskNone, "in the midst of a snapshot": novalet.TaskSnapshotPending} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			uuid := l.boot()
			l.quiesce(uuid)
			l.world.SetRow(uuid, func(r *fake.Row) { r.TaskState = task })
			l.crash()
			l.open()
			l.awaitAfterCrash(uuid, novalet.VMActive)
			if s, p := l.world.State(uuid), l.world.Row(uuid).PowerState; s != ice || p != novalet.PowerRunning {
				t.Errorf("the next agent left it %s, power state %d", s, p)
			}
			if list := l.agent.Tracked(); len(list) != 1 || list[0].Power != novalet.PowerRunning {
				t.Errorf("tracked %+v", list)
			}
			// Killed before it comes to thaw, and then again.
			dead := l.killAt("Runtime.Thaw", fake.Before, 1)
			l.agent.Unquiesce(uuid)
			dead()
			l.open()
			l.goesOn(uuid)
		})
	}
	t.Run("the host boots", func(t *testing.T) {
		l := newLab(t, func(l *lab) { l.cfg.ResumeGuestsStateOnHostBoot = true })
		uuid := l.boot()
		l.quiesce(uuid)
		l.crash()
		l.world.RebootHost("boot-2")
		l.open()
		l.awaitAfterCrash(uuid, novalet.VMActive)
		l.goesOn(uuid)
	})
	t.Run("its time is over", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLab(t)
			uuid := l.boot()
			l.quiesce(uuid)
			l.crash()
			time.Sleep(quiesceTime)
			l.open()
			l.goesOn(uuid)
		})
	})
	t.Run("closed", func(t *testing.T) {
		l := newLab(t)
		uuid := l.boot()
		ended, release := l.quiesceHangs(uuid)
		defer release()
		l.close()
		if err := <-ended; err == nil {
			t.Error("a closed agent has quiesced")
		}
		if s := l.world.State(uuid); s != run {
			t.Errorf("it left the guest %s", s)
		}
	})
}

// A record that cannot be written: nobody is told that the guest is quiesced, and it goes on.
func TestQuiesceOnFullDisk(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	l.agent.store.frozen.Store(true)
	if err := l.agent.Quiesce(t.Context(), uuid); err == nil {
		t.Error("quiesced without a record")
	}
	eventually(t, "the guest goes on", func() bool { return l.world.State(uuid) == run && l.idle(uuid) })
	l.agent.store.frozen.Store(false)
	l.quiesce(uuid)
	l.agent.store.frozen.Store(true)
	l.agent.Unquiesce(uuid)
	l.goesOn(uuid)
	l.agent.store.frozen.Store(false)
}
