package novadriver

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// computeAPI is the compute RPC API 6.5: what any controller from Zed on may send to a host.
var computeAPI = strings.Fields(`
	add_fixed_ip_to_instance allow_share attach_interface attach_volume backup_instance build_and_run_instance cache_images
	check_can_live_migrate_destination check_can_live_migrate_source check_instance_shared_storage confirm_resize
	confirm_snapshot_based_resize_at_source deny_share detach_interface detach_volume drop_move_claim_at_destination
	external_instance_event finish_resize finish_revert_resize finish_revert_snapshot_based_resize_at_source
	finish_snapshot_based_resize_at_dest get_console_output get_diagnostics get_host_uptime get_instance_diagnostics
	get_mks_console get_rdp_console get_serial_console get_spice_console get_vnc_console host_maintenance_mode
	host_power_action inject_network_info live_migration live_migration_abort live_migration_force_complete pause_instance
	post_live_migration_at_destination pre_live_migration prep_resize prep_snapshot_based_resize_at_dest
	prep_snapshot_based_resize_at_source quiesce_instance reboot_instance rebuild_instance remove_fixed_ip_from_instance
	remove_volume_connection rescue_instance reserve_block_device_name resize_instance restore_instance
	resume_instance revert_resize revert_snapshot_based_resize_at_dest rollback_live_migration_at_destination
	set_admin_password set_host_enabled shelve_instance shelve_offload_instance snapshot_instance soft_delete_instance
	start_instance stop_instance suspend_instance swap_volume terminate_instance trigger_crash_dump unpause_instance
	unquiesce_instance unrescue_instance unshelve_instance validate_console_port volume_snapshot_create volume_snapshot_delete`)

// Every method of the API is in the table, once, with one way to be answered and a test that exists.
func TestMethodTable(t *testing.T) {
	tests := map[string]bool{}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllStringSubmatch(string(b), -1) {
			tests[m[1]] = true
		}
	}
	var names []string
	for _, m := range methods {
		names = append(names, m.name)
		ways := 0
		for _, set := range []bool{m.operation != nil, m.record != nil, m.answer != nil} {
			if set {
				ways++
			}
		}
		if ways != 1 {
			t.Errorf("%s has %d ways to be answered", m.name, ways)
		}
		if !tests[m.test] {
			t.Errorf("%s: there is no %s", m.name, m.test)
		}
		if m.note == "" || m.since == "" || m.kind == "" || m.state == "" {
			t.Errorf("%s: not described", m.name)
		}
		if strings.HasPrefix(m.kind, "call") && m.operation != nil {
			t.Errorf("%s is a call and becomes an operation", m.name)
		}
	}
	slices.Sort(names)
	if !slices.Equal(names, computeAPI) {
		for _, n := range computeAPI {
			if !slices.Contains(names, n) {
				t.Errorf("%s is missing", n)
			}
		}
		t.Errorf("the table has %d methods, the API %d", len(names), len(computeAPI))
	}
}

// docs/compute-api.md is made from the table: go test ./novadriver -run TestComputeAPIDoc -update.
func TestComputeAPIDoc(t *testing.T) {
	var b bytes.Buffer
	done, refused := 0, 0
	rows := slices.Clone(methods)
	slices.SortFunc(rows, func(x, y method) int { return strings.Compare(x.name, y.name) })
	for _, m := range rows {
		if m.state == stateRefused {
			refused++
		} else {
			done++
		}
	}
	fmt.Fprintf(&b, `# The compute RPC API as novalet answers it

<!-- Made from the table in novadriver by: go test ./novadriver -run TestComputeAPIDoc -update -->

Every method of versions 6.0 to 6.5, which controllers of Zed and later send. %d are carried out, %d are refused: with the exception that
nova-api turns into the right HTTP answer, or for a cast with a fault and a finished action event. *Since* names the version that brought
the method, or its newest argument. The test is in the package novadriver.

| method | kind | since | state | how | test |
| --- | --- | --- | --- | --- | --- |
`, done, refused)
	for _, m := range rows {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s | %s |\n", m.name, m.kind, m.since, m.state, m.note, m.test)
	}
	fmt.Fprintf(&b, "\nIn the namespace `baseapi` (1.1): `ping` and `get_backdoor_port`. Any other method is answered with NoSuchMethod, another major version\n"+
		"with UnsupportedVersion.\n")
	path := filepath.Join("..", "docs", "compute-api.md")
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Errorf("%s is not what the table says: run the test with -update", path)
	}
}
