package systemd_test

import (
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/minicloud"
)

// cloud is what a compute host needs of one: a conductor (the embedded controller, over AMQP), and of Keystone,
// Placement, Neutron and Glance what a host with servers that have no ports asks for.
type cloud struct {
	*minicloud.Cloud
	t      *testing.T
	broker *broker
	rest   *httptest.Server
	data   string // the file of all images

	mu        sync.Mutex // guards what follows
	images    map[string]novalet.ImageMeta
	hash      string
	providers map[string]*provider
	traits    map[string]bool
	unknown   []string // requests that nobody here answers
}

// provider is a resource provider of Placement's.
type provider struct {
	UUID        string         `json:"uuid"`
	Name        string         `json:"name"`
	Generation  int64          `json:"generation"`
	inventories map[string]any //
	traits      []string
}

func newCloud(t *testing.T, data string) *cloud {
	t.Helper()
	b, err := os.ReadFile(data)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha512.Sum512(b)
	c := &cloud{t: t, broker: newBroker(t), data: data, hash: hex.EncodeToString(sum[:]), images: map[string]novalet.ImageMeta{},
		providers: map[string]*provider{}, traits: map[string]bool{}}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	if c.Cloud, err = minicloud.New(minicloud.Options{Transport: c.broker.bus.Connect(), Host: host, Logger: log}); err != nil {
		t.Fatal(err)
	}
	c.rest = httptest.NewServer(http.HandlerFunc(c.serve))
	t.Cleanup(func() {
		c.rest.Close()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if len(c.unknown) > 0 {
			t.Errorf("requests that this cloud does not know: %q", c.unknown)
		}
	})
	return c
}

// image makes an image that runs a command.
func (c *cloud) image(id, command string) novalet.ImageMeta {
	c.t.Helper()
	st, err := os.Stat(c.data)
	if err != nil {
		c.t.Fatal(err)
	}
	m := novalet.ImageMeta{ID: id, Name: command, Status: "active", Size: st.Size(), DiskFormat: "raw", ContainerFormat: "docker",
		Properties: map[string]string{"os_command_line": command}}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.images[id] = m
	return m
}

// config is the host's nova.conf.
func (c *cloud) config() string {
	account := func(section string) string {
		return fmt.Sprintf("[%s]\nauth_type = password\nauth_url = %s/identity\nusername = nova\npassword = of-the-test\nproject_name = service\n"+
			"user_domain_name = Default\nproject_domain_name = Default\nregion_name = RegionOne\n", section, c.rest.URL)
	}
	return fmt.Sprintf("[DEFAULT]\nhost = %s\nmy_ip = 127.0.0.1\ntransport_url = rabbit://nova:of-the-test@%s/\nreport_interval = 2\n"+
		"sync_power_state_interval = 20\n", host, c.broker.addr) + account("neutron") + account("placement") + account("service_user")
}

func (c *cloud) serve(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	service, path, _ := strings.Cut(strings.Trim(r.URL.Path, "/"), "/")
	var body map[string]any
	if r.Method != http.MethodGet {
		_ = json.NewDecoder(r.Body).Decode(&body)
	}
	known := true
	switch service {
	case "identity":
		known = path == "v3/auth/tokens" && r.Method == http.MethodPost
		if known {
			w.Header().Set("X-Subject-Token", "token-of-the-test")
			w.WriteHeader(http.StatusCreated)
			send(w, map[string]any{"token": c.token()})
		}
	case "placement":
		known = c.placement(w, r, strings.Split(path, "/"), body)
	case "network":
		switch path {
		case "v2.0/ports":
			send(w, map[string]any{"ports": []any{}})
		case "v2.0/extensions":
			send(w, map[string]any{"extensions": []any{}})
		default:
			known = false
		}
	case "image":
		known = c.glance(w, r, strings.Split(path, "/"))
	default:
		known = false
	}
	if !known {
		c.unknown = append(c.unknown, r.Method+" "+r.URL.RequestURI())
		http.NotFound(w, r)
	}
}

func send(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }

