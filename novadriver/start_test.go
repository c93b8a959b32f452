package novadriver

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/conductortest"
	"github.com/novalet/novalet/novadriver/ovo"
)

func ourService(b *bench) conductortest.Row {
	b.t.Helper()
	for _, r := range b.conductor.Find("Service", "host", "host1") {
		return r
	}
	b.t.Fatal("no service record")
	return nil
}

// A host nobody knows: everything is made, in stock's order, on every release.
func TestStartFresh(t *testing.T) {
	for _, rel := range ovo.Releases() {
		t.Run(rel.Name, func(t *testing.T) {
			recovered := false
			b := newBench(t, rel.Name)
			b.options.Recover = func(context.Context) error {
				recovered = true
				if len(b.conductor.Find("Service", "host", "host1")) > 0 {
					t.Error("registered before the recovery")
				}
				return nil
			}
			d := b.build()
			if err := d.Start(b.ctx()); err != nil {
				t.Fatal(err)
			}
			if !recovered {
				t.Error("the agent's recovery did not run")
			}
			s := ourService(b)
			if got := s.Int("version"); got != int64(rel.Service) {
				t.Errorf("service version %d, the controllers have %d", got, rel.Service)
			}
			id, err := os.ReadFile(filepath.Join(b.options.StateDir, "compute_id"))
			if err != nil {
				t.Fatal(err)
			}
			nodes := b.conductor.Find("ComputeNode", "uuid", strings.TrimSpace(string(id)))
			if len(nodes) != 1 {
				t.Fatalf("%d compute nodes with the uuid of the file", len(nodes))
			}
			n := nodes[0]
			for field, want := range map[string]string{
				"host": `"host1"`, "hypervisor_hostname": `"node1"`, "hypervisor_type": `"novalet"`, "service_id": string(s["id"]),
				"vcpus": "8", "memory_mb": "16000", "memory_mb_used": "512", "free_ram_mb": "15488", "local_gb": "100",
				"disk_available_least": "90", "cpu_info": `""`, "numa_topology": "null", "cpu_allocation_ratio": "4", "running_vms": "0",
			} {
				if got := string(n[field]); got != want {
					t.Errorf("ComputeNode.%s = %s, want %s", field, got, want)
				}
			}
			if want := b.provider.wanted(); want == nil || want.UUID != n.Str("uuid") || want.Name != "node1" {
				t.Errorf("provider %+v", want)
			} else if got := slices.Contains(want.Traits, "OWNER_NOVA"); got != (rel.Service >= 73) {
				t.Errorf("OWNER_NOVA: %v", got)
			}
			names := b.conductor.Names()
			order := []string{"Service.get_by_host_and_binary", "ServiceList.get_by_binary", "Service.get_minimum_version", "ComputeNode.get_by_uuid", "Service.create", "ComputeNode.create"}
			at := -1
			for _, want := range order {
				i := slices.Index(names, want)
				if i <= at {
					t.Fatalf("%s is not after what comes before it: %v", want, names)
				}
				at = i
			}
			before := ourService(b).Int("report_count")
			b.eventually("heartbeats", func() bool { return ourService(b).Int("report_count") > before+1 })
			if rel.Version("Instance") != "2.7" {
				inst := b.instance(map[string]any{"host": nil, "node": nil})
				err := d.Conductor().SaveInstance(b.ctx(), d.Conductor().NewContext(), &novalet.InstanceUpdate{
					UUID: inst.String("uuid"), Fields: map[string]any{"host": "host1", "node": "node1"},
				})
				if err != nil {
					t.Fatal(err)
				}
				row := b.conductor.Find("Instance", "uuid", instUUID)[0]
				if row.Int("compute_id") != n.Int("id") {
					t.Errorf("compute_id %s, the node is %d", row["compute_id"], n.Int("id"))
				}
			}
		})
	}
}

// The same host again: nothing is made, the identity stays.
func TestStartKnown(t *testing.T) {
	b := newBench(t, "2025.1")
	d := b.build()
	if err := d.Start(b.ctx()); err != nil {
		t.Fatal(err)
	}
	id := d.nodeUUID()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	b.conductor.Forget()
	b.conn = b.bus.Connect()
	b.options.Transport = b.conn
	d = b.build()
	if err := d.Start(b.ctx()); err != nil {
		t.Fatal(err)
	}
	if d.nodeUUID() != id {
		t.Errorf("another identity: %s, was %s", d.nodeUUID(), id)
	}
	for _, n := range b.conductor.Names() {
		if strings.HasSuffix(n, ".create") || n == "ComputeNode.save" {
			t.Errorf("unneeded %s", n)
		}
	}
}

