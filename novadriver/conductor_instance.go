package novadriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// SaveNetworkInfo implements novalet.Conductor.
func (c *conductor) SaveNetworkInfo(ctx context.Context, rc novalet.RequestContext, uuid string, info novalet.NetworkInfo) error {
	text, err := marshalPlain(wholeInfo(info))
	if err != nil {
		return fmt.Errorf("encode the network info of %s: %w", uuid, err)
	}
	o := c.d.release.get().Minimal("InstanceInfoCache", map[string]any{"instance_uuid": uuid, "network_info": string(text)})
	if _, err := c.d.rpc.object(ctx, c.d.requestContext(rc), o, "save", nil, nil); err != nil {
		return fmt.Errorf("save the network info of %s: %w", uuid, saveError(err))
	}
	return nil
}

// CreateVIF implements novalet.Conductor. The address holds the port too: rows must not share one, while two clouds'
// ports may.
func (c *conductor) CreateVIF(ctx context.Context, rc novalet.RequestContext, uuid string, vif *novalet.VIF, tag string) error {
	fields := map[string]any{
		"instance_uuid": uuid, "uuid": vif.ID, "address": vif.Address + "/" + vif.ID, "tag": nil,
	}
	if tag != "" {
		fields["tag"] = tag
	}
	o := c.d.release.get().Minimal("VirtualInterface", fields)
	a, err := c.d.rpc.object(ctx, c.d.requestContext(rc), o, "create", nil, nil)
	if err != nil && a.repeated && isClass(err, "VirtualInterfaceCreateException") {
		return nil // the first attempt made it
	}
	if err != nil {
		return fmt.Errorf("record interface %s of %s: %w", vif.ID, uuid, err)
	}
	return nil
}

// DeleteVIFs implements novalet.Conductor.
func (c *conductor) DeleteVIFs(ctx context.Context, rc novalet.RequestContext, uuid string) error {
	_, err := c.d.rpc.class(ctx, c.d.requestContext(rc), "VirtualInterface", "delete_by_instance_uuid", []any{uuid}, nil)
	if err != nil {
		return fmt.Errorf("delete the interface records of %s: %w", uuid, err)
	}
	return nil
}

// DeleteVIF implements novalet.Conductor.
func (c *conductor) DeleteVIF(ctx context.Context, rc novalet.RequestContext, uuid, vifID string) error {
	rctx := c.d.requestContext(rc)
	raw, err := c.d.rpc.class(ctx, rctx, "VirtualInterface", "get_by_uuid", []any{vifID}, nil)
	if err != nil {
		return fmt.Errorf("read the record of interface %s: %w", vifID, err)
	}
	o, err := ovo.Decode(raw)
	if err != nil {
		return fmt.Errorf("read the record of interface %s: %w", vifID, err)
	}
	if o == nil || o.String("instance_uuid") != uuid {
		return nil
	}
	v := c.d.release.get().Minimal("VirtualInterface", nil).Key("id", o.Int("id"))
	if _, err := c.d.rpc.object(ctx, rctx, v, "destroy", nil, nil); err != nil {
		return fmt.Errorf("delete the record of interface %s: %w", vifID, err)
	}
	return nil
}

// VIFTags implements novalet.Conductor.
func (c *conductor) VIFTags(ctx context.Context, rc novalet.RequestContext, uuid string) (map[string]string, error) {
	raw, err := c.d.rpc.class(ctx, c.d.requestContext(rc), "VirtualInterfaceList", "get_by_instance_uuid", []any{uuid}, map[string]any{"use_slave": false})
	if err != nil {
		return nil, fmt.Errorf("list the interface records of %s: %w", uuid, err)
	}
	l, err := ovo.Decode(raw)
	if err != nil {
		return nil, fmt.Errorf("list the interface records of %s: %w", uuid, err)
	}
	tags := map[string]string{}
	for _, o := range l.Objects() {
		if t := o.String("tag"); t != "" {
			tags[o.String("uuid")] = t
		}
	}
	return tags, nil
}

// SaveBlockDevice implements novalet.Conductor.
func (c *conductor) SaveBlockDevice(ctx context.Context, rc novalet.RequestContext, bdm *novalet.BlockDevice) error {
	o, err := ovo.Decode(bdm.Wire)
	if err != nil {
		return fmt.Errorf("save block device %s: %w", bdm.DeviceName, err)
	}
	if err := o.Require("id"); err != nil {
		return fmt.Errorf("save block device %s: %w", bdm.DeviceName, err)
	}
	o.ResetChanges()
	o.Set("device_name", bdm.DeviceName)
	if _, err := c.d.rpc.object(ctx, c.d.requestContext(rc), o.ForSave("id"), "save", nil, nil); err != nil {
		return fmt.Errorf("save block device %s: %w", bdm.DeviceName, err)
	}
	return nil
}

// StartEvent implements novalet.Conductor. Repeated after a lost answer it may leave a second row that never
// finishes, which is better than none that does.
func (c *conductor) StartEvent(ctx context.Context, rc novalet.RequestContext, uuid, event string) error {
	_, err := c.d.rpc.class(ctx, c.d.requestContext(rc), "InstanceActionEvent", "event_start", []any{uuid, event},
		map[string]any{"want_result": false, "host": c.d.o.Host})
	if err != nil && !isClass(err, "InstanceActionNotFound") {
		return fmt.Errorf("start event %s of %s: %w", event, uuid, err)
	}
	return nil
}

