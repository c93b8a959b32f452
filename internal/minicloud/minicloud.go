// Package minicloud is the controller of the embedded default: one cloud in the process, for trying, developing
// and load tests. It answers the conductor's calls and sends the API's casts over the bus it is given (the
// demo's is in memory), through the same encoders, envelopes, contexts and object versions as a real cloud, and keeps
// its rows in memory.
// It has no scheduler, no Placement and no users; production is real OpenStack.
//
// New starts the conductor (an oslomsg.Server with its own goroutines); Close ends it.
package minicloud

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// Ids of the only project and user there are.
const (
	projectID = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	userID    = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

// Options describe the cloud.
type Options struct {
	// Transport is the cloud's own connection to the bus. Close closes it.
	Transport oslomsg.Transport
	// Host is the compute service that instances go to.
	Host   string
	Logger *slog.Logger
	// Release whose object versions are spoken; "" is the newest.
	Release string
}

// Cloud is a running controller.
type Cloud struct {
	host    string
	log     *slog.Logger
	release *ovo.Release
	conn    oslomsg.Transport
	client  *oslomsg.Client
	server  *oslomsg.Server

	mu      sync.Mutex // guards what follows
	nextID  int64
	rows    map[string]*row // by instance uuid
	service *ovo.Object
	node    *ovo.Object
}

// row is one instance with what hangs off it.
type row struct {
	instance *ovo.Object
	info     string // network_info
	faults   []string
	events   []Event
	vifs     map[string]*ovo.Object // by port
	bdms     []*ovo.Object
	// changed is closed and replaced whenever what Show shows of the row changes.
	changed chan struct{}
}

// Event is one event of an instance's actions, as `server event show` lists them.
type Event struct {
	RequestID, Name, Result string
	Start, Finish           time.Time
}

// New starts the controller.
func New(o Options) (*Cloud, error) {
	rel := ovo.Newest()
	if o.Release != "" {
		var err error
		if rel, err = ovo.ReleaseNamed(o.Release); err != nil {
			return nil, err
		}
	}
	c := &Cloud{host: o.Host, log: o.Logger, release: rel, conn: o.Transport, rows: map[string]*row{}}
	var err error
	if c.client, err = oslomsg.NewClient(c.conn, oslomsg.ClientOptions{Logger: o.Logger}); err != nil {
		return nil, errors.Join(err, c.conn.Close())
	}
	c.server, err = oslomsg.Serve(c.conn, oslomsg.ServerOptions{Queues: []string{"conductor"}, Logger: o.Logger,
		Endpoints: []oslomsg.Endpoint{oslomsg.BaseAPI("conductor"), {Version: "3.0", Methods: map[string]oslomsg.Handler{
			"object_action":                c.answer(c.objectAction),
			"object_class_action_versions": c.answer(c.classAction),
		}}}})
	if err != nil {
		return nil, errors.Join(err, c.client.Close(), c.conn.Close())
	}
	return c, nil
}

// Close ends the conductor; rows are forgotten. An answer that nobody takes, since who asked has ended meanwhile, is given up.
func (c *Cloud) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err := c.server.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		c.log.Info("an answer of the controller was not taken")
		err = nil
	}
	return errors.Join(err, c.client.Close(), c.conn.Close())
}

// context makes a request context as keystonemiddleware and nova-api would.
func (c *Cloud) context() oslomsg.Context {
	ctx := oslomsg.AdminContext(time.Now())
	ctx.Set("user_id", userID)
	ctx.Set("project_id", projectID)
	ctx.Set("user_name", "demo")
	ctx.Set("project_name", "demo")
	ctx.Set("roles", []string{"member", "reader"})
	ctx.Set("is_admin", false)
	return ctx
}

func (c *Cloud) target() oslomsg.Target {
	return oslomsg.Target{Topic: "compute", Server: c.host, Version: "6.0"}
}

// BootRequest is `openstack server create`.
type BootRequest struct {
	Name     string
	Image    novalet.ImageMeta
	Flavor   novalet.Flavor
	Metadata map[string]string
	KeyPairs []novalet.KeyPair
	UserData []byte
	// ConfigDrive asks for one.
	ConfigDrive bool
	// Network is a network's id, or "none" for no interface; "" leaves it to the host.
	Network string
}