func (c *cloud) token() map[string]any {
	var catalog []any
	for _, s := range []string{"network", "placement", "image"} {
		catalog = append(catalog, map[string]any{"type": s, "name": s, "id": s, "endpoints": []any{map[string]any{
			"id": s, "interface": "internal", "region": "RegionOne", "region_id": "RegionOne", "url": c.rest.URL + "/" + s}, map[string]any{
			"id": s, "interface": "public", "region": "RegionOne", "region_id": "RegionOne", "url": c.rest.URL + "/" + s}}})
	}
	return map[string]any{"expires_at": time.Now().Add(24 * time.Hour).UTC().Format("2006-01-02T15:04:05.000000Z"), "catalog": catalog,
		"project": map[string]any{"id": "service", "name": "service"}, "user": map[string]any{"id": "nova", "name": "nova"}}
}

// placement keeps the provider's inventories and traits; consumers are none of this test.
func (c *cloud) placement(w http.ResponseWriter, r *http.Request, p []string, body map[string]any) bool {
	switch {
	case p[0] == "traits" && r.Method == http.MethodGet:
		out := []string{}
		for _, t := range strings.Split(strings.TrimPrefix(r.URL.Query().Get("name"), "in:"), ",") {
			if c.traits[t] || !strings.HasPrefix(t, "CUSTOM_") {
				out = append(out, t)
			}
		}
		send(w, map[string]any{"traits": out})
	case p[0] == "traits" && r.Method == http.MethodPut:
		c.traits[p[1]] = true
		w.WriteHeader(http.StatusCreated)
	case p[0] == "resource_classes" && r.Method == http.MethodPut:
		w.WriteHeader(http.StatusCreated)
	case p[0] == "allocations" && r.Method == http.MethodDelete:
		w.WriteHeader(http.StatusNoContent)
	case p[0] == "allocations" && r.Method == http.MethodGet:
		send(w, map[string]any{"allocations": map[string]any{}})
	case p[0] == "resource_providers" && len(p) == 1 && r.Method == http.MethodGet:
		out := []any{}
		if found := c.providers[r.URL.Query().Get("in_tree")]; found != nil {
			out = append(out, found)
		}
		send(w, map[string]any{"resource_providers": out})
	case p[0] == "resource_providers" && len(p) == 1 && r.Method == http.MethodPost:
		id, _ := body["uuid"].(string)
		name, _ := body["name"].(string)
		c.providers[id] = &provider{UUID: id, Name: name, inventories: map[string]any{}, traits: []string{}}
		send(w, c.providers[id])
	case p[0] == "resource_providers" && len(p) == 3 && c.providers[p[1]] != nil:
		return c.provider(w, r, c.providers[p[1]], p[2], body)
	default:
		return false
	}
	return true
}

func (c *cloud) provider(w http.ResponseWriter, r *http.Request, p *provider, what string, body map[string]any) bool {
	if r.Method == http.MethodPut {
		p.Generation++
		switch what {
		case "inventories":
			p.inventories, _ = body[what].(map[string]any)
		case "traits":
			p.traits = []string{}
			list, _ := body[what].([]any)
			for _, t := range list {
				p.traits = append(p.traits, fmt.Sprint(t))
			}
		}
	}
	out := map[string]any{"resource_provider_generation": p.Generation}
	switch what {
	case "inventories":
		out[what] = p.inventories
	case "traits":
		out[what] = p.traits
	case "allocations":
		out[what] = map[string]any{}
	default:
		return false
	}
	send(w, out)
	return true
}

// glance serves the records and, of each, the same file.
func (c *cloud) glance(w http.ResponseWriter, r *http.Request, p []string) bool {
	if r.Method != http.MethodGet || len(p) < 2 || p[0] != "v2" || p[1] != "images" {
		return false
	}
	if len(p) == 2 {
		send(w, map[string]any{"images": []any{}})
		return true
	}
	m, ok := c.images[p[2]]
	switch {
	case !ok:
		return false
	case len(p) == 4 && p[3] == "file":
		http.ServeFile(w, r, c.data)
	case len(p) == 3:
		out := map[string]any{"id": m.ID, "name": m.Name, "status": m.Status, "size": m.Size, "disk_format": m.DiskFormat, "container_format": m.ContainerFormat,
			"min_disk": 0, "min_ram": 0, "owner": "service", "visibility": "public", "os_hash_algo": "sha512", "os_hash_value": c.hash, "created_at": "2026-01-02T03:04:05Z"}
		for k, v := range m.Properties {
			out[k] = v
		}
		send(w, out)
	default:
		return false
	}
	return true
}
