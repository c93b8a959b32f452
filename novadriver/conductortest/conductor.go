// Package conductortest is a nova-conductor for tests: it serves the object calls that a compute host makes, with
// the rules of the real one (what only named changes write, expected task states, versions, actions), on any
// oslomsg.Transport. It starts the goroutines of an oslomsg.Server, and Close waits for them.
package conductortest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// Request is one request that was made, as it came.
type Request struct {
	Method  string // object_action, object_class_action_versions, build_instances, …
	Object  string // "Instance"
	Action  string // "save"
	Objinst *ovo.Object
	Args    json.RawMessage
	Context oslomsg.Context
}

// Name is "Instance.save", or the method where there is no object.
func (r Request) Name() string {
	if r.Object == "" {
		return r.Method
	}
	return r.Object + "." + r.Action
}

// Row is a row of a table.
type Row map[string]json.RawMessage

// Set stores values.
func (r Row) Set(kv map[string]any) Row {
	for k, v := range kv {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		r[k] = b
	}
	return r
}

// Str returns a text.
func (r Row) Str(k string) string {
	var s string
	_ = json.Unmarshal(r[k], &s)
	return s
}

// Int returns a number.
func (r Row) Int(k string) int64 {
	var n int64
	_ = json.Unmarshal(r[k], &n)
	return n
}

// Conductor is the fake.
type Conductor struct {
	release *ovo.Release
	server  *oslomsg.Server

	mu       sync.Mutex
	tables   map[string][]Row
	requests []Request
	hooks    []func(Request) Fate
	nextID   int64
}

// Fate says what becomes of a request, beside being carried out.
type Fate struct {
	Failure *oslomsg.Failure // it is not carried out and fails so
	Lost    bool             // it is carried out, and nobody answers
}

// New serves a conductor of a release ("zed", "2026.1", …) on t, with a live nova-conductor and nova-scheduler in its
// services table.
func New(t oslomsg.Transport, release string) (*Conductor, error) {
	rel, err := ovo.ReleaseNamed(release)
	if err != nil {
		return nil, err
	}
	c := &Conductor{release: rel, tables: map[string][]Row{}}
	for _, b := range []string{"nova-conductor", "nova-scheduler"} {
		c.Put("Service", map[string]any{
			"host": "control1", "binary": b, "topic": b[5:], "version": rel.Service, "report_count": 10, "disabled": false,
			"disabled_reason": nil, "forced_down": false, "last_seen_up": ovo.FormatTime(time.Now()),
		})
	}
	c.server, err = oslomsg.Serve(t, oslomsg.ServerOptions{
		Queues: []string{"conductor"},
		Endpoints: []oslomsg.Endpoint{
			{Version: "3.0", Methods: map[string]oslomsg.Handler{
				"object_action": c.objectAction, "object_class_action_versions": c.classAction,
			}},
			{Namespace: "compute_task", Version: rel.ComputeTask, Methods: map[string]oslomsg.Handler{"build_instances": c.cast}},
			oslomsg.BaseAPI("conductor"),
		},
	})
	return c, err
}

// Close stops serving.
func (c *Conductor) Close() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // held calls are never answered
	_ = c.server.Shutdown(ctx)
}

// Hook decides about requests from now on, until the function returned is called.
func (c *Conductor) Hook(f func(Request) Fate) (undo func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hooks = append(c.hooks, f)
	n := len(c.hooks) - 1
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.hooks[n] = func(Request) Fate { return Fate{} }
	}
}

// Requests returns what was asked, in the order it came, and Names only what.
func (c *Conductor) Requests() []Request {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.requests)
}

// Names returns Request.Name of each.
func (c *Conductor) Names() []string {
	var out []string
	for _, r := range c.Requests() {
		out = append(out, r.Name())
	}
	return out
}

// Forget clears Requests.
func (c *Conductor) Forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = nil
}

// Put adds a row and returns its id.
func (c *Conductor) Put(table string, values map[string]any) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.put(table, Row{}.Set(values))
}

// PutWire adds the row that an object shows.
func (c *Conductor) PutWire(raw json.RawMessage) error {
	o, err := ovo.Decode(raw)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	r := Row(maps.Clone(o.Data))
	if o.IsNull("id") {
		c.put(o.Name, r)
		return nil
	}
	c.tables[o.Name] = append(c.tables[o.Name], r)
	return nil
}

func (c *Conductor) put(table string, r Row) int64 {
	c.nextID++
	if _, ok := r["id"]; !ok {
		r.Set(map[string]any{"id": c.nextID})
	}
	r.Set(map[string]any{"created_at": ovo.FormatTime(time.Now()), "updated_at": nil, "deleted_at": nil, "deleted": false})
	if table == "ComputeNode" {
		r.Set(map[string]any{"mapped": 0})
	}
	c.tables[table] = append(c.tables[table], r)
	return r.Int("id")
}

// Find returns copies of the rows in which key has this value.
func (c *Conductor) Find(table, key string, value any) []Row {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Row
	for _, r := range c.find(table, key, value) {
		out = append(out, maps.Clone(r))
	}
	return out
}

