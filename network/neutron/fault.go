package neutron

import (
	"errors"
	"net/http"

	"github.com/novalet/novalet"
)

// fault makes the tenant's error of a kind and Nova exception class.
func fault(class string, details map[string]any, cause error, format string, args ...any) error {
	f := novalet.Faultf(novalet.ErrAbort, class, format, args...)
	f.Details, f.Err = details, cause
	return f
}

// bindingFailed: no L2 agent of this host took the port. Another host may have one, so the build may go there, as
// Nova's own compute does.
func bindingFailed(portID string) error {
	f := novalet.Faultf(novalet.ErrReschedule, "PortBindingFailed",
		"Binding failed for port %s: the host has no working network agent for this network.", portID)
	f.Details = map[string]any{"port_id": portID}
	return f
}

// portFault turns Neutron's answer to making or binding a port into Nova's exception. req may be zero.
func portFault(err error, inst *novalet.Instance, networkID string, req novalet.NetworkRequest) error {
	var e *apiError
	if err == nil || !errors.As(err, &e) {
		return err
	}
	switch e.kind {
	case "OverQuota":
		return fault("PortLimitExceeded", nil, err, "Maximum number of ports exceeded.")
	case "IpAddressGenerationFailure", "IpAddressGenerationFailureAllSubnets", "IpAddressGenerationFailureNoMatchingSubnet":
		return fault("NoMoreFixedIps", map[string]any{"net": networkID}, err,
			"No fixed IP addresses available for network: %s", networkID)
	case "IpAddressInUse", "IpAddressAlreadyAllocated":
		return fault("FixedIpAlreadyInUse", map[string]any{"address": req.Address, "instance_uuid": inst.UUID}, err,
			"Fixed IP address %s is already in use.", req.Address)
	case "InvalidIpForNetwork", "InvalidIpForSubnet":
		text := "Fixed IP " + req.Address + " is not a valid ip address for network " + networkID + "."
		return fault("InvalidInput", map[string]any{"reason": text}, err, "Invalid input received: %s", text)
	case "MacAddressInUse":
		return fault("PortInUse", map[string]any{"port_id": req.PortID}, err, "Port %s is still in use.", req.PortID)
	case "HostNotCompatibleWithFixedIps":
		return fault("FixedIpInvalidOnHost", map[string]any{"port_id": req.PortID}, err,
			"The fixed IP associated with port %s is not compatible with the host.", req.PortID)
	case "NetworkNotFound":
		return networkNotFound(networkID, err)
	case "PortNotFound":
		return portNotFound(req.PortID, err)
	case "SecurityGroupNotFound":
		return fault("SecurityGroupNotFound", map[string]any{"security_group_id": "?"}, err, "Security group not found.")
	}
	switch {
	case errors.Is(err, novalet.ErrTryAgain):
		return err
	case e.status == http.StatusNotFound && req.PortID != "":
		return portNotFound(req.PortID, err)
	case e.status == http.StatusNotFound:
		return networkNotFound(networkID, err)
	case e.status == http.StatusForbidden:
		return fault("Forbidden", nil, err, "The network service does not allow a port on network %s.", networkID)
	}
	return fault("", nil, err, "The network service refuses a port on network %s.", networkID)
}

func networkNotFound(id string, cause error) error {
	return fault("NetworkNotFound", map[string]any{"network_id": id}, cause, "Network %s could not be found.", id)
}

func portNotFound(id string, cause error) error {
	return fault("PortNotFound", map[string]any{"port_id": id}, cause, "Port id %s could not be found.", id)
}
