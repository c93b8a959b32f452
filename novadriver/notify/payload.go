package notify

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

// Failure is an error as a notification tells it: Nova's exception, and no more than a tenant may read.
type Failure struct {
	Module, Class, Message string
	Code                   int
}

// facts are what payloads of both forms are made of: the versioned object as Nova sent it, under what the agent knows
// better by now.
type facts struct {
	*queued
	inst *novalet.Instance
	wire *ovo.Object // nil when the object did not come with the instance
}

func factsOf(q *queued) (*facts, error) {
	wire, err := ovo.Decode(q.n.Instance.Wire)
	if err != nil {
		return nil, fmt.Errorf("read the instance: %w", err)
	}
	return &facts{q, q.n.Instance, wire}, nil
}

// period is the time that "exists" speaks of.
func (s *Notifier) period(f *facts) (begin, end time.Time) {
	if !f.end.IsZero() {
		return f.begin, f.end
	}
	_, begin = s.o.Period.Last(f.at)
	return begin, f.at
}

// text returns a field of the object that the agent never changes, null as Nova has it.
func (f *facts) text(field string) any {
	if f.wire.IsNull(field) {
		return nil
	}
	return f.wire.String(field)
}

// when returns a time of the object, nil when there is none.
func (f *facts) when(field string) any {
	if t := f.wire.Time(field); !t.IsZero() {
		return ovo.FormatTime(t)
	}
	return nil
}

// object makes the primitive of a versioned object of a notification. It has no changes: they would tell nothing.
func object(name, version string, data map[string]any) map[string]any {
	return map[string]any{"nova_object.name": name, "nova_object.namespace": "nova", "nova_object.version": version, "nova_object.data": data}
}

// powerNames are the power states by number (nova/objects/fields.py InstancePowerState).
var powerNames = map[novalet.PowerState]string{
	novalet.PowerNoState: "pending", novalet.PowerRunning: "running", novalet.PowerPaused: "paused",
	novalet.PowerShutdown: "shutdown", novalet.PowerCrashed: "crashed", novalet.PowerSuspended: "suspended",
}

// orNone makes null of an empty text.
func orNone[T ~string](s T) any {
	if s == "" {
		return nil
	}
	return string(s)
}

func orNoTime(t *time.Time) any {
	if t == nil {
		return nil
	}
	return ovo.FormatTime(*t)
}

// versioned makes the payload of the new form.
func (s *Notifier) versioned(f *facts, e event) map[string]any {
	i, rc := f.inst, &f.n.Context
	data := map[string]any{
		"uuid": i.UUID, "user_id": orNone(i.UserID), "tenant_id": orNone(i.ProjectID), "reservation_id": f.text("reservation_id"),
		"display_name": orNone(i.DisplayName), "display_description": f.text("display_description"), "host_name": orNone(i.Hostname),
		"host": orNone(i.Host), "node": orNone(i.Node), "os_type": f.text("os_type"), "architecture": f.text("architecture"),
		"availability_zone": orNone(i.AvailabilityZone), "flavor": flavor(f.wire.Object("flavor"), &i.Flavor), "image_uuid": i.ImageRef,
		"key_name": orNone(i.KeyName), "kernel_id": f.text("kernel_id"), "ramdisk_id": f.text("ramdisk_id"),
		"created_at": f.when("created_at"), "updated_at": f.when("updated_at"), "launched_at": orNoTime(i.LaunchedAt),
		"terminated_at": f.terminated(), "deleted_at": orNoTime(i.DeletedAt), "state": orNone(i.VMState), "task_state": orNone(i.TaskState),
		"power_state": powerNames[i.PowerState], "progress": f.wire.Int("progress"), "metadata": texts(i.Metadata), "locked": f.wire.Bool("locked"),
		"auto_disk_config": diskConfig(f.wire), "ip_addresses": addresses(i.NetworkInfo), "block_devices": s.blockDevices(f, e),
		"request_id": nil, "action_initiator_user": orNone(rc.UserID), "action_initiator_project": orNone(rc.ProjectID),
		"locked_reason": orNone(i.SystemMetadata["locked_reason"]),
	}
	if rc.UserID != "" && rc.ProjectID != "" {
		data["request_id"] = rc.RequestID
	}
	at := 0
	if s.o.SharesKnown() {
		at = 1
		data["shares"] = nil
		if s.o.Shares {
			data["shares"] = []any{}
		}
	}
	if e.object != payloadExists {
		data["fault"] = s.fault(f)
	}
	switch e.object {
	case payloadCreate:
		data["keypairs"], data["tags"] = keypairs(f.wire), tags(f.wire)
		data["trusted_image_certificates"], data["instance_name"] = certificates(f.wire), i.Name
	case payloadRebuild:
		data["trusted_image_certificates"] = certificates(f.wire)
	case payloadRescue:
		data["rescue_image_ref"] = orNone(f.n.ImageID)
	case payloadSnapshot:
		data["snapshot_image_id"] = f.n.ImageID
	case payloadExists:
		begin, end := s.period(f)
		data["audit_period"] = object("AuditPeriodPayload", "1.0", map[string]any{
			"audit_period_beginning": ovo.FormatTime(begin), "audit_period_ending": ovo.FormatTime(end)})
	}
	return object(e.object, payloadVersions[e.object][at], data)
}

