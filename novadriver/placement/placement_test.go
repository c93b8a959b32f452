package placement

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
)

// server is a Placement with generations, in use checks and the microversions that matter.
type server struct {
	classes   map[string]bool // custom resource classes
	mu        sync.Mutex
	providers map[string]*row
	traits    map[string]bool
	consumers map[string]*consumer
	log       []string // "PUT /resource_providers/u/traits"
	status    int      // answer everything so
	meddle    func()   // before the next write
}

type row struct {
	name        string
	generation  int64
	inventories map[string]Inventory
	traits      map[string]bool
}

type consumer struct {
	generation int64
	held       map[string]map[string]any // provider → allocation
	project    string
}

func newServer(t *testing.T) (*server, *Client) {
	t.Helper()
	s := &server{classes: map[string]bool{}, providers: map[string]*row{}, consumers: map[string]*consumer{}, traits: map[string]bool{
		"COMPUTE_NODE": true, "COMPUTE_IMAGE_TYPE_RAW": true, "COMPUTE_STATUS_DISABLED": true, "HW_CPU_X86_AVX": true, "COMPUTE_TRUSTED_CERTS": true,
	}}
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	sc := &gophercloud.ServiceClient{ProviderClient: &gophercloud.ProviderClient{HTTPClient: *h.Client()}, Endpoint: h.URL + "/placement/", Type: "placement"}
	return s, New(func(context.Context) (*gophercloud.ServiceClient, error) { return sc, nil }, slog.New(slog.DiscardHandler))
}

func (s *server) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.log
	s.log = nil
	return l
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := strings.TrimPrefix(r.URL.RequestURI(), "/placement")
	s.log = append(s.log, r.Method+" "+path)
	if s.status != 0 {
		http.Error(w, "away", s.status)
		return
	}
	if r.Method != "GET" && s.meddle != nil {
		s.meddle()
		s.meddle = nil
	}
	var body map[string]json.RawMessage
	raw, _ := io.ReadAll(r.Body)
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &body); err != nil {
			fail(w, 400, "", err.Error())
			return
		}
	}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")[1:]
	switch parts[0] {
	case "traits":
		s.serveTraits(w, r, parts)
	case "resource_classes":
		s.classes[parts[1]] = true
		w.WriteHeader(201)
	case "resource_providers":
		s.serveProviders(w, r, parts, body)
	case "allocations":
		s.serveAllocations(w, r, parts, body)
	default:
		fail(w, 404, "", "no such thing")
	}
}

func fail(w http.ResponseWriter, status int, code, detail string) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []any{map[string]any{"status": status, "code": code, "detail": detail}}})
}

func send(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }

func (s *server) serveTraits(w http.ResponseWriter, r *http.Request, parts []string) {
	if len(parts) == 2 {
		if !strings.HasPrefix(parts[1], "CUSTOM_") {
			fail(w, 400, "", "not a custom trait")
			return
		}
		s.traits[parts[1]] = true
		w.WriteHeader(201)
		return
	}
	out := []string{}
	for _, t := range strings.Split(strings.TrimPrefix(r.URL.Query().Get("name"), "in:"), ",") {
		if s.traits[t] {
			out = append(out, t)
		}
	}
	send(w, map[string]any{"traits": out})
}

func (s *server) serveProviders(w http.ResponseWriter, r *http.Request, parts []string, body map[string]json.RawMessage) {
	if len(parts) == 1 && r.Method == "GET" {
		out := []any{}
		if id := r.URL.Query().Get("in_tree"); s.providers[id] != nil {
			out = append(out, map[string]any{"uuid": id, "name": s.providers[id].name, "generation": s.providers[id].generation})
		}
		send(w, map[string]any{"resource_providers": out})
		return
	}
	if len(parts) == 1 {
		var id, name string
		_ = json.Unmarshal(body["uuid"], &id)
		_ = json.Unmarshal(body["name"], &name)
		for _, p := range s.providers {
			if p.name == name {
				fail(w, 409, "placement.duplicate_name", "Conflicting resource provider name: "+name+" already exists.")
				return
			}
		}
		s.providers[id] = &row{name: name, inventories: map[string]Inventory{}, traits: map[string]bool{}}
		send(w, map[string]any{"uuid": id, "name": name, "generation": 0})
		return
	}
	p := s.providers[parts[1]]
	if p == nil {
		fail(w, 404, "", "no provider")
		return
	}
	if r.Method == "PUT" {
		var g int64
		_ = json.Unmarshal(body["resource_provider_generation"], &g)
		if g != p.generation {
			fail(w, 409, "placement.concurrent_update", "resource provider generation conflict")
			return
		}
		switch parts[2] {
		case "inventories":
			var next map[string]Inventory
			if err := json.Unmarshal(body["inventories"], &next); err != nil {
				fail(w, 400, "", err.Error())
				return
			}
			for class := range next {
				if strings.HasPrefix(class, "CUSTOM_") && !s.classes[class] && p.inventories[class].Total == 0 {
					fail(w, 400, "", "No such resource class "+class)
					return
				}
			}
			for class := range p.inventories {
				if _, ok := next[class]; !ok && s.inUse(parts[1], class) {
					fail(w, 409, "placement.inventory.inuse", "inventory in use")
					return
				}
			}
			p.inventories = next
		case "traits":
			var l []string
			_ = json.Unmarshal(body["traits"], &l)
			next := map[string]bool{}
			for _, t := range l {
				if !s.traits[t] {
					fail(w, 400, "", "No such trait: "+t)
					return
				}
				next[t] = true
			}
			p.traits = next
		}
		p.generation++
	}
	switch parts[2] {
	case "inventories":
		send(w, map[string]any{"resource_provider_generation": p.generation, "inventories": p.inventories})
	case "traits":
		send(w, map[string]any{"resource_provider_generation": p.generation, "traits": slices.Sorted(maps.Keys(p.traits))})
	case "allocations":
		out := map[string]any{}
		for id, c := range s.consumers {
			if a, ok := c.held[parts[1]]; ok {
				out[id] = a
			}
		}
		send(w, map[string]any{"resource_provider_generation": p.generation, "allocations": out})
	}
}

