package wire

import (
	"encoding/json"
	"time"
)

// The operations of a keeper. Each is one request on a connection of its own and one Response, but for OpWatch
// (responses follow as events), OpExec (a second response with the exit code) and OpConsole (the connection
// becomes a stream of Frames).
const (
	OpHello   = "hello"
	OpList    = "list"
	OpCreate  = "create"
	OpAssign  = "assign"
	OpStart   = "start"
	OpStop    = "stop"
	OpForget  = "forget"
	OpUserNS  = "userns"
	OpExec    = "exec"
	OpConsole = "console"
	OpWatch   = "watch"
	OpExit    = "exit"
)

// The codes of Error.
const (
	CodeUnknown  = "unknown_operation"
	CodeNotFound = "not_found"
	CodeState    = "invalid_state"
	CodeFull     = "full"
	CodeAbort    = "abort" // the image or its configuration is at fault; Text is for the tenant
	CodeInternal = "internal"
)

// Request asks a keeper for something.
type Request struct {
	V    int             `json:"v"`
	Op   string          `json:"op"`
	ID   string          `json:"id,omitempty"`
	Body json.RawMessage `json:"body,omitempty"`
}

// Response answers it.
type Response struct {
	V     int             `json:"v"`
	Error *Error          `json:"error,omitempty"`
	Body  json.RawMessage `json:"body,omitempty"`
}

