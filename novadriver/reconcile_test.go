package novadriver

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

// What holds resources here without being here: only what is certainly over is freed.
func TestReconcile(t *testing.T) {
	b := started(t, "2025.1")
	older := ovo.FormatTime(time.Now().Add(-3 * time.Hour))
	b.driver.since = time.Now().Add(-2 * time.Hour)
	old, fresh := ovo.FormatTime(time.Now().Add(-time.Hour)), ovo.FormatTime(time.Now())
	rows := []struct {
		name    string
		fields  map[string]any
		tracked bool
		queued  bool
		freed   string // the call to Placement, "" for none
		state   string
	}{
		{name: "deleted", fields: map[string]any{"deleted": true}, freed: "remove from ", state: "active"},
		{name: "hidden", fields: map[string]any{"deleted": true, "hidden": true}, state: "active"},
		{name: "ours", fields: map[string]any{"host": "host1"}, tracked: true, state: "active"},
		{name: "elsewhere", fields: map[string]any{"host": "host2"}, state: "active"},
		{name: "lost", fields: map[string]any{"vm_state": "building", "task_state": "scheduling", "created_at": old}, freed: "delete ", state: "error"},
		{name: "waits for its turn", fields: map[string]any{"vm_state": "building", "task_state": "scheduling", "created_at": old}, queued: true, state: "building"},
		{name: "lost before this process began", fields: map[string]any{"vm_state": "building", "task_state": "scheduling", "created_at": older}, freed: "delete ", state: "error"},
		{name: "on its way from another host", fields: map[string]any{"vm_state": "building", "task_state": "scheduling", "created_at": old, "updated_at": fresh}, state: "building"},
		{name: "coming", fields: map[string]any{"vm_state": "building", "task_state": "scheduling", "created_at": fresh}, state: "building"},
		{name: "on another host", fields: map[string]any{"vm_state": "building", "task_state": "scheduling", "created_at": old, "host": "host2"}, state: "building"},
		{name: "at work", fields: map[string]any{"vm_state": "building", "task_state": "spawning", "created_at": old}, state: "building"},
	}
	uuid := func(n int) string { return fmt.Sprintf("5d1f7c1e-0000-4000-8002-%012d", n) }
	for n, r := range rows {
		f := map[string]any{"uuid": uuid(n), "host": nil, "vm_state": "active", "task_state": nil}
		id := b.conductor.Put("Instance", f)
		b.conductor.Change("Instance", "id", id, r.fields)
		b.provider.consumers = append(b.provider.consumers, uuid(n))
		if r.queued {
			b.driver.notes.build(uuid(n), time.Now())
		}
		if r.tracked {
			b.agent.set(func() {
				b.agent.tracked = append(b.agent.tracked, novalet.TrackedInstance{Instance: novalet.Instance{UUID: uuid(n)}})
			})
		}
	}
	b.provider.consumers = append(b.provider.consumers, "8a7b2c1e-0000-4000-8000-000000000002") // a migration
	if err := b.driver.reconcileOnce(b.ctx()); err != nil {
		t.Fatal(err)
	}
	did := b.provider.did()
	for n, r := range rows {
		calls := slices.DeleteFunc(slices.Clone(did), func(c string) bool { return !strings.HasSuffix(c, uuid(n)) })
		want := []string{}
		if r.freed != "" {
			want = []string{r.freed + uuid(n)}
		}
		if !slices.Equal(calls, want) {
			t.Errorf("%s: %v, want %v", r.name, calls, want)
		}
		if row := b.conductor.Find("Instance", "uuid", uuid(n))[0]; row.Str("vm_state") != r.state {
			t.Errorf("%s: vm_state %s", r.name, row["vm_state"])
		}
	}
	if f := b.conductor.Find("InstanceFault", "code", 500); len(f) != 2 || !strings.Contains(f[0].Str("message"), "lost on the way") {
		t.Errorf("faults %v", f)
	}
	if slices.Contains(did, "delete 8a7b2c1e-0000-4000-8000-000000000002") {
		t.Error("a migration's allocation was freed")
	}
}

// Right after the start, and without the broker, a cast may still be on its way: nothing counts as lost.
func TestReconcileWaits(t *testing.T) {
	for _, away := range []bool{false, true} {
		b := started(t, "zed")
		if away {
			b.driver.since = time.Now().Add(-2 * time.Hour)
		}
		old := ovo.FormatTime(time.Now().Add(-time.Hour))
		b.conductor.Put("Instance", map[string]any{"uuid": instUUID, "host": nil, "vm_state": "building", "task_state": "scheduling", "created_at": old})
		inst, err := b.driver.Conductor().Instance(b.ctx(), instUUID)
		if err != nil {
			t.Fatal(err)
		}
		if away {
			if !b.driver.lostBuild(inst, time.Now().Add(-time.Hour)) {
				t.Error("with the broker the build is not lost")
			}
			b.conn.Cut()
		}
		if b.driver.lostBuild(inst, latest(time.Now().Add(-time.Hour), b.driver.since)) {
			t.Errorf("broker away %v: the build is lost", away)
		}
		if away {
			b.conn.Restore()
		}
	}
}

// A host that replaces a stock nova-compute goes on under that one's node name, unless the operator chose another.
func TestAdoptNodeName(t *testing.T) {
	for _, chosen := range []string{"", "mine"} {
		b := newBench(t, "zed", func(o *Options) { o.Node = chosen })
		b.conductor.Put("Service", map[string]any{"host": "host1", "binary": "nova-compute", "version": 64, "report_count": 1})
		b.conductor.Put("ComputeNode", map[string]any{
			"host": "host1", "hypervisor_hostname": "host1.example.org", "uuid": "7a7b2c1e-0000-4000-8000-0000000000f1",
		})
		d := b.build()
		err := d.Start(b.ctx())
		if chosen == "" && (err != nil || d.Node() != "host1.example.org" || b.provider.wanted().Name != "host1.example.org") {
			t.Errorf("node %s (%v)", d.Node(), err)
		}
		if chosen != "" && (err == nil || !strings.Contains(err.Error(), "cannot be renamed")) {
			t.Errorf("renamed by the option: %v", err)
		}
	}
}

// What is remembered of builds does not pile up.
func TestNotesPrune(t *testing.T) {
	n := newNotes()
	now := time.Now()
	for _, id := range []string{"old", "old and here", "new"} {
		n.build(id, now.Add(-25*time.Hour))
		n.opened(id)
	}
	n.build("new", now)
	n.prune(map[string]bool{"old and here": true}, now)
	if n.knows("old") || !n.knows("old and here") || !n.knows("new") || len(n.token) != 2 {
		t.Errorf("%v %v", n.built, n.token)
	}
	n.forget("new")
	if n.knows("new") || !n.mayHaveTokens("new") {
		t.Error("a forgotten one is known")
	}
}