// A deleted node comes back with the same uuid.
func TestStartRevivesNode(t *testing.T) {
	b := newBench(t, "2025.1")
	d := b.build()
	if err := d.Start(b.ctx()); err != nil {
		t.Fatal(err)
	}
	id := d.nodeUUID()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	b.conductor.Change("ComputeNode", "uuid", id, map[string]any{"deleted": true})
	b.options.Transport = b.bus.Connect()
	d = b.build()
	if err := d.Start(b.ctx()); err != nil {
		t.Fatal(err)
	}
	if n := b.conductor.Find("ComputeNode", "uuid", id); len(n) != 1 || string(n[0]["deleted"]) != "false" {
		t.Errorf("the node is not back: %v", n)
	}
}

// Started before anything else is there, the driver waits, says so once, and goes on.
func TestStartWaits(t *testing.T) {
	b := newBench(t, "", func(o *Options) { o.RPCTimeout = patience })
	b.conn.Cut()
	b.provider.err = novalet.ErrTryAgain
	d := b.build()
	result := make(chan error, 1)
	go func() { result <- d.Start(b.ctx()) }()
	b.conn.Restore()
	b.serveConductor("zed")
	b.eventually("the compute node", func() bool { return len(b.conductor.Find("ComputeNode", "host", "host1")) == 1 })
	b.eventually("a word about Placement", func() bool { return b.logs.count("Placement does not answer") > 0 })
	b.provider.mu.Lock()
	b.provider.err = nil
	b.provider.mu.Unlock()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	if n := b.logs.count("Placement does not answer"); n != 1 {
		t.Errorf("said %d times that Placement is away", n)
	}
}

