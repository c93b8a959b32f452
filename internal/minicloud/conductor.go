package minicloud

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// This file answers what nova-conductor answers: object_action on a row, object_class_action_versions on a table.

// failure is an error that travels as a Nova exception.
func failure(class, message string, kwargs map[string]any) *oslomsg.Failure {
	return &oslomsg.Failure{Module: "nova.exception", Class: class, Message: message, Kwargs: kwargs}
}

// answer makes a handler of a function.
func (c *Cloud) answer(fn func(ctx oslomsg.Context, raw json.RawMessage) (any, *oslomsg.Failure)) oslomsg.Handler {
	return func(_ context.Context, d *oslomsg.Delivery) {
		v, f := fn(d.Context, d.Args)
		if f != nil {
			d.Fail(f)
			return
		}
		if err := d.Reply(v); err != nil {
			c.log.Error("answer the compute service", "method", d.Method, "error", err)
		}
	}
}

func badArgs(err error) *oslomsg.Failure {
	return &oslomsg.Failure{Module: "builtins", Class: "ValueError", Message: err.Error()}
}

// objectAction calls a method of one object and answers [updates, result].
func (c *Cloud) objectAction(ctx oslomsg.Context, raw json.RawMessage) (any, *oslomsg.Failure) {
	var a struct {
		Object json.RawMessage            `json:"objinst"`
		Method string                     `json:"objmethod"`
		Args   []json.RawMessage          `json:"args"`
		Kwargs map[string]json.RawMessage `json:"kwargs"`
	}
	if err := json.Unmarshal(raw, &a); err != nil {
		return nil, badArgs(err)
	}
	o, err := ovo.Decode(a.Object)
	if err != nil || o == nil {
		return nil, badArgs(fmt.Errorf("objinst: %w", err))
	}
	if have := c.release.Version(o.Name); have == "" {
		return nil, &oslomsg.Failure{Module: "oslo_versionedobjects.exception", Class: "UnsupportedObjectError", Message: "Unsupported object type " + o.Name}
	} else if o.Version > have && len(o.Version) == len(have) {
		return nil, &oslomsg.Failure{Module: "oslo_versionedobjects.exception", Class: "IncompatibleObjectVersion",
			Message: "Version " + o.Version + " of " + o.Name + " is not supported",
			Kwargs:  map[string]any{"objname": o.Name, "objver": o.Version, "supported": have, "code": 500}}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	updates, f := c.actLocked(ctx, o, a.Method, a.Kwargs)
	if f != nil {
		return nil, f
	}
	if updates == nil {
		updates = map[string]json.RawMessage{}
	}
	updates["obj_what_changed"] = json.RawMessage("[]")
	return []any{updates, nil}, nil
}

func (c *Cloud) actLocked(ctx oslomsg.Context, o *ovo.Object, method string, kwargs map[string]json.RawMessage) (map[string]json.RawMessage, *oslomsg.Failure) {
	switch o.Name + "." + method {
	case "Instance.save":
		return c.saveInstanceLocked(o, kwargs["expected_task_state"], ctx.String("read_deleted") == "yes")
	case "Instance.destroy":
		r, f := c.rowLocked(o.String("uuid"))
		if f != nil {
			return nil, f
		}
		r.instance.Put("deleted", true)
		r.instance.Put("deleted_at", time.Now())
		r.notifyLocked()
		return nil, nil
	case "InstanceInfoCache.save":
		r, f := c.rowLocked(o.String("instance_uuid"))
		if f != nil {
			return nil, f
		}
		r.info = o.String("network_info")
		r.notifyLocked()
		return nil, nil
	case "InstanceFault.create":
		r, f := c.rowLocked(o.String("instance_uuid"))
		if f != nil {
			return nil, f
		}
		r.faults = append(r.faults, o.String("message"))
		r.notifyLocked()
		return nil, nil
	case "VirtualInterface.create":
		r, f := c.rowLocked(o.String("instance_uuid"))
		if f != nil {
			return nil, f
		}
		c.nextID++
		o.Put("id", c.nextID)
		r.vifs[o.String("uuid")] = o
		return o.Data, nil
	case "VirtualInterface.destroy":
		for _, r := range c.rows {
			for k, v := range r.vifs {
				if v.Int("id") == o.Int("id") {
					delete(r.vifs, k)
				}
			}
		}
		return nil, nil
	case "BlockDeviceMapping.save":
		for _, r := range c.rows {
			for _, b := range r.bdms {
				if b.Int("id") == o.Int("id") {
					copyChanges(b, o)
				}
			}
		}
		return nil, nil
	case "Service.create", "Service.save":
		return c.saveRowLocked(&c.service, o, map[string]any{"disabled": false, "forced_down": false, "disabled_reason": nil, "last_seen_up": time.Now()})
	case "ComputeNode.create", "ComputeNode.save":
		return c.saveRowLocked(&c.node, o, map[string]any{"deleted": false, "mapped": 1})
	case "ConsoleAuthToken.authorize":
		o.Put("token", uuid.NewString())
		o.Put("id", 1)
		return o.Data, nil
	}
	return nil, failure("ObjectActionError", "Object action "+method+" failed because: not part of the embedded controller",
		map[string]any{"action": method, "reason": "not part of the embedded controller"})
}

// saveRowLocked keeps the single row of a table.
func (c *Cloud) saveRowLocked(at **ovo.Object, o *ovo.Object, defaults map[string]any) (map[string]json.RawMessage, *oslomsg.Failure) {
	if *at == nil {
		c.nextID++
		*at = o.Clone()
		(*at).Put("id", c.nextID)
		if !o.Has("uuid") {
			(*at).Put("uuid", uuid.NewString())
		}
		for k, v := range defaults {
			(*at).Put(k, v)
		}
	} else {
		copyChanges(*at, o)
	}
	(*at).ResetChanges()
	if (*at).Name == "Service" {
		(*at).Put("last_seen_up", time.Now())
	}
	return (*at).Clone().Data, nil
}

// copyChanges takes over the fields that src marks as changed.
func copyChanges(dst, src *ovo.Object) {
	for _, f := range src.Changes {
		dst.Data[f] = src.Data[f]
	}
}

func (c *Cloud) rowLocked(id string) (*row, *oslomsg.Failure) {
	r, ok := c.rows[id]
	if !ok {
		return nil, failure("InstanceNotFound", "Instance "+id+" could not be found.", map[string]any{"instance_id": id, "code": 404})
	}
	return r, nil
}

// saveInstanceLocked is Instance.save with its compare-and-swap on task_state.
func (c *Cloud) saveInstanceLocked(o *ovo.Object, expected json.RawMessage, deleted bool) (map[string]json.RawMessage, *oslomsg.Failure) {
	id := o.String("uuid")
	r, f := c.rowLocked(id)
	if f != nil {
		return nil, f
	}
	if r.instance.Bool("deleted") && !deleted {
		return nil, failure("InstanceNotFound", "Instance "+id+" could not be found.", map[string]any{"instance_id": id, "code": 404})
	}
	var want []*string
	if len(expected) > 0 && string(expected) != "null" {
		if json.Unmarshal(expected, &want) != nil {
			var one *string
			if err := json.Unmarshal(expected, &one); err != nil {
				return nil, badArgs(err)
			}
			want = []*string{one}
		}
		now := r.instance.String("task_state")
		ok := slices.ContainsFunc(want, func(s *string) bool { return (s == nil && now == "") || (s != nil && *s == now) })
		if !ok {
			class := "UnexpectedTaskStateError"
			if now == "deleting" {
				class = "UnexpectedDeletingTaskStateError"
			}
			actual := any(nil)
			if now != "" {
				actual = now
			}
			return nil, failure(class, fmt.Sprintf("Conflict updating instance %s. Actual: task_state %q", id, now),
				map[string]any{"instance_uuid": id, "expected": map[string]any{"task_state": want}, "actual": map[string]any{"task_state": actual}, "code": 500})
		}
	}
	copyChanges(r.instance, o)
	r.instance.Put("updated_at", time.Now())
	r.notifyLocked()
	return map[string]json.RawMessage{"updated_at": r.instance.Raw("updated_at")}, nil
}

// classAction calls a method of a table.
func (c *Cloud) classAction(ctx oslomsg.Context, raw json.RawMessage) (any, *oslomsg.Failure) {
	var a struct {
		Name   string                     `json:"objname"`
		Method string                     `json:"objmethod"`
		Args   []json.RawMessage          `json:"args"`
		Kwargs map[string]json.RawMessage `json:"kwargs"`
	}
	if err := json.Unmarshal(raw, &a); err != nil {
		return nil, badArgs(err)
	}
	arg := func(i int) string {
		var s string
		if i < len(a.Args) {
			_ = json.Unmarshal(a.Args[i], &s)
		}
		return s
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch a.Name + "." + a.Method {
	case "Service.get_minimum_version":
		return c.release.Service, nil
	case "Service.get_by_host_and_binary":
		if c.service == nil {
			return nil, nil
		}
		return c.service.Clone(), nil
	case "ServiceList.get_by_binary":
		s := c.release.Minimal("Service", nil)
		for k, v := range map[string]any{"id": 1, "host": "minicloud", "binary": arg(0), "version": c.release.Service, "forced_down": false, "disabled": false, "last_seen_up": time.Now()} {
			s.Put(k, v)
		}
		return ovo.NewList("ServiceList", c.release.Version("ServiceList"), []*ovo.Object{s}), nil
	case "ComputeNode.get_by_uuid":
		if c.node == nil || c.node.String("uuid") != arg(0) {
			return nil, failure("ComputeHostNotFound", "Compute host "+arg(0)+" could not be found.", map[string]any{"host": arg(0), "code": 404})
		}
		return c.node.Clone(), nil
	case "ComputeNodeList.get_all_by_host":
		if c.node == nil {
			return nil, failure("ComputeHostNotFound", "Compute host "+arg(0)+" could not be found.", map[string]any{"host": arg(0), "code": 404})
		}
		return ovo.NewList("ComputeNodeList", c.release.Version("ComputeNodeList"), []*ovo.Object{c.node.Clone()}), nil
	case "Instance.get_by_uuid":
		if _, f := c.rowLocked(arg(0)); f != nil {
			return nil, f
		}
		return c.instanceLocked(arg(0)), nil
	case "InstanceList.get_by_host":
		return c.listLocked(func(r *row) bool { return !r.instance.Bool("deleted") && r.instance.String("host") == arg(0) }), nil
	case "InstanceList.get_by_filters":
		var filter struct {
			UUID []string `json:"uuid"`
		}
		if len(a.Args) > 0 {
			if err := json.Unmarshal(a.Args[0], &filter); err != nil {
				return nil, badArgs(err)
			}
		}
		deleted := ctx.String("read_deleted") == "yes"
		return c.listLocked(func(r *row) bool {
			return slices.Contains(filter.UUID, r.instance.String("uuid")) && (deleted || !r.instance.Bool("deleted"))
		}), nil
	case "MigrationList.get_by_filters":
		return ovo.NewList("MigrationList", c.release.Version("MigrationList"), nil), nil
	case "VirtualInterface.get_by_uuid":
		for _, r := range c.rows {
			if v, ok := r.vifs[arg(0)]; ok {
				return v.Clone(), nil
			}
		}
		return nil, nil
	case "VirtualInterface.delete_by_instance_uuid":
		if r, ok := c.rows[arg(0)]; ok {
			clear(r.vifs)
		}
		return nil, nil
	case "InstanceActionEvent.event_start":
		if r, ok := c.rows[arg(0)]; ok {
			r.events = append(r.events, Event{RequestID: ctx.RequestID(), Name: arg(1), Start: time.Now()})
			r.notifyLocked()
		}
		return nil, nil
	case "InstanceActionEvent.event_finish_with_failure":
		r, ok := c.rows[arg(0)]
		if !ok {
			return nil, nil
		}
		for i := range r.events {
			if e := &r.events[i]; e.RequestID == ctx.RequestID() && e.Name == arg(1) && e.Result == "" {
				e.Finish, e.Result = time.Now(), "Success"
				if v := a.Kwargs["exc_val"]; len(v) > 0 && string(v) != "null" {
					e.Result = "Error"
				}
			}
		}
		r.notifyLocked()
		return nil, nil
	case "InstanceAction.action_start", "ConsoleAuthToken.clean_console_auths_for_instance", "ConsoleAuthToken.clean_expired_console_auths":
		return nil, nil
	}
	return nil, &oslomsg.Failure{Module: "oslo_versionedobjects.exception", Class: "UnsupportedObjectError",
		Message: "the embedded controller has no " + a.Name + "." + a.Method}
}

func (c *Cloud) listLocked(keep func(*row) bool) *ovo.Object {
	var l []*ovo.Object
	for id, r := range c.rows {
		if keep(r) {
			l = append(l, c.instanceLocked(id))
		}
	}
	return ovo.NewList("InstanceList", c.release.Version("InstanceList"), l)
}
