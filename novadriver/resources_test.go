package novadriver

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/osloconf"
	"github.com/novalet/novalet/novadriver/conductortest"
)

func TestUsage(t *testing.T) {
	inst := func(vm novalet.VMState, task novalet.TaskState, image string) novalet.TrackedInstance {
		return novalet.TrackedInstance{Instance: novalet.Instance{
			VMState: vm, TaskState: task, ImageRef: image, ProjectID: "p1",
			Flavor: novalet.Flavor{VCPUs: 2, MemoryMB: 1000, RootGB: 10, EphemeralGB: 3, Swap: 2048},
		}}
	}
	got := computeUsage([]novalet.TrackedInstance{
		inst(novalet.VMActive, "", "img"), inst(novalet.VMBuilding, novalet.TaskSpawning, "img"), inst(novalet.VMActive, novalet.TaskShelving, ""),
		inst(novalet.VMDeleted, "", "img"), inst(novalet.VMShelvedOffloaded, "", "img"),
	}, ResourceOptions{ReservedCPUs: 1, ReservedMemoryMB: 512, ReservedDiskMB: 1025}, 3)
	want := usage{
		vcpus: 7, memoryMB: 3512, diskGB: 2 + 15 + 15 + 5, instances: 3, workload: 2,
		stats: map[string]string{
			"failed_builds": "3", "num_instances": "3", "io_workload": "2", "num_vm_active": "2", "num_vm_building": "1",
			"num_task_None": "1", "num_task_spawning": "1", "num_task_shelving": "1", "num_proj_p1": "3", "num_os_type_None": "3",
		},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(usage{})); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	none := computeUsage(nil, ResourceOptions{}, 0)
	if none.stats["num_instances"] != "0" || none.instances != 0 || none.memoryMB != 0 {
		t.Errorf("of nothing: %+v", none)
	}
}

