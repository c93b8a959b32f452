package novalet

import (
	"context"
	"encoding/json"
	"time"
)

// Method is the name of a compute RPC method (compute RPC API 6.x).
type Method string

// The casts that become operations of an instance's queue.
const (
	MethodBuild         Method = "build_and_run_instance"
	MethodTerminate     Method = "terminate_instance"
	MethodSoftDelete    Method = "soft_delete_instance"
	MethodRestore       Method = "restore_instance"
	MethodStart         Method = "start_instance"
	MethodStop          Method = "stop_instance"
	MethodReboot        Method = "reboot_instance"
	MethodPause         Method = "pause_instance"
	MethodUnpause       Method = "unpause_instance"
	MethodSuspend       Method = "suspend_instance"
	MethodResume        Method = "resume_instance"
	MethodRescue        Method = "rescue_instance"
	MethodUnrescue      Method = "unrescue_instance"
	MethodRebuild       Method = "rebuild_instance"
	MethodSnapshot      Method = "snapshot_instance"
	MethodBackup        Method = "backup_instance"
	MethodShelve        Method = "shelve_instance"
	MethodShelveOffload Method = "shelve_offload_instance"
	MethodUnshelve      Method = "unshelve_instance"
	MethodDetachIface   Method = "detach_interface"
	MethodInjectNetwork Method = "inject_network_info"
	MethodResetNetwork  Method = "reset_network"
	MethodAddFixedIP    Method = "add_fixed_ip_to_instance"
	MethodRemoveFixedIP Method = "remove_fixed_ip_from_instance"
	MethodTriggerCrash  Method = "trigger_crash_dump"
)

// InjectedFile is a file of the boot request (personality).
type InjectedFile struct {
	Path string `json:"path"`
	Data Secret `json:"data"` // base64
}

// BlockDevice is one block device mapping of an instance.
type BlockDevice struct {
	SourceType      string          `json:"source_type"`      // image, blank, volume, snapshot
	DestinationType string          `json:"destination_type"` // local, volume
	GuestFormat     string          `json:"guest_format,omitempty"`
	BootIndex       *int64          `json:"boot_index,omitempty"`
	DeviceName      string          `json:"device_name,omitempty"`
	VolumeID        string          `json:"volume_id,omitempty"`
	VolumeSize      int64           `json:"volume_size,omitempty"` // GiB
	Tag             string          `json:"tag,omitempty"`
	Wire            json.RawMessage `json:"wire,omitempty"` // the object, for the save
}

// BuildArgs are the arguments of build_and_run_instance (and, where they apply, of unshelve and rebuild).
type BuildArgs struct {
	Image             ImageMeta        `json:"image"`
	AdminPassword     Secret           `json:"admin_password,omitempty"`
	InjectedFiles     []InjectedFile   `json:"injected_files,omitempty"`
	RequestedNetworks []NetworkRequest `json:"requested_networks"`
	SecurityGroups    []string         `json:"security_groups,omitempty"`
	BlockDevices      []BlockDevice    `json:"block_devices,omitempty"`
	Node              string           `json:"node"`
	// MayReschedule: the request carries retry information, so another host may be tried.
	MayReschedule bool `json:"may_reschedule"`
}

// RebuildArgs are the arguments of rebuild_instance.
type RebuildArgs struct {
	OrigImageRef      string            `json:"orig_image_ref"`
	ImageRef          string            `json:"image_ref"`
	NewPassword       Secret            `json:"new_pass,omitempty"`
	InjectedFiles     []InjectedFile    `json:"injected_files,omitempty"`
	OrigSystemMeta    map[string]string `json:"orig_sys_metadata,omitempty"`
	Recreate          bool              `json:"recreate"` // evacuate to this host
	SharedStorage     bool              `json:"on_shared_storage,omitempty"`
	MigrationID       int64             `json:"migration_id,omitempty"` // of the evacuation; 0 for none
	Node              string            `json:"node,omitempty"`         // of this host, for an evacuation
	SourceHost        string            `json:"source_host,omitempty"`  // where an evacuated instance was
	SourceNode        string            `json:"source_node,omitempty"`
	PreserveEphemeral bool              `json:"preserve_ephemeral"`
	ReimageBootVolume bool              `json:"reimage_boot_volume"`
	TargetState       string            `json:"target_state,omitempty"`
}

// OperationArgs are the arguments of a method, as far as the agent reads them.
type OperationArgs struct {
	Build         *BuildArgs   `json:"build,omitempty"`   // build, unshelve
	Rebuild       *RebuildArgs `json:"rebuild,omitempty"` // rebuild
	CleanShutdown bool         `json:"clean_shutdown,omitempty"`
	RebootType    string       `json:"reboot_type,omitempty"` // SOFT or HARD
	ImageID       string       `json:"image_id,omitempty"`    // snapshot, backup, shelve; rescue's image
	BackupType    string       `json:"backup_type,omitempty"`
	Rotation      int64        `json:"rotation,omitempty"`
	Password      Secret       `json:"password,omitempty"` // rescue
	PortID        string       `json:"port_id,omitempty"`  // detach
	NetworkID     string       `json:"network_id,omitempty"`
	Address       string       `json:"address,omitempty"`
	// Raw is the whole args dict as it came, for calls that pass it back (reschedule).
	Raw json.RawMessage `json:"raw,omitempty"`
}

