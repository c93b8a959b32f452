package novadriver

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/conductortest"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

func (b *bench) row() conductortest.Row {
	b.t.Helper()
	return b.conductor.Find("Instance", "uuid", instUUID)[0]
}

func TestSaveInstance(t *testing.T) {
	b := started(t, "zed")
	c := b.driver.Conductor()
	rc := contextOf(userContext())
	b.instance(map[string]any{"vm_state": "building", "task_state": "scheduling", "host": nil, "display_name": "kept"})
	save := func(fields map[string]any, expected ...novalet.TaskState) error {
		return c.SaveInstance(b.ctx(), rc, &novalet.InstanceUpdate{UUID: instUUID, Fields: fields, Expected: expected})
	}
	when := time.Date(2026, 3, 1, 12, 0, 0, 123e6, time.FixedZone("x", 3600))
	if err := save(map[string]any{
		"task_state": novalet.TaskNone, "vm_state": novalet.VMActive, "power_state": novalet.PowerRunning, "launched_at": when,
		"system_metadata": map[string]string{"a": "b"}, "config_drive": "True", "access_ip_v4": nil,
	}, novalet.TaskScheduling, novalet.TaskNone); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"task_state": "null", "vm_state": `"active"`, "power_state": "1", "launched_at": `"2026-03-01T11:00:00Z"`, "system_metadata": `{"a":"b"}`,
		"config_drive": `"True"`, "access_ip_v4": "null", "display_name": `"kept"`,
	}
	for k, v := range want {
		if got := string(b.row()[k]); got != v {
			t.Errorf("%s = %s, want %s", k, got, v)
		}
	}
	// Only what is named travels, with the context echoed and elevated.
	l := b.conductor.Requests()
	last := l[len(l)-1]
	if last.Name() != "Instance.save" { // a heartbeat may be behind it
		for _, r := range l {
			if r.Name() == "Instance.save" {
				last = r
			}
		}
	}
	if n := len(last.Objinst.Data); n != 8 {
		t.Errorf("%d fields sent: %v", n, last.Objinst.Data)
	}
	if !last.Context.Bool("is_admin") || last.Context.String("project_id") != "project1" || last.Context.RequestID() != rc.RequestID ||
		!slices.Equal(last.Context.Strings("roles"), []string{"member", "admin"}) {
		t.Errorf("context %v", last.Context)
	}
	// "Must be None" is a list with null; no expectation is no key.
	if err := save(map[string]any{"task_state": novalet.TaskPoweringOff}, novalet.TaskNone); err != nil {
		t.Fatal(err)
	}
	if err := save(map[string]any{"task_state": novalet.TaskNone}, novalet.TaskPoweringOn, novalet.TaskNone); !errors.Is(err, novalet.ErrTaskState) {
		t.Errorf("unexpected state: %v", err)
	}
	b.conductor.Change("Instance", "uuid", instUUID, map[string]any{"task_state": "deleting"})
	if err := save(map[string]any{"task_state": novalet.TaskNone}, novalet.TaskNone); !errors.Is(err, novalet.ErrInstanceGone) {
		t.Errorf("being deleted: %v", err)
	}
	if err := save(map[string]any{"vm_state": novalet.VMError}); err != nil {
		t.Errorf("without an expectation: %v", err)
	}
	for range 2 {
		if err := c.DestroyInstance(b.ctx(), rc, instUUID); err != nil {
			t.Fatal(err)
		}
	}
	if err := save(map[string]any{"task_state": novalet.TaskNone}); !errors.Is(err, novalet.ErrInstanceGone) {
		t.Errorf("deleted: %v", err)
	}
	final := &novalet.InstanceUpdate{UUID: instUUID, Fields: map[string]any{"vm_state": novalet.VMDeleted}, Deleted: true}
	if err := c.SaveInstance(b.ctx(), rc, final); err != nil || b.conductor.Find("Instance", "uuid", instUUID)[0].Str("vm_state") != "deleted" {
		t.Errorf("the last state of a deleted row is not written: %v", err)
	}
}

