package conductortest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// act carries out an instance method.
func (c *Conductor) act(ctx oslomsg.Context, o *ovo.Object, a actionArgs) (Row, any, *oslomsg.Failure) {
	switch o.Name + "." + a.Method {
	case "Service.create":
		for _, r := range c.find("Service", "host", o.String("host")) {
			if r.Str("binary") == o.String("binary") {
				return nil, nil, novaFailure("ServiceBinaryExists", "Service with host and binary exists.", nil)
			}
		}
		if f := c.tooOld(o); f != nil {
			return nil, nil, f
		}
		return c.create(o, map[string]any{"disabled": false, "disabled_reason": nil, "forced_down": false, "last_seen_up": nil}), nil, nil
	case "Service.save":
		return c.saveService(o)
	case "ComputeNode.create":
		for _, r := range c.find("ComputeNode", "uuid", o.String("uuid")) {
			c.write(r, o)
			r.Set(map[string]any{"deleted": false, "deleted_at": nil})
			return maps.Clone(r), nil, nil
		}
		return c.create(o, nil), nil, nil
	case "Instance.save":
		return c.saveInstance(o, a, ctx.String("read_deleted") == "yes")
	case "Instance.destroy":
		r := c.instance(o.String("uuid"), false)
		if r == nil || !o.Has("id") {
			return nil, nil, instanceNotFound(o.String("uuid"))
		}
		r.Set(map[string]any{"deleted": true, "deleted_at": ovo.FormatTime(time.Now())})
		return maps.Clone(r), nil, nil
	case "InstanceInfoCache.save":
		if r := c.instance(o.String("instance_uuid"), true); r == nil {
			return nil, nil, instanceNotFound(o.String("instance_uuid"))
		}
		for _, r := range c.find("InstanceInfoCache", "instance_uuid", o.String("instance_uuid")) {
			c.write(r, o)
			return maps.Clone(r), nil, nil
		}
		return c.create(o, nil), nil, nil
	case "VirtualInterface.create":
		if len(c.find("VirtualInterface", "address", o.String("address"))) > 0 {
			return nil, nil, novaFailure("VirtualInterfaceCreateException", "Virtual Interface creation failed", nil)
		}
		return c.create(o, nil), nil, nil
	case "VirtualInterface.destroy":
		c.tables[o.Name] = slices.DeleteFunc(c.tables[o.Name], func(r Row) bool { return r.Int("id") == o.Int("id") })
		return Row{}, nil, nil
	case "TaskLog.begin_task":
		if c.taskLog(o.String("task_name"), o.Time("period_ending"), o.String("host")) != nil {
			return nil, nil, novaFailure("TaskAlreadyRunning", "Task "+o.String("task_name")+" is already running", nil)
		}
		c.put(o.Name, Row(maps.Clone(o.Data)).Set(map[string]any{"state": "RUNNING"}))
		return Row{}, nil, nil
	case "TaskLog.end_task":
		r := c.taskLog(o.String("task_name"), o.Time("period_ending"), o.String("host"))
		if r == nil {
			return nil, nil, novaFailure("TaskNotRunning", "Task "+o.String("task_name")+" is not running", nil)
		}
		r["message"], r["errors"] = o.Data["message"], o.Data["errors"]
		r.Set(map[string]any{"state": "DONE"})
		return Row{}, nil, nil
	case "InstanceFault.create":
		return c.create(o, nil), nil, nil
	case "ConsoleAuthToken.authorize":
		token := fmt.Sprintf("token-%d", c.nextID+1)
		u := c.create(o, map[string]any{"token": token})
		return u, token, nil
	case "PciDevice.save":
		// The row is found by node and address, and made where there is none; "removed" is its end.
		rows := c.find("PciDevice", "address", o.String("address"))
		switch removed := o.String("status") == "removed"; {
		case len(rows) == 0 && removed:
			return nil, nil, novaFailure("PciDeviceNotFound", "PCI Device not found.", nil)
		case len(rows) == 0:
			return c.create(o, nil), nil, nil
		case removed:
			c.tables["PciDevice"] = slices.DeleteFunc(c.tables["PciDevice"], func(x Row) bool { return x.Str("address") == o.String("address") })
		default:
			c.write(rows[0], o)
		}
		return maps.Clone(rows[0]), nil, nil
	case "ComputeNode.save", "Migration.save", "BlockDeviceMapping.save", "ShareMapping.save":
		for _, r := range c.tables[o.Name] {
			if r.Int("id") == o.Int("id") {
				c.write(r, o)
				return maps.Clone(r), nil, nil
			}
		}
		return nil, nil, novaFailure(o.Name+"NotFound", o.Name+" could not be found.", nil)
	}
	return nil, nil, &oslomsg.Failure{Module: "builtins", Class: "AttributeError", Message: o.Name + " has no " + a.Method}
}

