package novalet

// Action is what a notification tells about, in the words of Nova's versioned notifications.
type Action string

// The actions that compute tells about (nova/objects/fields.py NotificationAction). AddFixedIP and RemoveFixedIP are
// told in the old form alone, the interface actions in the new form alone, as in Nova.
const (
	ActionCreate          Action = "create"
	ActionDelete          Action = "delete"
	ActionShutdown        Action = "shutdown"
	ActionSoftDelete      Action = "soft_delete"
	ActionRestore         Action = "restore"
	ActionPowerOn         Action = "power_on"
	ActionPowerOff        Action = "power_off"
	ActionReboot          Action = "reboot"
	ActionPause           Action = "pause"
	ActionUnpause         Action = "unpause"
	ActionSuspend         Action = "suspend"
	ActionResume          Action = "resume"
	ActionRescue          Action = "rescue"
	ActionUnrescue        Action = "unrescue"
	ActionRebuild         Action = "rebuild"
	ActionSnapshot        Action = "snapshot"
	ActionShelve          Action = "shelve"
	ActionShelveOffload   Action = "shelve_offload"
	ActionUnshelve        Action = "unshelve"
	ActionInterfaceAttach Action = "interface_attach"
	ActionInterfaceDetach Action = "interface_detach"
	ActionTriggerCrash    Action = "trigger_crash_dump"
	ActionExists          Action = "exists"
	ActionAddFixedIP      Action = "create_ip"
	ActionRemoveFixedIP   Action = "delete_ip"
)

// Phase is where in an action a notification stands; PhaseNone is for actions that are a moment.
type Phase string

// The phases of an action.
const (
	PhaseNone  Phase = ""
	PhaseStart Phase = "start"
	PhaseEnd   Phase = "end"
	PhaseError Phase = "error"
)

// Notification tells others than Nova (metering, DNS, billing) what happens to an instance.
type Notification struct {
	Context RequestContext
	Action  Action
	Phase   Phase
	// Instance is as it stands at this moment. It must not be changed afterwards.
	Instance *Instance
	// Err is why the action failed, for PhaseError.
	Err error
	// ImageID is the image that is made (snapshot) or rescued with.
	ImageID string
	// ImageName is the image's name where it is known (create).
	ImageName string
	// BlockDevices are the instance's, where they are known.
	BlockDevices []BlockDevice
}

// Notifier sends notifications. Served by novadriver, called by agent.
type Notifier interface {
	// Notify queues a notification and returns at once. They are sent in order; what cannot be sent for long is
	// dropped and told in the log. Nothing depends on them.
	Notify(n *Notification)
}