// A save whose answer was lost is repeated; when the first one was carried out the second one's refusal shows it.
func TestSaveAgain(t *testing.T) {
	for _, c := range []struct {
		name  string
		other bool // somebody else changed the row in between
	}{{"carried out", false}, {"changed since", true}} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, "zed")
			d := b.build()
			d.rpc.timeout = 30 * time.Millisecond
			b.instance(map[string]any{"task_state": "spawning"})
			first := true
			undo := b.conductor.Hook(func(r conductortest.Request) conductortest.Fate {
				if r.Name() != "Instance.save" || !first {
					return conductortest.Fate{}
				}
				first = false
				return conductortest.Fate{Lost: true}
			})
			defer undo()
			if c.other {
				defer b.conductor.Hook(func(r conductortest.Request) conductortest.Fate {
					if !first {
						b.conductor.Change("Instance", "uuid", instUUID, map[string]any{"task_state": "powering-off"})
					}
					return conductortest.Fate{}
				})()
			}
			err := d.Conductor().SaveInstance(b.ctx(), contextOf(userContext()), &novalet.InstanceUpdate{
				UUID: instUUID, Fields: map[string]any{"vm_state": novalet.VMActive, "task_state": novalet.TaskNone}, Expected: []novalet.TaskState{novalet.TaskSpawning},
			})
			if c.other != errors.Is(err, novalet.ErrTaskState) || !c.other && err != nil {
				t.Errorf("the repeated save: %v", err)
			}
		})
	}
}

// Faults of the conductor's database pass; an object that it knows only in an older version is sent in that.
func TestConductorFaults(t *testing.T) {
	b := newBench(t, "2023.1")
	d := b.build()
	newer, err := ovo.ReleaseNamed("2025.1")
	if err != nil {
		t.Fatal(err)
	}
	d.release.set(newer)
	d.setNode(&node{uuid: "u", id: 5})
	b.instance(nil)
	deadlocks := 3
	defer b.conductor.Hook(func(conductortest.Request) conductortest.Fate {
		if deadlocks--; deadlocks >= 0 {
			return conductortest.Fate{Failure: &oslomsg.Failure{Module: "oslo_db.exception", Class: "DBDeadlock", Message: "deadlock"}}
		}
		return conductortest.Fate{}
	})()
	err = d.Conductor().SaveInstance(b.ctx(), contextOf(userContext()), &novalet.InstanceUpdate{
		UUID: instUUID, Fields: map[string]any{"host": "host1", "node": "node1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if v := d.release.get().Version("Instance"); v != "2.7" {
		t.Errorf("Instance %s is still used", v)
	}
	if _, ok := b.row()["compute_id"]; ok {
		t.Error("compute_id was sent with 2.7")
	}
	d.release.set(newer)
	if _, err := d.Conductor().Instance(b.ctx(), instUUID); err != nil {
		t.Errorf("class action: %v", err)
	}
	defer b.conductor.Hook(func(r conductortest.Request) conductortest.Fate {
		return conductortest.Fate{Failure: &oslomsg.Failure{Module: "oslo_db.exception", Class: "DBDataError", Message: "too long"}}
	})()
	if _, err := d.Conductor().Instance(b.ctx(), instUUID); err == nil || errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("a lasting fault: %v", err)
	}
}

func TestReadInstances(t *testing.T) {
	b := started(t, "zed")
	c := b.driver.Conductor()
	b.instance(map[string]any{"flavor": ovo.Releases()[0].Minimal("Flavor", map[string]any{"memory_mb": 64, "extra_specs": map[string]string{"a": "b"}})})
	const other = "5d1f7c1e-0000-4000-8000-000000000002"
	b.conductor.Put("Instance", map[string]any{"uuid": other, "host": "host2"})
	b.conductor.Put("Instance", map[string]any{"uuid": "not one", "host": "host1"})
	i, err := c.Instance(b.ctx(), instUUID)
	if err != nil || i.Flavor.MemoryMB != 64 || i.Flavor.ExtraSpecs["a"] != "b" || i.Host != "host1" || len(i.Wire) == 0 {
		t.Errorf("%+v (%v)", i, err)
	}
	if _, err := c.Instance(b.ctx(), "5d1f7c1e-0000-4000-8000-00000000000f"); !errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("a missing one: %v", err)
	}
	l, err := c.InstancesByHost(b.ctx())
	if err != nil || len(l) != 1 || l[0].UUID != instUUID {
		t.Errorf("by host: %v (%v)", l, err)
	}
	if err := c.DestroyInstance(b.ctx(), c.NewContext(), instUUID); err != nil {
		t.Fatal(err)
	}
	uuids := []string{instUUID, other}
	for n := range 300 { // more than one request holds
		uuids = append(uuids, fmt.Sprintf("5d1f7c1e-0000-4000-8001-%012d", n))
	}
	l, err = c.Instances(b.ctx(), uuids)
	if err != nil || len(l) != 2 || !l[0].Deleted || l[1].UUID != other {
		t.Errorf("by uuid: %v (%v)", l, err)
	}
}