func (s *server) inUse(provider, class string) bool {
	for _, c := range s.consumers {
		if res, ok := c.held[provider]["resources"].(map[string]any); ok && res[class] != nil {
			return true
		}
	}
	return false
}

func (s *server) serveAllocations(w http.ResponseWriter, r *http.Request, parts []string, body map[string]json.RawMessage) {
	put := func(id string, raw json.RawMessage) bool {
		var a struct {
			Allocations map[string]map[string]any `json:"allocations"`
			Generation  *int64                    `json:"consumer_generation"`
			Project     string                    `json:"project_id"`
		}
		if err := json.Unmarshal(raw, &a); err != nil {
			fail(w, 400, "", err.Error())
			return false
		}
		for _, held := range a.Allocations {
			if _, ok := held["generation"]; ok {
				fail(w, 400, "", "Additional properties are not allowed ('generation' was unexpected)")
				return false
			}
		}
		c := s.consumers[id]
		if (c == nil) != (a.Generation == nil) || c != nil && *a.Generation != c.generation {
			fail(w, 409, "placement.concurrent_update", "consumer generation conflict")
			return false
		}
		if len(a.Allocations) == 0 {
			delete(s.consumers, id)
			return true
		}
		g := int64(0)
		if c != nil {
			g = c.generation + 1
		}
		s.consumers[id] = &consumer{generation: g, held: a.Allocations, project: a.Project}
		return true
	}
	switch {
	case r.Method == "POST":
		for id, raw := range body {
			if !put(id, raw) {
				return
			}
		}
		w.WriteHeader(204)
	case r.Method == "DELETE":
		if s.consumers[parts[1]] == nil {
			fail(w, 404, "", "no allocations")
			return
		}
		delete(s.consumers, parts[1])
		w.WriteHeader(204)
	case r.Method == "PUT":
		raw, _ := json.Marshal(body)
		if put(parts[1], raw) {
			w.WriteHeader(204)
		}
	default:
		c := s.consumers[parts[1]]
		if c == nil {
			send(w, map[string]any{"allocations": map[string]any{}})
			return
		}
		out := map[string]any{}
		for p, a := range c.held {
			b := maps.Clone(a)
			b["generation"] = 7
			out[p] = b
		}
		send(w, map[string]any{"allocations": out, "consumer_generation": c.generation, "project_id": c.project, "user_id": "u"})
	}
}

const u1 = "2f5c0eed-580b-433f-8ba0-7342e538a105"

func want() *Want {
	return &Want{
		UUID: u1, Name: "node1",
		Classes: map[string]Class{
			"VCPU": {Total: 8, Initial: 4}, "MEMORY_MB": {Total: 16000, Reserved: 512, Initial: 1}, "DISK_GB": {Total: 100, Initial: 1},
		},
		Traits:  []string{"COMPUTE_NODE", "COMPUTE_IMAGE_TYPE_RAW", "CUSTOM_NOVALET", "OWNER_NOVA"},
		Managed: []string{"COMPUTE_NODE", "COMPUTE_IMAGE_TYPE_RAW", "CUSTOM_NOVALET", "OWNER_NOVA", "COMPUTE_STATUS_DISABLED", "COMPUTE_TRUSTED_CERTS"},
	}
}

