package novadriver

import (
	"errors"
	"fmt"
	"maps"
	"unicode/utf8"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
)

// maxFaultText is how much of a fault's message the database keeps.
const maxFaultText = 255

// maxDetails bounds what administrators read of a failure: the column is a TEXT of 64 KiB.
const maxDetails = 8000

const novaModule = "nova.exception"

// failure is an error as Nova's exception.
type failure struct{ oslomsg.Failure }

func (f *failure) code() int {
	if c, ok := f.Kwargs["code"].(int); ok {
		return c
	}
	return 500
}

// classCodes are the codes of Nova's exceptions that are not 500: what `openstack server show` prints as the fault's
// code (nova/exception.py).
var classCodes = map[string]int{
	"AttachInterfaceNotSupported": 400, "ComputeResourcesUnavailable": 400, "ConfigDriveInvalidValue": 400,
	"ConsoleNotAvailable": 404, "ConsoleTypeInvalid": 400, "ConsoleTypeUnavailable": 400,
	"ExternalNetworkAttachForbidden": 403, "FixedIpNotFoundForInstance": 404, "ImageNotFound": 404,
	"ImageUnacceptable": 400, "InstanceInvalidState": 400, "InstanceNotFound": 404,
	"InstanceNotReady": 400, "InstanceNotRescuable": 400, "InstanceNotRunning": 400, "InstanceQuiesceNotSupported": 400,
	"InterfaceAttachFailedNoNetwork": 400, "InvalidDiskFormat": 400, "InvalidInput": 400, "InvalidSharedStorage": 400,
	"InvalidVolume": 400, "NetworkAmbiguous": 400,
	"NetworkNotFound": 404, "NetworkNotFoundForInstance": 404, "NetworksWithQoSPolicyNotSupported": 400, "OverQuota": 413,
	"PortBindingFailed": 400, "PortInUse": 400, "PortLimitExceeded": 413, "PortNotFound": 404, "PortNotUsable": 400,
	"PortRequiresFixedIP": 400, "PortUpdateFailed": 400, "PreserveEphemeralNotSupported": 400,
	"SecurityGroupCannotBeApplied": 400, "SecurityGroupNotFound": 404, "SetAdminPasswdNotSupported": 400,
	"TriggerCrashDumpNotSupported": 400, "UnableToMigrateToSelf": 400, "VolumeNotFound": 404,
}

// novaError makes an exception of nova.exception. The receiver builds it from the text and the kwargs.
func novaError(class, text string, kwargs map[string]any) *failure {
	kw := maps.Clone(kwargs)
	if kw == nil {
		kw = map[string]any{}
	}
	code, ok := classCodes[class]
	if !ok {
		code = 500
	}
	kw["code"] = code
	return &failure{oslomsg.Failure{Module: novaModule, Class: class, Message: text, Kwargs: kw}}
}

func instanceNotFound(uuid string) *failure {
	return novaError("InstanceNotFound", "Instance "+uuid+" could not be found.", map[string]any{"instance_id": uuid})
}

// failureOf says in Nova's words what went wrong with an instance. Only texts meant for tenants go in: the cause of
// a Fault, and errors that are none, may name paths and addresses of this host.
func failureOf(err error, uuid string) *failure {
	var own *failure
	if errors.As(err, &own) {
		return own
	}
	var sent *oslomsg.Failure
	if errors.As(err, &sent) {
		return &failure{*sent}
	}
	var fault *novalet.Fault
	text := ""
	if errors.As(err, &fault) {
		text = fault.Text
		if fault.Class == "NotImplementedError" {
			return &failure{*oslomsg.NotImplemented(text)}
		}
		if fault.Class != "" {
			return novaError(fault.Class, text, fault.Details)
		}
	}
	or := func(s string) string {
		if text != "" {
			return text
		}
		return s
	}
	reason := map[string]any{"reason": text, "instance_uuid": uuid}
	switch {
	case errors.Is(err, novalet.ErrNotFound), errors.Is(err, novalet.ErrInstanceGone):
		return instanceNotFound(uuid)
	case errors.Is(err, novalet.ErrUnsupported):
		return &failure{*oslomsg.NotImplemented(or("this host cannot do that"))}
	case errors.Is(err, novalet.ErrInvalidState), errors.Is(err, novalet.ErrBusy), errors.Is(err, novalet.ErrTaskState):
		return novaError("InstanceInvalidState", or(fmt.Sprintf("Instance %s is in a state in which this cannot be done.", uuid)), reason)
	case errors.Is(err, novalet.ErrReschedule):
		return novaError("ComputeResourcesUnavailable", or("Insufficient compute resources."), reason)
	case errors.Is(err, novalet.ErrAbort):
		return novaError("BuildAbortException", or(fmt.Sprintf("Build of instance %s aborted.", uuid)), reason)
	case errors.Is(err, novalet.ErrTryAgain):
		return novaError("NovaException", or("A service that the compute host needs does not answer."), nil)
	}
	return novaError("NovaException", or("The compute host met an unexpected error; its log tells more."), nil)
}

// shorten cuts a text to at most n characters.
func shorten(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	r := []rune(s)
	return string(r[:n-1]) + "…"
}
