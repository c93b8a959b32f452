package neutron_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
	"github.com/novalet/novalet/internal/keystone"
	"github.com/novalet/novalet/network"
	"github.com/novalet/novalet/network/neutron"
)

// openrc reads a file of "export OS_X=y" lines.
func openrc(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	env := map[string]string{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		for _, field := range strings.Fields(strings.TrimPrefix(sc.Text(), "export ")) {
			if k, v, ok := strings.Cut(field, "="); ok {
				env[k] = strings.Trim(v, `"'`)
			}
		}
	}
	return env
}

func liveSession(t *testing.T, path string, observe func(keystone.Request)) *keystone.Session {
	t.Helper()
	env := openrc(t, path)
	s, err := keystone.New(keystone.Options{
		Section: "neutron", AuthURL: env["OS_AUTH_URL"], Username: env["OS_USERNAME"], Password: novalet.Secret(env["OS_PASSWORD"]),
		ProjectName: env["OS_PROJECT_NAME"], UserDomainName: or(env["OS_USER_DOMAIN_NAME"], "Default"),
		ProjectDomainName: or(env["OS_PROJECT_DOMAIN_NAME"], "Default"), RegionName: env["OS_REGION_NAME"],
		ValidInterfaces: []string{"public"}, Observe: observe,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func newUUID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// TestLive makes a port on a real cloud, plugs it into a namespace, waits until Neutron has wired it, reaches the router and
// takes everything away again. NOVALET_CLOUD_OPENRC names the administrator's openrc, NOVALET_CLOUD_USER_OPENRC (default:
// the same) the requester's, NOVALET_CLOUD_HOST (default novalet1) the host to bind to, NOVALET_CLOUD_NETWORK the
// network's id.
func TestLive(t *testing.T) {
	path := os.Getenv("NOVALET_CLOUD_OPENRC")
	if path == "" {
		t.Skip("NOVALET_CLOUD_OPENRC names no cloud")
	}
	networkID := os.Getenv("NOVALET_CLOUD_NETWORK")
	var requests []string
	session := liveSession(t, path, func(r keystone.Request) {
		if r.Service == "network" {
			requests = append(requests, fmt.Sprintf("%s %s %d %s", r.Method, r.Path, r.Status, r.Duration.Round(time.Millisecond)))
		}
	})
	user := liveSession(t, or(os.Getenv("NOVALET_CLOUD_USER_OPENRC"), path), nil)
	token, err := user.Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	project, err := user.ProjectID(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	api, err := neutron.New(neutron.Options{Session: session, Host: or(os.Getenv("NOVALET_CLOUD_HOST"), "novalet1")})
	if err != nil {
		t.Fatal(err)
	}
	inst := &novalet.Instance{UUID: newUUID(), ProjectID: project, Hostname: "live-test", AvailabilityZone: "nova"}
	rc := novalet.RequestContext{RequestID: "req-" + newUUID(), AuthToken: token, ProjectID: project}
	req := &novalet.AllocateRequest{Context: rc, Instance: inst, SecurityGroups: []string{"default"}}
	if networkID != "" {
		req.Networks = []novalet.NetworkRequest{{NetworkID: networkID}, {NetworkID: networkID}}
	}
	info, err := api.Allocate(t.Context(), req)
	t.Logf("allocate: %d requests\n%s", len(requests), strings.Join(requests, "\n"))
	if err != nil {
		t.Fatal(err)
	}
	deallocated := false
	t.Cleanup(func() {
		if !deallocated {
			if err := api.Deallocate(t.Context(), rc, inst, info); err != nil {
				t.Error(err)
			}
		}
	})
	for _, v := range info {
		t.Logf("port %s type %s bridge %s active %v mtu %d details %s subnets %+v", v.ID, v.Type, v.Network.Bridge, v.Active, v.Network.Meta.MTU, v.Details, v.Network.Subnets)
	}
	inst.NetworkInfo = info
	requests = nil
	again, err := api.Refresh(t.Context(), rc, inst, info)
	if err != nil || len(again) != len(info) {
		t.Fatalf("refresh: %d ports, %v", len(again), err)
	}
	t.Logf("refresh: %d requests\n%s", len(requests), strings.Join(requests, "\n"))
	for i := range info {
		if again[i].ID != info[i].ID || again[i].Network.ID != info[i].Network.ID {
			t.Errorf("port %d: %s became %s", i, info[i].ID, again[i].ID)
		}
	}

	if os.Geteuid() == 0 && os.Getenv("NOVALET_ROOT_TESTS") == "1" {
		plugLive(t, api, inst, info)
	}

	requests = nil
	if err := api.Deallocate(t.Context(), rc, inst, info); err != nil {
		t.Fatal(err)
	}
	deallocated = true
	t.Logf("deallocate: %d requests\n%s", len(requests), strings.Join(requests, "\n"))
	left, err := api.Refresh(t.Context(), rc, inst, info)
	if err != nil || len(left) != 0 {
		t.Errorf("after deallocation: %d ports, %v", len(left), err)
	}
	if err := api.Deallocate(t.Context(), rc, inst, info); err != nil {
		t.Errorf("deallocate again: %v", err)
	}
}

func plugLive(t *testing.T, api *neutron.API, inst *novalet.Instance, info novalet.NetworkInfo) {
	hosttest.RequireRoot(t)
	p, err := network.New(network.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ns := "nvlive" + inst.UUID[:6]
	if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
		t.Fatalf("ip netns add: %v: %s", err, out)
	}
	defer func() { _ = exec.Command("ip", "netns", "del", ns).Run() }()
	for i := range info {
		start := time.Now()
		r := &novalet.PlugRequest{InstanceUUID: inst.UUID, VIF: &info[i], NetNS: "/run/netns/" + ns, Index: i, Static: true}
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		t.Logf("plug: %s", time.Since(start))
		defer func() {
			if err := p.Unplug(t.Context(), inst.UUID, &info[i]); err != nil {
				t.Error(err)
			}
		}()
	}
	plugged := time.Now()
	for i := range info {
		for {
			ok, err := api.PortActive(t.Context(), info[i].ID)
			if err != nil {
				t.Fatal(err)
			}
			if ok {
				break
			}
			if time.Since(plugged) > time.Minute {
				t.Fatalf("port %s is not wired after a minute", info[i].ID)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	t.Logf("active %s after the plug", time.Since(plugged))
	for _, s := range info[0].Network.Subnets {
		if s.Gateway.Address == nil || !netip.MustParseAddr(*s.Gateway.Address).Is4() {
			continue
		}
		out, err := exec.Command("ip", "netns", "exec", ns, "ping", "-c", "3", "-W", "5", *s.Gateway.Address).CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			show, _ := exec.Command("ip", "netns", "exec", ns, "ip", "addr").CombinedOutput()
			t.Errorf("ping the router: %v\n%s", err, show)
		}
	}
}

// TestLiveRequestedPort brings a port along: it is bound, refused to a second server, and given back as it came.
func TestLiveRequestedPort(t *testing.T) {
	path, networkID := os.Getenv("NOVALET_CLOUD_OPENRC"), os.Getenv("NOVALET_CLOUD_NETWORK")
	if path == "" || networkID == "" {
		t.Skip("NOVALET_CLOUD_OPENRC and NOVALET_CLOUD_NETWORK name no network of a cloud")
	}
	ctx := t.Context()
	user := liveSession(t, or(os.Getenv("NOVALET_CLOUD_USER_OPENRC"), path), nil)
	cl, err := user.Client(ctx, "network")
	if err != nil {
		t.Fatal(err)
	}
	type port struct {
		ID       string `json:"id"`
		DeviceID string `json:"device_id"`
		Owner    string `json:"device_owner"`
		Status   string `json:"status"`
	}
	var made struct{ Port port }
	base := cl.ServiceURL("v2.0", "ports")
	if _, err := cl.Post(ctx, base, map[string]any{"port": map[string]any{"network_id": networkID, "name": "live-test"}}, &made, nil); err != nil {
		t.Fatal(err)
	}
	id := made.Port.ID
	t.Cleanup(func() {
		if _, err := cl.Delete(context.Background(), base+"/"+id, nil); err != nil {
			t.Error(err)
		}
	})
	token, err := user.Token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	project, err := user.ProjectID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	api, err := neutron.New(neutron.Options{Session: liveSession(t, path, nil), Host: or(os.Getenv("NOVALET_CLOUD_HOST"), "novalet1")})
	if err != nil {
		t.Fatal(err)
	}
	rc := novalet.RequestContext{RequestID: "req-" + newUUID(), AuthToken: token, ProjectID: project}
	boot := func(project string) (*novalet.Instance, novalet.NetworkInfo, error) {
		inst := &novalet.Instance{UUID: newUUID(), ProjectID: project, Hostname: "live-port", AvailabilityZone: "nova"}
		info, err := api.Allocate(ctx, &novalet.AllocateRequest{Context: rc, Instance: inst, Networks: []novalet.NetworkRequest{{PortID: id}}})
		return inst, info, err
	}
	inst, info, err := boot(project)
	if err != nil {
		t.Fatal(err)
	}
	if len(info) != 1 || info[0].ID != id || !info[0].PreserveOnDelete || len(info[0].Network.Subnets) != 1 {
		t.Errorf("info %+v", info)
	}
	var f *novalet.Fault
	if _, _, err := boot(project); !errors.As(err, &f) || f.Class != "PortInUse" {
		t.Errorf("a second server: %v", err)
	}
	if _, _, err := boot("00000000000000000000000000000000"); !errors.As(err, &f) || f.Class != "PortNotUsable" {
		t.Errorf("another project: %v", err)
	}
	if bound, err := api.Bind(ctx, rc, inst, info); err != nil || len(bound) != 1 || bound[0].Type != info[0].Type {
		t.Errorf("bind again: %+v, %v", bound, err)
	}
	for range 2 {
		if err := api.Deallocate(ctx, rc, inst, info); err != nil {
			t.Fatal(err)
		}
	}
	var now struct{ Port port }
	if _, err := cl.Get(ctx, base+"/"+id, &now, nil); err != nil {
		t.Fatal(err)
	}
	if now.Port.DeviceID != "" || now.Port.Owner != "" {
		t.Errorf("the port was not given back: %+v", now.Port)
	}

	// What does not exist has its own name.
	_, err = api.Allocate(ctx, &novalet.AllocateRequest{Context: rc, Instance: inst, Networks: []novalet.NetworkRequest{{NetworkID: newUUID()}}})
	if !errors.As(err, &f) || f.Class != "NetworkNotFound" {
		t.Errorf("unknown network: %v", err)
	}
	_, err = api.Allocate(ctx, &novalet.AllocateRequest{Context: rc, Instance: inst, Networks: []novalet.NetworkRequest{{NetworkID: networkID}}, SecurityGroups: []string{"no-such-group"}})
	if !errors.As(err, &f) || f.Class != "SecurityGroupNotFound" {
		t.Errorf("unknown group: %v", err)
	}
	_, err = api.Allocate(ctx, &novalet.AllocateRequest{Context: rc, Instance: inst, Networks: []novalet.NetworkRequest{{NetworkID: networkID, Address: "192.0.2.77"}}})
	if !errors.As(err, &f) || f.Class != "InvalidInput" {
		t.Errorf("address of another network: %v", err)
	}
	if left, err := api.Refresh(ctx, rc, inst, nil); err != nil || len(left) != 0 {
		t.Errorf("ports left: %+v, %v", left, err)
	}
}
