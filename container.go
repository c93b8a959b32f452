package novalet

import (
	"context"
	"io"
	"time"
)

// Limits bound what a container uses. Zero means no limit of that kind.
type Limits struct {
	MemoryBytes int64 `json:"memory_bytes,omitempty"`
	SwapBytes   int64 `json:"swap_bytes,omitempty"` // beyond memory
	VCPUs       int64 `json:"vcpus,omitempty"`
	// CPUShares is a cgroup v1 weight (2..262144); CPUQuota and CPUPeriod are microseconds.
	CPUShares int64  `json:"cpu_shares,omitempty"`
	CPUQuota  int64  `json:"cpu_quota,omitempty"`
	CPUPeriod int64  `json:"cpu_period,omitempty"`
	CPUSet    string `json:"cpuset,omitempty"` // host CPUs, list format, for dedicated CPUs
	PIDs      int64  `json:"pids,omitempty"`
	// RootBytes and RootInodes bound what the instance writes to its root.
	RootBytes  int64 `json:"root_bytes,omitempty"`
	RootInodes int64 `json:"root_inodes,omitempty"`
	// EphemeralBytes are the sizes of further file systems of the instance's own, empty at first: mounted at /mnt,
	// /mnt1, /mnt2 and so on, each with a limit of its own. They are made by Create and go with the root.
	EphemeralBytes []int64 `json:"ephemeral_bytes,omitempty"`
	// Disk throughput in bytes and operations a second (quota:disk_*).
	ReadBPS, WriteBPS, ReadIOPS, WriteIOPS int64 `json:",omitempty"`
}

// SandboxSpec describes what Create makes: everything of a container that needs no image.
type SandboxSpec struct {
	ID       string `json:"id"` // the instance's uuid
	Hostname string `json:"hostname"`
	Kind     Kind   `json:"kind,omitempty"` // may be unknown ("") until Start
	Limits   Limits `json:"limits"`
}

// ProcessSpec is the first process of a container.
type ProcessSpec struct {
	Args       []string `json:"args"`
	Env        []string `json:"env"`
	Cwd        string   `json:"cwd"`
	User       string   `json:"user"` // as in an image config: user[:group], names or numbers
	StopSignal string   `json:"stop_signal"`
}

// File is a file the host puts into the root before the start. It replaces what is there, never follows a
// symlink out of the root, and is owned by root inside.
type File struct {
	Path string `json:"path"`
	Mode uint32 `json:"mode"` // permission bits; 0 means 0644
	Data []byte `json:"data"`
	// Append adds to the file instead of replacing it, unless it already ends so.
	Append bool `json:"append,omitempty"`
	// IfAbsent leaves an existing file alone.
	IfAbsent bool `json:"if_absent,omitempty"`
}

// Tree is a read-only directory that the host shows inside, such as a config drive.
type Tree struct {
	Path  string `json:"path"` // where in the container
	Files []File `json:"files"`
	// Label is the file-system label a config drive is looked up by ("config-2").
	Label string `json:"label,omitempty"`
}

// ContainerSpec is what Start needs beside the sandbox. It is recorded, so that a later start after a stop or an
// agent restart needs nothing else.
type ContainerSpec struct {
	Kind    Kind        `json:"kind"`
	Layers  []Layer     `json:"layers"` // base first
	Process ProcessSpec `json:"process"`
	Files   []File      `json:"files,omitempty"`
	Trees   []Tree      `json:"trees,omitempty"`
	// Rescue, when set, makes this a rescue: Layers are the rescue image's, and the instance's own root is shown
	// at this path.
	Rescue string `json:"rescue,omitempty"`
}

// ContainerState says what a container is doing.
//
//	          Create            Start              init exits
//	(none) ----------> created --------> running ------------> stopped --Create--> created
//	                                     ^     |
//	                                Thaw |     | Freeze
//	                                     paused
type ContainerState string

// The states of a container. Stopped: the writable root is kept, nothing runs and no namespace is held.
const (
	ContainerCreated ContainerState = "created"
	ContainerRunning ContainerState = "running"
	ContainerPaused  ContainerState = "paused"
	ContainerStopped ContainerState = "stopped"
)

// ContainerStatus is what the host knows of one container.
type ContainerStatus struct {
	ID    string         `json:"id"`
	State ContainerState `json:"state"`
	// PID of init in the host's pid namespace, 0 unless created, running or paused.
	PID int `json:"pid,omitempty"`
	// NetNS opens the network namespace; "" when stopped.
	NetNS     string    `json:"netns,omitempty"`
	StartedAt time.Time `json:"started_at"`
	// ExitCode and ExitedAt are of the last run; ExitCode is 128+signal when a signal ended it.
	ExitCode int       `json:"exit_code"`
	ExitedAt time.Time `json:"exited_at"`
	// OOMKills counts processes killed by the memory limit since the start.
	OOMKills int64 `json:"oom_kills"`
	// BootID is the host boot in which it last ran.
	BootID string `json:"boot_id"`
}

