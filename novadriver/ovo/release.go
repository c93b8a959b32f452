package ovo

import (
	"fmt"
	"maps"
	"slices"
)

// Release is what one release of Nova speaks.
type Release struct {
	Name        string // "zed", "2023.1", …
	Nova        int    // major version of Nova
	Service     int    // the service version its services report
	Oldest      int    // the oldest service version it lets computes report
	ComputeRPC  string // newest compute RPC version
	ComputeTask string // newest version of the compute_task interface
	objects     map[string]string
}

// Object versions that changed since Zed. A row holds only what is new in that
// release; everything before it and common holds too.
var releaseTable = []struct {
	Release
	changed map[string]string
}{
	{Release{Name: "zed", Nova: 26, Service: 64, Oldest: 61, ComputeRPC: "6.1", ComputeTask: "1.24"}, map[string]string{
		"Instance": "2.7", "Migration": "1.7", "RequestSpec": "1.14", "ImageMetaProps": "1.34",
		"ConsoleAuthToken": "1.1", "LiveMigrateData": "1.3", "LibvirtLiveMigrateData": "1.10",
	}},
	{Release{Name: "2023.1", Nova: 27, Service: 66, Oldest: 61, ComputeRPC: "6.2", ComputeTask: "1.25"}, nil},
	{Release{Name: "2023.2", Nova: 28, Service: 66, Oldest: 66, ComputeRPC: "6.2", ComputeTask: "1.25"}, map[string]string{
		"Instance": "2.8", "Migration": "1.8",
	}},
	{Release{Name: "2024.1", Nova: 29, Service: 67, Oldest: 66, ComputeRPC: "6.3", ComputeTask: "1.25"}, map[string]string{
		"RequestSpec": "1.15", "ImageMetaProps": "1.37", "ConsoleAuthToken": "1.2", "LibvirtLiveMigrateData": "1.11",
		"ShareMapping": "1.0", "ShareMappingList": "1.0",
	}},
	{Release{Name: "2024.2", Nova: 30, Service: 67, Oldest: 66, ComputeRPC: "6.3", ComputeTask: "1.25"}, map[string]string{
		"ImageMetaProps": "1.38", "LibvirtLiveMigrateData": "1.12",
	}},
	{Release{Name: "2025.1", Nova: 31, Service: 68, Oldest: 66, ComputeRPC: "6.4", ComputeTask: "1.25"}, map[string]string{
		"ImageMetaProps": "1.39", "ConsoleAuthToken": "1.3", "LiveMigrateData": "1.4", "LibvirtLiveMigrateData": "1.13",
		"ShareMapping": "1.2", "ShareMetadata": "1.0",
	}},
	{Release{Name: "2025.2", Nova: 32, Service: 70, Oldest: 68, ComputeRPC: "6.4", ComputeTask: "1.25"}, map[string]string{
		"ImageMetaProps": "1.42",
	}},
	{Release{Name: "2026.1", Nova: 33, Service: 72, Oldest: 68, ComputeRPC: "6.5", ComputeTask: "1.26"}, map[string]string{
		"LibvirtLiveMigrateData": "1.14",
	}},
	{Release{Name: "2026.2", Nova: 34, Service: 74, Oldest: 72, ComputeRPC: "6.5", ComputeTask: "1.26"}, map[string]string{
		"ImageMetaProps": "1.44", "ShareMappingList": "1.1",
	}},
}

// common are the versions that no release since Zed has changed.
var common = map[string]string{
	"Aggregate": "1.3", "AggregateList": "1.3", "BlockDeviceMapping": "1.21", "BlockDeviceMappingList": "1.18",
	"BuildRequest": "1.3", "CellMapping": "1.1", "ComputeNode": "1.19", "ComputeNodeList": "1.17",
	"CpuDiagnostics": "1.0", "Destination": "1.4", "DeviceBus": "1.0", "DeviceMetadata": "1.0", "Diagnostics": "1.0",
	"DiskDiagnostics": "1.0", "DiskMetadata": "1.0", "EC2Ids": "1.0", "Flavor": "1.2", "HVSpec": "1.2",
	"HostMapping": "1.0", "HostMappingList": "1.1", "ImageMeta": "1.8", "InstanceAction": "1.2",
	"InstanceActionEvent": "1.4", "InstanceActionEventList": "1.1", "InstanceActionList": "1.1",
	"InstanceDeviceMetadata": "1.0", "InstanceExternalEvent": "1.5", "InstanceFault": "1.2", "InstanceFaultList": "1.2",
	"InstanceGroup": "1.11", "InstanceGroupList": "1.8", "InstanceInfoCache": "1.5", "InstanceList": "2.6",
	"InstanceMapping": "1.2", "InstanceNUMACell": "1.6", "InstanceNUMATopology": "1.3", "InstancePCIRequest": "1.4",
	"InstancePCIRequests": "1.1", "KeyPair": "1.4", "KeyPairList": "1.3", "MemoryDiagnostics": "1.0",
	"MigrationContext": "1.2", "MigrationList": "1.5", "MonitorMetric": "1.1", "MonitorMetricList": "1.1",
	"NUMACell": "1.5", "NUMATopology": "1.2", "NUMATopologyLimits": "1.1", "NetworkInterfaceMetadata": "1.2",
	"NetworkMetadata": "1.0", "NetworkRequest": "1.3", "NetworkRequestList": "1.1", "NicDiagnostics": "1.0",
	"PciDevice": "1.7", "PciDeviceList": "1.3", "PciDevicePool": "1.1", "PciDevicePoolList": "1.1", "Quotas": "1.3",
	"RequestGroup": "1.3", "RequestLevelParams": "1.1", "Resource": "1.0", "ResourceList": "1.0",
	"ResourceMetadata": "1.0", "SchedulerLimits": "1.0", "SchedulerRetries": "1.1", "SecurityGroup": "1.2",
	"SecurityGroupList": "1.1", "Selection": "1.1", "Service": "1.22", "ServiceList": "1.19", "Tag": "1.1",
	"TagList": "1.1", "TaskLog": "1.0", "TrustedCerts": "1.0", "VIFMigrateData": "1.0", "VirtCPUFeature": "1.0",
	"VirtCPUModel": "1.0", "VirtCPUTopology": "1.0", "VirtualInterface": "1.3", "VirtualInterfaceList": "1.0",
	"VolumeUsage": "1.0",
}

