package novadriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
	"github.com/novalet/novalet/novadriver/placement"
)

const (
	// hypervisorType is what the cloud sees as this host's kind.
	hypervisorType = "novalet"
	// traitNovalet lets operators steer flavors and images to these hosts (trait:CUSTOM_NOVALET=required).
	traitNovalet = "CUSTOM_NOVALET"
	// saveSpacing is the least time between two saves of the ComputeNode: boots come in bursts.
	saveSpacing = time.Second
	// uptimeAge is how old the uptime in the node's stats may get before it alone is a reason to save.
	uptimeAge = 10 * time.Minute
)

// nodeFields are the fields of ComputeNode that this host writes.
var nodeFields = []string{
	"host", "service_id", "hypervisor_hostname", "hypervisor_type", "hypervisor_version", "host_ip",
	"vcpus", "vcpus_used", "memory_mb", "memory_mb_used", "local_gb", "local_gb_used", "free_ram_mb", "free_disk_gb",
	"disk_available_least", "running_vms", "current_workload", "cpu_info", "numa_topology", "supported_hv_specs", "stats", "metrics",
	"cpu_allocation_ratio", "ram_allocation_ratio", "disk_allocation_ratio", "pci_device_pools",
}

// tracker keeps the ComputeNode and the provider true.
type tracker struct {
	d      *Driver
	kick   chan struct{}
	failed atomic.Int64 // builds that failed since the last that did not

	// Used by the goroutine that updates, and before it starts.
	uptimeAt time.Time
	ratios   map[string]float64
	problem  string // the last failure that was logged
	// devices are Nova's rows as last read or written, by address; nil before the first look.
	devices map[string]*ovo.Object
}

func newTracker(d *Driver) *tracker { return &tracker{d: d, kick: make(chan struct{}, 1)} }

// changed asks for an update soon. It does not block.
func (t *tracker) changed() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// buildFailed and buildSucceeded feed the scheduler's BuildFailureWeigher. Only failures of this host count: a
// broken image is not a reason to avoid it.
func (t *tracker) buildFailed() {
	t.failed.Add(1)
	t.changed()
}

func (t *tracker) buildSucceeded() { t.failed.Store(0) }

// run updates on every change, at most once a second, and every UpdateInterval.
func (t *tracker) run(ctx context.Context) {
	for {
		timer := time.NewTimer(jitter(t.d.o.UpdateInterval))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-t.kick:
			timer.Stop()
		case <-timer.C:
		}
		t.logged(ctx, t.update(ctx))
		if !sleep(ctx, saveSpacing) {
			return
		}
	}
}

// logged says once what keeps failing, and once that it no longer does.
func (t *tracker) logged(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	text := ""
	if err != nil {
		text = err.Error()
	}
	switch {
	case text == t.problem:
	case err != nil:
		t.d.log.Warn("update resources", "err", err)
	default:
		t.d.log.Info("resources are up to date again")
	}
	t.problem = text
}

// update brings ComputeNode and provider up to date. The node comes first: the provider without a node would be
// scheduled to in vain.
func (t *tracker) update(ctx context.Context) error {
	res, err := t.d.agent().Resources(ctx)
	if err != nil {
		return fmt.Errorf("read the host's resources: %w", err)
	}
	nodeErr := t.saveNode(ctx, res)
	if nodeErr == nil {
		nodeErr = t.saveDevices(ctx, res)
	}
	var syncErr error
	if t.d.o.Placement != nil && (nodeErr == nil || t.d.nodeCreated()) {
		var ratios map[string]float64
		var want *placement.Want
		if want, syncErr = t.want(res); syncErr == nil {
			ratios, syncErr = t.d.o.Placement.Sync(ctx, want)
		}
		if syncErr == nil {
			t.ratios = ratios
		}
	}
	return errors.Join(nodeErr, syncErr)
}

func (d *Driver) nodeCreated() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.node != nil && d.node.id != 0
}

