package novadriver

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

func TestAttachInterface(t *testing.T) {
	b := started(t, "zed")
	inst := b.instance(nil)
	b.agent.vif = &novalet.VIF{ID: "port1", Address: "fa:16:3e:00:00:01"}
	args := map[string]any{"instance": inst, "network_id": "net1", "port_id": nil, "requested_ip": "10.0.0.9", "tag": nil}
	raw, err := b.call("attach_interface", args)
	if err != nil {
		t.Fatal(err)
	}
	var vif map[string]json.RawMessage
	if err := json.Unmarshal(raw, &vif); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"id", "address", "network", "type", "details", "devname", "active", "vnic_type", "profile", "preserve_on_delete", "meta"} {
		if v, ok := vif[k]; !ok || string(v) == "null" {
			t.Errorf("the VIF's %s is %s", k, v)
		}
	}
	if n := b.agent.attached.Network; n.NetworkID != "net1" || n.Address != "10.0.0.9" || b.agent.attached.Context.AuthToken != "TOKEN" {
		t.Errorf("asked for %+v", b.agent.attached)
	}
	ev := b.conductor.Find("InstanceActionEvent", "event", "compute_attach_interface")
	if len(ev) != 1 || ev[0].Str("result") != "Success" {
		t.Errorf("event %v", ev)
	}

	for _, c := range []struct {
		err   error
		class string
	}{
		{err: novalet.Faultf(novalet.ErrAbort, "PortInUse", "Port port1 is still in use."), class: "PortInUse"},
		{err: novalet.Faultf(novalet.ErrNotFound, "NetworkNotFound", "Network net1 could not be found."), class: "NetworkNotFound"},
		{err: errors.New("plug: operation not permitted"), class: "InterfaceAttachFailed"},
		{err: novalet.ErrNotFound, class: "InstanceNotFound"},
	} {
		b.agent.set(func() { b.agent.err = c.err })
		e := b.refused("attach_interface", args)
		if e.Class != c.class || e.Module != "nova.exception" {
			t.Errorf("%v: %s.%s", c.err, e.Module, e.Class)
		}
		if strings.Contains(e.Message, "not permitted") {
			t.Errorf("the cause is shown to the tenant: %s", e.Message)
		}
	}
	if n := len(b.conductor.Find("InstanceFault", "instance_uuid", instUUID)); n != 3 {
		t.Errorf("%d faults", n) // none for an instance that is gone
	}
	if n := len(b.conductor.Find("InstanceActionEvent", "result", "Error")); n != 4 {
		t.Errorf("%d events with an error", n)
	}
}

func TestConsoleOutput(t *testing.T) {
	b := started(t, "zed")
	inst := b.instance(nil)
	b.agent.output = "a\xffb"
	for _, c := range []struct {
		tail  any
		lines int
		want  string
	}{
		{nil, -1, "a\uFFFDb"}, {"50", 50, "a\uFFFDb"}, {10, 10, "a\uFFFDb"}, {-1, -1, "a\uFFFDb"}, {"junk", -1, "a\uFFFDb"}, {0, 0, ""},
	} {
		b.agent.set(func() { b.agent.lines = 0 })
		raw, err := b.call("get_console_output", map[string]any{"instance": inst, "tail_length": c.tail})
		var got string
		if err != nil || json.Unmarshal(raw, &got) != nil || got != c.want || b.agent.lines != c.lines {
			t.Errorf("tail_length %v: %q of %d lines (%v)", c.tail, got, b.agent.lines, err)
		}
	}
	for err, class := range map[error]string{novalet.ErrNotFound: "InstanceNotFound", novalet.ErrInvalidState: "InstanceNotReady"} {
		b.agent.set(func() { b.agent.err = err })
		if e := b.refused("get_console_output", map[string]any{"instance": inst, "tail_length": 1}); e.Class != class {
			t.Errorf("%v: %s", err, e.Class)
		}
	}
}

