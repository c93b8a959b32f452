package fake

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/novalet/novalet"
)

// Row is an instance as the database has it, with what hangs on it.
type Row struct {
	novalet.Instance
	LaunchedOn   string
	TerminatedAt *time.Time
	Faults       []error
	VIFRows      map[string]string // id → address
	VIFTags      map[string]string // id → tag
	Info         novalet.NetworkInfo
	Devices      []novalet.TaggedDevice
	Evacuated    string   // the status of its evacuation to this host
	History      []string // "vm_state/task_state" after each save
}

// Event is an action event as StartEvent and FinishEvent leave it.
type Event struct {
	UUID, Name string
	Finished   bool
	Err        error
}

type conductorState struct {
	cmu        sync.Mutex
	host       string
	rows       map[string]*Row
	events     []*Event
	actions    []string
	reschedule []string
	evacuated  []novalet.EvacuatedInstance
	changed    map[string]bool
	saving     map[string]bool
	tokens     map[string]int
	bdms       int
	requests   int
}

func newConductorState(host string) *conductorState {
	return &conductorState{host: host, rows: map[string]*Row{}, changed: map[string]bool{}, saving: map[string]bool{}, tokens: map[string]int{}}
}

// PutRow stores a row, as nova-api or the conductor would.
func (s *conductorState) PutRow(inst novalet.Instance) {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	s.rows[inst.UUID] = &Row{Instance: inst, VIFRows: map[string]string{}, Info: inst.NetworkInfo}
}

// SetRow changes a row in place.
func (s *conductorState) SetRow(uuid string, f func(*Row)) {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	f(s.rows[uuid])
}

// Row returns a copy of a row, nil if there is none.
func (s *conductorState) Row(uuid string) *Row {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	r, ok := s.rows[uuid]
	if !ok {
		return nil
	}
	c := *r
	c.NetworkInfo = r.Info
	c.Faults, c.History, c.VIFRows = slices.Clone(r.Faults), slices.Clone(r.History), maps.Clone(r.VIFRows)
	return &c
}

// ForgetRow removes a row and its events as a database purge does.
func (s *conductorState) ForgetRow(uuid string) {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	delete(s.rows, uuid)
	s.events = slices.DeleteFunc(s.events, func(e *Event) bool { return e.UUID == uuid })
}

// ActionEvents returns the action events of an instance.
func (s *conductorState) ActionEvents(uuid string) []Event {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	var out []Event
	for _, e := range s.events {
		if e.UUID == uuid {
			out = append(out, *e)
		}
	}
	return out
}

// Rescheduled returns the uuids handed back by RescheduleBuild, and Actions those of StartAction as "uuid action".
func (s *conductorState) Rescheduled() []string {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	return slices.Clone(s.reschedule)
}

// Actions returns what StartAction opened, as "uuid action".
func (s *conductorState) Actions() []string {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	return slices.Clone(s.actions)
}

// AddEvacuated makes Evacuated list an instance.
func (s *conductorState) AddEvacuated(e novalet.EvacuatedInstance) {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	s.evacuated = append(s.evacuated, e)
}

// EvacuatedLeft counts what is not yet marked done.
func (s *conductorState) EvacuatedLeft() int {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	return len(s.evacuated)
}

// Conductor is a fake novalet.Conductor.
type Conductor struct {
	*conductorState
	f *Faults
}

var _ novalet.Conductor = (*Conductor)(nil)

// SaveInstance implements novalet.Conductor. Two saves of one instance side by side are reported as an error.
func (c *Conductor) SaveInstance(ctx context.Context, _ novalet.RequestContext, u *novalet.InstanceUpdate) error {
	c.cmu.Lock()
	side := c.saving[u.UUID]
	c.saving[u.UUID] = true
	c.cmu.Unlock()
	if side {
		return fmt.Errorf("instance %s: two saves side by side", u.UUID)
	}
	defer func() {
		c.cmu.Lock()
		delete(c.saving, u.UUID)
		c.cmu.Unlock()
	}()
	if err := c.f.enter(ctx, "Conductor.SaveInstance"); err != nil {
		return err
	}
	if err := c.save(u); err != nil {
		return err
	}
	return c.f.leave(ctx, "Conductor.SaveInstance")
}

