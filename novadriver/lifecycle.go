package novadriver

import "github.com/novalet/novalet"

var lifecycleMethods = []method{
	lifecycle(novalet.MethodStart, "starts what was stopped", decodePlain),
	lifecycle(novalet.MethodStop, "stop signal, grace time, kill", decodePlain),
	lifecycle(novalet.MethodReboot, "soft or hard", decodeReboot),
	lifecycle(novalet.MethodPause, "freezer", decodePlain),
	lifecycle(novalet.MethodUnpause, "freezer", decodePlain),
	lifecycle(novalet.MethodSuspend, "freezer; memory stays", decodePlain),
	lifecycle(novalet.MethodResume, "freezer", decodePlain),
	lifecycle(novalet.MethodRescue, "another image with the instance's root shown inside", decodeRescue),
	lifecycle(novalet.MethodUnrescue, "back to the instance's own root", decodePlain),
	lifecycle(novalet.MethodSnapshot, "uploads the root as an image", decodeImageID),
	lifecycle(novalet.MethodBackup, "snapshot, then older backups beyond the rotation are deleted", decodeImageID),
	lifecycle(novalet.MethodSoftDelete, "powers off; `reclaim_instance_interval` deletes", decodePlain),
	lifecycle(novalet.MethodRestore, "powers on again", decodePlain),
	{
		name: string(novalet.MethodTriggerCrash), since: "6.0", kind: "cast", state: stateRefused, operation: decodePlain,
		note: "fault `TriggerCrashDumpNotSupported`: a container has no kernel of its own", test: "TestLifecycleCasts",
	},
}

func lifecycle(m novalet.Method, note string, decode func(*Driver, *request, *novalet.Operation) error) method {
	return method{name: string(m), since: "6.0", kind: "cast", state: stateDone, note: note, operation: decode, test: "TestLifecycleCasts"}
}

func decodeReboot(d *Driver, r *request, op *novalet.Operation) error {
	if op.Args.RebootType = "HARD"; r.args.str("reboot_type") == "SOFT" {
		op.Args.RebootType = "SOFT"
	}
	return decodePlain(d, r, op)
}

func decodeRescue(d *Driver, r *request, op *novalet.Operation) error {
	op.Args.ImageID = r.args.str("rescue_image_ref")
	op.Args.Password = novalet.Secret(r.args.str("rescue_password"))
	return decodePlain(d, r, op)
}
