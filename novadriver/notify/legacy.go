package notify

import (
	"fmt"
	"strings"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
)

// Times of the old form: as Python prints a datetime, and as nova.utils.strtime writes it.
const (
	printedTime = "2006-01-02 15:04:05+00:00"
	plainTime   = "2006-01-02 15:04:05"
	strTime     = "2006-01-02T15:04:05.000000"
)

// legacy makes the payload of the old form (nova/notifications/base.py info_from_instance).
func (s *Notifier) legacy(f *facts, e event) map[string]any {
	i, w := f.inst, f.wire
	p := map[string]any{
		"tenant_id": i.ProjectID, "user_id": i.UserID,
		"instance_id": i.UUID, "display_name": i.DisplayName, "reservation_id": f.text("reservation_id"), "hostname": i.Hostname,
		"instance_type": i.Flavor.Name, "instance_type_id": typeID(f), "instance_flavor_id": i.Flavor.FlavorID, "architecture": f.text("architecture"),
		"memory_mb": i.Flavor.MemoryMB, "disk_gb": i.Flavor.RootGB + i.Flavor.EphemeralGB, "vcpus": i.Flavor.VCPUs,
		"root_gb": i.Flavor.RootGB, "ephemeral_gb": i.Flavor.EphemeralGB,
		"host": orNone(i.Host), "node": orNone(i.Node), "availability_zone": orNone(i.AvailabilityZone), "cell_name": w.String("cell_name"),
		"created_at": "None", "terminated_at": "", "deleted_at": written(i.DeletedAt), "launched_at": written(i.LaunchedAt),
		"image_ref_url": s.o.glanceOf(oslomsg.Context(f.n.Context.Wire)) + "/images/" + i.ImageRef,
		"os_type":       f.text("os_type"), "kernel_id": f.text("kernel_id"), "ramdisk_id": f.text("ramdisk_id"),
		"state": i.VMState, "state_description": i.TaskState, "progress": "",
		"access_ip_v4": orNone(i.AccessIPv4), "access_ip_v6": orNone(i.AccessIPv6),
		"image_meta": imageMeta(i.SystemMetadata), "metadata": texts(i.Metadata),
	}
	if t := w.Time("created_at"); !t.IsZero() {
		p["created_at"] = t.UTC().Format(printedTime)
	}
	if t := w.Time("terminated_at"); !t.IsZero() {
		p["terminated_at"] = written(&t)
	} else if i.VMState == novalet.VMDeleted {
		p["terminated_at"] = written(i.DeletedAt)
	}
	if n := w.Int("progress"); n != 0 {
		p["progress"] = n
	}
	if e.addresses[f.n.Phase] {
		p["fixed_ips"] = fixedIPs(i.NetworkInfo)
	}
	switch {
	case f.n.Action == novalet.ActionCreate && f.n.Phase == novalet.PhaseStart, f.n.Action == novalet.ActionRebuild:
		p["image_name"] = f.n.ImageName
	case f.n.Action == novalet.ActionCreate && f.n.Phase == novalet.PhaseEnd:
		p["message"] = "Success"
	case f.n.Action == novalet.ActionRescue:
		p["rescue_image_name"] = f.n.ImageName
	case f.n.Action == novalet.ActionExists:
		begin, end := s.period(f)
		p["audit_period_beginning"], p["audit_period_ending"] = printed(begin), printed(end)
	}
	if f.n.Err != nil {
		d := s.o.Describe(f.n.Err, i.UUID)
		p["exception"] = printedError(d)
		p["message"], p["code"] = d.Message, d.Code
	}
	return p
}

// printedError is an error as Python prints what it makes of one.
func printedError(d Failure) string {
	quote := func(s string) string {
		return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`, "\n", `\n`).Replace(s) + "'"
	}
	return fmt.Sprintf("{'kwargs': {'code': %d}, 'message': %s, 'class': %s}", d.Code, quote(d.Message), quote(d.Class))
}

// typeID is the number of the flavor the instance was made from.
func typeID(f *facts) any {
	if f.wire.IsNull("instance_type_id") {
		return nil
	}
	return f.wire.Int("instance_type_id")
}

// written is a time as nova.utils.strtime writes it, "" for none.
func written(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.UTC().Format(strTime)
}

// printed is a time as Python prints one without a zone: the fraction only when there is one.
func printed(t time.Time) string {
	if us := t.Nanosecond() / 1000; us != 0 {
		return t.UTC().Format(plainTime + ".000000")
	}
	return t.UTC().Format(plainTime)
}

// imageMeta are the image's properties, which Nova copies into system_metadata.
func imageMeta(system map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range system {
		if k, ok := strings.CutPrefix(k, "image_"); ok {
			out[k] = v
		}
	}
	return out
}

func fixedIPs(info novalet.NetworkInfo) []any {
	out := []any{}
	for i := range info {
		for _, s := range info[i].Network.Subnets {
			for _, ip := range s.IPs {
				floating := ip.FloatingIPs
				if floating == nil {
					floating = []novalet.FixedIP{}
				}
				out = append(out, map[string]any{"address": ip.Address, "type": ip.Type, "version": ip.Version, "meta": ip.Meta,
					"floating_ips": floating, "label": info[i].Network.Label, "vif_mac": info[i].Address})
			}
		}
	}
	return out
}