func (c *Conductor) save(u *novalet.InstanceUpdate) error {
	c.cmu.Lock()
	defer c.cmu.Unlock()
	r, ok := c.rows[u.UUID]
	if !ok || r.Deleted && !u.Deleted {
		return fmt.Errorf("save instance %s: %w", u.UUID, novalet.ErrInstanceGone)
	}
	if u.Expected != nil && !slices.Contains(u.Expected, r.TaskState) {
		if r.TaskState == novalet.TaskDeleting {
			return fmt.Errorf("save instance %s: %w", u.UUID, novalet.ErrInstanceGone)
		}
		return fmt.Errorf("save instance %s: task_state is %q, expected %q: %w", u.UUID, r.TaskState, u.Expected, novalet.ErrTaskState)
	}
	for k, v := range u.Fields {
		if err := r.set(k, v); err != nil {
			return err
		}
	}
	r.History = append(r.History, string(r.VMState)+"/"+string(r.TaskState))
	return nil
}

// set writes one column; the types are those that the contract's users agree on.
func (r *Row) set(k string, v any) error {
	ok := true
	switch k {
	case "vm_state":
		var s string
		if s, ok = text(v); ok {
			r.VMState = novalet.VMState(s)
		}
	case "task_state":
		var s string
		if s, ok = text(v); ok {
			r.TaskState = novalet.TaskState(s)
		}
	case "power_state":
		switch n := v.(type) {
		case novalet.PowerState:
			r.PowerState = n
		case int:
			r.PowerState = novalet.PowerState(n)
		default:
			ok = false
		}
	case "host":
		r.Host, ok = text(v)
	case "node":
		r.Node, ok = text(v)
	case "launched_on":
		r.LaunchedOn, ok = text(v)
	case "availability_zone":
		r.AvailabilityZone, ok = text(v)
	case "image_ref":
		r.ImageRef, ok = text(v)
	case "root_device_name":
		r.RootDeviceName, ok = text(v)
	case "config_drive":
		r.ConfigDrive, ok = text(v)
	case "access_ip_v4":
		r.AccessIPv4, ok = text(v)
	case "access_ip_v6":
		r.AccessIPv6, ok = text(v)
	case "launched_at":
		r.LaunchedAt, ok = stamp(v)
	case "terminated_at":
		r.TerminatedAt, ok = stamp(v)
	case "device_metadata":
		r.Devices, ok = v.([]novalet.TaggedDevice)
	case "system_metadata":
		r.SystemMetadata, ok = v.(map[string]string)
	case "metadata":
		r.Metadata, ok = v.(map[string]string)
	default:
		return fmt.Errorf("save instance %s: unknown field %q", r.UUID, k)
	}
	if !ok {
		return fmt.Errorf("save instance %s: field %q has type %T", r.UUID, k, v)
	}
	return nil
}

func text(v any) (string, bool) {
	switch s := v.(type) {
	case nil:
		return "", true
	case string:
		return s, true
	case novalet.VMState:
		return string(s), true
	case novalet.TaskState:
		return string(s), true
	}
	return "", false
}

func stamp(v any) (*time.Time, bool) {
	if v == nil {
		return nil, true
	}
	t, ok := v.(time.Time)
	return &t, ok
}

// DestroyInstance implements novalet.Conductor.
func (c *Conductor) DestroyInstance(ctx context.Context, _ novalet.RequestContext, uuid string) error {
	if err := c.f.enter(ctx, "Conductor.DestroyInstance"); err != nil {
		return err
	}
	c.cmu.Lock()
	if r, ok := c.rows[uuid]; ok {
		r.Deleted = true
		clear(r.VIFRows)
	}
	c.cmu.Unlock()
	return c.f.leave(ctx, "Conductor.DestroyInstance")
}