func TestSync(t *testing.T) {
	s, c := newServer(t)
	ctx := context.Background()
	ratios, err := c.Sync(ctx, want())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]float64{"VCPU": 4, "MEMORY_MB": 1, "DISK_GB": 1}, ratios); diff != "" {
		t.Errorf("ratios:\n%s", diff)
	}
	p := s.providers[u1]
	if p == nil || p.name != "node1" {
		t.Fatalf("provider %+v", p)
	}
	if diff := cmp.Diff(Inventory{Total: 16000, Reserved: 512, MinUnit: 1, MaxUnit: 16000, StepSize: 1, AllocationRatio: 1}, p.inventories["MEMORY_MB"]); diff != "" {
		t.Errorf("inventory:\n%s", diff)
	}
	if diff := cmp.Diff(map[string]bool{"COMPUTE_NODE": true, "COMPUTE_IMAGE_TYPE_RAW": true, "CUSTOM_NOVALET": true}, p.traits); diff != "" {
		t.Errorf("traits (OWNER_NOVA is unknown here):\n%s", diff)
	}
	s.requests()
	if _, err := c.Sync(ctx, want()); err != nil {
		t.Fatal(err)
	}
	if l := s.requests(); len(l) != 0 {
		t.Errorf("requests although nothing changed: %v", l)
	}
	// After a while it is looked at again: others' traits and ratios stay, classes that no file names go.
	s.mu.Lock()
	p.traits["HW_CPU_X86_AVX"], p.traits["COMPUTE_TRUSTED_CERTS"] = true, true
	p.inventories["CUSTOM_GPU"] = Inventory{Total: 1, MaxUnit: 1, MinUnit: 1, StepSize: 1, AllocationRatio: 1}
	inv := p.inventories["VCPU"]
	inv.AllocationRatio = 9
	p.inventories["VCPU"] = inv
	p.generation += 3
	s.mu.Unlock()
	c.now = func() time.Time { return time.Now().Add(refreshAfter + time.Second) }
	if ratios, err = c.Sync(ctx, want()); err != nil {
		t.Fatal(err)
	}
	if _, gpu := p.inventories["CUSTOM_GPU"]; ratios["VCPU"] != 9 || p.inventories["VCPU"].AllocationRatio != 9 || gpu {
		t.Errorf("others' inventory: %v %+v", ratios, p.inventories)
	}
	if !p.traits["HW_CPU_X86_AVX"] || p.traits["COMPUTE_TRUSTED_CERTS"] {
		t.Errorf("traits: %v", p.traits)
	}
	// A configured ratio wins.
	w := want()
	two := 2.0
	w.Classes["VCPU"] = Class{Total: 8, Ratio: &two, Initial: 4}
	if ratios, err = c.Sync(ctx, w); err != nil || ratios["VCPU"] != 2 || p.inventories["VCPU"].AllocationRatio != 2 {
		t.Errorf("configured: %v %v", ratios, err)
	}
}

func TestSyncConflicts(t *testing.T) {
	s, c := newServer(t)
	ctx := context.Background()
	if _, err := c.Sync(ctx, want()); err != nil {
		t.Fatal(err)
	}
	// Somebody writes between our read and our write.
	s.mu.Lock()
	s.meddle = func() { s.providers[u1].generation += 5 }
	s.mu.Unlock()
	w := want()
	w.Classes["VCPU"] = Class{Total: 16, Initial: 4}
	if _, err := c.Sync(ctx, w); err != nil {
		t.Fatal(err)
	}
	if n := s.providers[u1].inventories["VCPU"].Total; n != 16 {
		t.Errorf("VCPU %d", n)
	}
	// A class in use cannot go: it stays, the rest is written.
	s.consumers["i1"] = &consumer{held: map[string]map[string]any{u1: {"resources": map[string]any{"DISK_GB": 1.0}}}}
	w.Classes["DISK_GB"] = Class{Total: 0}
	w.Classes["MEMORY_MB"] = Class{Total: 8000, Initial: 1}
	if _, err := c.Sync(ctx, w); err != nil {
		t.Fatal(err)
	}
	if inv := s.providers[u1].inventories; inv["DISK_GB"].Total != 100 || inv["MEMORY_MB"].Total != 8000 {
		t.Errorf("inventories %+v", inv)
	}
	// Deleted under us: made again.
	s.mu.Lock()
	delete(s.providers, u1)
	s.mu.Unlock()
	w.Classes["VCPU"] = Class{Total: 4, Initial: 4}
	if _, err := c.Sync(ctx, w); err != nil || s.providers[u1] == nil {
		t.Errorf("a deleted provider: %v", err)
	}
	// The name belongs to another.
	w.UUID = "2f5c0eed-580b-433f-8ba0-7342e538a106"
	if _, err := c.Sync(ctx, w); err == nil || !strings.Contains(err.Error(), "compute_id") || errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("another's name: %v", err)
	}
	for status, again := range map[int]bool{503: true, 500: true, 403: false} {
		s.mu.Lock()
		s.status = status
		s.mu.Unlock()
		c.known = nil
		if _, err := c.Sync(ctx, want()); err == nil || errors.Is(err, novalet.ErrTryAgain) != again {
			t.Errorf("status %d: %v", status, err)
		}
	}
}