func TestEvacuated(t *testing.T) {
	b := started(t, "zed")
	c := b.driver.Conductor()
	id := b.conductor.Put("Migration", map[string]any{"instance_uuid": instUUID, "source_compute": "host1", "status": "done", "migration_type": "evacuation"})
	b.conductor.Put("Migration", map[string]any{"instance_uuid": instUUID, "source_compute": "host1", "status": "completed", "migration_type": "evacuation"})
	b.conductor.Put("Migration", map[string]any{"instance_uuid": "rubbish", "source_compute": "host1", "status": "done", "migration_type": "evacuation"})
	l, err := c.Evacuated(b.ctx())
	if err != nil || len(l) != 1 || l[0].InstanceUUID != instUUID || l[0].MigrationID != id || len(l[0].Wire) == 0 {
		t.Fatalf("%+v (%v)", l, err)
	}
	if err := c.EvacuationDone(b.ctx(), &l[0]); err != nil {
		t.Fatal(err)
	}
	if m := b.conductor.Find("Migration", "id", id)[0]; m.Str("status") != "completed" {
		t.Errorf("migration %s", m["status"])
	}
	if !slices.Contains(b.provider.did(), "remove from "+instUUID) {
		t.Errorf("allocations: %v", b.provider.did())
	}
}

func TestVIFsAndCache(t *testing.T) {
	b := newBench(t, "zed")
	d := b.build()
	d.rpc.timeout = 30 * time.Millisecond
	c, rc := d.Conductor(), contextOf(userContext())
	b.instance(nil)
	vif := &novalet.VIF{ID: "7f1c3a3e-0000-4000-8000-0000000000bb", Address: "fa:16:3e:11:22:33"}
	lost := true
	defer b.conductor.Hook(func(r conductortest.Request) conductortest.Fate {
		was := lost
		lost = false
		return conductortest.Fate{Lost: was}
	})()
	if err := c.CreateVIF(b.ctx(), rc, instUUID, vif, "nic0"); err != nil {
		t.Errorf("a creation whose answer was lost: %v", err)
	}
	rows := b.conductor.Find("VirtualInterface", "uuid", vif.ID)
	if len(rows) != 1 || rows[0].Str("address") != "fa:16:3e:11:22:33/"+vif.ID || rows[0].Str("tag") != "nic0" {
		t.Errorf("rows %v", rows)
	}
	d.rpc.timeout = patience
	if err := c.CreateVIF(b.ctx(), rc, instUUID, vif, ""); err == nil {
		t.Error("a second one of the same address was taken")
	}
	if tags, err := c.VIFTags(b.ctx(), rc, instUUID); err != nil || len(tags) != 1 || tags[vif.ID] != "nic0" {
		t.Errorf("tags %v, %v", tags, err)
	}
	for range 2 {
		if err := c.DeleteVIF(b.ctx(), rc, instUUID, vif.ID); err != nil {
			t.Fatal(err)
		}
	}
	if rows := b.conductor.Find("VirtualInterface", "uuid", vif.ID); len(rows) != 0 {
		t.Errorf("rows left: %v", rows)
	}
	vif.Network.Subnets = []novalet.Subnet{{CIDR: "10.0.0.0/24"}}
	for want, info := range map[string]novalet.NetworkInfo{"[]": nil, "": {*vif}} {
		if err := c.SaveNetworkInfo(b.ctx(), rc, instUUID, info); err != nil {
			t.Fatal(err)
		}
		got := b.conductor.Find("InstanceInfoCache", "instance_uuid", instUUID)[0].Str("network_info")
		if want == "" {
			var back novalet.NetworkInfo
			if err := json.Unmarshal([]byte(got), &back); err != nil || len(back) != 1 || back[0].ID != vif.ID {
				t.Errorf("cache %s (%v)", got, err)
			}
			for _, k := range []string{`"meta":null`, `"details":null`, `"profile":null`, `"dns":null`, `"ips":null`, `"routes":null`, `"subnets":null`} {
				if strings.Contains(got, k) {
					t.Errorf("Nova's model fails on %s", k)
				}
			}
		} else if got != want {
			t.Errorf("cache %s, want %s", got, want)
		}
	}
	bdm := b.conductor.Put("BlockDeviceMapping", map[string]any{"device_name": nil, "boot_index": 0})
	wire, err := json.Marshal(ovo.Newest().Minimal("BlockDeviceMapping", map[string]any{"id": bdm, "device_name": nil, "boot_index": 0}))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SaveBlockDevice(b.ctx(), rc, &novalet.BlockDevice{DeviceName: "/dev/vda", Wire: wire}); err != nil {
		t.Fatal(err)
	}
	if r := b.conductor.Find("BlockDeviceMapping", "id", bdm)[0]; r.Str("device_name") != "/dev/vda" {
		t.Errorf("device %s", r["device_name"])
	}
	if err := c.SaveBlockDevice(b.ctx(), rc, &novalet.BlockDevice{DeviceName: "/dev/vda"}); err == nil {
		t.Error("a block device without its object was saved")
	}
}