// Instance implements novalet.Conductor.
func (c *Conductor) Instance(ctx context.Context, uuid string) (*novalet.Instance, error) {
	if err := c.f.enter(ctx, "Conductor.Instance"); err != nil {
		return nil, err
	}
	r := c.Row(uuid)
	if r == nil {
		return nil, fmt.Errorf("instance %s: %w", uuid, novalet.ErrNotFound)
	}
	return &r.Instance, c.f.leave(ctx, "Conductor.Instance")
}

// InstancesByHost implements novalet.Conductor.
func (c *Conductor) InstancesByHost(ctx context.Context) ([]novalet.Instance, error) {
	if err := c.f.enter(ctx, "Conductor.InstancesByHost"); err != nil {
		return nil, err
	}
	var out []novalet.Instance
	for _, uuid := range c.uuids() {
		if r := c.Row(uuid); r != nil && r.Host == c.host && !r.Deleted {
			out = append(out, r.Instance)
		}
	}
	return out, c.f.leave(ctx, "Conductor.InstancesByHost")
}

// Instances implements novalet.Conductor.
func (c *Conductor) Instances(ctx context.Context, uuids []string) ([]novalet.Instance, error) {
	if err := c.f.enter(ctx, "Conductor.Instances"); err != nil {
		return nil, err
	}
	var out []novalet.Instance
	for _, uuid := range uuids {
		if r := c.Row(uuid); r != nil {
			out = append(out, r.Instance)
		}
	}
	return out, c.f.leave(ctx, "Conductor.Instances")
}

func (c *Conductor) uuids() []string {
	c.cmu.Lock()
	defer c.cmu.Unlock()
	return slices.Sorted(maps.Keys(c.rows))
}

// Evacuated implements novalet.Conductor.
func (c *Conductor) Evacuated(ctx context.Context) ([]novalet.EvacuatedInstance, error) {
	if err := c.f.enter(ctx, "Conductor.Evacuated"); err != nil {
		return nil, err
	}
	c.cmu.Lock()
	out := slices.Clone(c.evacuated)
	c.cmu.Unlock()
	return out, c.f.leave(ctx, "Conductor.Evacuated")
}

// EvacuationDone implements novalet.Conductor.
func (c *Conductor) EvacuationDone(ctx context.Context, e *novalet.EvacuatedInstance) error {
	if err := c.f.enter(ctx, "Conductor.EvacuationDone"); err != nil {
		return err
	}
	c.cmu.Lock()
	c.evacuated = slices.DeleteFunc(c.evacuated, func(x novalet.EvacuatedInstance) bool { return x.MigrationID == e.MigrationID })
	c.cmu.Unlock()
	return c.f.leave(ctx, "Conductor.EvacuationDone")
}

// EndEvacuation implements novalet.Conductor.
func (c *Conductor) EndEvacuation(ctx context.Context, _ novalet.RequestContext, uuid string, _ *novalet.RebuildArgs, ok bool) error {
	if err := c.f.enter(ctx, "Conductor.EndEvacuation"); err != nil {
		return err
	}
	c.cmu.Lock()
	if r := c.rows[uuid]; r != nil {
		r.Evacuated = map[bool]string{true: "done", false: "failed"}[ok]
	}
	c.cmu.Unlock()
	return c.f.leave(ctx, "Conductor.EndEvacuation")
}

// CreateFault implements novalet.Conductor.
func (c *Conductor) CreateFault(ctx context.Context, _ novalet.RequestContext, uuid string, err error) error {
	return c.onRow(ctx, "Conductor.CreateFault", uuid, func(r *Row) error { r.Faults = append(r.Faults, err); return nil })
}

func (c *Conductor) onRow(ctx context.Context, name, uuid string, f func(*Row) error) error {
	if err := c.f.enter(ctx, name); err != nil {
		return err
	}
	c.cmu.Lock()
	r, ok := c.rows[uuid]
	err := error(nil)
	if ok {
		err = f(r)
	}
	c.cmu.Unlock()
	if err != nil {
		return err
	}
	return c.f.leave(ctx, name)
}