// The ComputeNode is saved when something changed, with only that, and never when nothing did.
func TestTracker(t *testing.T) {
	b := newBench(t, "zed", func(o *Options) { o.UpdateInterval = time.Hour })
	d := b.build()
	d.setNode(&node{uuid: "7a7b2c1e-0000-4000-8000-0000000000f1"})
	tr := d.tracker
	saves := func() (out []conductortest.Request) {
		for _, r := range b.conductor.Requests() {
			if r.Object == "ComputeNode" {
				out = append(out, r)
			}
		}
		return out
	}
	for range 3 {
		if err := tr.update(b.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	if l := saves(); len(l) != 1 || l[0].Action != "create" {
		t.Fatalf("a new node: %v", l)
	}
	b.agent.set(func() {
		b.agent.tracked = []novalet.TrackedInstance{{Instance: novalet.Instance{
			UUID: instUUID, ImageRef: "i", VMState: novalet.VMActive, Flavor: novalet.Flavor{VCPUs: 1, MemoryMB: 64, RootGB: 1},
		}}}
	})
	for range 2 {
		if err := tr.update(b.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	l := saves()
	if len(l) != 2 || l[1].Action != "save" {
		t.Fatalf("after an instance came: %v", l)
	}
	changes := slices.Sorted(slices.Values(l[1].Objinst.Changes))
	want := []string{"free_disk_gb", "free_ram_mb", "local_gb_used", "memory_mb_used", "running_vms", "stats", "vcpus_used"}
	if diff := cmp.Diff(want, changes); diff != "" {
		t.Errorf("changes:\n%s", diff)
	}
	// The uptime moves all the time: it alone is saved every ten minutes.
	d.o.uptime = func() string { return "up 2 days" }
	if err := tr.update(b.ctx()); err != nil {
		t.Fatal(err)
	}
	if len(saves()) != 2 {
		t.Error("saved for the uptime alone")
	}
	d.o.now = func() time.Time { return time.Now().Add(11 * time.Minute) }
	if err := tr.update(b.ctx()); err != nil {
		t.Fatal(err)
	}
	if l := saves(); len(l) != 3 || !slices.Equal(l[2].Objinst.Changes, []string{"stats"}) {
		t.Error("an old uptime was not saved")
	}
	// A failed build counts, a good one clears it.
	tr.buildFailed()
	if err := tr.update(b.ctx()); err != nil {
		t.Fatal(err)
	}
	stats := func() string { return string(b.conductor.Find("ComputeNode", "host", "host1")[0]["stats"]) }
	if !strings.Contains(stats(), `"failed_builds":"1"`) {
		t.Errorf("stats %s", stats())
	}
	b.instance(nil)
	if err := d.Conductor().SaveInstance(b.ctx(), d.Conductor().NewContext(), &novalet.InstanceUpdate{
		UUID: instUUID, Fields: map[string]any{"vm_state": novalet.VMActive, "launched_at": time.Now()},
	}); err != nil {
		t.Fatal(err)
	}
	if n := tr.failed.Load(); n != 0 {
		t.Errorf("%d failed builds after a good one", n)
	}
	// A node deleted with its service does not come back by itself.
	b.conductor.Delete("ComputeNode", "host", "host1")
	b.agent.set(func() { b.agent.tracked = nil })
	if err := tr.update(b.ctx()); err == nil {
		t.Error("a deleted node was saved")
	}
	if l := b.conductor.Find("ComputeNode", "host", "host1"); len(l) != 0 {
		t.Errorf("the node came back: %v", l)
	}
}

// Many changes at once are one save.
func TestTrackerCoalesces(t *testing.T) {
	b := started(t, "zed", func(o *Options) { o.UpdateInterval = time.Hour })
	b.conductor.Forget()
	c := b.driver.Conductor()
	for n := range 50 {
		b.agent.set(func() {
			b.agent.tracked = append(b.agent.tracked, novalet.TrackedInstance{Instance: novalet.Instance{UUID: instUUID, ImageRef: "i", Flavor: novalet.Flavor{MemoryMB: 1}}})
		})
		c.InstanceChanged(&novalet.Instance{UUID: instUUID}, n%2 == 1)
	}
	b.eventually("the last change", func() bool { return b.conductor.Find("ComputeNode", "host", "host1")[0].Int("running_vms") == 50 })
	n := 0
	for _, name := range b.conductor.Names() {
		if name == "ComputeNode.save" {
			n++
		}
	}
	if n > 3 {
		t.Errorf("%d saves for changes within a moment", n)
	}
}

// The inventory is what the options say, with a configured ratio above all.
func TestWant(t *testing.T) {
	two := 2.0
	b := newBench(t, "zed", func(o *Options) {
		o.Resources = ResourceOptions{ReservedCPUs: 1, ReservedMemoryMB: 512, ReservedDiskMB: 1500, CPURatio: &two}
		o.ImageFormats = []string{"raw"}
	})
	d := b.build()
	d.setNode(&node{uuid: "u"})
	if err := d.tracker.update(b.ctx()); err != nil {
		t.Fatal(err)
	}
	w := b.provider.wanted()
	if c := w.Classes["VCPU"]; c.Total != 8 || c.Reserved != 1 || *c.Ratio != 2 {
		t.Errorf("VCPU %+v", c)
	}
	if c := w.Classes["DISK_GB"]; c.Total != 100 || c.Reserved != 2 || c.Ratio != nil || c.Initial != 1 {
		t.Errorf("DISK_GB %+v", c)
	}
	want := []string{"COMPUTE_DEVICE_TAGGING", "COMPUTE_IMAGE_TYPE_RAW", "COMPUTE_NET_ATTACH_INTERFACE", "COMPUTE_NET_ATTACH_INTERFACE_WITH_TAG", "COMPUTE_NODE", "CUSTOM_NOVALET"}
	if diff := cmp.Diff(want, slices.Sorted(slices.Values(w.Traits))); diff != "" {
		t.Errorf("traits:\n%s", diff)
	}
	for _, tr := range w.Traits {
		if !slices.Contains(w.Managed, tr) {
			t.Errorf("%s is set and never taken away", tr)
		}
	}
	n := b.conductor.Find("ComputeNode", "host", "host1")[0]
	if string(n["cpu_allocation_ratio"]) != "2" || string(n["ram_allocation_ratio"]) != "1" || n.Int("vcpus_used") != 1 {
		t.Errorf("node %v", n)
	}
	specs := string(n["supported_hv_specs"])
	for _, hv := range []string{"docker", "lxc", "lxd"} {
		if !strings.Contains(specs, `"hv_type":"`+hv+`"`) {
			t.Errorf("supported_hv_specs without %s: %s", hv, specs)
		}
	}
}

func TestHostUptime(t *testing.T) {
	dir := t.TempDir()
	now := time.Date(2026, 3, 1, 7, 8, 9, 0, time.UTC)
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("loadavg", "0.10 0.20 0.30 1/2 3\n")
	for secs, want := range map[string]string{
		"59.1 1": " 07:08:09 up 0 min,  0 users,  load average: 0.10, 0.20, 0.30",
		"3720.0": " 07:08:09 up  1:02,  0 users,  load average: 0.10, 0.20, 0.30",
		"90000":  " 07:08:09 up 1 day,  1:00,  0 users,  load average: 0.10, 0.20, 0.30",
		"172860": " 07:08:09 up 2 days, 1 min,  0 users,  load average: 0.10, 0.20, 0.30",
		"junk":   " 07:08:09 up unknown,  0 users,  load average: 0.10, 0.20, 0.30",
	} {
		write("uptime", secs)
		if got := hostUptime(dir, now); got != want {
			t.Errorf("%s: %q, want %q", secs, got, want)
		}
	}
	if got := hostUptime(filepath.Join(dir, "none"), now); !strings.Contains(got, "up unknown") {
		t.Errorf("without proc: %q", got)
	}
}

func TestReadOptions(t *testing.T) {
	read := func(text string) (Options, error) {
		c := osloconf.New()
		if err := c.Add("nova.conf", []byte(text)); err != nil {
			t.Fatal(err)
		}
		o := ReadOptions(c)
		return o, c.Err()
	}
	o, err := read(`[DEFAULT]
host = h1
my_ip = 192.0.2.9
state_path = /s
report_interval = 5
reserved_host_memory_mb = 1024
cpu_allocation_ratio = 8.0
ram_allocation_ratio = 0.0
[serial_console]
enabled = true
base_url = wss://x/
[novalet]
hypervisor_hostname = n1
release = 2025.1
[filter_scheduler]
track_instance_changes = false
`)
	if err != nil {
		t.Fatal(err)
	}
	if o.Host != "h1" || o.Node != "n1" || o.MyIP != "192.0.2.9" || o.StateDir != "/s" || o.ReportInterval != 5*time.Second ||
		o.Resources.ReservedMemoryMB != 1024 || *o.Resources.CPURatio != 8 || o.Resources.RAMRatio != nil || o.Resources.InitialCPURatio != 4 ||
		!o.SerialConsole || o.SerialBaseURL != "wss://x/" || o.Release != "2025.1" || o.TrackInstanceChanges || o.InstanceNameTemplate != "instance-%08x" {
		t.Errorf("%+v", o)
	}
	if o, err := read(""); err != nil || o.Host == "" || o.MyIP == "" || !o.TrackInstanceChanges {
		t.Errorf("nothing set: %+v (%v)", o, err)
	}
	for _, bad := range []string{
		"my_ip = nowhere", "instance_name_template = instance-%(uuid)s", "cpu_allocation_ratio = -1", "[novalet]\nrelease = 1999.1", "reserved_host_cpus = -1",
	} {
		if _, err := read("[DEFAULT]\n" + bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