// want describes the provider.
func (t *tracker) want(res novalet.HostResources) (*placement.Want, error) {
	o := &t.d.o
	traits := []string{"COMPUTE_NODE", "COMPUTE_NET_ATTACH_INTERFACE", "COMPUTE_NET_ATTACH_INTERFACE_WITH_TAG", "COMPUTE_DEVICE_TAGGING", traitNovalet}
	for _, f := range o.ImageFormats {
		traits = append(traits, "COMPUTE_IMAGE_TYPE_"+strings.ToUpper(f))
	}
	if t.d.service.disabled.Load() {
		traits = append(traits, traitDisabled)
	}
	if t.d.owner.Load() {
		traits = append(traits, traitOwner)
	}
	r := o.Resources
	w := &placement.Want{
		UUID: t.d.nodeUUID(), Name: o.Node, Traits: traits, Managed: managedTraits,
		Classes: map[string]placement.Class{
			"VCPU":      {Total: res.VCPUs, Reserved: r.ReservedCPUs, Ratio: r.CPURatio, Initial: r.InitialCPURatio},
			"MEMORY_MB": {Total: res.MemoryMB, Reserved: r.ReservedMemoryMB, Ratio: r.RAMRatio, Initial: r.InitialRAMRatio},
			"DISK_GB":   {Total: res.DiskGB, Reserved: diskGB(r.ReservedDiskMB), Ratio: r.DiskRatio, Initial: r.InitialDiskRatio},
		},
	}
	added, err := providerConfig(o.Providers, w.UUID, w.Name)
	if err != nil || added == nil {
		return w, err
	}
	for _, name := range added.Traits {
		if slices.Contains(traits, name) {
			return nil, fmt.Errorf("provider config %s: trait %s is this program's own; remove it there", added.File, name)
		}
	}
	w.Traits, w.Extra = append(w.Traits, added.Traits...), added.Inventories
	return w, nil
}

// managedTraits are the traits that say what a compute host can do: those that this one cannot go away, such as what
// another nova-compute left on the provider.
var managedTraits = []string{
	"COMPUTE_NODE", traitDisabled, traitOwner, traitNovalet,
	"COMPUTE_NET_ATTACH_INTERFACE", "COMPUTE_NET_ATTACH_INTERFACE_WITH_TAG", "COMPUTE_DEVICE_TAGGING",
	"COMPUTE_VOLUME_ATTACH_WITH_TAG", "COMPUTE_VOLUME_EXTEND", "COMPUTE_VOLUME_MULTI_ATTACH", "COMPUTE_TRUSTED_CERTS",
	"COMPUTE_SAME_HOST_COLD_MIGRATE", "COMPUTE_RESCUE_BFV", "COMPUTE_ACCELERATORS", "COMPUTE_SOCKET_PCI_NUMA_AFFINITY",
	"COMPUTE_REMOTE_MANAGED_PORTS", "COMPUTE_SECURITY_UEFI_SECURE_BOOT", "COMPUTE_EPHEMERAL_ENCRYPTION",
	"COMPUTE_EPHEMERAL_ENCRYPTION_LUKS", "COMPUTE_STORAGE_VIRTIO_FS", "COMPUTE_MEM_BACKING_FILE",
	"COMPUTE_ADDRESS_SPACE_PASSTHROUGH", "COMPUTE_ADDRESS_SPACE_EMULATED",
	"COMPUTE_IMAGE_TYPE_AKI", "COMPUTE_IMAGE_TYPE_AMI", "COMPUTE_IMAGE_TYPE_ARI", "COMPUTE_IMAGE_TYPE_ISO", "COMPUTE_IMAGE_TYPE_QCOW2",
	"COMPUTE_IMAGE_TYPE_RAW", "COMPUTE_IMAGE_TYPE_VDI", "COMPUTE_IMAGE_TYPE_VHD", "COMPUTE_IMAGE_TYPE_VHDX", "COMPUTE_IMAGE_TYPE_VMDK",
	"COMPUTE_IMAGE_TYPE_PLOOP",
}