// A conductor that does not answer is said once, and asked until it does.
func TestConductorAway(t *testing.T) {
	b := newBench(t, "zed")
	d := b.build()
	d.rpc.timeout = 20 * time.Millisecond // each attempt is given up soon
	undo := b.conductor.Hook(func(r conductortest.Request) conductortest.Fate { return conductortest.Fate{Lost: true} })
	done := make(chan error, 1)
	go func() { _, err := d.readService(b.ctx()); done <- err }()
	b.eventually("several attempts", func() bool { return len(b.conductor.Requests()) >= 3 })
	undo()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := b.logs.count("the conductor does not answer"); n != 1 {
		t.Errorf("said %d times that the conductor is away", n)
	}
	if n := b.logs.count("the conductor answers"); n != 1 {
		t.Errorf("said %d times that it is back", n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := d.readService(ctx); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("an ended context gives %v, not ErrTryAgain", err)
	}
}

func TestIdentity(t *testing.T) {
	const file = "7a7b2c1e-0000-4000-8000-0000000000f1"
	for _, c := range []struct {
		name    string
		release string
		file    string
		service bool  // the host is registered
		nodes   []int // compute nodes of the host
		tracked int
		want    string // part of the error; "" for success
		id      string // the identity then, "" for any
	}{
		{name: "fresh", release: "2025.1"},
		{name: "file", release: "2025.1", file: file, id: file},
		{name: "file lost", release: "2025.1", service: true, want: "restore the file"},
		{name: "zed without file, one node", release: "zed", service: true, nodes: []int{1}, id: "00000000-0000-4000-8000-000000000001"},
		{name: "zed without file, no node", release: "zed", service: true},
		{name: "zed without file, two nodes", release: "zed", service: true, nodes: []int{1, 2}, want: "2 compute nodes"},
		{name: "wrong database", release: "zed", tracked: 1, want: "wrong database"},
		{name: "wrong database with file", release: "zed", file: file, tracked: 1, want: "wrong database"},
		{name: "damaged", release: "zed", file: "../../etc", want: "no uuid"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, c.release)
			if c.file != "" {
				if err := os.WriteFile(filepath.Join(b.options.StateDir, identityFile), []byte(c.file+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if c.service {
				rel, _ := ovo.ReleaseNamed(c.release)
				b.conductor.Put("Service", map[string]any{"host": "host1", "binary": "nova-compute", "version": rel.Service, "report_count": 1})
			}
			for _, n := range c.nodes {
				b.conductor.Put("ComputeNode", map[string]any{
					"host": "host1", "hypervisor_hostname": "node1", "uuid": "00000000-0000-4000-8000-00000000000" + string(rune('0'+n)),
				})
			}
			b.agent.tracked = make([]novalet.TrackedInstance, c.tracked)
			d := b.build()
			err := d.Start(b.ctx())
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("want an error with %q, got %v", c.want, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			raw, err := os.ReadFile(filepath.Join(b.options.StateDir, identityFile))
			if err != nil || strings.TrimSpace(string(raw)) != d.nodeUUID() {
				t.Errorf("file %q (%v), identity %q", raw, err, d.nodeUUID())
			}
			if c.id != "" && d.nodeUUID() != c.id {
				t.Errorf("identity %s, want %s", d.nodeUUID(), c.id)
			}
		})
	}
}

// A host that was renamed is not taken for another.
func TestIdentityRename(t *testing.T) {
	b := started(t, "2025.1")
	if err := b.driver.Close(); err != nil {
		t.Fatal(err)
	}
	b.options.Transport, b.options.Host = b.bus.Connect(), "host2"
	err := b.build().Start(b.ctx())
	if err == nil || !strings.Contains(err.Error(), "cannot be renamed") {
		t.Fatalf("renamed host started: %v", err)
	}
}

func TestNegotiate(t *testing.T) {
	type svc struct {
		binary  string
		version int
		down    bool
	}
	for _, c := range []struct {
		name     string
		release  string // what the conductor really is
		more     []svc
		pin      string
		noTrait  bool
		own      int
		report   int
		instance string
	}{
		{name: "zed", release: "zed", report: 64, instance: "2.7"},
		{name: "2023.1 shares 66", release: "2023.1", report: 66, instance: "2.7"},
		{name: "2023.2 shares 66", release: "2023.2", report: 66, instance: "2.8"},
		{name: "newest", release: "2026.2", report: ovo.Newest().Service, instance: "2.8"},
		{name: "newest without the trait", release: "2026.2", noTrait: true, report: 72, instance: "2.8"},
		{name: "older scheduler", release: "2025.1", more: []svc{{"nova-scheduler", 67, false}}, report: 67, instance: "2.8"},
		{name: "older conductor that is down", release: "2025.1", more: []svc{{"nova-conductor", 64, true}}, report: 68, instance: "2.8"},
		{name: "older conductor", release: "2025.1", more: []svc{{"nova-conductor", 67, false}}, report: 67, instance: "2.8"},
		{name: "not lowered by a scheduler", release: "2025.1", more: []svc{{"nova-scheduler", 67, false}}, own: 68, report: 68, instance: "2.8"},
		{name: "pinned", release: "2025.1", pin: "2024.1", report: 67, instance: "2.8"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, c.release, func(o *Options) { o.Release = c.pin })
			for _, s := range c.more {
				b.conductor.Put("Service", map[string]any{
					"host": "other", "binary": s.binary, "version": s.version, "forced_down": s.down, "last_seen_up": ovo.FormatTime(time.Now()),
				})
			}
			if c.noTrait {
				b.provider.traits = map[string]bool{}
			}
			d := b.build()
			n, err := d.negotiate(b.ctx(), c.own)
			if err != nil {
				t.Fatal(err)
			}
			if n.report != c.report || n.release.Version("Instance") != c.instance {
				t.Errorf("report %d, Instance %s; want %d, %s", n.report, n.release.Version("Instance"), c.report, c.instance)
			}
		})
	}
}

// Controllers newer than anything known are reported as the newest known, never more.
func TestNegotiateBeyond(t *testing.T) {
	b := newBench(t, "2026.2")
	b.conductor.Change("Service", "host", "control1", map[string]any{"version": 99})
	n, err := b.build().negotiate(b.ctx(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if n.report != ovo.Newest().Service {
		t.Errorf("reports %d", n.report)
	}
	if b.logs.count("newer than any release known") != 1 {
		t.Error("nothing is said of it")
	}
}

// Where the other computes are newer than we may be the conductor would refuse us: wait for the operator.
func TestStartTooOld(t *testing.T) {
	b := newBench(t, "zed")
	b.conductor.Put("Service", map[string]any{"host": "c2", "binary": "nova-compute", "version": 70})
	d := b.build()
	ctx, cancel := context.WithCancel(b.ctx())
	done := make(chan error, 1)
	go func() { done <- d.Start(ctx) }()
	b.eventually("a word about it", func() bool { return b.logs.count("would refuse this host") == 1 })
	b.conductor.Change("Service", "host", "c2", map[string]any{"version": 64})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	cancel()
}

// The version follows the controllers within the interval.
func TestFollowControllers(t *testing.T) {
	b := started(t, "2025.1")
	b.conductor.Change("Service", "host", "control1", map[string]any{"version": 70})
	b.driver.Renegotiate()
	b.eventually("the new version", func() bool { return ourService(b).Int("version") == 70 })
	b.eventually("the state", func() bool {
		s := b.driver.Status()
		return s.Release == "2025.2" && s.ServiceVersion == 70 && s.ComputeID != "" && !s.Away && !s.LastReport.IsZero()
	})
}

// What a heartbeat brings back steers the trait; an operator's delete of the record ends the work.
func TestServiceRecord(t *testing.T) {
	b := started(t, "zed")
	b.conductor.Change("Service", "host", "host1", map[string]any{"disabled": true})
	b.eventually("the trait", func() bool { return slices.Contains(b.provider.wanted().Traits, traitDisabled) })
	b.conductor.Delete("Service", "host", "host1")
	b.eventually("a word about the deleted record", func() bool { return b.logs.count("the service record was deleted") == 1 })
	if got := b.conductor.Find("Service", "host", "host1"); len(got) != 0 {
		t.Errorf("the record came back: %v", got)
	}
}

// The calls of the start have the shape that stock's have, and the ones recorded.
func TestRequestShapes(t *testing.T) {
	for _, release := range []string{"zed", "2025.1", "2026.1"} {
		t.Run(release, func(t *testing.T) {
			b := started(t, release)
			d := b.driver
			c := d.Conductor()
			rc := contextOf(userContext())
			b.instance(map[string]any{"host": nil, "vm_state": "building", "task_state": "scheduling"})
			vif := &novalet.VIF{ID: "7f1c3a3e-0000-4000-8000-0000000000bb", Address: "fa:16:3e:11:22:33"}
			for _, err := range []error{
				c.StartEvent(b.ctx(), rc, instUUID, "compute__do_build_and_run_instance"),
				c.SaveInstance(b.ctx(), rc, &novalet.InstanceUpdate{UUID: instUUID, Fields: map[string]any{
					"vm_state": novalet.VMBuilding, "task_state": novalet.TaskSpawning, "host": "host1", "node": "node1", "launched_on": "host1",
				}, Expected: []novalet.TaskState{novalet.TaskScheduling, novalet.TaskNone}}),
				c.CreateVIF(b.ctx(), rc, instUUID, vif, ""),
				c.SaveNetworkInfo(b.ctx(), rc, instUUID, novalet.NetworkInfo{*vif}),
				c.FinishEvent(b.ctx(), rc, instUUID, "compute__do_build_and_run_instance", nil),
				c.CreateFault(b.ctx(), rc, instUUID, errors.New("boom")),
				c.DeleteVIFs(b.ctx(), rc, instUUID),
				c.DestroyInstance(b.ctx(), rc, instUUID),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			b.eventually("a heartbeat", func() bool { return slices.Contains(b.conductor.Names(), "Service.save") })
			ours := map[string][]conductortest.Request{}
			for _, r := range b.conductor.Requests() {
				ours[r.Name()] = append(ours[r.Name()], r)
			}
			for title, theirs := range recordedConductor(t, release) {
				switch title {
				case "compute node create", "read back", "delete 1: save deleted", "state conflict", "save after delete", "boot 5: final save",
					"service lookup, absent", "compute node lookup, absent":
					continue // other fields or arguments on purpose
				}
				name := theirs.name()
				if len(ours[name]) == 0 {
					t.Errorf("%s: no %s of ours", title, name)
					continue
				}
				r := ours[name][0]
				if r.Object == "Instance" && r.Action == "save" {
					r = ours[name][len(ours[name])-1]
				}
				var got callShape
				if err := json.Unmarshal(r.Args, &got); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(theirs.shape(), got.shape()); diff != "" {
					t.Errorf("%s (-recorded +ours):\n%s", title, diff)
				}
			}
		})
	}
}

// callShape is a conductor request as far as its shape goes.
type callShape struct {
	Objinst  *ovo.Object       `json:"objinst"`
	Objname  string            `json:"objname"`
	Method   string            `json:"objmethod"`
	Versions map[string]string `json:"object_versions"`
	Args     []any             `json:"args"`
	Kwargs   map[string]any    `json:"kwargs"`
}

func (c callShape) name() string {
	if c.Objinst != nil {
		return c.Objinst.Name + "." + c.Method
	}
	return c.Objname + "." + c.Method
}

func (c callShape) shape() map[string]any {
	m := map[string]any{"name": c.name(), "args": len(c.Args), "versions": c.Versions}
	kw := []string{}
	for k := range c.Kwargs {
		kw = append(kw, k)
	}
	slices.Sort(kw)
	m["kwargs"] = strings.Join(kw, ",")
	if c.Objinst != nil {
		data := []string{}
		for k := range c.Objinst.Data {
			data = append(data, k)
		}
		slices.Sort(data)
		changes := slices.Clone(c.Objinst.Changes)
		slices.Sort(changes)
		m["data"], m["changes"], m["version"] = strings.Join(data, ","), strings.Join(changes, ","), c.Objinst.Version
	}
	return m
}

func recordedConductor(t *testing.T, release string) map[string]callShape {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", release, "conductor.json"))
	if err != nil {
		t.Fatal(err)
	}
	var l []struct {
		Title   string `json:"title"`
		Request struct {
			Args callShape `json:"args"`
		} `json:"request"`
	}
	if err := json.Unmarshal(raw, &l); err != nil {
		t.Fatal(err)
	}
	out := map[string]callShape{}
	for _, x := range l {
		out[x.Title] = x.Request.Args
	}
	return out
}
