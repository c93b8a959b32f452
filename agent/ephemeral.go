package agent

import (
	"github.com/novalet/novalet"
)

// swapMB is the swap space in MiB: what the request takes of the flavor's, else all of it (driver.swap_is_usable in
// nova/virt/libvirt/blockinfo.py). build may be nil.
func swapMB(inst *novalet.Instance, build *novalet.BuildArgs) int64 {
	if build != nil {
		for i := range build.BlockDevices {
			d := &build.BlockDevices[i]
			if d.SourceType == "blank" && d.DestinationType == "local" && d.GuestFormat == "swap" && d.VolumeSize > 0 {
				return min(d.VolumeSize, inst.Flavor.Swap)
			}
		}
	}
	return inst.Flavor.Swap
}

// maxEphemerals is how many letters are left for disks after vda.
const maxEphemerals = 25

// ephemerals returns the sizes in GiB of the ephemeral disks: those that the request divides the flavor's space into,
// else one of all of it, as the libvirt driver does (nova/virt/libvirt/blockinfo.py, get_disk_mapping). The sum was
// checked by nova-api. build may be nil.
func ephemerals(inst *novalet.Instance, build *novalet.BuildArgs) ([]int64, error) {
	var out []int64
	if build != nil {
		for i := range build.BlockDevices {
			d := &build.BlockDevices[i]
			if d.SourceType != "blank" || d.DestinationType != "local" || d.GuestFormat == "swap" {
				continue
			}
			switch d.GuestFormat {
			case "", "ext4", "default":
			default:
				return nil, novalet.Faultf(novalet.ErrAbort, "", "The ephemeral disk cannot be formatted as %q: container servers get ext4. Leave the format out, or ask for ext4.", d.GuestFormat)
			}
			if d.VolumeSize > 0 {
				out = append(out, d.VolumeSize)
			}
		}
	}
	if len(out) == 0 && inst.Flavor.EphemeralGB > 0 {
		out = []int64{inst.Flavor.EphemeralGB}
	}
	if len(out) > maxEphemerals {
		return nil, novalet.Faultf(novalet.ErrAbort, "", "The server asks for %d ephemeral disks; at most %d are possible.", len(out), maxEphemerals)
	}
	return out, nil
}