// Operation is one cast for one instance: what the journal holds and the instance's goroutine runs.
type Operation struct {
	ID       string         `json:"id"` // _unique_id of the message; a second one with the same id is dropped
	Method   Method         `json:"method"`
	Context  RequestContext `json:"context"`
	Instance Instance       `json:"instance"`
	Args     OperationArgs  `json:"args"`
	Received time.Time      `json:"received"`
}

// ExternalEvent is an event that nova-api forwards (nova.objects.InstanceExternalEvent).
type ExternalEvent struct {
	InstanceUUID string `json:"instance_uuid"`
	Name         string `json:"name"`   // network-vif-plugged, network-changed, …
	Status       string `json:"status"` // completed, failed, in-progress
	Tag          string `json:"tag"`    // port or volume id
}

// InterfaceRequest asks for one more interface on an instance.
type InterfaceRequest struct {
	Context  RequestContext
	Instance Instance
	Network  NetworkRequest
}

// ConsoleAccess is where a console proxy finds an instance's console.
type ConsoleAccess struct {
	Host string // address of this host that the proxy reaches
	Port int
}

// Diagnostics is the state of a running instance in numbers.
type Diagnostics struct {
	State       string // running, paused, …
	Uptime      time.Duration
	MemoryMB    int64 // limit
	MemoryUsed  int64 // MiB
	CPUTimes    []time.Duration
	NICs        map[string]InterfaceStats // by MAC
	Disk        ContainerStats
	ConfigDrive bool
}

// TrackedInstance is what resource tracking counts: an instance that this host holds resources for.
type TrackedInstance struct {
	Instance Instance
	// Power is what the host sees now.
	Power PowerState
}

// HostResources is what this host has to give, before anything is reserved.
type HostResources struct {
	VCPUs      int64
	MemoryMB   int64
	DiskGB     int64 // size of the file system that holds the roots
	DiskFreeGB int64
	Arch       string // Nova's word: x86_64, aarch64
	CPUInfo    map[string]any
	// PCIDevices are those that instances may have, PCIClaims those that instances have. PCI says that the operator has
	// named any at all.
	PCI        bool
	PCIDevices []PCIDevice
	PCIClaims  []PCIClaim
}

// Compute is what Nova's bus asks of this host. Served by agent, called by novadriver. No method waits for an
// operation that another message asked for.
type Compute interface {
	// Submit records the operation durably and returns; nil means that it will be carried out, also after a crash,
	// exactly once by its ID. The message may be acked then. It does not wait for the operation. An error means that it is
	// not recorded and has to come again; a delete may have begun all the same, and is not begun again once it is done.
	Submit(ctx context.Context, op *Operation) error
	// ExternalEvents hands on what Neutron and Cinder report. It never waits for an instance's queue.
	ExternalEvents(ctx context.Context, rc RequestContext, events []ExternalEvent)
	// AttachInterface blocks until the interface is plugged and saved, and returns it.
	AttachInterface(ctx context.Context, r *InterfaceRequest) (*VIF, error)
	// ConsoleOutput returns the last lines of the console log, of which what follows the last newline is one; lines < 0 is
	// all of it.
	ConsoleOutput(ctx context.Context, instanceUUID string, lines int) (string, error)
	// SerialConsole opens (or finds) the TCP end point of the instance's console. ttl is how long it waits for its
	// first viewer.
	SerialConsole(ctx context.Context, instanceUUID string, ttl time.Duration) (*ConsoleAccess, error)
	// ConsolePort says whether the port is the instance's console now.
	ConsolePort(ctx context.Context, instanceUUID string, port int) (bool, error)
	// Diagnostics reads the counters. ErrInvalidState unless it runs.
	Diagnostics(ctx context.Context, instanceUUID string) (*Diagnostics, error)
	// SetAdminPassword changes a password inside the running instance, that of root for no user.
	SetAdminPassword(ctx context.Context, instanceUUID string, user string, password Secret) error
	// Quiesce has the running guest write what it has written to disk and stops it there, until Unquiesce, an operation that the
	// guest has a part in, or some ten minutes. It blocks until that is so. It may be repeated, which begins the time anew; an error
	// means that the guest goes on. ErrInvalidState unless it runs; ErrBusy while an operation is under way or when it
	// cannot be stopped.
	Quiesce(ctx context.Context, instanceUUID string) error
	// Unquiesce lets a quiesced guest go on. It records that and returns; one that is not quiesced, or not here, is left alone.
	Unquiesce(instanceUUID string)
	// CacheImages fetches images ahead of use: the result by image id.
	CacheImages(ctx context.Context, rc RequestContext, ids []string) (map[string]string, error)
	// Tracked lists the instances of this host. It does no I/O.
	Tracked() []TrackedInstance
	// Resources says what the host has.
	Resources(ctx context.Context) (HostResources, error)
}
