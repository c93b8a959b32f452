package novadriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// conductor is nova-conductor as the agent sees it. Repeating is built into rpc; what is special about a repeated
// call is said at each method.
type conductor struct{ d *Driver }

var _ novalet.Conductor = (*conductor)(nil)

// instanceAttrs are the lazy fields that are loaded with an instance.
var instanceAttrs = []string{"flavor", "info_cache", "keypairs", "metadata", "system_metadata", "trusted_certs"}

// adminContext is the context of work that nobody asked for: as nova.context.get_admin_context, without the
// keys whose absence means the same.
func (d *Driver) adminContext() oslomsg.Context {
	full := oslomsg.AdminContext(d.o.now())
	c := oslomsg.Context{}
	for _, k := range []string{"request_id", "user_id", "project_id", "is_admin", "read_deleted", "timestamp", "roles"} {
		c[k] = full[k]
	}
	return c
}

// requestContext is the context to send for a request: that of the request, with the right to see and change
// what is not the user's own.
func (d *Driver) requestContext(rc novalet.RequestContext) oslomsg.Context {
	if rc.Wire == nil {
		c := d.adminContext()
		if rc.RequestID != "" {
			c.Set("request_id", rc.RequestID)
		}
		return c
	}
	c := oslomsg.Context(rc.Wire).Clone()
	c.Set("is_admin", true)
	if roles := c.Strings("roles"); !slices.Contains(roles, "admin") {
		c.Set("roles", append(roles, "admin"))
	}
	return c
}

// NewContext implements novalet.Conductor.
func (c *conductor) NewContext() novalet.RequestContext {
	w := c.d.adminContext()
	return novalet.RequestContext{RequestID: w.RequestID(), Wire: w}
}

// saveError turns what a save was refused with into the kinds the agent knows.
func saveError(err error) error {
	switch {
	case err == nil:
		return nil
	case isClass(err, "UnexpectedDeletingTaskStateError", "InstanceNotFound"):
		return fmt.Errorf("%w: %w", novalet.ErrInstanceGone, err)
	case isClass(err, "UnexpectedTaskStateError"):
		return fmt.Errorf("%w: %w", novalet.ErrTaskState, err)
	}
	return err
}

// SaveInstance implements novalet.Conductor. A save repeated because its answer was lost is refused when the first
// one was carried out: the row's task_state, which the refusal tells, is then the one written here.
func (c *conductor) SaveInstance(ctx context.Context, rc novalet.RequestContext, u *novalet.InstanceUpdate) error {
	fields := make(map[string]any, len(u.Fields)+1)
	for name, v := range u.Fields {
		fields[name] = saveValue(v)
		if list, ok := v.([]novalet.TaggedDevice); ok {
			fields[name] = c.deviceMetadata(list)
		}
	}
	if node, ok := fields["node"]; ok && c.d.release.hasComputeID() {
		if _, given := fields["compute_id"]; !given {
			id, err := c.d.computeID(ctx, node)
			if err != nil {
				return err
			}
			fields["compute_id"] = id
		}
	}
	o := c.d.release.get().Minimal("Instance", fields).Key("uuid", u.UUID)
	kwargs := map[string]any{}
	if u.Expected != nil {
		states := make([]any, len(u.Expected))
		for i, s := range u.Expected {
			states[i] = saveValue(s)
		}
		kwargs["expected_task_state"] = states
	}
	rctx := c.d.requestContext(rc)
	if u.Deleted {
		rctx.Set("read_deleted", "yes")
	}
	a, err := c.d.rpc.object(ctx, rctx, o, "save", nil, kwargs)
	if err != nil && a.repeated && wroteIt(err, fields) {
		return nil
	}
	if err = saveError(err); err != nil {
		return fmt.Errorf("save instance %s: %w", u.UUID, err)
	}
	if fields["vm_state"] == "active" && fields["launched_at"] != nil {
		c.d.tracker.buildSucceeded()
	}
	return nil
}

