package novalet

import (
	"encoding/json"
	"time"
)

// VMState is Nova's vm_state: what the instance is, between operations.
type VMState string

// The vm_states this agent sets or meets (nova/compute/vm_states.py).
const (
	VMBuilding         VMState = "building"
	VMActive           VMState = "active"
	VMStopped          VMState = "stopped"
	VMPaused           VMState = "paused"
	VMSuspended        VMState = "suspended"
	VMRescued          VMState = "rescued"
	VMSoftDeleted      VMState = "soft-delete"
	VMDeleted          VMState = "deleted"
	VMError            VMState = "error"
	VMShelved          VMState = "shelved"
	VMShelvedOffloaded VMState = "shelved_offloaded"
	VMResized          VMState = "resized"
)

// TaskState is Nova's task_state: the operation under way. TaskNone stands for null.
type TaskState string

// The task_states this agent sets or expects (nova/compute/task_states.py).
const (
	TaskNone               TaskState = ""
	TaskScheduling         TaskState = "scheduling"
	TaskNetworking         TaskState = "networking"
	TaskBlockDeviceMapping TaskState = "block_device_mapping"
	TaskSpawning           TaskState = "spawning"
	TaskDeleting           TaskState = "deleting"
	TaskSoftDeleting       TaskState = "soft-deleting"
	TaskRestoring          TaskState = "restoring"
	TaskPoweringOff        TaskState = "powering-off"
	TaskPoweringOn         TaskState = "powering-on"
	TaskRebooting          TaskState = "rebooting"
	TaskRebootPending      TaskState = "reboot_pending"
	TaskRebootStarted      TaskState = "reboot_started"
	TaskRebootingHard      TaskState = "rebooting_hard"
	TaskRebootPendingHard  TaskState = "reboot_pending_hard"
	TaskRebootStartedHard  TaskState = "reboot_started_hard"
	TaskPausing            TaskState = "pausing"
	TaskUnpausing          TaskState = "unpausing"
	TaskSuspending         TaskState = "suspending"
	TaskResuming           TaskState = "resuming"
	TaskRescuing           TaskState = "rescuing"
	TaskUnrescuing         TaskState = "unrescuing"
	TaskRebuilding         TaskState = "rebuilding"
	TaskRebuildBlockDevice TaskState = "rebuild_block_device_mapping"
	TaskRebuildSpawning    TaskState = "rebuild_spawning"
	TaskSnapshotPending    TaskState = "image_snapshot_pending"
	TaskSnapshot           TaskState = "image_snapshot"
	TaskImagePendingUpload TaskState = "image_pending_upload"
	TaskImageUploading     TaskState = "image_uploading"
	TaskBackup             TaskState = "image_backup"
	TaskShelving           TaskState = "shelving"
	TaskShelvingPendUpload TaskState = "shelving_image_pending_upload"
	TaskShelvingUploading  TaskState = "shelving_image_uploading"
	TaskShelvingOffloading TaskState = "shelving_offloading"
	TaskUnshelving         TaskState = "unshelving"
	TaskUpdatingPassword   TaskState = "updating_password"
	TaskResizePrep         TaskState = "resize_prep"
	TaskResizeMigrating    TaskState = "resize_migrating"
	TaskMigrating          TaskState = "migrating"
)

// PowerState is Nova's power_state number (nova/compute/power_state.py).
type PowerState int

// Power states; 2 and 5 are unused in Nova.
const (
	PowerNoState   PowerState = 0
	PowerRunning   PowerState = 1
	PowerPaused    PowerState = 3
	PowerShutdown  PowerState = 4
	PowerCrashed   PowerState = 6
	PowerSuspended PowerState = 7
)

// KeyPair is a public key that the user may log in with.
type KeyPair struct {
	Name string `json:"name"`
	Type string `json:"type"` // "ssh" or "x509"
	Data string `json:"data"`
}

// Instance is what the agent knows of one server, taken from Nova's Instance object. Fields that came unset are
// zero; Wire keeps the object itself.
type Instance struct {
	ID               int64             `json:"id"`
	UUID             string            `json:"uuid"`
	Name             string            `json:"name"` // instance_name_template % id
	ProjectID        string            `json:"project_id"`
	UserID           string            `json:"user_id"`
	Hostname         string            `json:"hostname"`
	DisplayName      string            `json:"display_name"`
	ImageRef         string            `json:"image_ref"` // "" when booted from a volume
	KeyName          string            `json:"key_name,omitempty"`
	KeyData          string            `json:"key_data,omitempty"`
	UserData         string            `json:"user_data,omitempty"` // base64
	Host             string            `json:"host"`
	Node             string            `json:"node"`
	VMState          VMState           `json:"vm_state"`
	TaskState        TaskState         `json:"task_state"`
	PowerState       PowerState        `json:"power_state"`
	AvailabilityZone string            `json:"availability_zone,omitempty"`
	LaunchIndex      int64             `json:"launch_index"`
	LaunchedAt       *time.Time        `json:"launched_at,omitempty"`
	DeletedAt        *time.Time        `json:"deleted_at,omitempty"`
	Deleted          bool              `json:"deleted,omitempty"`
	RootDeviceName   string            `json:"root_device_name,omitempty"`
	ConfigDrive      string            `json:"config_drive,omitempty"` // "True" or ""
	AccessIPv4       string            `json:"access_ip_v4,omitempty"`
	AccessIPv6       string            `json:"access_ip_v6,omitempty"`
	Metadata         map[string]string `json:"metadata,omitempty"`
	SystemMetadata   map[string]string `json:"system_metadata,omitempty"`
	Flavor           Flavor            `json:"flavor"`
	NetworkInfo      NetworkInfo       `json:"network_info,omitempty"` // as cached by Nova, in request order
	KeyPairs         []KeyPair         `json:"keypairs,omitempty"`
	// PCIRequests are the devices that it needs; only the message of a build is sure to tell.
	PCIRequests []PCIRequest `json:"pci_requests,omitempty"`
	// TrustedCertificates are the ids of trusted_image_certificates; nil is not known, since most messages leave them out.
	TrustedCertificates []string `json:"trusted_certificates,omitzero"`
	// Wire is the versioned object as it came; opaque outside novadriver.
	Wire json.RawMessage `json:"wire,omitempty"`
}

// TaggedDevice is a device that the owner of an instance gave a name: what the guest finds under "devices" in its
// metadata. As the field "device_metadata" of an InstanceUpdate a list of them becomes Nova's record of the same.
type TaggedDevice struct {
	MAC  string // of an interface; "" for a disk
	Path string // of a disk
	Tag  string
}

// ImageProperty returns a property of the image the instance was made from, as Nova copies it into
// system_metadata (image_<name>), or "".
func (i *Instance) ImageProperty(name string) string { return i.SystemMetadata["image_"+name] }

// InstanceUpdate is one save of an instance. Fields has Nova's field names; only those named change (metadata
// and system_metadata are replaced whole). A nil value is null.
type InstanceUpdate struct {
	UUID   string
	Fields map[string]any
	// Expected lists the task_states the row may be in (TaskNone for null); nil asks for no check. When the
	// row is in none of them the save fails with ErrTaskState, or ErrInstanceGone if it is being deleted.
	Expected []TaskState
	// Deleted lets the save reach a row that is marked deleted already.
	Deleted bool
}