// terminated is when the instance was ended: the object's own time, or that of a delete under way.
func (f *facts) terminated() any {
	if t := f.when("terminated_at"); t != nil {
		return t
	}
	if f.inst.VMState == novalet.VMDeleted {
		return orNoTime(f.inst.DeletedAt)
	}
	return nil
}

func (s *Notifier) fault(f *facts) any {
	if f.n.Err == nil {
		return nil
	}
	e := s.o.Describe(f.n.Err, f.inst.UUID)
	// The three places in Python's code have no counterpart here; consumers show the class and the message.
	return object("ExceptionPayload", "1.1", map[string]any{"module_name": e.Module, "function_name": string(f.n.Action),
		"exception": e.Class, "exception_message": e.Message, "traceback": e.Message})
}

func flavor(o *ovo.Object, f *novalet.Flavor) map[string]any {
	optional := func(field string) any {
		if o.IsNull(field) {
			return nil
		}
		return o.Raw(field)
	}
	data := map[string]any{
		"flavorid": f.FlavorID, "memory_mb": f.MemoryMB, "vcpus": f.VCPUs, "root_gb": f.RootGB, "ephemeral_gb": f.EphemeralGB,
		"name": f.Name, "swap": f.Swap, "disabled": o.Bool("disabled"), "is_public": o.Bool("is_public"), "extra_specs": texts(f.ExtraSpecs),
	}
	for _, k := range []string{"rxtx_factor", "vcpu_weight", "projects", "description"} {
		data[k] = optional(k)
	}
	return object("FlavorPayload", "1.4", data)
}

// texts is a map that is never null.
func texts(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

func diskConfig(o *ovo.Object) string {
	if o.Bool("auto_disk_config") {
		return "AUTO"
	}
	return "MANUAL"
}

func addresses(info novalet.NetworkInfo) []any {
	out := []any{}
	for i := range info {
		v := &info[i]
		meta := map[string]string{}
		for k, raw := range v.Meta {
			var text string
			if json.Unmarshal(raw, &text) != nil {
				text = string(raw)
			}
			meta[k] = text
		}
		for _, s := range v.Network.Subnets {
			for _, ip := range s.IPs {
				out = append(out, object("IpPayload", "1.0", map[string]any{"label": v.Network.Label, "mac": v.Address, "meta": meta,
					"port_uuid": v.ID, "version": ip.Version, "address": ip.Address, "device_name": orNone(v.DevName)}))
			}
		}
	}
	return out
}

func (s *Notifier) blockDevices(f *facts, e event) any {
	if !e.volumes && !s.o.BlockDevices {
		return nil
	}
	out := []any{}
	for i := range f.n.BlockDevices {
		d := &f.n.BlockDevices[i]
		if d.VolumeID == "" {
			continue
		}
		o, err := ovo.Decode(d.Wire)
		if err != nil {
			continue
		}
		data := map[string]any{"device_name": orNone(d.DeviceName), "boot_index": d.BootIndex, "volume_id": d.VolumeID,
			"delete_on_termination": o.Bool("delete_on_termination"), "tag": orNone(o.String("tag"))}
		out = append(out, object("BlockDevicePayload", "1.0", data))
	}
	return out
}

func keypairs(o *ovo.Object) []any {
	out := []any{}
	for _, k := range o.Object("keypairs").Objects() {
		data := map[string]any{}
		for _, field := range []string{"user_id", "name", "fingerprint", "public_key", "type"} {
			data[field] = nil
			if !k.IsNull(field) {
				data[field] = k.String(field)
			}
		}
		out = append(out, object("KeypairPayload", "1.0", data))
	}
	return out
}

func tags(o *ovo.Object) []string {
	out := []string{}
	for _, t := range o.Object("tags").Objects() {
		out = append(out, t.String("tag"))
	}
	return out
}

func certificates(o *ovo.Object) any {
	c := o.Object("trusted_certs")
	if c == nil {
		return nil
	}
	return c.Strings("ids")
}

func unmarshal(raw json.RawMessage, dst any) error {
	if len(bytes.TrimSpace(raw)) == 0 {
		return nil
	}
	return json.Unmarshal(raw, dst)
}