// FinishEvent implements novalet.Conductor.
func (c *conductor) FinishEvent(ctx context.Context, rc novalet.RequestContext, uuid, event string, failed error) error {
	kwargs := map[string]any{"exc_val": nil, "exc_tb": nil, "want_result": false}
	if failed != nil {
		// The value is for the user, the traceback for the operator.
		kwargs["exc_val"] = failureOf(failed, uuid).Message
		kwargs["exc_tb"] = shorten(failed.Error(), maxDetails)
	}
	_, err := c.d.rpc.class(ctx, c.d.requestContext(rc), "InstanceActionEvent", "event_finish_with_failure", []any{uuid, event}, kwargs)
	if err != nil && !isClass(err, "InstanceActionNotFound", "InstanceActionEventNotFound") {
		return fmt.Errorf("finish event %s of %s: %w", event, uuid, err)
	}
	return nil
}

// StartAction implements novalet.Conductor.
func (c *conductor) StartAction(ctx context.Context, rc novalet.RequestContext, uuid, action string) error {
	_, err := c.d.rpc.class(ctx, c.d.requestContext(rc), "InstanceAction", "action_start", []any{uuid, action},
		map[string]any{"want_result": false})
	if err != nil {
		return fmt.Errorf("start action %s of %s: %w", action, uuid, err)
	}
	return nil
}

// CreateFault implements novalet.Conductor.
func (c *conductor) CreateFault(ctx context.Context, rc novalet.RequestContext, uuid string, cause error) error {
	f := failureOf(cause, uuid)
	details := ""
	if f.code() == 500 {
		details = shorten(cause.Error(), maxDetails) // shown to administrators only
	}
	o := c.d.release.get().Minimal("InstanceFault", map[string]any{
		"instance_uuid": uuid, "code": f.code(), "message": shorten(f.Message, maxFaultText), "details": details, "host": c.d.o.Host,
	})
	_, err := c.d.rpc.object(ctx, c.d.requestContext(rc), o, "create", nil, nil)
	if err != nil && !isClass(err, "InstanceNotFound") {
		return fmt.Errorf("record a fault of %s: %w", uuid, err)
	}
	return nil
}

// CleanConsoleTokens implements novalet.Conductor. An instance built by this process whose console nobody opened has
// none, and costs no call.
func (c *conductor) CleanConsoleTokens(ctx context.Context, rc novalet.RequestContext, uuid string) error {
	if !c.d.notes.mayHaveTokens(uuid) {
		c.d.notes.forget(uuid)
		return nil
	}
	_, err := c.d.rpc.class(ctx, c.d.requestContext(rc), "ConsoleAuthToken", "clean_console_auths_for_instance", []any{uuid}, nil)
	if err != nil {
		return fmt.Errorf("remove the console tokens of %s: %w", uuid, err)
	}
	c.d.notes.forget(uuid)
	return nil
}

// RescheduleBuild implements novalet.Conductor: it tells the conductor to try the next host. The row names no host
// then and the allocation is freed. When the cast is sent twice, the second build finds the row taken.
func (c *conductor) RescheduleBuild(ctx context.Context, op *novalet.Operation, cause error) error {
	uuid := op.Instance.UUID
	args, err := c.rescheduleArgs(op, cause)
	if err != nil {
		return fmt.Errorf("reschedule %s: %w", uuid, err)
	}
	to := oslomsg.Target{Exchange: c.d.o.ControlExchange, Topic: "conductor", Namespace: "compute_task", Version: "1.19"}
	if err := c.d.rpc.client.Cast(ctx, to, "build_instances", args, c.d.requestContext(op.Context)); err != nil {
		return fmt.Errorf("%w: reschedule %s: %w", novalet.ErrTryAgain, uuid, err)
	}
	c.d.tracker.buildFailed()
	return nil
}

// rescheduleArgs makes the arguments of build_instances from those of the build.
func (c *conductor) rescheduleArgs(op *novalet.Operation, cause error) (map[string]any, error) {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(op.Args.Raw, &raw); err != nil {
		return nil, errors.New("the arguments of the build were not kept")
	}
	inst, err := ovo.Decode(op.Instance.Wire)
	if err != nil || inst == nil {
		return nil, fmt.Errorf("the instance object was not kept: %w", err)
	}
	inst.ResetChanges()
	for f, v := range map[string]any{
		"vm_state": "building", "task_state": "scheduling",
		"host": nil, "node": nil, "launched_on": nil, "availability_zone": nil,
	} {
		inst.Put(f, v)
	}
	if inst.Has("compute_id") {
		inst.Put("compute_id", nil)
	}
	var filter map[string]json.RawMessage
	_ = json.Unmarshal(raw["filter_properties"], &filter)
	var retry map[string]any
	if json.Unmarshal(filter["retry"], &retry) != nil || retry == nil {
		return nil, errors.New("the request may not be rescheduled")
	}
	f := failureOf(cause, op.Instance.UUID)
	retry["exc"] = []string{f.Message + "\n"}
	retry["exc_reason"] = f.Message
	if filter["retry"], err = marshalPlain(retry); err != nil {
		return nil, err
	}
	args := map[string]any{"instances": []*ovo.Object{inst}, "filter_properties": filter, "host_lists": []json.RawMessage{orNull(raw["host_list"])}}
	for _, k := range []string{"image", "admin_password", "injected_files", "requested_networks", "security_groups", "request_spec"} {
		args[k] = orNull(raw[k])
	}
	return args, nil
}

// InstanceChanged implements novalet.Conductor.
func (c *conductor) InstanceChanged(inst *novalet.Instance, gone bool) {
	c.d.tracker.changed()
	c.d.announce(inst, gone)
}