// ContainerStats are counters of a running container.
type ContainerStats struct {
	CPU                   time.Duration
	MemoryBytes           int64
	MemoryMaxBytes        int64
	PIDs                  int64
	DiskReadBytes         int64
	DiskWriteBytes        int64
	DiskReadOps           int64
	DiskWriteOps          int64
	RootBytes, RootInodes int64 // used by the writable root
	EphemeralBytes        int64 // used by the ephemeral disks together
	Uptime                time.Duration
}

// ContainerEventType names what happened to a container by itself.
type ContainerEventType string

// The events of Runtime.Events.
const (
	// EventExited: init is gone and will not be started again by the engine.
	EventExited ContainerEventType = "exited"
	// EventRebooted: init asked for a reboot and was started again in the same namespaces.
	EventRebooted ContainerEventType = "rebooted"
	// EventOOM: the memory limit killed a process inside.
	EventOOM ContainerEventType = "oom"
)

// ContainerEvent is one of them.
type ContainerEvent struct {
	ID       string
	Type     ContainerEventType
	ExitCode int
	At       time.Time
}

// RootDirs tells where an instance's root lies, for a snapshot. Ids in Upper are shifted by UIDBase.
type RootDirs struct {
	Upper   string
	Layers  []Layer
	UIDBase uint32
	UIDSize uint32
}

// StopOptions say how to end a container.
type StopOptions struct {
	// Timeout is how long the container may take after its stop signal before it is killed; 0 kills at once.
	Timeout time.Duration
}

// DestroyOptions say what Destroy leaves.
type DestroyOptions struct {
	// KeepRoot keeps the writable root and the console log.
	KeepRoot bool
}

// ExecSpec is a further process in a running container.
type ExecSpec struct {
	Process ProcessSpec
	TTY     bool
	Stdin   io.Reader
	Stdout  io.Writer
	Stderr  io.Writer
}

// Terminal is one viewer of a container's console. Reading gives what the console printed lately, then what it
// prints; writing types. Several may be open at once.
type Terminal interface {
	io.ReadWriteCloser
	Resize(rows, cols uint16) error
}

// Runtime runs containers. Served by engine. All methods may be repeated, also after a crash at any point of an
// earlier call, and from a new agent process: the host is the authority on what runs. A container is named by
// the instance's uuid. Unknown ids are ErrNotFound except in Stop and Destroy, where they are success.
type Runtime interface {
	// Create makes namespaces, cgroups with the limits applied, the monitor, and an init process that waits. It
	// needs no image and no port, and takes milliseconds. On a container that is created or running it
	// returns its status. ErrReschedule when this host cannot hold one more.
	Create(ctx context.Context, s *SandboxSpec) (*ContainerStatus, error)
	// Start mounts the root, writes the files and lets init go on to the process. ErrAbort with a Fault text when the
	// image is at fault (no such command, wrong architecture). A nil spec starts with the recorded one.
	Start(ctx context.Context, id string, c *ContainerSpec) error
	// Stop sends the stop signal, waits, kills, and returns when nothing of it runs. The root stays.
	Stop(ctx context.Context, id string, o StopOptions) error
	// Freeze stops all processes where they are; Thaw lets them go on. Processes of which one cannot be stopped go on
	// (ErrBusy), as they do when ctx ends first.
	Freeze(ctx context.Context, id string) error
	Thaw(ctx context.Context, id string) error
	// Sync writes to disk what a container that runs or is frozen has written to its files. It blocks until all is there, or
	// ctx ends; the writing goes on then. ErrInvalidState when it is stopped.
	Sync(ctx context.Context, id string) error
	// Update changes the limits of a container, running or not.
	Update(ctx context.Context, id string, l Limits) error
	// Destroy ends the container at once and removes everything of it but what the options keep.
	Destroy(ctx context.Context, id string, o DestroyOptions) error
	// Status and List read what the host knows.
	Status(ctx context.Context, id string) (*ContainerStatus, error)
	List(ctx context.Context) ([]ContainerStatus, error)
	// Stats reads the counters. ErrInvalidState unless running or paused.
	Stats(ctx context.Context, id string) (*ContainerStats, error)
	// Root tells where the writable root lies.
	Root(ctx context.Context, id string) (*RootDirs, error)
	// ConsoleLog returns at most max bytes of the end of the console log, which survives stops and agent restarts.
	ConsoleLog(ctx context.Context, id string, max int) ([]byte, error)
	// Console opens a viewer on the console of a running container.
	Console(ctx context.Context, id string) (Terminal, error)
	// Exec runs a process inside and waits for it: its exit code.
	Exec(ctx context.Context, id string, e *ExecSpec) (int, error)
	// Events delivers what containers do by themselves, from the first call until ctx ends. What happened while no
	// agent listened is found by List.
	Events(ctx context.Context) <-chan ContainerEvent
}
