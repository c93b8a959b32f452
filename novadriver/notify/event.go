package notify

import "github.com/novalet/novalet"

// event says how an action is told, as the calls in nova/compute/manager.py have it.
type event struct {
	// legacy is its name in the old form, versioned in the new one; "" is not told in that form.
	legacy, versioned string
	// object is the payload of the new form.
	object string
	// volumes: the new form lists the volumes whatever bdms_in_notifications says.
	volumes bool
	// addresses: the old form has fixed_ips, in the phases named.
	addresses map[novalet.Phase]bool
}

// Payloads of the new form, with their versions before and since Nova 31 (2025.1), which added the shares.
const (
	payloadAction   = "InstanceActionPayload"
	payloadCreate   = "InstanceCreatePayload"
	payloadRescue   = "InstanceActionRescuePayload"
	payloadRebuild  = "InstanceActionRebuildPayload"
	payloadSnapshot = "InstanceActionSnapshotPayload"
	payloadExists   = "InstanceExistsPayload"
)

var payloadVersions = map[string][2]string{
	payloadAction: {"1.8", "1.9"}, payloadCreate: {"1.12", "1.13"}, payloadRescue: {"1.3", "1.4"},
	payloadRebuild: {"1.9", "1.10"}, payloadSnapshot: {"1.9", "1.10"}, payloadExists: {"2.0", "2.1"},
}

var (
	atEnd   = map[novalet.Phase]bool{novalet.PhaseEnd: true}
	atBoth  = map[novalet.Phase]bool{novalet.PhaseStart: true, novalet.PhaseEnd: true}
	nowhere map[novalet.Phase]bool
)

var events = map[novalet.Action]event{
	novalet.ActionCreate:          {"create", "create", payloadCreate, true, atEnd},
	novalet.ActionDelete:          {"delete", "delete", payloadAction, true, nowhere},
	novalet.ActionShutdown:        {"shutdown", "shutdown", payloadAction, true, nowhere},
	novalet.ActionSoftDelete:      {"soft_delete", "soft_delete", payloadAction, false, nowhere},
	novalet.ActionRestore:         {"restore", "restore", payloadAction, false, nowhere},
	novalet.ActionPowerOn:         {"power_on", "power_on", payloadAction, false, nowhere},
	novalet.ActionPowerOff:        {"power_off", "power_off", payloadAction, false, nowhere},
	novalet.ActionReboot:          {"reboot", "reboot", payloadAction, true, nowhere},
	novalet.ActionPause:           {"pause", "pause", payloadAction, false, nowhere},
	novalet.ActionUnpause:         {"unpause", "unpause", payloadAction, false, nowhere},
	novalet.ActionSuspend:         {"suspend", "suspend", payloadAction, false, nowhere},
	novalet.ActionResume:          {"resume", "resume", payloadAction, true, nowhere},
	novalet.ActionRescue:          {"rescue", "rescue", payloadRescue, false, atBoth},
	novalet.ActionUnrescue:        {"unrescue", "unrescue", payloadAction, false, atBoth},
	novalet.ActionRebuild:         {"rebuild", "rebuild", payloadRebuild, true, atEnd},
	novalet.ActionSnapshot:        {"snapshot", "snapshot", payloadSnapshot, false, nowhere},
	novalet.ActionShelve:          {"shelve", "shelve", payloadAction, true, nowhere},
	novalet.ActionShelveOffload:   {"shelve_offload", "shelve_offload", payloadAction, true, nowhere},
	novalet.ActionUnshelve:        {"unshelve", "unshelve", payloadAction, true, nowhere},
	novalet.ActionInterfaceAttach: {"", "interface_attach", payloadAction, false, nowhere},
	novalet.ActionInterfaceDetach: {"", "interface_detach", payloadAction, false, nowhere},
	novalet.ActionTriggerCrash:    {"trigger_crash_dump", "trigger_crash_dump", payloadAction, false, nowhere},
	novalet.ActionExists:          {"exists", "exists", payloadExists, false, nowhere},
	novalet.ActionAddFixedIP:      {"create_ip", "", "", false, atEnd},
	novalet.ActionRemoveFixedIP:   {"delete_ip", "", "", false, atEnd},
}

// name joins the parts of an event's name.
func name(prefix, action string, phase novalet.Phase) string {
	if phase == novalet.PhaseNone {
		return prefix + "." + action
	}
	return prefix + "." + action + "." + string(phase)
}