// Error says why a request was refused. Text, when set, may be shown to the tenant: it names no host path.
type Error struct {
	Code   string `json:"code"`
	Text   string `json:"text,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// Error implements error.
func (e *Error) Error() string {
	switch {
	case e.Text == "":
		return e.Code + ": " + e.Detail
	case e.Detail == "":
		return e.Code + ": " + e.Text
	}
	return e.Code + ": " + e.Text + ": " + e.Detail
}

// The states of a Status.
const (
	StateCreated = "created"
	StateRunning = "running"
	StateExited  = "exited"
)

// Hello is a keeper's answer to OpHello.
type Hello struct {
	PID      int `json:"pid"`
	Capacity int `json:"capacity"`
	Count    int `json:"count"`
}

// Status is what a keeper knows of one instance.
type Status struct {
	ID        string    `json:"id"`
	Slot      int       `json:"slot"`
	State     string    `json:"state"`
	PID       int       `json:"pid,omitempty"`
	StartedAt time.Time `json:"started_at"`
	ExitedAt  time.Time `json:"exited_at"`
	ExitCode  int       `json:"exit_code"`
	OOMKills  int64     `json:"oom_kills"`
	Reboots   int       `json:"reboots"`
	Init      string    `json:"init,omitempty"`
}

// CgroupRef names one of the cgroup directories whose descriptors come with a Create: v1 is a v1 controller's
// directory, the others are parts of the cgroup2 sub-tree.
type CgroupRef struct {
	Kind       string `json:"kind"`
	Controller string `json:"controller,omitempty"`
}

// The kinds of a CgroupRef.
const (
	CgroupV1      = "v1"      // every process joins
	CgroupBase    = "base"    // cgroup2: holds the limits, cgroup.kill and memory.events
	CgroupPayload = "payload" // cgroup2: init's, the root of the cgroup namespace
	CgroupExec    = "exec"    // cgroup2: further processes
)

// Create asks for namespaces and a waiting init. Descriptors: the instance's directory (console log, exit
// record), left out when it is made in advance, then one per CgroupRef.
type Create struct {
	// Advance makes an instance that waits for its identity (Assign).
	Advance  bool        `json:"advance,omitempty"`
	Slot     int         `json:"slot"`
	Hostname string      `json:"hostname"`
	UIDBase  uint32      `json:"uid_base"`
	UIDSize  uint32      `json:"uid_size"`
	LogMax   int64       `json:"log_max"` // bytes
	Cgroups  []CgroupRef `json:"cgroups"`
}

// Assign gives an instance that was made in advance its identity. Descriptor: the instance's directory.
type Assign struct {
	ID       string `json:"id"`
	Hostname string `json:"hostname"`
	LogMax   int64  `json:"log_max"` // bytes
}

// Process is a resolved request for a process; names are looked up inside.
type Process struct {
	Args []string `json:"args"`
	Env  []string `json:"env"`
	Cwd  string   `json:"cwd"`
	User string   `json:"user"`
}

// Confine is how a process is shut in before its program runs.
type Confine struct {
	// Seccomp is a classic BPF program (struct sock_filter, native byte order); empty installs none.
	Seccomp []byte `json:"seccomp"`
	// Bounding has one bit for each capability that may be kept.
	Bounding        uint64 `json:"bounding"`
	NoNewPrivileges bool   `json:"no_new_privileges"`
}

// File is a file to put into the root.
type File struct {
	Path     string `json:"path"`
	Mode     uint32 `json:"mode"`
	Data     []byte `json:"data"`
	Append   bool   `json:"append,omitempty"`
	IfAbsent bool   `json:"if_absent,omitempty"`
}

// Tree is a read-only directory to show.
type Tree struct {
	Path  string `json:"path"`
	Files []File `json:"files"`
}

// Disk is a further file system to show.
type Disk struct {
	Path string `json:"path"`
	Name string `json:"name"` // as a block device, without /dev/
	Size int64  `json:"size"` // bytes
}

// Start lets a created instance go on to its program. Descriptors: the root mount, with Rescue the mount to
// show there, then one mount for each disk.
type Start struct {
	Machine bool    `json:"machine"`
	Process Process `json:"process"`
	Confine Confine `json:"confine"`
	// StopSignal is the image's; 0 lets the kind and the init program decide.
	StopSignal int `json:"stop_signal"`
	// DeadlineMS bounds the set-up inside, in milliseconds.
	DeadlineMS int64  `json:"deadline_ms"`
	Files      []File `json:"files,omitempty"`
	Trees      []Tree `json:"trees,omitempty"`
	Rescue     string `json:"rescue,omitempty"`
	Disks      []Disk `json:"disks,omitempty"`
	// CgroupV2 mounts the delegated cgroup2 sub-tree at /sys/fs/cgroup.
	CgroupV2 bool `json:"cgroup_v2"`
}

// Stop asks for the end of an instance; the response comes when nothing of it runs.
type Stop struct {
	// TimeoutMS is how long it may take after its stop signal; 0 kills at once.
	TimeoutMS int64 `json:"timeout_ms"`
}

// Exec runs a further process. Descriptors without TTY: stdin, stdout, stderr. With TTY the response carries the
// master side.
type Exec struct {
	Process Process `json:"process"`
	Confine Confine `json:"confine"`
	TTY     bool    `json:"tty"`
	Rows    uint16  `json:"rows,omitempty"`
	Cols    uint16  `json:"cols,omitempty"`
}

// Exit is the last response of OpExec.
type Exit struct {
	Code int `json:"code"`
}

// The types of an Event.
const (
	EventExited   = "exited"
	EventRebooted = "rebooted"
	EventOOM      = "oom"
)

// Event is one message of OpWatch.
type Event struct {
	ID       string    `json:"id"`
	Type     string    `json:"type"`
	ExitCode int       `json:"exit_code"`
	At       time.Time `json:"at"`
}

// InitConfig is what a keeper sends to a waiting init: the start, and what the keeper itself adds.
// Descriptors: as those of Start, then the view's mount if View is set.
type InitConfig struct {
	Start
	ID       string `json:"id"`
	Hostname string `json:"hostname"`
	// View maps the files of the /proc view to what they are shown over, from the root on.
	View map[string]string `json:"view,omitempty"`
}

// InitReport is what an init sends back: first when its root is ready (descriptors: the console's master side
// and the devpts mount), then, where the kernel can, with the listener for sysinfo(2) (descriptor: the listener). The
// end of the connection says that the program runs.
type InitReport struct {
	Listener   bool   `json:"listener,omitempty"`
	Error      *Error `json:"error,omitempty"`
	StopSignal int    `json:"stop_signal,omitempty"`
	Init       string `json:"init,omitempty"`
}

// The kinds of a frame of OpConsole.
const (
	FrameData   byte = 0
	FrameResize byte = 1 // rows and columns, two big-endian 16-bit numbers
)

// MaxFrame bounds the payload of a frame.
const MaxFrame = 64 << 10