func TestSetTrait(t *testing.T) {
	s, c := newServer(t)
	ctx := context.Background()
	if _, err := c.Sync(ctx, want()); err != nil {
		t.Fatal(err)
	}
	for _, on := range []bool{true, true, false, false} {
		s.mu.Lock()
		s.meddle = func() { s.providers[u1].generation++ }
		s.mu.Unlock()
		if err := c.SetTrait(ctx, u1, "COMPUTE_STATUS_DISABLED", on); err != nil {
			t.Fatal(err)
		}
		if tr := s.providers[u1].traits; tr["COMPUTE_STATUS_DISABLED"] != on || !tr["COMPUTE_NODE"] {
			t.Errorf("%v: %v", on, tr)
		}
	}
	if err := c.SetTrait(ctx, "2f5c0eed-580b-433f-8ba0-000000000000", "COMPUTE_NODE", true); !errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("no provider: %v", err)
	}
	for trait, want := range map[string]bool{"COMPUTE_NODE": true, "OWNER_NOVA": false} {
		if got, err := c.HasTrait(ctx, trait); got != want || err != nil {
			t.Errorf("%s: %v (%v)", trait, got, err)
		}
	}
}

func TestAllocations(t *testing.T) {
	s, c := newServer(t)
	ctx := context.Background()
	res := func() map[string]any { return map[string]any{"resources": map[string]any{"VCPU": 1.0}} }
	s.consumers["i1"] = &consumer{generation: 3, project: "p", held: map[string]map[string]any{u1: res(), "other": res()}}
	s.consumers["m1"] = &consumer{generation: 1, project: "p", held: map[string]map[string]any{u1: res()}}
	s.providers[u1] = &row{name: "n"}
	if l, err := c.Consumers(ctx, u1); err != nil || len(l) != 2 {
		t.Errorf("consumers %v (%v)", l, err)
	}
	for range 2 {
		if err := c.RemoveFromAllocation(ctx, "i1", u1); err != nil {
			t.Fatal(err)
		}
	}
	if h := s.consumers["i1"].held; len(h) != 1 || h["other"] == nil {
		t.Errorf("i1 holds %v", h)
	}
	// The instance gets back what the migration holds, in place of what it has.
	for range 2 {
		if err := c.MoveAllocation(ctx, "m1", "i1"); err != nil {
			t.Fatal(err)
		}
	}
	if h := s.consumers["i1"].held; len(h) != 1 || h[u1] == nil || s.consumers["m1"] != nil {
		t.Errorf("i1 holds %v, m1 %v", h, s.consumers["m1"])
	}
	if err := c.MoveAllocation(ctx, "i1", "i2"); err != nil || s.consumers["i2"] == nil {
		t.Errorf("to a consumer without any: %v", err)
	}
	if err := c.RemoveFromAllocation(ctx, "i2", u1); err != nil || s.consumers["i2"] != nil {
		t.Errorf("the last provider: %v", err)
	}
	s.consumers["i3"] = &consumer{held: map[string]map[string]any{u1: res()}}
	for range 2 {
		if err := c.DeleteAllocation(ctx, "i3"); err != nil || s.consumers["i3"] != nil {
			t.Errorf("delete: %v", err)
		}
	}
	s.status = 503
	if err := c.DeleteAllocation(ctx, "i3"); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("Placement away: %v", err)
	}
	if err := c.MoveAllocation(ctx, "a", "b"); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("Placement away: %v", err)
	}
}

// An error document becomes words, of bounded length.
func TestErrorText(t *testing.T) {
	for _, c := range []struct{ body, code, detail string }{
		{`{"errors":[{"code":"placement.x","detail":" because \n"}]}`, "placement.x", "because"},
		{`{"errors":[{"title":"Conflict"}]}`, "", "Conflict"},
		{`<html>`, "", "<html>"},
		{strings.Repeat("x", 1000), "", strings.Repeat("x", 300) + "…"},
	} {
		if code, detail := errorText([]byte(c.body)); code != c.code || detail != c.detail {
			t.Errorf("%.40s: %q %q", c.body, code, detail)
		}
	}
	if (&conflictError{detail: "resource provider generation conflict"}).concurrent() != true {
		t.Error("a conflict of old versions is not seen as one")
	}
	if fmt.Sprint(&conflictError{detail: "d"}) != "conflict: d" {
		t.Error("text")
	}
}