func TestEventsAndFaults(t *testing.T) {
	b := started(t, "zed")
	c, rc := b.driver.Conductor(), contextOf(userContext())
	b.instance(nil)
	fault := &novalet.Fault{Kind: novalet.ErrAbort, Class: "ImageUnacceptable", Text: "the image is no archive", Err: errors.New("open /secret/path")}
	for _, err := range []error{
		c.StartEvent(b.ctx(), rc, instUUID, "compute_stop_instance"),
		c.FinishEvent(b.ctx(), rc, instUUID, "compute_stop_instance", fault),
		c.CreateFault(b.ctx(), rc, instUUID, fault),
		c.CreateFault(b.ctx(), rc, instUUID, errors.New("open /secret/path")),
		c.CreateFault(b.ctx(), rc, instUUID, novalet.Faultf(novalet.ErrAbort, "", "%s", strings.Repeat("ä", 300))),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	ev := b.conductor.Find("InstanceActionEvent", "instance_uuid", instUUID)[0]
	if ev.Str("result") != "Error" || ev.Str("details") != "the image is no archive" || !strings.Contains(ev.Str("traceback"), "/secret/path") || ev.Str("host") != "host1" {
		t.Errorf("event %v", ev)
	}
	f := b.conductor.Find("InstanceFault", "instance_uuid", instUUID)
	if f[0].Int("code") != 400 || f[0].Str("message") != "the image is no archive" || f[0].Str("details") != "" {
		t.Errorf("fault %v", f[0])
	}
	if f[1].Int("code") != 500 || strings.Contains(f[1].Str("message"), "secret") || !strings.Contains(f[1].Str("details"), "/secret/path") {
		t.Errorf("fault %v", f[1])
	}
	if n := len([]rune(f[2].Str("message"))); n != 255 {
		t.Errorf("a text of %d characters", n)
	}
	// Work of our own has no action until it opens one.
	own := c.NewContext()
	for _, err := range []error{
		c.StartEvent(b.ctx(), own, instUUID, "compute_stop_instance"),
		c.FinishEvent(b.ctx(), own, instUUID, "compute_stop_instance", nil),
		c.StartAction(b.ctx(), own, instUUID, "stop"),
		c.StartEvent(b.ctx(), own, instUUID, "compute_stop_instance"),
		c.FinishEvent(b.ctx(), own, instUUID, "compute_stop_instance", nil),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if ok := b.conductor.Find("InstanceActionEvent", "result", "Success"); len(ok) != 1 {
		t.Errorf("%d events of our own", len(ok))
	}
}

// What the schedulers are told, and in which exchange.
func TestInstanceChanged(t *testing.T) {
	b := started(t, "zed")
	got := make(chan string, 100)
	b.bus.Tap(func(p oslomsg.Publishing) {
		if p.Exchange == "scheduler_fanout" && p.Fanout {
			got <- string(p.Body)
		}
	})
	d := b.driver
	c := d.Conductor()
	c.InstanceChanged(&novalet.Instance{UUID: instUUID, Host: "host1"}, false)
	c.InstanceChanged(&novalet.Instance{UUID: instUUID}, true)
	for _, want := range []string{"update_instance_info", "delete_instance_info"} {
		select {
		case body := <-got:
			if !strings.Contains(body, want) || !strings.Contains(body, instUUID) {
				t.Errorf("want %s, got %s", want, body)
			}
		case <-time.After(patience):
			t.Fatalf("no %s", want)
		}
	}
	a := d.announcementFor(&novalet.Instance{UUID: instUUID, Host: "host1", Node: "node1", VMState: "active", Wire: json.RawMessage(`{
		"nova_object.name":"Instance","nova_object.namespace":"nova","nova_object.version":"2.7",
		"nova_object.data":{"uuid":"` + instUUID + `","host":null,"vm_state":"building","task_state":"spawning","project_id":"p"},"nova_object.changes":["tags"]}`)}, false)
	raw, err := json.Marshal(a.args)
	if err != nil {
		t.Fatal(err)
	}
	var args struct {
		Host string      `json:"host_name"`
		Info *ovo.Object `json:"instance_info"`
	}
	if err := json.Unmarshal(raw, &args); err != nil {
		t.Fatal(err)
	}
	i := args.Info.Objects()[0]
	if a.method != "update_instance_info" || args.Host != "host1" || i.String("host") != "host1" || i.String("vm_state") != "active" ||
		!i.IsNull("task_state") || i.String("project_id") != "p" || i.Changes != nil {
		t.Errorf("%s %s", a.method, raw)
	}
	if a := d.announcementFor(&novalet.Instance{UUID: instUUID}, true); a.method != "delete_instance_info" || a.args["instance_uuid"] != instUUID {
		t.Errorf("gone: %+v", a)
	}
}

func TestFailureOf(t *testing.T) {
	for _, c := range []struct {
		err           error
		module, class string
		code          int
		text          string
	}{
		{errors.New("/path"), "nova.exception", "NovaException", 500, "unexpected error"},
		{fmt.Errorf("x: %w", novalet.ErrNotFound), "nova.exception", "InstanceNotFound", 404, "could not be found"},
		{novalet.ErrInstanceGone, "nova.exception", "InstanceNotFound", 404, ""},
		{novalet.ErrUnsupported, "builtins", "NotImplementedError", 500, ""},
		{novalet.ErrBusy, "nova.exception", "InstanceInvalidState", 400, ""},
		{novalet.ErrTryAgain, "nova.exception", "NovaException", 500, "does not answer"},
		{novalet.Faultf(novalet.ErrReschedule, "", "no room"), "nova.exception", "ComputeResourcesUnavailable", 400, "no room"},
		{novalet.Faultf(novalet.ErrAbort, "", "bad image"), "nova.exception", "BuildAbortException", 500, "bad image"},
		{novalet.Faultf(novalet.ErrAbort, "PortNotFound", "no port"), "nova.exception", "PortNotFound", 404, "no port"},
		{fmt.Errorf("y: %w", novalet.Faultf(novalet.ErrUnsupported, "NotImplementedError", "cannot")), "builtins", "NotImplementedError", 500, "cannot"},
		{oslomsg.NotImplemented("z"), "builtins", "NotImplementedError", 500, "z"},
		{fmt.Errorf("x: %w", novaError("InvalidVolume", "v", nil)), "nova.exception", "InvalidVolume", 400, "v"},
	} {
		f := failureOf(c.err, instUUID)
		if f.Module != c.module || f.Class != c.class || f.code() != c.code || !strings.Contains(f.Message, c.text) || strings.Contains(f.Message, "/path") {
			t.Errorf("%v: %+v (code %d)", c.err, f.Failure, f.code())
		}
	}
	details := map[string]any{"port_id": "p"}
	f := failureOf(&novalet.Fault{Kind: novalet.ErrAbort, Class: "PortInUse", Text: "x", Details: details}, "")
	if diff := cmp.Diff(map[string]any{"port_id": "p", "code": 400}, f.Kwargs); diff != "" || len(details) != 1 {
		t.Errorf("kwargs: %s", diff)
	}
}

// A broker that goes away and comes back, and one that takes a message twice, change nothing.
func TestBrokerAway(t *testing.T) {
	b := started(t, "zed")
	c, rc := b.driver.Conductor(), contextOf(userContext())
	b.instance(map[string]any{"task_state": "spawning"})
	b.conn.Cut()
	done := make(chan error, 1)
	go func() {
		done <- c.SaveInstance(b.ctx(), rc, &novalet.InstanceUpdate{
			UUID: instUUID, Fields: map[string]any{"task_state": novalet.TaskNone}, Expected: []novalet.TaskState{novalet.TaskSpawning},
		})
	}()
	b.cast("stop_instance", map[string]any{"instance": b.instance(nil)})
	select {
	case err := <-done:
		t.Fatalf("saved without a broker: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	b.conn.LoseConfirms(3)
	b.conn.Restore()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	b.submitted("stop_instance")
	before := ourService(b).Int("report_count")
	b.eventually("heartbeats", func() bool { return ourService(b).Int("report_count") > before })
	if err := c.StartEvent(b.ctx(), rc, instUUID, "compute_stop_instance"); err != nil {
		t.Fatal(err)
	}
	if n := len(b.conductor.Find("InstanceActionEvent", "instance_uuid", instUUID)); n != 1 {
		t.Errorf("%d events of one start", n)
	}
}

// Tags of devices become the object that nova-api reads.
func TestDeviceMetadata(t *testing.T) {
	b := newBench(t, "2025.1")
	c := b.build().Conductor()
	b.instance(nil)
	err := c.SaveInstance(b.ctx(), c.NewContext(), &novalet.InstanceUpdate{UUID: instUUID, Fields: map[string]any{
		"device_metadata": []novalet.TaggedDevice{{MAC: "fa:16:3e:00:00:01", Tag: "mgmt"}, {Path: "/dev/vda", Tag: "root"}}}})
	if err != nil {
		t.Fatal(err)
	}
	o, err := ovo.Decode(b.conductor.Find("Instance", "uuid", instUUID)[0]["device_metadata"])
	if err != nil || o == nil || o.Name != "InstanceDeviceMetadata" || o.Version != "1.0" {
		t.Fatalf("%+v, %v", o, err)
	}
	d := o.List("devices")
	if len(d) != 2 || d[0].Name != "NetworkInterfaceMetadata" || d[0].Version != "1.2" || d[0].String("mac") != "fa:16:3e:00:00:01" ||
		d[0].Strings("tags")[0] != "mgmt" || d[1].Name != "DiskMetadata" || d[1].String("path") != "/dev/vda" || d[1].Strings("tags")[0] != "root" {
		t.Errorf("devices %+v", d)
	}
}