// deviceMetadata makes the object that nova-api serves as "devices" to guests. Devices of a container sit on no bus.
func (c *conductor) deviceMetadata(list []novalet.TaggedDevice) *ovo.Object {
	rel := c.d.release.get()
	devices := []*ovo.Object{}
	for _, t := range list {
		if t.MAC != "" {
			devices = append(devices, rel.Minimal("NetworkInterfaceMetadata", map[string]any{"mac": t.MAC, "tags": []string{t.Tag}, "vf_trusted": false}))
		} else {
			devices = append(devices, rel.Minimal("DiskMetadata", map[string]any{"path": t.Path, "tags": []string{t.Tag}}))
		}
	}
	return rel.Minimal("InstanceDeviceMetadata", map[string]any{"devices": devices})
}

// saveValue makes null of the empty states.
func saveValue(v any) any {
	switch s := v.(type) {
	case novalet.TaskState:
		if s == novalet.TaskNone {
			return nil
		}
		return string(s)
	case novalet.VMState:
		return string(s)
	case novalet.PowerState:
		return int(s)
	}
	return v
}

// wroteIt reports whether the refusal shows the state that the save was to write.
func wroteIt(err error, fields map[string]any) bool {
	var e *oslomsg.RemoteError
	if !errors.As(err, &e) || e.Class != "UnexpectedTaskStateError" {
		return false
	}
	want, ok := fields["task_state"]
	if !ok {
		return false
	}
	var actual map[string]any
	if json.Unmarshal(e.Kwargs["actual"], &actual) != nil {
		return false
	}
	got, ok := actual["task_state"]
	if l, isList := got.([]any); isList && len(l) == 1 {
		got = l[0]
	}
	return ok && got == want
}

// DestroyInstance implements novalet.Conductor.
func (c *conductor) DestroyInstance(ctx context.Context, rc novalet.RequestContext, uuid string) error {
	// The id only has to be set (an object without one counts as destroyed); the row is found by uuid.
	o := c.d.release.get().Minimal("Instance", nil).Key("uuid", uuid).Key("id", c.d.instanceID(uuid)).Key("host", c.d.o.Host)
	_, err := c.d.rpc.object(ctx, c.d.requestContext(rc), o, "destroy", nil, nil)
	if err != nil && !isClass(err, "InstanceNotFound") {
		return fmt.Errorf("destroy instance %s: %w", uuid, err)
	}
	return nil
}