// taskLog finds the record of a task for the period that ended then.
func (c *Conductor) taskLog(task string, end time.Time, host string) Row {
	for _, r := range c.find("TaskLog", "task_name", task) {
		if at, err := ovo.ParseTime(r.Str("period_ending")); err == nil && at.Equal(end) && r.Str("host") == host {
			return r
		}
	}
	return nil
}

func instanceNotFound(uuid string) *oslomsg.Failure {
	return novaFailure("InstanceNotFound", "Instance "+uuid+" could not be found.", map[string]any{"instance_id": uuid, "code": 404})
}

func (c *Conductor) create(o *ovo.Object, more map[string]any) Row {
	r := Row(maps.Clone(o.Data)).Set(more)
	c.put(o.Name, r)
	return maps.Clone(r)
}

// write takes over the fields that are marked as changed.
func (c *Conductor) write(r Row, o *ovo.Object) {
	for _, f := range o.Changes {
		if v, ok := o.Data[f]; ok {
			r[f] = v
		}
	}
	r.Set(map[string]any{"updated_at": ovo.FormatTime(time.Now())})
}

// instance finds a row by uuid.
func (c *Conductor) instance(uuid string, deleted bool) Row {
	for _, r := range c.find("Instance", "uuid", uuid) {
		if deleted || string(r["deleted"]) != "true" {
			return r
		}
	}
	return nil
}

// tooOld refuses a service version below that of the other computes.
func (c *Conductor) tooOld(o *ovo.Object) *oslomsg.Failure {
	if least := c.minimum(o.String("binary")); o.Has("version") && o.Int("version") < least {
		return novaFailure("ServiceTooOld", fmt.Sprintf("This service is older (v%d) than the minimum (v%d)", o.Int("version"), least), nil)
	}
	return nil
}

func (c *Conductor) minimum(binary string) int64 {
	var least int64
	for _, r := range c.find("Service", "binary", binary) {
		if v := r.Int("version"); least == 0 || v < least {
			least = v
		}
	}
	return least
}

func (c *Conductor) saveService(o *ovo.Object) (Row, any, *oslomsg.Failure) {
	for _, r := range c.tables["Service"] {
		if r.Int("id") != o.Int("id") {
			continue
		}
		if f := c.tooOld(o); f != nil && o.Has("binary") {
			return nil, nil, f
		}
		if o.Int("report_count") > r.Int("report_count") {
			r.Set(map[string]any{"last_seen_up": ovo.FormatTime(time.Now())})
		}
		c.write(r, o)
		return maps.Clone(r), nil, nil
	}
	return nil, nil, novaFailure("ServiceNotFound", "Service could not be found.", nil)
}

