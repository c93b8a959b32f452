package novadriver

import (
	"maps"
	"strconv"

	"github.com/novalet/novalet"
)

// usage is what the instances of this host take, as the ComputeNode shows it. Placement is what schedules.
type usage struct {
	vcpus, memoryMB, diskGB int64
	instances, workload     int64
	stats                   map[string]string
}

// ioTasks are the task_states whose instances count as I/O load (nova/compute/stats.py).
var ioTasks = map[novalet.TaskState]bool{
	novalet.TaskResizeMigrating: true, novalet.TaskRebuilding: true, novalet.TaskResizePrep: true, novalet.TaskSnapshot: true,
	novalet.TaskBackup: true, novalet.TaskUnshelving: true, novalet.TaskShelving: true, novalet.TaskRescuing: true,
}

// computeUsage adds up the instances, beginning with what is reserved, as stock's resource tracker does.
func computeUsage(tracked []novalet.TrackedInstance, reserved ResourceOptions, failedBuilds int64) usage {
	u := usage{vcpus: reserved.ReservedCPUs, memoryMB: reserved.ReservedMemoryMB, diskGB: diskGB(reserved.ReservedDiskMB)}
	count := map[string]int64{}
	var io int64
	for _, t := range tracked {
		i := &t.Instance
		if i.VMState == novalet.VMDeleted || i.VMState == novalet.VMShelvedOffloaded || i.Deleted {
			continue
		}
		u.instances++
		u.vcpus += i.Flavor.VCPUs
		u.memoryMB += i.Flavor.MemoryMB
		if i.ImageRef != "" { // else the root is a volume
			u.diskGB += i.Flavor.RootGB
		}
		u.diskGB += i.Flavor.EphemeralGB + i.Flavor.Swap/1024
		task := string(i.TaskState)
		if task == "" {
			task = "None"
		} else {
			u.workload++
		}
		count["num_vm_"+string(i.VMState)]++
		count["num_task_"+task]++
		count["num_proj_"+i.ProjectID]++
		os := i.ImageProperty("os_type")
		if os == "" {
			os = "None"
		}
		count["num_os_type_"+os]++
		if i.VMState == novalet.VMBuilding || ioTasks[i.TaskState] {
			io++
		}
	}
	u.stats = map[string]string{"failed_builds": strconv.FormatInt(failedBuilds, 10)}
	if u.instances > 0 {
		for k, n := range count {
			u.stats[k] = strconv.FormatInt(n, 10)
		}
		maps.Copy(u.stats, map[string]string{
			"num_instances": strconv.FormatInt(u.instances, 10), "io_workload": strconv.FormatInt(io, 10),
		})
	} else {
		u.stats["num_instances"], u.stats["io_workload"] = "0", "0"
	}
	return u
}

// diskGB rounds MiB up to GiB.
func diskGB(mb int64) int64 { return (max(mb, 0) + 1023) / 1024 }
