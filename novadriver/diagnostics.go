package novadriver

import (
	"maps"
	"slices"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

// diagnosticsObject makes the Diagnostics object. Its driver field is an enum that nova-api checks, without a name
// for us: "libvirt" is the one that leads to no error there.
func (d *Driver) diagnosticsObject(g *novalet.Diagnostics) *ovo.Object {
	rel := d.release.get()
	cpus := make([]*ovo.Object, 0, len(g.CPUTimes))
	for i, t := range g.CPUTimes {
		cpus = append(cpus, rel.Minimal("CpuDiagnostics", map[string]any{"id": i, "time": t.Nanoseconds(), "utilisation": nil}))
	}
	nics := make([]*ovo.Object, 0, len(g.NICs))
	for _, mac := range slices.Sorted(maps.Keys(g.NICs)) {
		s := g.NICs[mac]
		nics = append(nics, rel.Minimal("NicDiagnostics", map[string]any{
			"mac_address": mac,
			"rx_octets":   s.RxBytes, "rx_errors": s.RxErrors, "rx_drop": s.RxDrop, "rx_packets": s.RxPackets, "rx_rate": nil,
			"tx_octets": s.TxBytes, "tx_errors": s.TxErrors, "tx_drop": s.TxDrop, "tx_packets": s.TxPackets, "tx_rate": nil,
		}))
	}
	disk := rel.Minimal("DiskDiagnostics", map[string]any{
		"read_bytes": g.Disk.DiskReadBytes, "read_requests": g.Disk.DiskReadOps,
		"write_bytes": g.Disk.DiskWriteBytes, "write_requests": g.Disk.DiskWriteOps, "errors_count": nil,
	})
	return rel.Minimal("Diagnostics", map[string]any{
		"state": diagnosticsState(g.State), "driver": "libvirt", "hypervisor": hypervisorType, "hypervisor_os": "linux",
		"uptime": int64(g.Uptime.Seconds()), "config_drive": g.ConfigDrive,
		"memory_details": rel.Minimal("MemoryDiagnostics", map[string]any{"maximum": g.MemoryMB, "used": g.MemoryUsed}),
		"cpu_details":    cpus, "nic_details": nics, "disk_details": []*ovo.Object{disk},
		"num_cpus": len(cpus), "num_nics": len(nics), "num_disks": 1,
	})
}

// diagnosticsState keeps to the enum that nova-api checks.
func diagnosticsState(s string) string {
	switch s {
	case "pending", "running", "paused", "shutdown", "crashed", "suspended":
		return s
	}
	return "running"
}
