package agent

import (
	"errors"
	"fmt"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// stranded makes the row of an instance whose host is dead, with its port and its allocation on this host, as the
// conductor leaves it before it casts, and the operation.
func (l *lab) stranded(vm novalet.VMState) *novalet.Operation {
	l.next++
	uuid := fmt.Sprintf("%08d-0000-4000-8000-00000000dead", l.next)
	port := fmt.Sprintf("%08x-0000-4000-8000-00000000beef", l.next)
	l.world.AddPort(port)
	l.world.SetPort(port, func(p *fake.Port) { p.Device, p.Host, p.Preexisting = uuid, "dead", false })
	inst := novalet.Instance{ID: int64(l.next), UUID: uuid, Name: "instance-1", ProjectID: "p", Hostname: "web", ImageRef: appImage, Host: "dead", Node: "dead",
		VMState: vm, TaskState: novalet.TaskRebuilding, PowerState: novalet.PowerRunning, SystemMetadata: map[string]string{"image_base_image_ref": appImage},
		Flavor: novalet.Flavor{MemoryMB: 64, VCPUs: 1, RootGB: 1}}
	for _, p := range l.world.Ports(uuid) {
		inst.NetworkInfo = append(inst.NetworkInfo, fake.VIF(&p))
	}
	l.world.PutRow(inst)
	l.world.Allocate(uuid)
	n := opCounter.Add(1)
	return &novalet.Operation{ID: fmt.Sprintf("op-%d", n), Method: novalet.MethodRebuild, Context: novalet.RequestContext{RequestID: fmt.Sprintf("req-%d", n)},
		Instance: inst, Args: novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{OrigImageRef: appImage, ImageRef: appImage, Recreate: true, MigrationID: 7,
			Node: testHost, SourceHost: "dead", SourceNode: "dead"}}}
}

func TestEvacuateHere(t *testing.T) {
	for _, vm := range []novalet.VMState{novalet.VMActive, novalet.VMStopped, novalet.VMError} {
		t.Run(string(vm), func(t *testing.T) {
			l := newLab(t)
			op := l.stranded(vm)
			uuid := op.Instance.UUID
			l.submit(op)
			want := novalet.VMActive
			if vm == novalet.VMStopped {
				want = vm
			}
			l.await(uuid, want)
			r := l.world.Row(uuid)
			ports := l.world.Ports(uuid)
			if r.Host != testHost || r.Node != testHost || r.LaunchedAt == nil || len(r.Faults) > 0 || len(ports) != 1 || ports[0].Host != testHost ||
				len(r.Info) != 1 || r.Info[0].ID != ports[0].ID {
				t.Errorf("row on %s/%s, faults %v, ports %+v, addresses %v", r.Host, r.Node, r.Faults, ports, r.Info)
			}
			if r.Evacuated != "done" {
				t.Errorf("migration %q", r.Evacuated)
			}
			if vm == novalet.VMStopped {
				l.cast(uuid, novalet.MethodStart, novalet.TaskPoweringOn, novalet.OperationArgs{})
				l.await(uuid, novalet.VMActive)
			}
			l.checkRunning(uuid)
			l.cast(uuid, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
			l.awaitGone(uuid)
			l.checkNothingLeft(uuid)
		})
	}
}

// A failed evacuation leaves nothing here and the port alone; the row names the dead host again, so that it can be tried
// once more.
func TestEvacuateHereFails(t *testing.T) {
	for _, step := range []string{"ImageStore.Prepare", "NetworkAPI.Bind", "Runtime.Create", "VIFPlugger.Plug", "Runtime.Start"} {
		t.Run(step, func(t *testing.T) {
			l := newLab(t)
			op := l.stranded(novalet.VMActive)
			uuid := op.Instance.UUID
			l.h.Faults.Fail(step, errors.New("boom"), 1)
			l.submit(op)
			eventually(t, "the evacuation has failed", func() bool {
				r := l.world.Row(uuid)
				_, err := l.agent.lookup(uuid)
				return r.VMState == novalet.VMError && r.TaskState == novalet.TaskNone && err != nil
			})
			r := l.world.Row(uuid)
			if r.Host != "dead" || r.Node != "dead" || len(r.Faults) != 1 || r.Evacuated != "failed" || len(l.world.Ports(uuid)) != 1 {
				t.Errorf("row on %s/%s, faults %v, migration %s, ports %v", r.Host, r.Node, r.Faults, r.Evacuated, l.world.Ports(uuid))
			}
			if s := l.world.State(uuid); s != "" || len(l.world.Plugs(uuid)) > 0 || len(l.world.Leased()) > 0 || l.world.Announced(uuid) {
				t.Errorf("left here: container %q, plugs %v, leases %v", s, l.world.Plugs(uuid), l.world.Leased())
			}
			again := l.message(uuid, novalet.MethodRebuild, novalet.TaskRebuilding, op.Args)
			l.submit(again)
			l.await(uuid, novalet.VMActive)
		})
	}
}

// An instance that is here cannot be evacuated here, and is not touched by the attempt.
func TestEvacuateWhatIsHere(t *testing.T) {
	for _, source := range []string{testHost, "dead"} {
		l := newLab(t)
		uuid := l.boot()
		pid := l.world.PID(uuid)
		l.cast(uuid, novalet.MethodRebuild, novalet.TaskRebuilding, novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{Recreate: true, Node: testHost, SourceHost: source}})
		eventually(t, "the evacuation was refused", func() bool { return len(l.world.Row(uuid).Faults) == 1 && l.idle(uuid) })
		if r := l.world.Row(uuid); r.Evacuated != "failed" || l.world.PID(uuid) != pid {
			t.Errorf("migration %q, process %d, was %d", r.Evacuated, l.world.PID(uuid), pid)
		}
		l.checkRunning(uuid)
	}
}

// The agent is killed at each step of an evacuation; it ends the same.
func TestEvacuateHereAfterCrash(t *testing.T) {
	for _, step := range []string{"Conductor.SaveInstance", "ImageStore.Prepare", "NetworkAPI.Bind", "Conductor.SaveNetworkInfo", "Runtime.Create",
		"VIFPlugger.Plug", "Runtime.Start", "Conductor.EndEvacuation"} {
		for _, phase := range []fake.Phase{fake.Before, fake.After} {
			t.Run(fmt.Sprintf("%s/%s", step, phase), func(t *testing.T) {
				l := newLab(t)
				op := l.stranded(novalet.VMActive)
				uuid := op.Instance.UUID
				dead := l.killAt(step, phase, 1)
				l.submit(op)
				dead()
				l.open()
				l.awaitAfterCrash(uuid, novalet.VMActive)
				l.checkRunning(uuid)
				r := l.world.Row(uuid)
				if len(r.Faults) > 0 || r.Evacuated != "done" {
					t.Errorf("migration %q, faults %v", r.Evacuated, r.Faults)
				}
			})
		}
	}
}
