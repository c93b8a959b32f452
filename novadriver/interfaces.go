package novadriver

import (
	"context"
	"errors"

	"github.com/novalet/novalet"
)

var interfaceMethods = []method{
	{
		name: "attach_interface", since: "6.0", kind: "call", state: stateDone, answer: attachInterface,
		note: "returns the VIF", test: "TestAttachInterface",
	},
	{
		name: "detach_interface", since: "6.0", kind: "cast", state: stateDone, operation: decodeInterface,
		note: "unplugs, then deletes or unbinds the port", test: "TestLifecycleCasts",
	},
	{
		name: "add_fixed_ip_to_instance", since: "6.0", kind: "cast", state: stateDone, operation: decodeInterface,
		note: "one more address on the port", test: "TestLifecycleCasts",
	},
	{
		name: "remove_fixed_ip_from_instance", since: "6.0", kind: "cast", state: stateDone, operation: decodeInterface,
		note: "takes the address away", test: "TestLifecycleCasts",
	},
	{
		name: "inject_network_info", since: "6.0", kind: "cast", state: stateDone, operation: decodeInterface,
		note: "reads the ports again", test: "TestLifecycleCasts",
	},
}

func decodeInterface(_ *Driver, r *request, op *novalet.Operation) error {
	op.Args.PortID = r.args.str("port_id")
	op.Args.NetworkID = r.args.str("network_id")
	op.Args.Address = r.args.str("address")
	return nil
}

func attachInterface(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "attach_interface", wraps{event: true, fault: true}, func(inst *novalet.Instance) (any, error) {
		vif, err := d.agent().AttachInterface(ctx, &novalet.InterfaceRequest{
			Context: r.rc, Instance: *inst,
			Network: novalet.NetworkRequest{NetworkID: r.args.str("network_id"), PortID: r.args.str("port_id"), Address: r.args.str("requested_ip"),
				Tag: r.args.str("tag")},
		})
		if err == nil {
			return wholeVIF(*vif), nil
		}
		var fault *novalet.Fault
		if errors.As(err, &fault) && fault.Class != "" || errors.Is(err, novalet.ErrNotFound) || errors.Is(err, novalet.ErrInstanceGone) {
			return nil, err
		}
		text := "Failed to attach network adapter device to " + inst.UUID
		if t := novalet.FaultText(err); t != "" {
			text += ": " + t
		}
		d.log.Error("attach interface", "instance", inst.UUID, "request_id", r.rc.RequestID, "err", err)
		return nil, novaError("InterfaceAttachFailed", text, map[string]any{"instance_uuid": inst.UUID})
	})
}