// Boot sends the build to the host and returns the new instance's uuid. It does not wait for the boot: see Wait.
func (c *Cloud) Boot(ctx context.Context, r BootRequest) (string, error) {
	id := uuid.NewString()
	c.mu.Lock()
	c.nextID++
	inst := c.newInstance(id, c.nextID, &r)
	bdm := c.release.Minimal("BlockDeviceMapping", nil)
	bdm.Put("id", c.nextID)
	bdm.Put("uuid", uuid.NewString())
	for k, v := range map[string]any{"instance_uuid": id, "source_type": "image", "destination_type": "local", "boot_index": 0,
		"device_name": nil, "image_id": r.Image.ID, "delete_on_termination": true, "device_type": "disk", "guest_format": nil,
		"volume_id": nil, "volume_size": nil, "no_device": false, "tag": nil, "connection_info": nil} {
		bdm.Put(k, v)
	}
	c.rows[id] = &row{instance: inst, info: "[]", vifs: map[string]*ovo.Object{}, bdms: []*ovo.Object{bdm}, changed: make(chan struct{})}
	msg := c.instanceLocked(id)
	c.mu.Unlock()

	networks := any(nil)
	if r.Network != "" {
		networks = ovo.NewList("NetworkRequestList", c.release.Version("NetworkRequestList"),
			[]*ovo.Object{c.release.Minimal("NetworkRequest", map[string]any{"network_id": r.Network, "address": nil, "port_id": nil, "tag": nil})})
	}
	args := map[string]any{
		"instance": msg, "image": imageDict(r.Image), "request_spec": c.requestSpec(id, &r), "filter_properties": map[string]any{"limits": map[string]any{}},
		"admin_password": uuid.NewString()[:12], "injected_files": []any{}, "requested_networks": networks, "security_groups": []string{"default"},
		"block_device_mapping": ovo.NewList("BlockDeviceMappingList", c.release.Version("BlockDeviceMappingList"), []*ovo.Object{bdm}),
		"node":                 c.host, "limits": map[string]any{}, "host_list": []any{}, "accel_uuids": []any{},
	}
	if err := c.client.Cast(ctx, c.target(), "build_and_run_instance", args, c.context()); err != nil {
		return "", fmt.Errorf("send the build: %w", err)
	}
	return id, nil
}