// Change sets values in the rows in which key has this value.
func (c *Conductor) Change(table, key string, value any, to map[string]any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.find(table, key, value) {
		r.Set(to)
	}
}

// Delete removes the rows in which key has this value.
func (c *Conductor) Delete(table, key string, value any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	gone := c.find(table, key, value)
	c.tables[table] = slices.DeleteFunc(c.tables[table], func(r Row) bool {
		return slices.ContainsFunc(gone, func(g Row) bool { return g.Int("id") == r.Int("id") })
	})
}

func (c *Conductor) find(table, key string, value any) []Row {
	want, err := json.Marshal(value)
	if err != nil {
		return nil
	}
	var out []Row
	for _, r := range c.tables[table] {
		if v, ok := r[key]; ok && bytes.Equal(bytes.TrimSpace(v), want) {
			out = append(out, r)
		}
	}
	return out
}

// note records a request and says its fate.
func (c *Conductor) note(r Request) Fate {
	c.mu.Lock()
	c.requests = append(c.requests, r)
	hooks := slices.Clone(c.hooks)
	c.mu.Unlock()
	for _, h := range hooks {
		if f := h(r); f.Failure != nil || f.Lost {
			return f
		}
	}
	return Fate{}
}

func (c *Conductor) cast(_ context.Context, d *oslomsg.Delivery) {
	c.note(Request{Method: d.Method, Args: d.Args, Context: d.Context})
}

type actionArgs struct {
	Objinst  json.RawMessage            `json:"objinst"`
	Method   string                     `json:"objmethod"`
	Name     string                     `json:"objname"`
	Versions map[string]string          `json:"object_versions"`
	Args     []json.RawMessage          `json:"args"`
	Kwargs   map[string]json.RawMessage `json:"kwargs"`
}

func (c *Conductor) objectAction(_ context.Context, d *oslomsg.Delivery) {
	var a actionArgs
	if err := json.Unmarshal(d.Args, &a); err != nil {
		d.Fail(&oslomsg.Failure{Module: "builtins", Class: "TypeError", Message: err.Error()})
		return
	}
	o, err := ovo.Decode(a.Objinst)
	if err != nil || o == nil {
		d.Fail(&oslomsg.Failure{Module: "builtins", Class: "ValueError", Message: fmt.Sprint("objinst: ", err)})
		return
	}
	fate := c.note(Request{Method: d.Method, Object: o.Name, Action: a.Method, Objinst: o, Args: d.Args, Context: d.Context})
	if fate.Failure == nil {
		fate.Failure = c.checkVersion(o.Name, o.Version)
	}
	if fate.Failure != nil {
		d.Fail(fate.Failure)
		return
	}
	c.mu.Lock()
	updates, result, failure := c.act(d.Context, o, a)
	c.mu.Unlock()
	switch {
	case fate.Lost:
		d.Hold()
	case failure != nil:
		d.Fail(failure)
	default:
		updates["obj_what_changed"] = json.RawMessage("[]")
		_ = d.Reply([]any{updates, result})
	}
}

func (c *Conductor) classAction(_ context.Context, d *oslomsg.Delivery) {
	var a actionArgs
	if err := json.Unmarshal(d.Args, &a); err != nil {
		d.Fail(&oslomsg.Failure{Module: "builtins", Class: "TypeError", Message: err.Error()})
		return
	}
	fate := c.note(Request{Method: d.Method, Object: a.Name, Action: a.Method, Args: d.Args, Context: d.Context})
	if fate.Failure == nil {
		fate.Failure = c.checkVersion(a.Name, a.Versions[a.Name])
	}
	if fate.Failure != nil {
		d.Fail(fate.Failure)
		return
	}
	c.mu.Lock()
	result, failure := c.classMethod(d.Context, a)
	c.mu.Unlock()
	switch {
	case fate.Lost:
		d.Hold()
	case failure != nil:
		d.Fail(failure)
	default:
		_ = d.Reply(result)
	}
}

// checkVersion refuses an object that this release does not have in that version yet.
func (c *Conductor) checkVersion(name, version string) *oslomsg.Failure {
	ours := c.release.Version(name)
	if ours == "" || version == "" {
		return &oslomsg.Failure{Module: "oslo_versionedobjects.exception", Class: "UnsupportedObjectError", Message: "Unsupported object type " + name}
	}
	if newer(version, ours) {
		return &oslomsg.Failure{
			Module: "oslo_versionedobjects.exception", Class: "IncompatibleObjectVersion",
			Message: fmt.Sprintf("Version %s of %s is not supported, supported version is %s", version, name, ours),
			Kwargs:  map[string]any{"objname": name, "objver": version, "supported": ours, "code": 500},
		}
	}
	return nil
}

func newer(a, b string) bool {
	var am, an, bm, bn int
	_, _ = fmt.Sscanf(a, "%d.%d", &am, &an)
	_, _ = fmt.Sscanf(b, "%d.%d", &bm, &bn)
	return am > bm || am == bm && an > bn
}

func novaFailure(class, message string, kwargs map[string]any) *oslomsg.Failure {
	return &oslomsg.Failure{Module: "nova.exception", Class: class, Message: message, Kwargs: kwargs}
}