// Instance implements novalet.Conductor.
func (c *conductor) Instance(ctx context.Context, uuid string) (*novalet.Instance, error) {
	rctx := c.d.adminContext()
	rctx.Set("read_deleted", "yes")
	raw, err := c.d.rpc.class(ctx, rctx, "Instance", "get_by_uuid", []any{uuid},
		map[string]any{"expected_attrs": instanceAttrs})
	if isClass(err, "InstanceNotFound") {
		err = fmt.Errorf("%w: %w", novalet.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read instance %s: %w", uuid, err)
	}
	return c.d.decodeInstance(raw)
}

// InstancesByHost implements novalet.Conductor.
func (c *conductor) InstancesByHost(ctx context.Context) ([]novalet.Instance, error) {
	raw, err := c.d.rpc.class(ctx, c.d.adminContext(), "InstanceList", "get_by_host", []any{c.d.o.Host},
		map[string]any{"expected_attrs": instanceAttrs})
	if err != nil {
		return nil, fmt.Errorf("list the instances of host %s: %w", c.d.o.Host, err)
	}
	return c.d.decodeInstances(raw)
}

// maxUUIDs is how many instances one request asks for.
const maxUUIDs = 200

// Instances implements novalet.Conductor.
func (c *conductor) Instances(ctx context.Context, uuids []string) ([]novalet.Instance, error) {
	rctx := c.d.adminContext()
	rctx.Set("read_deleted", "yes")
	var out []novalet.Instance
	for part := range slices.Chunk(uuids, maxUUIDs) {
		raw, err := c.d.rpc.class(ctx, rctx, "InstanceList", "get_by_filters", []any{map[string]any{"uuid": part}},
			map[string]any{"expected_attrs": instanceAttrs})
		if err != nil {
			return nil, fmt.Errorf("read %d instances: %w", len(part), err)
		}
		l, err := c.d.decodeInstances(raw)
		if err != nil {
			return nil, err
		}
		out = append(out, l...)
	}
	return out, nil
}

// Evacuated implements novalet.Conductor.
func (c *conductor) Evacuated(ctx context.Context) ([]novalet.EvacuatedInstance, error) {
	rctx := c.d.adminContext()
	rctx.Set("read_deleted", "yes")
	raw, err := c.d.rpc.class(ctx, rctx, "MigrationList", "get_by_filters", []any{map[string]any{
		"source_compute": c.d.o.Host, "status": []string{"accepted", "pre-migrating", "done"}, "migration_type": "evacuation",
	}}, nil)
	if err != nil {
		return nil, fmt.Errorf("list the evacuations from host %s: %w", c.d.o.Host, err)
	}
	l, err := ovo.Decode(raw)
	if err != nil {
		return nil, fmt.Errorf("list the evacuations from host %s: %w", c.d.o.Host, err)
	}
	var out []novalet.EvacuatedInstance
	for _, m := range l.Objects() {
		wire, err := json.Marshal(m)
		if err != nil || !isUUID(m.String("instance_uuid")) {
			continue
		}
		out = append(out, novalet.EvacuatedInstance{InstanceUUID: m.String("instance_uuid"), MigrationID: m.Int("id"), Wire: wire})
	}
	return out, nil
}

// EvacuationDone implements novalet.Conductor: what the instance still holds on this host's provider goes too.
func (c *conductor) EvacuationDone(ctx context.Context, e *novalet.EvacuatedInstance) error {
	if p := c.d.o.Placement; p != nil {
		if uuid := c.d.nodeUUID(); uuid != "" {
			if err := p.RemoveFromAllocation(ctx, e.InstanceUUID, uuid); err != nil {
				return err
			}
		}
	}
	return c.d.saveMigration(ctx, c.d.adminContext(), e.MigrationID, "completed")
}

// EndEvacuation implements novalet.Conductor.
func (c *conductor) EndEvacuation(ctx context.Context, rc novalet.RequestContext, uuid string, r *novalet.RebuildArgs, ok bool) error {
	// What an instance holds that was here all the time stays its own.
	if node := c.d.nodeUUID(); !ok && r.SourceHost != c.d.o.Host && c.d.o.Placement != nil && node != "" {
		if err := c.d.o.Placement.RemoveFromAllocation(ctx, uuid, node); err != nil {
			return err
		}
	}
	if r.MigrationID <= 0 {
		return nil
	}
	if !ok {
		return c.d.saveMigration(ctx, c.d.requestContext(rc), r.MigrationID, "failed")
	}
	o := c.d.release.get().Minimal("Migration", map[string]any{"status": "done", "dest_compute": c.d.o.Host, "dest_node": r.Node}).Key("id", r.MigrationID)
	if _, err := c.d.rpc.object(ctx, c.d.requestContext(rc), o, "save", nil, nil); err != nil {
		return fmt.Errorf("save migration %d as done: %w", r.MigrationID, err)
	}
	return nil
}

// saveMigration sets the status of a migration.
func (d *Driver) saveMigration(ctx context.Context, rctx oslomsg.Context, id int64, status string) error {
	o := d.release.get().Minimal("Migration", map[string]any{"status": status}).Key("id", id)
	if _, err := d.rpc.object(ctx, rctx, o, "save", nil, nil); err != nil {
		return fmt.Errorf("save migration %d as %s: %w", id, status, err)
	}
	return nil
}

// instanceID finds the row id of an instance this host has, or 0.
func (d *Driver) instanceID(uuid string) int64 {
	c := d.compute.Load()
	if c == nil {
		return 0
	}
	for _, t := range (*c).Tracked() {
		if t.Instance.UUID == uuid {
			return t.Instance.ID
		}
	}
	return 0
}