func TestSerialConsole(t *testing.T) {
	b := started(t, "2025.1", func(o *Options) { o.SerialBaseURL = "wss://proxy/" })
	inst := b.instance(nil)
	raw, err := b.call("get_serial_console", map[string]any{"instance": inst, "console_type": "serial"})
	if err != nil {
		t.Fatal(err)
	}
	tokens := b.conductor.Find("ConsoleAuthToken", "instance_uuid", instUUID)
	if len(tokens) != 1 || tokens[0].Str("host") != "192.0.2.7" || tokens[0].Int("port") != 10007 || tokens[0].Str("access_url_base") != "wss://proxy/" {
		t.Fatalf("token %v", tokens)
	}
	token := tokens[0].Str("token")
	want := map[string]any{"host": "192.0.2.7", "port": 10007.0, "internal_access_path": nil, "token": token, "access_url": "wss://proxy/?token=" + token}
	if diff := cmp.Diff(want, decoded(t, raw)); diff != "" {
		t.Errorf("answer:\n%s", diff)
	}
	for _, c := range []struct {
		port, kind any
		want       string
	}{{"10007", "serial", "true"}, {"10008", "serial", "false"}, {10007, "serial", "true"}, {"10007", "novnc", "false"}, {"x", "serial", "false"}} {
		raw, err := b.call("validate_console_port", map[string]any{"instance": inst, "port": c.port, "console_type": c.kind})
		if err != nil || string(raw) != c.want {
			t.Errorf("port %v of a %v console: %s (%v)", c.port, c.kind, raw, err)
		}
	}
	if e := b.refused("get_serial_console", map[string]any{"instance": inst, "console_type": "novnc"}); e.Class != "ConsoleTypeInvalid" {
		t.Errorf("type novnc: %s", e.Class)
	}
	// Delete takes the tokens along, in one call, and only where there may be some.
	c := b.driver.Conductor()
	b.driver.notes.build("5d1f7c1e-0000-4000-8000-000000000003", time.Now())
	b.conductor.Forget()
	for _, id := range []string{instUUID, "5d1f7c1e-0000-4000-8000-000000000003"} {
		if err := c.CleanConsoleTokens(b.ctx(), c.NewContext(), id); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(strings.Join(b.conductor.Names(), " "), "clean_console_auths_for_instance"); n != 1 {
		t.Errorf("%d calls for one instance with tokens and one without", n)
	}
	if l := b.conductor.Find("ConsoleAuthToken", "instance_uuid", instUUID); len(l) != 0 {
		t.Errorf("tokens left: %v", l)
	}

	off := started(t, "zed", func(o *Options) { o.SerialConsole = false })
	e := off.refused("get_serial_console", map[string]any{"instance": off.instance(nil), "console_type": "serial"})
	if e.Class != "ConsoleTypeUnavailable" {
		t.Errorf("switched off: %s", e.Class)
	}
}

func TestDiagnostics(t *testing.T) {
	b := started(t, "zed")
	inst := b.instance(nil)
	raw, err := b.call("get_instance_diagnostics", map[string]any{"instance": inst})
	if err != nil {
		t.Fatal(err)
	}
	o, err := ovo.Decode(raw)
	if err != nil {
		t.Fatal(err)
	}
	if o.Name != "Diagnostics" || o.String("driver") != "libvirt" || o.String("state") != "running" || o.Int("uptime") != 90 ||
		o.Object("memory_details").Int("maximum") != 512 || len(o.List("nic_details")) != 1 || o.List("nic_details")[0].Int("rx_octets") != 7 ||
		o.List("cpu_details")[0].Int("time") != 3e9 || o.Int("num_cpus") != 1 {
		t.Errorf("%s", raw)
	}
	raw, err = b.call("get_diagnostics", map[string]any{"instance": inst})
	if err != nil || !strings.Contains(string(raw), `"cpu0_time":3000000000`) {
		t.Errorf("%s (%v)", raw, err)
	}
	b.agent.set(func() { b.agent.err = novalet.ErrInvalidState })
	for _, m := range []string{"get_diagnostics", "get_instance_diagnostics"} {
		if e := b.refused(m, map[string]any{"instance": inst}); e.Class != "InstanceInvalidState" {
			t.Errorf("%s of what does not run: %s", m, e.Class)
		}
	}
}

// TestQuiesce: whatever keeps a guest from being quiesced is said in the words after which nova-api goes on without.
func TestQuiesce(t *testing.T) {
	b := started(t, "zed")
	inst := b.instance(map[string]any{"task_state": "image_snapshot_pending"})
	if raw, err := b.call("quiesce_instance", map[string]any{"instance": inst}); err != nil || string(raw) != "null" {
		t.Errorf("quiesce_instance: %s (%v)", raw, err)
	}
	b.cast("unquiesce_instance", map[string]any{"instance": inst, "mapping": []any{map[string]any{"source_type": "snapshot", "snapshot_id": "s"}}})
	want := []string{"quiesce " + instUUID, "unquiesce " + instUUID}
	b.eventually("both are asked of the agent", func() bool {
		b.agent.mu.Lock()
		defer b.agent.mu.Unlock()
		return slices.Equal(b.agent.quiesced, want)
	})
	for err, text := range map[error]string{
		novalet.ErrInvalidState: "not running", novalet.ErrBusy: "busy", errors.New("syncfs /var/lib/x: input/output error"): "written to disk",
	} {
		b.agent.set(func() { b.agent.err = err })
		e := b.refused("quiesce_instance", map[string]any{"instance": inst})
		if e.Class != "InstanceQuiesceNotSupported" || e.Module != "nova.exception" || !strings.Contains(e.Message, text) || strings.Contains(e.Message, "/var") {
			t.Errorf("%v: %+v", err, e)
		}
	}
	b.agent.set(func() { b.agent.err = novalet.ErrNotFound })
	if e := b.refused("quiesce_instance", map[string]any{"instance": inst}); e.Class != "InstanceNotFound" {
		t.Errorf("of an instance that is not here: %s", e.Class)
	}
	if n := len(b.conductor.Find("InstanceFault", "instance_uuid", instUUID)); n != 0 || b.logs.count("method=quiesce_instance") == 0 {
		t.Errorf("%d faults, %s", n, b.logs.b.String())
	}
	b.cast("unquiesce_instance", map[string]any{"instance": 5})
	b.eventually("a word about it", func() bool { return b.logs.count("method=unquiesce_instance") == 1 })
}

func TestHostCalls(t *testing.T) {
	b := started(t, "zed")
	raw, err := b.call("get_host_uptime", map[string]any{})
	if err != nil || string(raw) != `"up 1 day"` {
		t.Errorf("uptime %s (%v)", raw, err)
	}
	for _, enabled := range []bool{false, true} {
		raw, err := b.call("set_host_enabled", map[string]any{"enabled": enabled})
		want, did := `"disabled"`, "set "+traitDisabled
		if enabled {
			want, did = `"enabled"`, "unset "+traitDisabled
		}
		if err != nil || string(raw) != want || !slices.Contains(b.provider.did(), did) {
			t.Errorf("enabled %v: %s (%v), %v", enabled, raw, err, b.provider.did())
		}
	}
	b.provider.mu.Lock()
	b.provider.err = novalet.ErrTryAgain
	b.provider.mu.Unlock()
	if raw, err := b.call("set_host_enabled", map[string]any{"enabled": false}); err != nil || string(raw) != `"disabled"` {
		t.Errorf("without Placement: %s (%v)", raw, err)
	}
	raw, err = b.call("cache_images", map[string]any{"image_ids": []string{"i1", "i2"}})
	if err != nil || string(raw) != `{"i1":"cached","i2":"cached"}` {
		t.Errorf("cache_images: %s (%v)", raw, err)
	}
	if e := b.refused("cache_images", map[string]any{"image_ids": "i1"}); e.Class != "InvalidInput" {
		t.Errorf("cache_images of a text: %s", e.Class)
	}
	raw, err = b.api.Call(b.ctx(), oslomsg.Target{Topic: "compute", Server: "host1", Namespace: "baseapi", Version: "1.0"}, "ping",
		map[string]any{"arg": 7}, userContext())
	if err != nil || string(raw) != `{"arg":7,"service":"compute"}` {
		t.Errorf("ping: %s (%v)", raw, err)
	}
}

// Every call that is refused, with the class that nova-api or the conductor knows.
func TestRefusedCalls(t *testing.T) {
	b := started(t, "2026.1")
	inst := b.instance(nil)
	const nova = "nova.exception"
	for method, want := range map[string]string{
		"get_vnc_console": nova + ".ConsoleTypeUnavailable", "get_spice_console": nova + ".ConsoleTypeUnavailable",
		"get_mks_console": nova + ".ConsoleTypeUnavailable", "get_rdp_console": "builtins.NotImplementedError",
		"reserve_block_device_name":          nova + ".InvalidVolume",
		"prep_snapshot_based_resize_at_dest": nova + ".MigrationPreCheckError", "check_can_live_migrate_destination": nova + ".MigrationPreCheckError",
		"check_can_live_migrate_source": nova + ".MigrationPreCheckError", "prep_snapshot_based_resize_at_source": "builtins.NotImplementedError",
		"finish_snapshot_based_resize_at_dest": "builtins.NotImplementedError", "confirm_snapshot_based_resize_at_source": "builtins.NotImplementedError",
		"revert_snapshot_based_resize_at_dest": "builtins.NotImplementedError", "finish_revert_snapshot_based_resize_at_source": "builtins.NotImplementedError",
		"pre_live_migration": "builtins.NotImplementedError", "post_live_migration_at_destination": "builtins.NotImplementedError",
		"drop_move_claim_at_destination": "builtins.NotImplementedError", "host_power_action": "builtins.NotImplementedError",
		"host_maintenance_mode": "builtins.NotImplementedError",
	} {
		e := b.refused(method, map[string]any{"instance": inst, "console_type": "novnc", "volume_id": "v", "device": nil})
		if got := e.Module + "." + e.Class; got != want || e.Message == "" {
			t.Errorf("%s: %s %q, want %s", method, got, e.Message, want)
		}
	}
	for _, m := range methods {
		if m.test == "TestRefusedCalls" && m.state != stateRefused {
			t.Errorf("%s is not refused", m.name)
		}
	}
	var e *oslomsg.RemoteError
	if _, err := b.call("no_such_method", map[string]any{}); !errors.As(err, &e) || e.Class != "NoSuchMethod" {
		t.Errorf("an unknown method: %v", err)
	}
	if n := len(b.conductor.Find("InstanceFault", "instance_uuid", instUUID)); n != 1 { // of the volume alone
		t.Errorf("%d faults", n)
	}
}

// Casts that are refused leave a fault and a finished event.
func TestRefusedCasts(t *testing.T) {
	for _, m := range methods {
		if m.test != "TestRefusedCasts" {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			b := started(t, "zed")
			b.cast(m.name, map[string]any{"instance": b.instance(map[string]any{"task_state": "x"}), "bdm": nil, "volume_id": "v"})
			if strings.HasPrefix(m.name, "volume_snapshot") {
				b.eventually("a word about it", func() bool { return b.logs.count("method="+m.name) > 0 })
				return
			}
			b.eventually("the fault", func() bool { return len(b.conductor.Find("InstanceFault", "instance_uuid", instUUID)) == 1 })
			b.eventually("the event", func() bool {
				l := b.conductor.Find("InstanceActionEvent", "event", "compute_"+m.name)
				return len(l) == 1 && l[0].Str("result") == "Error"
			})
			want := "MigrationError"
			if strings.HasSuffix(m.name, "_volume") {
				want = "InvalidVolume"
			} else {
				b.eventually("task_state null", func() bool { return string(b.conductor.Find("Instance", "uuid", instUUID)[0]["task_state"]) == "null" })
			}
			b.eventually("a refusal with "+want, func() bool { return b.logs.count("class="+want) == 1 })
		})
	}
}

