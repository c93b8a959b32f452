package neutron

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/keystone"
)

const (
	projectID = "9c576b1f4df34ec0a290bceb2b6bd183"
	otherID   = "b5aaba5e7dd745a5b949815b75ddc552"
	instUUID  = "1fdff036-d062-498e-bf9e-b1bba14ab194"
	netA      = "20607cf5-81e0-463c-8e39-a87f98401f3c"
	netB      = "0b16df38-d1df-4694-9552-d11ebc386278"
	netExt    = "addf962d-5f20-4cb1-a243-4bc65e5a62dd"
	subnetA   = "4ea9a9bc-16ca-4e12-bed8-d6935ff3edfc"
	subnetB   = "58c14c15-153a-4fd5-91a8-917c9120d222"
	hostName  = "compute1"
)

type object = map[string]any

// fakeNeutron is a Keystone and a Neutron that behave as far as this package asks them: ports are kept, the policy and
// the quota are enforced, and every request is written down.
type fakeNeutron struct {
	*httptest.Server
	mu       sync.Mutex
	networks map[string]object
	subnets  map[string]object
	ports    map[string]object
	fips     []object
	groups   []object
	exts     []string
	log      []string
	made     int

	bindForbidden bool                                    // create_port:binding:host_id is not for the agent's user
	bindFails     bool                                    // no agent on the host
	quota         int                                     // ports of the project
	fail          func(method, path string) (int, string) // status and NeutronError type
	hangUp        string                                  // method whose answer is cut off after it was carried out
	noFilters     bool                                    // something on the way drops the query
}

func newFake(t *testing.T) *fakeNeutron {
	f := &fakeNeutron{networks: map[string]object{}, subnets: map[string]object{}, ports: map[string]object{}, quota: 100,
		exts: []string{"router", "multi-provider", "binding-extended"}}
	f.Server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(f.Close)
	f.network(netA, "shared", otherID, true, false)
	f.network(netB, "private", projectID, false, false)
	f.subnet(subnetA, netA, "10.78.0.0/22", "10.78.0.1")
	f.subnet(subnetB, netB, "10.77.0.0/22", "10.77.0.1")
	return f
}

func (f *fakeNeutron) network(id, name, tenant string, shared, external bool) object {
	f.networks[id] = object{"id": id, "name": name, "tenant_id": tenant, "shared": shared, "router:external": external,
		"admin_state_up": true, "mtu": 1450, "subnets": []string{}, "port_security_enabled": true,
		"provider:network_type": "vxlan", "provider:physical_network": nil}
	return f.networks[id]
}

func (f *fakeNeutron) subnet(id, network, cidr, gateway string) object {
	f.subnets[id] = object{"id": id, "network_id": network, "cidr": cidr, "gateway_ip": gateway, "enable_dhcp": true,
		"dns_nameservers": []string{}, "host_routes": []object{}, "ip_version": 4, "ipv6_address_mode": nil, "ipv6_ra_mode": nil}
	n := f.networks[network]
	n["subnets"] = append(n["subnets"].([]string), id)
	return f.subnets[id]
}

// port adds a port that exists before the test begins.
func (f *fakeNeutron) port(id, network, tenant string) object {
	p := object{"id": id, "network_id": network, "tenant_id": tenant, "mac_address": "fa:16:3e:00:00:01", "admin_state_up": true,
		"status": "DOWN", "device_id": "", "device_owner": "", "binding:vif_type": "unbound", "binding:vif_details": object{},
		"binding:profile": object{}, "binding:vnic_type": "normal", "binding:host_id": "", "fixed_ips": []object{}, "revision_number": 1}
	for sid, s := range f.subnets {
		if s["network_id"] == network {
			p["fixed_ips"] = []object{{"subnet_id": sid, "ip_address": strings.Replace(s["gateway_ip"].(string), ".0.1", ".0.99", 1)}}
		}
	}
	f.ports[id] = p
	return p
}