// contains lists, for each object the conductor is asked for, the objects its
// fields hold. A manifest has to name them all: one that is not named is left
// at the conductor's version.
var contains = map[string][]string{
	"BlockDeviceMapping":     {"Instance"},
	"BlockDeviceMappingList": {"BlockDeviceMapping"},
	"ComputeNode":            {"HVSpec", "PciDevicePoolList"},
	"ComputeNodeList":        {"ComputeNode"},
	"DeviceMetadata":         {"DeviceBus"},
	"Instance": {
		"DeviceMetadata", "EC2Ids", "Flavor", "InstanceDeviceMetadata", "InstanceFault", "InstanceInfoCache",
		"InstanceNUMATopology", "InstancePCIRequests", "KeyPairList", "MigrationContext", "PciDeviceList",
		"ResourceList", "SecurityGroupList", "ServiceList", "TagList", "TrustedCerts", "VirtCPUModel",
	},
	"InstanceActionEventList": {"InstanceActionEvent"},
	"InstanceActionList":      {"InstanceAction"},
	"InstanceDeviceMetadata":  {"DeviceMetadata"},
	"InstanceFaultList":       {"InstanceFault"},
	"InstanceList":            {"Instance"},
	"InstanceNUMACell":        {"VirtCPUTopology"},
	"InstanceNUMATopology":    {"InstanceNUMACell"},
	"InstancePCIRequests":     {"InstancePCIRequest"},
	"KeyPairList":             {"KeyPair"},
	"MigrationContext":        {"InstanceNUMATopology", "InstancePCIRequests", "PciDeviceList", "ResourceList"},
	"MigrationList":           {"Migration"},
	"PciDeviceList":           {"PciDevice"},
	"PciDevicePoolList":       {"PciDevicePool"},
	"Resource":                {"ResourceMetadata"},
	"ResourceList":            {"Resource"},
	"SecurityGroupList":       {"SecurityGroup"},
	"Service":                 {"ComputeNode"},
	"ServiceList":             {"Service"},
	"TagList":                 {"Tag"},
	"VirtCPUModel":            {"VirtCPUFeature", "VirtCPUTopology"},
	"VirtualInterfaceList":    {"VirtualInterface"},
}

// Releases returns every release known, oldest first.
func Releases() []*Release {
	out := make([]*Release, 0, len(releaseTable))
	objects := maps.Clone(common)
	for _, row := range releaseTable {
		maps.Copy(objects, row.changed)
		r := row.Release
		r.objects = maps.Clone(objects)
		out = append(out, &r)
	}
	return out
}

// Newest is the newest release known.
func Newest() *Release {
	all := Releases()
	return all[len(all)-1]
}

// ReleaseNamed finds a release by name.
func ReleaseNamed(name string) (*Release, error) {
	for _, r := range Releases() {
		if r.Name == name {
			return r, nil
		}
	}
	return nil, fmt.Errorf("release %q is not known", name)
}

// ReleaseFor returns the release whose controllers report service version s:
// the oldest with that number, whose objects every release with it accepts. A
// number between two releases, or above the newest, gives the one below it.
// Below Zed's number it is an error. See Candidates for numbers that two
// releases share.
func ReleaseFor(s int) (*Release, error) {
	var best *Release
	for _, r := range Releases() {
		if r.Service <= s && (best == nil || r.Service > best.Service) {
			best = r
		}
	}
	if best == nil {
		return nil, fmt.Errorf("controllers report service version %d, which is older than Zed (%d)", s, releaseTable[0].Service)
	}
	return best, nil
}

// Candidates returns the releases with service version s, oldest first. Where
// there are two, only a request can tell them apart: 66 is 2023.1 (Instance
// 2.7) or 2023.2 (Instance 2.8).
func Candidates(s int) []*Release {
	return slices.DeleteFunc(Releases(), func(r *Release) bool { return r.Service != s })
}

// Version is the version of an object in the release, "" if it has none.
func (r *Release) Version(name string) string { return r.objects[name] }

// Objects returns the version of every object of the release.
func (r *Release) Objects() map[string]string { return maps.Clone(r.objects) }

// Lower makes the release use an older version of one object, as learnt from
// the conductor's IncompatibleObjectVersion. It returns a new release.
func (r *Release) Lower(name, version string) *Release {
	c := *r
	c.objects = maps.Clone(r.objects)
	c.objects[name] = version
	return &c
}

// Manifest is the object_versions of a class action: name and all objects that
// can hang off it, each with its version in this release. An unknown name
// gives an empty manifest.
func (r *Release) Manifest(name string) map[string]string {
	m := map[string]string{}
	var add func(string)
	add = func(n string) {
		v, ok := r.objects[n]
		if _, done := m[n]; done || !ok {
			return
		}
		m[n] = v
		for _, c := range contains[n] {
			add(c)
		}
	}
	add(name)
	return m
}

// Minimal is the package's Minimal with this release's version of name.
func (r *Release) Minimal(name string, fields map[string]any) *Object {
	return Minimal(name, r.Version(name), fields)
}