// A resize or migration that reaches this host is given back whole: the server stays as it was.
func TestRefuseResize(t *testing.T) {
	for _, method := range []string{"prep_resize", "live_migration"} {
		t.Run(method, func(t *testing.T) {
			b := started(t, "2025.1")
			inst := b.instance(map[string]any{"vm_state": "stopped", "task_state": "resize_prep"})
			const mig = "8a7b2c1e-0000-4000-8000-000000000002"
			id := b.conductor.Put("Migration", map[string]any{"uuid": mig, "status": "pre-migrating"})
			b.cast(method, map[string]any{
				"instance": inst, "migration": ovo.Newest().Minimal("Migration", map[string]any{"id": id, "uuid": mig, "status": "pre-migrating"}),
				"dest": "host2", "flavor": nil, "image": map[string]any{}, "host_list": []any{},
			})
			b.eventually("task_state null", func() bool { return string(b.conductor.Find("Instance", "uuid", instUUID)[0]["task_state"]) == "null" })
			if r := b.conductor.Find("Instance", "uuid", instUUID)[0]; r.Str("vm_state") != "stopped" {
				t.Errorf("vm_state %s", r["vm_state"])
			}
			if m := b.conductor.Find("Migration", "id", id)[0]; m.Str("status") != "error" {
				t.Errorf("migration %s", m["status"])
			}
			if !slices.Contains(b.provider.did(), "move "+mig+" to "+instUUID) {
				t.Errorf("allocations: %v", b.provider.did())
			}
			f := b.conductor.Find("InstanceFault", "instance_uuid", instUUID)
			if len(f) != 1 || f[0].Str("host") != "host1" {
				t.Errorf("fault %v", f)
			}
		})
	}
}

