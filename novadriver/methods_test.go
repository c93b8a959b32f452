package novadriver

import (
	"encoding/json"
	"errors"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

var update = flag.Bool("update", false, "write golden files and docs/compute-api.md")

// golden compares v with testdata/<name>, or writes it with -update.
func golden(t *testing.T, name string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// submitted waits for the operation of a method.
func (b *bench) submitted(m string) *novalet.Operation {
	b.t.Helper()
	var op *novalet.Operation
	b.eventually("operation "+m, func() bool {
		for _, o := range b.agent.operations() {
			if o.Method == novalet.Method(m) {
				op = o
			}
		}
		return op != nil
	})
	return op
}

// comparable is an operation without what is long or differs from run to run.
func comparableOp(op *novalet.Operation) any {
	c := *op
	c.Instance.Wire, c.Context.Wire = nil, nil
	c.Received = time.Time{}
	var raw map[string]json.RawMessage
	_ = json.Unmarshal(c.Args.Raw, &raw)
	c.Args.Raw = nil
	if c.Args.Build != nil {
		build := *c.Args.Build
		build.BlockDevices = slices.Clone(build.BlockDevices)
		for i := range build.BlockDevices {
			build.BlockDevices[i].Wire = nil
		}
		c.Args.Build = &build
	}
	return map[string]any{"operation": c, "raw keys": slices.Sorted(maps.Keys(raw))}
}

// recordedOperations are the recorded messages that become operations.
func recordedOperations(t *testing.T, release string) []string {
	t.Helper()
	var out []string
	for _, m := range methods {
		if m.operation == nil {
			continue
		}
		if _, err := os.Stat(filepath.Join("testdata", release, m.name+".json")); err == nil {
			out = append(out, m.name)
		}
	}
	return out
}

// Every recorded cast of every release, through the bus: what the agent is handed.
func TestRecordedOperations(t *testing.T) {
	for _, release := range []string{"zed", "2025.1", "2026.1"} {
		b := started(t, release)
		for _, m := range recordedOperations(t, release) {
			t.Run(release+"/"+m, func(t *testing.T) {
				key, message := recorded(t, release, m)
				message["_unique_id"] = json.RawMessage(`"` + m + `"`) // some recordings share theirs
				b.publish(message, strings.SplitN(key, ".", 2)[0]+".host1")
				op := b.submitted(m)
				golden(t, filepath.Join(release, m+".operation.json"), comparableOp(op))
				if wire, err := ovo.Decode(op.Instance.Wire); err != nil || wire.String("uuid") != op.Instance.UUID {
					t.Errorf("the instance object was not kept: %v", err)
				}
				if op.Context.Wire["service_catalog"] == nil {
					t.Error("the context was not kept whole")
				}
			})
		}
	}
}

func TestBuild(t *testing.T) {
	b := started(t, "2026.1")
	key, message := recorded(t, "2026.1", "build_and_run_instance")
	b.publish(message, key)
	op := b.submitted("build_and_run_instance")
	build := op.Args.Build
	if build == nil || build.Image.ID == "" || build.AdminPassword != "secretpw" || len(build.InjectedFiles) != 1 ||
		len(build.RequestedNetworks) != 1 || build.RequestedNetworks[0].NetworkID != "6f1c3a3e-0000-4000-8000-0000000000aa" ||
		len(build.BlockDevices) != 1 || build.BlockDevices[0].BootIndex == nil || !build.MayReschedule || build.Node != "host1" {
		t.Fatalf("arguments: %+v", build)
	}
	if op.Instance.Flavor.MemoryMB != 512 || op.Instance.Metadata["role"] != "web" || op.Instance.Name != "instance-00000001" {
		t.Errorf("instance: %+v", op.Instance)
	}
	// The same message again is no second operation.
	b.publish(message, key)
	b.publish(message, key)
	if _, err := b.call("get_host_uptime", map[string]any{}); err != nil { // behind them in the queue
		t.Fatal(err)
	}
	if n := len(b.agent.operations()); n != 1 {
		t.Errorf("%d operations of one message", n)
	}
	// Back to the conductor.
	b.instance(nil)
	cause := &novalet.Fault{Kind: novalet.ErrReschedule, Text: "no room here", Err: errors.New("/var/lib/secret/path")}
	if err := b.driver.Conductor().RescheduleBuild(b.ctx(), op, cause); err != nil {
		t.Fatal(err)
	}
	var args map[string]json.RawMessage
	b.eventually("build_instances", func() bool {
		for _, r := range b.conductor.Requests() {
			if r.Method == "build_instances" {
				return json.Unmarshal(r.Args, &args) == nil
			}
		}
		return false
	})
	sent := map[string]json.RawMessage{}
	if err := json.Unmarshal(message["args"], &sent); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"image", "admin_password", "injected_files", "requested_networks", "security_groups", "request_spec"} {
		if diff := cmp.Diff(decoded(t, sent[k]), decoded(t, args[k])); diff != "" {
			t.Errorf("%s (-came +went):\n%s", k, diff)
		}
	}
	if diff := cmp.Diff([]any{decoded(t, sent["host_list"])}, decoded(t, args["host_lists"])); diff != "" {
		t.Errorf("host_lists:\n%s", diff)
	}
	text := string(args["filter_properties"])
	if !strings.Contains(text, "no room here") || strings.Contains(text, "/var/lib/secret") {
		t.Errorf("filter_properties: %s", text)
	}
	insts := (&ovo.Object{Data: args}).List("instances")
	if len(insts) != 1 || !insts[0].IsNull("host") || insts[0].String("task_state") != "scheduling" {
		t.Errorf("instances: %s", args["instances"])
	}
	// Without a further host, or without retry, there is nothing to hand back.
	for k, v := range map[string]string{"host_list": "[]", "filter_properties": "{}"} {
		one := maps.Clone(sent)
		one[k] = json.RawMessage(v)
		op := &novalet.Operation{Method: novalet.MethodBuild}
		if err := decodeBuild(b.driver, &request{args: one}, op); err != nil || op.Args.Build.MayReschedule || op.Args.Raw != nil {
			t.Errorf("%s %s: may be rescheduled (%v)", k, v, err)
		}
	}
}

func decoded(t *testing.T, raw json.RawMessage) any {
	t.Helper()
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// Every cast that changes an instance is recorded before it is acked, with the arguments the agent needs.
func TestLifecycleCasts(t *testing.T) {
	b := started(t, "zed")
	inst := b.instance(nil)
	for method, c := range map[string]struct {
		args map[string]any
		want novalet.OperationArgs
	}{
		"terminate_instance":            {map[string]any{"bdms": nil}, novalet.OperationArgs{CleanShutdown: true}},
		"soft_delete_instance":          {nil, novalet.OperationArgs{CleanShutdown: true}},
		"restore_instance":              {nil, novalet.OperationArgs{CleanShutdown: true}},
		"start_instance":                {nil, novalet.OperationArgs{CleanShutdown: true}},
		"stop_instance":                 {map[string]any{"clean_shutdown": false}, novalet.OperationArgs{}},
		"reboot_instance":               {map[string]any{"reboot_type": "SOFT", "block_device_info": nil}, novalet.OperationArgs{CleanShutdown: true, RebootType: "SOFT"}},
		"pause_instance":                {nil, novalet.OperationArgs{CleanShutdown: true}},
		"unpause_instance":              {nil, novalet.OperationArgs{CleanShutdown: true}},
		"suspend_instance":              {nil, novalet.OperationArgs{CleanShutdown: true}},
		"resume_instance":               {nil, novalet.OperationArgs{CleanShutdown: true}},
		"rescue_instance":               {map[string]any{"rescue_password": "pw", "rescue_image_ref": "img", "clean_shutdown": true}, novalet.OperationArgs{CleanShutdown: true, ImageID: "img", Password: "pw"}},
		"unrescue_instance":             {nil, novalet.OperationArgs{CleanShutdown: true}},
		"snapshot_instance":             {map[string]any{"image_id": "img"}, novalet.OperationArgs{CleanShutdown: true, ImageID: "img"}},
		"backup_instance":               {map[string]any{"image_id": "img", "backup_type": "daily", "rotation": 3}, novalet.OperationArgs{CleanShutdown: true, ImageID: "img", BackupType: "daily", Rotation: 3}},
		"shelve_instance":               {map[string]any{"image_id": "img", "clean_shutdown": false, "accel_uuids": []string{}}, novalet.OperationArgs{ImageID: "img"}},
		"shelve_offload_instance":       {map[string]any{"clean_shutdown": true}, novalet.OperationArgs{CleanShutdown: true}},
		"trigger_crash_dump":            {nil, novalet.OperationArgs{CleanShutdown: true}},
		"detach_interface":              {map[string]any{"port_id": "p1"}, novalet.OperationArgs{PortID: "p1"}},
		"add_fixed_ip_to_instance":      {map[string]any{"network_id": "n1"}, novalet.OperationArgs{NetworkID: "n1"}},
		"remove_fixed_ip_from_instance": {map[string]any{"address": "10.0.0.9"}, novalet.OperationArgs{Address: "10.0.0.9"}},
		"inject_network_info":           {nil, novalet.OperationArgs{}},
	} {
		args := map[string]any{"instance": inst}
		maps.Copy(args, c.args)
		b.cast(method, args)
		op := b.submitted(method)
		if diff := cmp.Diff(c.want, op.Args); diff != "" {
			t.Errorf("%s (-want +got):\n%s", method, diff)
		}
		if op.Instance.UUID != instUUID || op.Context.RequestID != userContext().RequestID() || op.Context.AuthToken != "TOKEN" || op.ID == "" {
			t.Errorf("%s: %+v", method, op)
		}
	}
	for _, m := range methods {
		if m.operation != nil && m.test == "TestLifecycleCasts" && !slices.ContainsFunc(b.agent.operations(), func(o *novalet.Operation) bool { return string(o.Method) == m.name }) {
			t.Errorf("%s says it is tested here", m.name)
		}
	}
}

func TestRebuild(t *testing.T) {
	b := started(t, "2025.1")
	inst := b.instance(map[string]any{"task_state": "rebuilding"})
	args := map[string]any{
		"instance": inst, "orig_image_ref": "i0", "image_ref": "i1", "new_pass": "pw", "injected_files": [][]string{{"/a", "Yg=="}},
		"orig_sys_metadata": map[string]string{"image_x": "y"}, "bdms": nil, "recreate": false, "on_shared_storage": nil, "preserve_ephemeral": true,
		"migration": nil, "scheduled_node": nil, "limits": map[string]any{}, "request_spec": nil, "reimage_boot_volume": false, "target_state": "stopped",
	}
	b.cast("rebuild_instance", args)
	op := b.submitted("rebuild_instance")
	want := &novalet.RebuildArgs{
		OrigImageRef: "i0", ImageRef: "i1", NewPassword: "pw", InjectedFiles: []novalet.InjectedFile{{Path: "/a", Data: "Yg=="}},
		OrigSystemMeta: map[string]string{"image_x": "y"}, PreserveEphemeral: true, TargetState: "stopped",
	}
	if diff := cmp.Diff(want, op.Args.Rebuild); diff != "" {
		t.Errorf("arguments:\n%s", diff)
	}
	// An evacuation to this host is an operation too; it knows where the instance was.
	id := b.conductor.Put("Migration", map[string]any{"uuid": "8a7b2c1e-0000-4000-8000-000000000002", "status": "accepted"})
	inst.Set("host", "dead")
	inst.Set("node", "dead-node")
	args["recreate"], args["preserve_ephemeral"], args["new_pass"] = true, false, nil
	args["migration"] = ovo.Releases()[0].Minimal("Migration", map[string]any{"id": id, "status": "accepted"})
	b.cast("rebuild_instance", args)
	b.eventually("the second operation", func() bool { return len(b.agent.operations()) == 2 })
	got := b.agent.operations()[1].Args.Rebuild
	if !got.Recreate || got.MigrationID != id || got.Node != "node1" || got.SourceHost != "dead" || got.SourceNode != "dead-node" || got.SharedStorage {
		t.Errorf("evacuation %+v", got)
	}
	c := b.driver.Conductor()
	freed := 0
	for _, ok := range []bool{true, false} {
		for range 2 {
			if err := c.EndEvacuation(b.ctx(), c.NewContext(), instUUID, got, ok); err != nil {
				t.Fatal(err)
			}
		}
		want := map[bool]string{false: "failed", true: "done"}[ok]
		if m := b.conductor.Find("Migration", "id", id)[0]; m.Str("status") != want || m.Str("dest_compute") != "host1" {
			t.Errorf("migration %s to %s, want %s", m.Str("status"), m.Str("dest_compute"), want)
		}
		for _, call := range b.provider.did() {
			if call == "remove from "+instUUID {
				freed++
			}
		}
		if ok && freed > 0 || !ok && freed == 0 {
			t.Errorf("ended well %v: the allocation was freed %d times", ok, freed)
		}
	}
	got.SourceHost = "host1"
	before := len(b.provider.did())
	if err := c.EndEvacuation(b.ctx(), c.NewContext(), instUUID, got, false); err != nil || slices.Contains(b.provider.did()[before:], "remove from "+instUUID) {
		t.Errorf("an instance of this host lost its allocation (%v)", err)
	}
}

func TestUnshelve(t *testing.T) {
	b := started(t, "zed")
	_, message := recorded(t, "zed", "unshelve_instance")
	b.publish(message, "compute.host1")
	op := b.submitted("unshelve_instance")
	if op.Args.Build == nil || op.Args.Build.Image.ID == "" || op.Args.Build.MayReschedule || op.Args.Raw != nil {
		t.Errorf("arguments: %+v", op.Args)
	}
}

// A cast that cannot be recorded now is kept and tried again; one that never can be is let go.
func TestRecordThenAck(t *testing.T) {
	b := started(t, "zed")
	b.agent.set(func() { b.agent.submitErr = errors.New("disk full") })
	b.cast("stop_instance", map[string]any{"instance": b.instance(nil)})
	b.eventually("a word about it", func() bool { return b.logs.count("disk full") > 0 })
	if len(b.agent.operations()) != 0 {
		t.Fatal("recorded nevertheless")
	}
	b.agent.set(func() { b.agent.submitErr = nil })
	b.submitted("stop_instance")

	for _, args := range []any{
		map[string]any{}, map[string]any{"instance": nil}, map[string]any{"instance": "x"}, map[string]any{"instance": map[string]any{"uuid": instUUID}},
		map[string]any{"instance": ovo.Releases()[0].Minimal("Instance", map[string]any{"uuid": "../../../etc/passwd"})},
		map[string]any{"instance": ovo.Releases()[0].Minimal("Flavor", map[string]any{"uuid": instUUID})},
	} {
		b.cast("start_instance", args)
	}
	b.cast("pause_instance", map[string]any{"instance": b.instance(nil)})
	b.submitted("pause_instance")
	if n := b.logs.count("is dropped"); n != 6 {
		t.Errorf("%d of 6 unreadable messages were told of", n)
	}
	if n := len(b.agent.operations()); n != 2 {
		t.Errorf("%d operations", n)
	}
}

func TestExternalEvents(t *testing.T) {
	for _, release := range []string{"zed", "2025.1", "2026.1"} {
		t.Run(release, func(t *testing.T) {
			b := started(t, release)
			key, message := recorded(t, release, "external_instance_event")
			b.publish(message, key) // compute-alt.host1 from 2026.1 on
			want := []novalet.ExternalEvent{{InstanceUUID: instUUID, Name: "network-vif-plugged", Status: "completed", Tag: "7f1c3a3e-0000-4000-8000-0000000000bb"}}
			if release == "zed" || release == "2025.1" {
				if key != "compute.host1" {
					t.Errorf("recorded for %s", key)
				}
			}
			b.eventually("the event", func() bool {
				b.agent.mu.Lock()
				defer b.agent.mu.Unlock()
				return len(b.agent.events) > 0
			})
			if diff := cmp.Diff(want, b.agent.events); diff != "" {
				t.Errorf("events:\n%s", diff)
			}
		})
	}
	// For an instance that the message does not name nothing is done.
	b := started(t, "zed")
	rel := ovo.Releases()[0]
	b.cast("external_instance_event", map[string]any{
		"instances": []any{b.instance(nil)},
		"events": []any{
			rel.Minimal("InstanceExternalEvent", map[string]any{"instance_uuid": "5d1f7c1e-0000-4000-8000-000000000009", "name": "network-changed", "status": "completed", "tag": nil}),
			rel.Minimal("InstanceExternalEvent", map[string]any{"instance_uuid": instUUID, "name": "network-changed", "status": "completed", "tag": nil}),
		},
	})
	b.cast("external_instance_event", map[string]any{"instances": 3})
	b.eventually("the other event", func() bool {
		b.agent.mu.Lock()
		defer b.agent.mu.Unlock()
		return len(b.agent.events) == 1 && b.agent.events[0].Name == "network-changed" && b.agent.events[0].Tag == ""
	})
}

// Close leaves the queues: what is sent meanwhile is there for the next start.
func TestCloseKeepsQueues(t *testing.T) {
	b := started(t, "zed")
	if err := b.driver.Close(); err != nil {
		t.Fatal(err)
	}
	b.cast("stop_instance", map[string]any{"instance": b.instance(nil)})
	b.options.Transport = b.bus.Connect()
	d := b.build()
	if err := d.Start(b.ctx()); err != nil {
		t.Fatal(err)
	}
	b.submitted("stop_instance")
}