// SaveBlockDevice implements novalet.Conductor.
func (c *Conductor) SaveBlockDevice(ctx context.Context, _ novalet.RequestContext, _ *novalet.BlockDevice) error {
	if err := c.f.enter(ctx, "Conductor.SaveBlockDevice"); err != nil {
		return err
	}
	c.cmu.Lock()
	c.bdms++
	c.cmu.Unlock()
	return c.f.leave(ctx, "Conductor.SaveBlockDevice")
}

// StartEvent implements novalet.Conductor.
func (c *Conductor) StartEvent(ctx context.Context, _ novalet.RequestContext, uuid, event string) error {
	if err := c.f.enter(ctx, "Conductor.StartEvent"); err != nil {
		return err
	}
	c.cmu.Lock()
	c.events = append(c.events, &Event{UUID: uuid, Name: event})
	c.cmu.Unlock()
	return c.f.leave(ctx, "Conductor.StartEvent")
}

// FinishEvent implements novalet.Conductor. A finish without a start is an error.
func (c *Conductor) FinishEvent(ctx context.Context, _ novalet.RequestContext, uuid, event string, evErr error) error {
	if err := c.f.enter(ctx, "Conductor.FinishEvent"); err != nil {
		return err
	}
	c.cmu.Lock()
	found := false
	for _, e := range slices.Backward(c.events) {
		if e.UUID == uuid && e.Name == event && !e.Finished {
			e.Finished, e.Err, found = true, evErr, true
			break
		}
	}
	c.cmu.Unlock()
	if !found {
		return fmt.Errorf("finish event %s of %s: no such event is open", event, uuid)
	}
	return c.f.leave(ctx, "Conductor.FinishEvent")
}

// StartAction implements novalet.Conductor.
func (c *Conductor) StartAction(ctx context.Context, _ novalet.RequestContext, uuid, action string) error {
	if err := c.f.enter(ctx, "Conductor.StartAction"); err != nil {
		return err
	}
	c.cmu.Lock()
	c.actions = append(c.actions, uuid+" "+action)
	c.cmu.Unlock()
	return c.f.leave(ctx, "Conductor.StartAction")
}

// RescheduleBuild implements novalet.Conductor.
func (c *Conductor) RescheduleBuild(ctx context.Context, op *novalet.Operation, _ error) error {
	if err := c.f.enter(ctx, "Conductor.RescheduleBuild"); err != nil {
		return err
	}
	c.cmu.Lock()
	c.reschedule = append(c.reschedule, op.Instance.UUID)
	c.cmu.Unlock()
	return c.f.leave(ctx, "Conductor.RescheduleBuild")
}

// CleanConsoleTokens implements novalet.Conductor.
func (c *Conductor) CleanConsoleTokens(ctx context.Context, _ novalet.RequestContext, uuid string) error {
	if err := c.f.enter(ctx, "Conductor.CleanConsoleTokens"); err != nil {
		return err
	}
	c.cmu.Lock()
	c.tokens[uuid]++
	c.cmu.Unlock()
	return c.f.leave(ctx, "Conductor.CleanConsoleTokens")
}

// InstanceChanged implements novalet.Conductor.
func (c *Conductor) InstanceChanged(inst *novalet.Instance, gone bool) {
	c.cmu.Lock()
	defer c.cmu.Unlock()
	if gone {
		delete(c.changed, inst.UUID)
	} else {
		c.changed[inst.UUID] = true
	}
}

// Announced says whether the tracker was last told that the instance is here.
func (s *conductorState) Announced(uuid string) bool {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	return s.changed[uuid]
}

// NewContext implements novalet.Conductor.
func (c *Conductor) NewContext() novalet.RequestContext {
	c.cmu.Lock()
	defer c.cmu.Unlock()
	c.requests++
	return novalet.RequestContext{RequestID: fmt.Sprintf("req-own-%d", c.requests)}
}