func (c *Conductor) saveInstance(o *ovo.Object, a actionArgs, deleted bool) (Row, any, *oslomsg.Failure) {
	uuid := o.String("uuid")
	r := c.instance(uuid, deleted)
	if r == nil {
		return nil, nil, instanceNotFound(uuid)
	}
	if o.Version != "2.7" && o.Changed("node") && !o.Changed("compute_id") {
		return nil, nil, novaFailure("ObjectActionError", "Object action save failed because: compute_id is missing", nil)
	}
	if raw, ok := a.Kwargs["expected_task_state"]; ok && string(raw) != "null" {
		var states []json.RawMessage
		if json.Unmarshal(raw, &states) != nil {
			states = []json.RawMessage{raw}
		}
		have := orNull(r["task_state"])
		if !slices.ContainsFunc(states, func(s json.RawMessage) bool { return bytes.Equal(s, have) }) {
			class := "UnexpectedTaskStateError"
			if r.Str("task_state") == "deleting" {
				class = "UnexpectedDeletingTaskStateError"
			}
			return nil, nil, novaFailure(class, "Conflict updating instance "+uuid, map[string]any{
				"instance_uuid": uuid, "expected": map[string]any{"task_state": states}, "actual": map[string]any{"task_state": have}, "code": 500,
			})
		}
	}
	c.write(r, o)
	return maps.Clone(r), nil, nil
}

func orNull(raw json.RawMessage) json.RawMessage {
	if len(raw) == 0 {
		return json.RawMessage("null")
	}
	return raw
}