// fields computes the ComputeNode.
func (t *tracker) fields(res novalet.HostResources) (map[string]any, error) {
	o := &t.d.o
	u := computeUsage(t.d.agent().Tracked(), o.Resources, t.failed.Load())
	u.stats["uptime"] = o.uptime()
	cpu := ""
	if res.CPUInfo != nil {
		b, err := json.Marshal(res.CPUInfo)
		if err != nil {
			return nil, fmt.Errorf("encode cpu_info: %w", err)
		}
		cpu = string(b)
	}
	ratio := func(class string, set *float64, initial float64) float64 {
		if set != nil {
			return *set
		}
		if r := t.ratios[class]; r > 0 {
			return r
		}
		return initial
	}
	specs := make([]*ovo.Object, 0, 3)
	for _, hv := range []string{"docker", "lxc", "lxd"} {
		specs = append(specs, t.d.release.get().Minimal("HVSpec", map[string]any{"arch": res.Arch, "hv_type": hv, "vm_mode": "exe"}))
	}
	fields := map[string]any{
		"host": o.Host, "service_id": t.d.service.row(), "hypervisor_hostname": o.Node, "host_ip": o.MyIP,
		"hypervisor_type": hypervisorType, "hypervisor_version": o.HypervisorVersion,
		"vcpus": res.VCPUs, "vcpus_used": u.vcpus, "memory_mb": res.MemoryMB, "memory_mb_used": u.memoryMB,
		"local_gb": res.DiskGB, "local_gb_used": u.diskGB,
		"free_ram_mb": res.MemoryMB - u.memoryMB, "free_disk_gb": res.DiskGB - u.diskGB,
		"disk_available_least": res.DiskFreeGB - diskGB(o.Resources.ReservedDiskMB),
		"running_vms":          u.instances, "current_workload": u.workload, "cpu_info": cpu, "numa_topology": nil,
		"supported_hv_specs": specs, "stats": u.stats, "metrics": "[]",
		"cpu_allocation_ratio":  ratio("VCPU", o.Resources.CPURatio, o.Resources.InitialCPURatio),
		"ram_allocation_ratio":  ratio("MEMORY_MB", o.Resources.RAMRatio, o.Resources.InitialRAMRatio),
		"disk_allocation_ratio": ratio("DISK_GB", o.Resources.DiskRatio, o.Resources.InitialDiskRatio),
	}
	if res.PCI || t.hasPools() {
		fields["pci_device_pools"] = t.pools(res)
	}
	return fields, nil
}

// saveNode creates the ComputeNode, or saves the fields that changed.
func (t *tracker) saveNode(ctx context.Context, res novalet.HostResources) error {
	fields, err := t.fields(res)
	if err != nil {
		return err
	}
	t.d.mu.Lock()
	n := *t.d.node
	t.d.mu.Unlock()
	o := t.d.release.get().Minimal("ComputeNode", fields)
	method := "save"
	if n.id == 0 || n.deleted {
		method = "create"
		o.Set("uuid", n.uuid)
	} else {
		stale := t.d.o.now().Sub(t.uptimeAt) > uptimeAge
		o.Changes = slices.DeleteFunc(o.Changes, func(f string) bool {
			if f == "stats" && !stale {
				return same(n.saved[f], o.Data[f], "uptime")
			}
			return same(n.saved[f], o.Data[f], "")
		})
		if len(o.Changes) == 0 {
			return nil
		}
		o.Key("id", n.id)
	}
	send := o
	if method == "save" {
		send = o.ForSave("id")
	}
	a, err := t.d.rpc.object(ctx, t.d.adminContext(), send, method, nil, nil)
	if isClass(err, "ComputeHostNotFound", "NotFound") && method == "save" {
		// Deleted with its service. A new one is made only by a restart.
		return fmt.Errorf("the compute node of this host was deleted from Nova: %w", err)
	}
	if isClass(err, "DuplicateRecord") {
		return fmt.Errorf("there is another compute node %s on host %s, with another uuid than the file %s: restore the file, or "+
			"delete the old compute service: %w", t.d.o.Node, t.d.o.Host, identityFile, err)
	}
	if err != nil {
		return fmt.Errorf("%s compute node %s: %w", method, n.uuid, err)
	}
	saved := map[string]json.RawMessage{}
	for _, f := range nodeFields {
		saved[f] = o.Data[f]
	}
	if method == "create" {
		if err := send.Merge(a.updates); err != nil {
			return fmt.Errorf("create compute node: %w", err)
		}
		if n.id = send.Int("id"); n.id == 0 {
			return errors.New("create compute node: the conductor gave no id")
		}
		t.d.log.Info("compute node created", "uuid", n.uuid, "node", t.d.o.Node)
	}
	n.saved, n.deleted = saved, false
	t.uptimeAt = t.d.o.now()
	t.d.setNode(&n)
	return nil
}

// same compares two field values, apart from marks of changes inside objects and one key of a dict.
func same(a, b json.RawMessage, ignore string) bool {
	var x, y any
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	return reflect.DeepEqual(plain(x, ignore), plain(y, ignore))
}

func plain(v any, ignore string) any {
	switch v := v.(type) {
	case map[string]any:
		delete(v, "nova_object.changes")
		if ignore != "" {
			delete(v, ignore)
		}
		for k := range v {
			v[k] = plain(v[k], ignore)
		}
	case []any:
		for i := range v {
			v[i] = plain(v[i], ignore)
		}
	}
	return v
}