// newInstance makes the row that nova-api and the conductor would have made.
func (c *Cloud) newInstance(id string, n int64, r *BootRequest) *ovo.Object {
	f := c.release.Minimal("Flavor", nil)
	for k, v := range map[string]any{"id": max(r.Flavor.ID, 1), "name": r.Flavor.Name, "flavorid": r.Flavor.FlavorID, "memory_mb": r.Flavor.MemoryMB,
		"vcpus": r.Flavor.VCPUs, "root_gb": r.Flavor.RootGB, "ephemeral_gb": r.Flavor.EphemeralGB, "swap": r.Flavor.Swap, "rxtx_factor": 1.0,
		"vcpu_weight": 0, "disabled": false, "is_public": true, "extra_specs": nonNil(r.Flavor.ExtraSpecs), "description": nil} {
		f.Put(k, v)
	}
	keys := []*ovo.Object{}
	for _, k := range r.KeyPairs {
		o := c.release.Minimal("KeyPair", nil)
		o.Put("name", k.Name)
		o.Put("type", k.Type)
		o.Put("public_key", k.Data)
		keys = append(keys, o)
	}
	sys := map[string]string{"image_disk_format": r.Image.DiskFormat, "image_container_format": r.Image.ContainerFormat,
		"image_min_disk": "0", "image_min_ram": "0", "image_base_image_ref": r.Image.ID}
	for k, v := range r.Image.Properties {
		sys["image_"+k] = v
	}
	i := c.release.Minimal("Instance", nil)
	for k, v := range map[string]any{
		"id": n, "uuid": id, "user_id": userID, "project_id": projectID, "image_ref": r.Image.ID, "hostname": r.Name, "display_name": r.Name,
		"launch_index": 0, "key_name": nil, "key_data": nil, "power_state": 0, "vm_state": "building", "task_state": "scheduling",
		"memory_mb": r.Flavor.MemoryMB, "vcpus": r.Flavor.VCPUs, "root_gb": r.Flavor.RootGB, "ephemeral_gb": r.Flavor.EphemeralGB, "host": nil, "node": nil,
		"instance_type_id": max(r.Flavor.ID, 1), "user_data": nil, "launched_at": nil, "terminated_at": nil, "availability_zone": "nova",
		"root_device_name": nil, "config_drive": "", "access_ip_v4": nil, "access_ip_v6": nil, "progress": 0, "locked": false, "metadata": nonNil(r.Metadata),
		"system_metadata": sys, "flavor": f, "old_flavor": nil, "new_flavor": nil, "numa_topology": nil, "cleaned": false, "hidden": false,
		"keypairs":   ovo.NewList("KeyPairList", c.release.Version("KeyPairList"), keys),
		"created_at": time.Now(), "updated_at": nil, "deleted_at": nil, "deleted": false,
	} {
		i.Put(k, v)
	}
	if c.release.Version("Instance") >= "2.8" {
		i.Put("compute_id", nil)
	}
	if len(r.UserData) > 0 {
		i.Put("user_data", r.UserData) // base64, as encoding/json writes bytes
	}
	if r.ConfigDrive {
		i.Put("config_drive", "True")
	}
	if len(r.KeyPairs) > 0 {
		i.Put("key_name", r.KeyPairs[0].Name)
		i.Put("key_data", r.KeyPairs[0].Data)
	}
	return i
}