// Requests that find nothing to do are answered as done.
func TestIgnored(t *testing.T) {
	b := started(t, "zed")
	inst := b.instance(nil)
	for method, want := range map[string]string{
		"confirm_resize": "null", "check_instance_shared_storage": "false", "remove_volume_connection": "null",
		"rollback_live_migration_at_destination": "null",
	} {
		if raw, err := b.call(method, map[string]any{"instance": inst, "data": "x"}); err != nil || string(raw) != want {
			t.Errorf("%s: %s (%v)", method, raw, err)
		}
	}
}

func TestShares(t *testing.T) {
	b := started(t, "2025.1")
	for _, method := range []string{"allow_share", "deny_share"} {
		id := b.conductor.Put("ShareMapping", map[string]any{"status": "attaching"})
		b.cast(method, map[string]any{
			"instance": b.instance(nil), "share_mapping": ovo.Newest().Minimal("ShareMapping", map[string]any{"id": id, "status": "attaching"}),
		})
		b.eventually("the mapping's error", func() bool { return b.conductor.Find("ShareMapping", "id", id)[0].Str("status") == "error" })
	}
	b.cast("allow_share", map[string]any{"instance": b.instance(nil), "share_mapping": nil})
	b.eventually("a word about it", func() bool { return b.logs.count("method=allow_share") == 2 })
}