func (f *fakeNeutron) serve(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/v3/auth/tokens" {
		w.Header().Set("X-Subject-Token", "admin")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(object{"token": object{"expires_at": time.Now().Add(time.Hour).UTC().Format(time.RFC3339),
			"catalog": []object{{"type": "network", "endpoints": []object{{"interface": "public", "url": f.URL}}}}}})
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	token := r.Header.Get("X-Auth-Token")
	who := "U"
	if token == "admin" {
		who = "A"
	}
	path := strings.TrimPrefix(r.URL.Path, "/v2.0/")
	f.log = append(f.log, fmt.Sprintf("%s %s %s", who, r.Method, path))
	if f.noFilters {
		r.URL.RawQuery = ""
	}
	if token != "admin" && token != "user" {
		f.refuse(w, http.StatusUnauthorized, "")
		return
	}
	if f.fail != nil {
		if status, kind := f.fail(r.Method, path); status != 0 {
			f.refuse(w, status, kind)
			return
		}
	}
	body, _ := io.ReadAll(r.Body)
	var in object
	_ = json.Unmarshal(body, &in)
	kind, id, _ := strings.Cut(path, "/")
	status, out := http.StatusOK, object(nil)
	switch {
	case r.Method == http.MethodGet && kind == "extensions":
		list := []object{}
		for _, a := range f.exts {
			list = append(list, object{"alias": a})
		}
		out = object{"extensions": list}
	case r.Method == http.MethodGet && kind == "floatingips":
		out = object{"floatingips": filter(f.fips, r)}
	case r.Method == http.MethodGet && kind == "security-groups":
		out = object{"security_groups": filter(f.groups, r)}
	case r.Method == http.MethodGet && kind == "networks":
		list := []object{}
		for _, n := range f.networks {
			if who == "A" || n["shared"] == true || n["router:external"] == true || n["tenant_id"] == projectID {
				list = append(list, n)
			}
		}
		out = object{"networks": filter(list, r)}
	case r.Method == http.MethodGet && kind == "subnets":
		out = object{"subnets": filter(values(f.subnets), r)}
	case r.Method == http.MethodGet && kind == "ports" && id == "":
		out = object{"ports": filter(values(f.ports), r)}
	case kind == "ports" && id != "" && f.ports[id] == nil:
		f.refuse(w, http.StatusNotFound, "PortNotFound")
		return
	case r.Method == http.MethodGet && kind == "ports":
		out = object{"port": f.ports[id]}
	case r.Method == http.MethodDelete && kind == "ports" && slices.Contains(f.exts, revisionIfMatch) && r.Header.Get("If-Match") != "" &&
		r.Header.Get("If-Match") != fmt.Sprintf("revision_number=%v", f.ports[id]["revision_number"]):
		f.refuse(w, http.StatusPreconditionFailed, "RevisionNumberConstraintFailed")
		return
	case r.Method == http.MethodDelete && kind == "ports":
		delete(f.ports, id)
		status = http.StatusNoContent
	case r.Method == http.MethodPut && kind == "ports":
		f.update(f.ports[id], in["port"].(object))
		out = object{"port": f.ports[id]}
	case r.Method == http.MethodPost && kind == "ports":
		list, bulk := in["ports"].([]any)
		if !bulk {
			list = []any{in["port"]}
		}
		ports, st, errKind := f.create(who, list)
		if st != 0 {
			f.refuse(w, st, errKind)
			return
		}
		status, out = http.StatusCreated, object{"port": ports[0]}
		if bulk {
			out = object{"ports": ports}
		}
	default:
		f.refuse(w, http.StatusNotFound, "HTTPNotFound")
		return
	}
	if f.hangUp == r.Method {
		c, _, _ := w.(http.Hijacker).Hijack()
		c.Close()
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if out != nil {
		_ = json.NewEncoder(w).Encode(out)
	}
}

func (f *fakeNeutron) create(who string, list []any) ([]object, int, string) {
	var out []object
	for _, item := range list {
		in := item.(object)
		if _, asked := in["binding:host_id"]; asked && (who != "A" || f.bindForbidden) {
			return nil, http.StatusForbidden, "PolicyNotAuthorized"
		}
		if _, asked := in["fixed_ips"]; asked && who == "U" && f.networks[in["network_id"].(string)]["tenant_id"] != projectID {
			return nil, http.StatusForbidden, "PolicyNotAuthorized"
		}
		if _, asked := in["dns_name"]; asked && !slices.Contains(f.exts, "dns-integration") {
			return nil, http.StatusBadRequest, "HTTPBadRequest"
		}
		if _, asked := in["dns_name"]; asked && who == "A" && f.networks[in["network_id"].(string)]["dns_domain"] != nil {
			return nil, http.StatusConflict, "DNSDomainNotFound" // the zone is the user's
		}
		if len(f.ports)+len(list) > f.quota {
			return nil, http.StatusConflict, "OverQuota"
		}
		if f.networks[in["network_id"].(string)] == nil {
			return nil, http.StatusNotFound, "NetworkNotFound"
		}
		f.made++
		p := f.port(fmt.Sprintf("fdff7b31-69de-4955-aaf9-%012d", f.made), in["network_id"].(string), in["tenant_id"].(string))
		f.update(p, in)
		if ips, ok := in["fixed_ips"].([]any); ok {
			for sid, s := range f.subnets {
				if s["network_id"] == in["network_id"] {
					p["fixed_ips"] = []object{{"subnet_id": sid, "ip_address": ips[0].(object)["ip_address"]}}
				}
			}
		}
		out = append(out, p)
	}
	return out, 0, ""
}

func (f *fakeNeutron) update(p, in object) {
	p["revision_number"] = p["revision_number"].(int) + 1
	for k, v := range in {
		if k != "fixed_ips" {
			p[k] = v
		}
	}
	if ips, ok := in["fixed_ips"].([]any); ok {
		var list []object
		for _, ip := range ips {
			ip := ip.(object)
			if ip["ip_address"] == nil {
				f.made++
				ip["ip_address"] = strings.Replace(f.subnets[ip["subnet_id"].(string)]["gateway_ip"].(string), ".0.1", fmt.Sprintf(".1.%d", f.made), 1)
			}
			if ip["subnet_id"] == nil {
				ip["subnet_id"] = "?"
			}
			list = append(list, ip)
		}
		p["fixed_ips"] = list
	}
	switch host := p["binding:host_id"]; {
	case host == nil || host == "":
		p["binding:host_id"], p["binding:vif_type"], p["binding:vif_details"] = "", "unbound", object{}
	case f.bindFails:
		p["binding:vif_type"] = "binding_failed"
	default:
		p["binding:vif_type"] = "bridge"
		p["binding:vif_details"] = object{"connectivity": "l2", "port_filter": true}
	}
}

func (f *fakeNeutron) refuse(w http.ResponseWriter, status int, kind string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(object{"NeutronError": object{"type": kind, "message": kind + ": no", "detail": ""}})
}

func values(m map[string]object) []object {
	out := []object{}
	for _, v := range m {
		out = append(out, v)
	}
	return out
}

// filter applies a query as Neutron does: values of one key are alternatives.
func filter(list []object, r *http.Request) []object {
	out := []object{}
	for _, o := range list {
		ok := true
		for k, want := range r.URL.Query() {
			if k != "fields" && !slices.Contains(want, fmt.Sprint(o[k])) {
				ok = false
			}
		}
		if ok {
			out = append(out, o)
		}
	}
	return out
}

// requests returns what was asked since the last call, sorted where the order is free.
func (f *fakeNeutron) requests() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := f.log
	f.log = nil
	slices.Sort(out)
	return out
}

func (f *fakeNeutron) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.ports)
}

func newAPI(t *testing.T, f *fakeNeutron) *API {
	t.Helper()
	s, err := keystone.New(keystone.Options{Section: "neutron", AuthURL: f.URL, Username: "nova", Password: "p", UserDomainName: "Default",
		ProjectName: "service", ProjectDomainName: "Default", ConnectRetries: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.CloseIdle)
	a, err := New(Options{Session: s, Host: hostName})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func instance() *novalet.Instance {
	return &novalet.Instance{UUID: instUUID, ProjectID: projectID, Hostname: "web1", AvailabilityZone: "nova"}
}

func userContext() novalet.RequestContext {
	return novalet.RequestContext{RequestID: "req-1", AuthToken: "user", ProjectID: projectID}
}

func request(nets ...novalet.NetworkRequest) *novalet.AllocateRequest {
	return &novalet.AllocateRequest{Context: userContext(), Instance: instance(), Networks: nets}
}