func nonNil(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

func imageDict(m novalet.ImageMeta) map[string]any {
	return map[string]any{"id": m.ID, "name": m.Name, "status": "active", "size": m.Size, "disk_format": m.DiskFormat,
		"container_format": m.ContainerFormat, "min_disk": m.MinDiskGB, "min_ram": m.MinRAMMB, "owner": projectID, "properties": nonNil(m.Properties)}
}

func (c *Cloud) requestSpec(id string, r *BootRequest) *ovo.Object {
	o := c.release.Minimal("RequestSpec", nil)
	for k, v := range map[string]any{"instance_uuid": id, "project_id": projectID, "user_id": userID, "num_instances": 1, "availability_zone": nil,
		"is_bfv": false, "scheduler_hints": map[string]any{}, "requested_resources": []any{}} {
		o.Put(k, v)
	}
	return o
}

// instanceLocked is the row as an object to send, with its info cache.
func (c *Cloud) instanceLocked(id string) *ovo.Object {
	r := c.rows[id]
	o := r.instance.Clone()
	cache := c.release.Minimal("InstanceInfoCache", nil)
	cache.Put("instance_uuid", id)
	cache.Put("network_info", r.info)
	o.Put("info_cache", cache)
	return o
}

// Do sends a cast about an instance after writing its task_state, as nova-api does: "stop_instance", "start_instance",
// "reboot_instance", "pause_instance", …
func (c *Cloud) Do(ctx context.Context, id string, method novalet.Method, task novalet.TaskState, args map[string]any) error {
	c.mu.Lock()
	r, ok := c.rows[id]
	if !ok || r.instance.Bool("deleted") {
		c.mu.Unlock()
		return fmt.Errorf("instance %s: %w", id, novalet.ErrNotFound)
	}
	if task != novalet.TaskNone {
		r.instance.Put("task_state", string(task))
	}
	a := map[string]any{"instance": c.instanceLocked(id)}
	if method == novalet.MethodTerminate {
		a["bdms"] = ovo.NewList("BlockDeviceMappingList", c.release.Version("BlockDeviceMappingList"), r.bdms)
	}
	r.notifyLocked()
	c.mu.Unlock()
	for k, v := range args {
		a[k] = v
	}
	if err := c.client.Cast(ctx, c.target(), string(method), a, c.context()); err != nil {
		return fmt.Errorf("send %s: %w", method, err)
	}
	return nil
}

// Delete deletes an instance. It does not wait.
func (c *Cloud) Delete(ctx context.Context, id string) error {
	return c.Do(ctx, id, novalet.MethodTerminate, novalet.TaskDeleting, nil)
}

// ConsoleOutput asks the host for the last lines of the console log, as `console log show` does.
func (c *Cloud) ConsoleOutput(ctx context.Context, id string, lines int) (string, error) {
	c.mu.Lock()
	_, ok := c.rows[id]
	var inst *ovo.Object
	if ok {
		inst = c.instanceLocked(id)
	}
	c.mu.Unlock()
	if !ok {
		return "", fmt.Errorf("instance %s: %w", id, novalet.ErrNotFound)
	}
	raw, err := c.client.Call(ctx, c.target(), "get_console_output", map[string]any{"instance": inst, "tail_length": lines}, c.context())
	if err != nil {
		return "", fmt.Errorf("ask for the console output: %w", err)
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", fmt.Errorf("read the console output: %w", err)
	}
	return s, nil
}

// Server is an instance as `openstack server show` prints it.
type Server struct {
	UUID, Name string
	VMState    novalet.VMState
	TaskState  novalet.TaskState
	PowerState novalet.PowerState
	Host       string
	Deleted    bool
	Fault      string
	Addresses  []string
	Events     []Event
}

// Show reads one instance.
func (c *Cloud) Show(id string) (*Server, error) {
	s, _, err := c.show(id)
	return s, err
}

// show also returns what is closed when the instance changes.
func (c *Cloud) show(id string) (*Server, <-chan struct{}, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.rows[id]
	if !ok {
		return nil, nil, fmt.Errorf("instance %s: %w", id, novalet.ErrNotFound)
	}
	s, err := r.server()
	return s, r.changed, err
}

// List reads all instances that are not deleted.
func (c *Cloud) List() ([]*Server, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*Server
	for _, r := range c.rows {
		if r.instance.Bool("deleted") {
			continue
		}
		s, err := r.server()
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

func (r *row) server() (*Server, error) {
	i := r.instance
	s := &Server{UUID: i.String("uuid"), Name: i.String("display_name"), VMState: novalet.VMState(i.String("vm_state")),
		TaskState: novalet.TaskState(i.String("task_state")), PowerState: novalet.PowerState(i.Int("power_state")), Host: i.String("host"),
		Deleted: i.Bool("deleted"), Events: append([]Event(nil), r.events...)}
	if n := len(r.faults); n > 0 {
		s.Fault = r.faults[n-1]
	}
	var info novalet.NetworkInfo
	if err := json.Unmarshal([]byte(r.info), &info); err != nil {
		return nil, fmt.Errorf("read the network info of %s: %w", s.UUID, err)
	}
	for _, v := range info {
		for _, sn := range v.Network.Subnets {
			for _, ip := range sn.IPs {
				s.Addresses = append(s.Addresses, ip.Address)
			}
		}
	}
	return s, nil
}

// Archive forgets a deleted instance, as `nova-manage db archive_deleted_rows` does. It may be repeated.
func (c *Cloud) Archive(id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.rows[id]; ok && !r.instance.Bool("deleted") {
		return fmt.Errorf("instance %s is not deleted: %w", id, novalet.ErrInvalidState)
	}
	delete(c.rows, id)
	return nil
}

// Wait blocks until done says so of the instance, or ctx ends. done is asked whenever something of the instance has changed.
func (c *Cloud) Wait(ctx context.Context, id string, done func(*Server) bool) (*Server, error) {
	for {
		s, changed, err := c.show(id)
		if err != nil {
			return nil, err
		}
		if done(s) {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return s, fmt.Errorf("wait for instance %s (vm_state %s, task_state %q): %w", id, s.VMState, s.TaskState, context.Cause(ctx))
		}
	}
}

// Settled is a condition for Wait: no operation is under way.
func Settled(s *Server) bool { return s.Deleted || s.TaskState == novalet.TaskNone }

func (r *row) notifyLocked() {
	close(r.changed)
	r.changed = make(chan struct{})
}