// classMethod carries out a class method.
func (c *Conductor) classMethod(ctx oslomsg.Context, a actionArgs) (any, *oslomsg.Failure) {
	str := func(i int) string {
		var s string
		if i < len(a.Args) {
			_ = json.Unmarshal(a.Args[i], &s)
		}
		return s
	}
	deleted := ctx.String("read_deleted") == "yes"
	switch a.Name + "." + a.Method {
	case "Service.get_by_host_and_binary":
		for _, r := range c.find("Service", "host", str(0)) {
			if r.Str("binary") == str(1) {
				return c.object("Service", r), nil
			}
		}
		return nil, nil
	case "Service.get_minimum_version":
		return c.minimum(str(0)), nil
	case "ServiceList.get_by_binary":
		return c.list("ServiceList", "Service", c.find("Service", "binary", str(0))), nil
	case "ComputeNode.get_by_uuid":
		for _, r := range c.find("ComputeNode", "uuid", str(0)) {
			if deleted || string(r["deleted"]) != "true" {
				return c.object("ComputeNode", r), nil
			}
		}
		return nil, novaFailure("ComputeHostNotFound", "Compute host "+str(0)+" could not be found.", map[string]any{"host": str(0), "code": 404})
	case "PciDeviceList.get_by_compute_node":
		return c.list("PciDeviceList", "PciDevice", c.tables["PciDevice"]), nil
	case "ComputeNodeList.get_all_by_host":
		rows := c.find("ComputeNode", "host", str(0))
		if len(rows) == 0 {
			return nil, novaFailure("ComputeHostNotFound", "Compute host "+str(0)+" could not be found.", map[string]any{"host": str(0), "code": 404})
		}
		return c.list("ComputeNodeList", "ComputeNode", rows), nil
	case "Instance.get_by_uuid":
		if r := c.instance(str(0), deleted); r != nil {
			return c.object("Instance", r), nil
		}
		return nil, instanceNotFound(str(0))
	case "InstanceList.get_by_host":
		return c.list("InstanceList", "Instance", slices.DeleteFunc(c.find("Instance", "host", str(0)),
			func(r Row) bool { return string(r["deleted"]) == "true" })), nil
	case "InstanceList.get_by_filters":
		var filters struct {
			UUID []string `json:"uuid"`
		}
		_ = json.Unmarshal(a.Args[0], &filters)
		var rows []Row
		for _, id := range filters.UUID {
			if r := c.instance(id, deleted); r != nil {
				rows = append(rows, r)
			}
		}
		return c.list("InstanceList", "Instance", rows), nil
	case "InstanceList._get_active_by_window_joined":
		begin, err := ovo.ParseTime(str(0))
		if err != nil {
			return nil, &oslomsg.Failure{Module: "builtins", Class: "ValueError", Message: err.Error()}
		}
		return c.list("InstanceList", "Instance", slices.DeleteFunc(c.find("Instance", "host", str(3)), func(r Row) bool {
			at, err := ovo.ParseTime(r.Str("terminated_at"))
			return err == nil && at.Before(begin)
		})), nil
	case "TaskLog.get":
		end, err := ovo.ParseTime(str(2))
		if err != nil {
			return nil, &oslomsg.Failure{Module: "builtins", Class: "ValueError", Message: err.Error()}
		}
		if r := c.taskLog(str(0), end, str(3)); r != nil {
			return c.object("TaskLog", r), nil
		}
		return nil, nil
	case "MigrationList.get_by_filters":
		var filters struct {
			Source string   `json:"source_compute"`
			Status []string `json:"status"`
		}
		_ = json.Unmarshal(a.Args[0], &filters)
		return c.list("MigrationList", "Migration", slices.DeleteFunc(c.find("Migration", "source_compute", filters.Source),
			func(r Row) bool { return !slices.Contains(filters.Status, r.Str("status")) })), nil
	case "VirtualInterfaceList.get_by_instance_uuid":
		return c.list("VirtualInterfaceList", "VirtualInterface", c.find("VirtualInterface", "instance_uuid", str(0))), nil
	case "VirtualInterface.get_by_uuid":
		for _, r := range c.find("VirtualInterface", "uuid", str(0)) {
			return c.object("VirtualInterface", r), nil
		}
		return nil, nil
	case "VirtualInterface.delete_by_instance_uuid", "ConsoleAuthToken.clean_console_auths_for_instance":
		gone := c.find(a.Name, "instance_uuid", str(0))
		c.tables[a.Name] = slices.DeleteFunc(c.tables[a.Name], func(r Row) bool {
			return slices.ContainsFunc(gone, func(g Row) bool { return g.Int("id") == r.Int("id") })
		})
		return nil, nil
	case "InstanceAction.action_start":
		c.put("InstanceAction", Row{}.Set(map[string]any{"instance_uuid": str(0), "action": str(1), "request_id": ctx.RequestID()}))
		return nil, nil
	case "InstanceActionEvent.event_start":
		if f := c.needAction(ctx, str(0)); f != nil {
			return nil, f
		}
		c.put("InstanceActionEvent", Row{"host": a.Kwargs["host"]}.Set(map[string]any{"instance_uuid": str(0), "event": str(1), "result": nil}))
		return nil, nil
	case "InstanceActionEvent.event_finish_with_failure":
		if f := c.needAction(ctx, str(0)); f != nil {
			return nil, f
		}
		for _, r := range c.find("InstanceActionEvent", "instance_uuid", str(0)) {
			if r.Str("event") == str(1) && string(r["result"]) == "null" {
				result := "Success"
				if string(a.Kwargs["exc_val"]) != "null" {
					result = "Error"
				}
				r.Set(map[string]any{"result": result})
				r["details"], r["traceback"] = a.Kwargs["exc_val"], a.Kwargs["exc_tb"]
				return nil, nil
			}
		}
		return nil, novaFailure("InstanceActionEventNotFound", "Event "+str(1)+" not found for action id", map[string]any{"code": 404})
	}
	return nil, &oslomsg.Failure{Module: "builtins", Class: "AttributeError", Message: a.Name + " has no " + a.Method}
}

// needAction finds the action that belongs to the request.
func (c *Conductor) needAction(ctx oslomsg.Context, uuid string) *oslomsg.Failure {
	for _, r := range c.find("InstanceAction", "instance_uuid", uuid) {
		if r.Str("request_id") == ctx.RequestID() {
			return nil
		}
	}
	return novaFailure("InstanceActionNotFound", "Action for request_id "+ctx.RequestID()+" on instance "+uuid+" not found",
		map[string]any{"request_id": ctx.RequestID(), "instance_uuid": uuid, "code": 404})
}

func (c *Conductor) object(name string, r Row) *ovo.Object {
	return &ovo.Object{Name: name, Namespace: "nova", Version: c.release.Version(name), Data: maps.Clone(r)}
}

func (c *Conductor) list(name, elem string, rows []Row) *ovo.Object {
	objects := []*ovo.Object{}
	for _, r := range rows {
		objects = append(objects, c.object(elem, r))
	}
	l := ovo.NewList(name, c.release.Version(name), objects)
	l.ResetChanges()
	return l
}
