// Package cloud_test holds the tests against a real OpenStack with novalet as its compute service: the one that
// `make cloud` brings up. They act as users do, through the public APIs, and look at the host beside that.
// NOVALET_CLOUD names the cloud's state folder; without it every test skips and says so.
package cloud_test

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/keypairs"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/networks"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/ports"
)

// computeHost is the name that make cloud gives the agent.
func computeHost() string {
	if h := os.Getenv("COMPUTE_HOST"); h != "" {
		return h
	}
	return "novalet1"
}

// state is the cloud's folder; it skips the test when there is no cloud.
func state(t testing.TB) string {
	t.Helper()
	s := os.Getenv("NOVALET_CLOUD")
	if s == "" {
		t.Skip("needs a real cloud: NOVALET_CLOUD=/srv/novalet-cloud after `make cloud`")
	}
	return s
}

// user is one logged-in user with clients of what the tests use.
type user struct {
	name                                       string
	project                                    string
	env                                        map[string]string
	compute, network, image, placement, orches *gophercloud.ServiceClient
}

var logins sync.Map // name → *user

// as logs in as admin, demo or demo2, once per run.
func as(t testing.TB, name string) *user {
	t.Helper()
	dir := state(t)
	if u, ok := logins.Load(name); ok {
		return u.(*user)
	}
	env, err := openrc(filepath.Join(dir, "openrc-"+name))
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	provider, err := openstack.AuthenticatedClient(ctx, gophercloud.AuthOptions{
		IdentityEndpoint: env["OS_AUTH_URL"], Username: env["OS_USERNAME"], Password: env["OS_PASSWORD"], AllowReauth: true,
		DomainName: "Default", Scope: &gophercloud.AuthScope{ProjectName: env["OS_PROJECT_NAME"], DomainName: "Default"}})
	if err != nil {
		t.Fatalf("log in as %s: %v", name, err)
	}
	eo := gophercloud.EndpointOpts{Region: env["OS_REGION_NAME"]}
	u := &user{name: name, env: env}
	for _, s := range []struct {
		at *(*gophercloud.ServiceClient)
		fn func(*gophercloud.ProviderClient, gophercloud.EndpointOpts) (*gophercloud.ServiceClient, error)
	}{{&u.compute, openstack.NewComputeV2}, {&u.network, openstack.NewNetworkV2}, {&u.image, openstack.NewImageV2},
		{&u.placement, openstack.NewPlacementV1}, {&u.orches, openstack.NewOrchestrationV1}} {
		if *s.at, err = s.fn(provider, eo); err != nil {
			t.Fatalf("find a service's end point: %v", err)
		}
	}
	u.compute.Microversion = "2.79"
	u.placement.Microversion = "1.28"
	u.project = projectOf(t, provider)
	logins.Store(name, u)
	return u
}

// openrc reads the exports of a shell file.
func openrc(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	env := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		line, ok := strings.CutPrefix(s.Text(), "export ")
		if !ok {
			continue
		}
		for _, kv := range strings.Fields(line) {
			k, v, _ := strings.Cut(kv, "=")
			env[k] = strings.Trim(v, `'"`)
		}
	}
	return env, nil
}

// eventually polls until fn returns nil, for at most limit, and fails the test with its last error.
func eventually(t testing.TB, limit time.Duration, what string, fn func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, limit, err)
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// long is how long a wait may take on a loaded machine before something is wrong.
const long = 3 * time.Minute

// bootOpts are what a test wants of a server; zero values mean the defaults of boot.
type bootOpts struct {
	name     string
	image    string
	flavor   string
	networks []servers.Network
	noNet    bool
	key      string
	userData string
	metadata map[string]string
	groups   []string
	drive    bool
	count    int
	files    servers.Personality
	zone     string
	trusted  []string // certificates
}

// trusting adds to a request what the library does not know.
type trusting struct {
	servers.CreateOptsBuilder
	certificates []string
}

func (c trusting) ToServerCreateMap() (map[string]any, error) {
	m, err := c.CreateOptsBuilder.ToServerCreateMap()
	if err == nil {
		m["server"].(map[string]any)["trusted_image_certificates"] = c.certificates
	}
	return m, err
}

// create sends the request and registers the server's deletion.
func create(t testing.TB, u *user, o bootOpts) *servers.Server {
	t.Helper()
	s, err := tryCreate(t, u, o)
	if err != nil {
		t.Fatalf("create server %s: %v", o.name, err)
	}
	return s
}

func tryCreate(t testing.TB, u *user, o bootOpts) (*servers.Server, error) {
	t.Helper()
	if o.name == "" {
		o.name = strings.ReplaceAll(strings.ToLower(t.Name()), "/", "-")
	}
	if o.flavor == "" {
		o.flavor = "m1.tiny"
	}
	var nets any
	switch {
	case o.noNet:
		nets = "none"
	case o.networks == nil:
		nets = []servers.Network{{UUID: networkID(t, u, privateNet(u))}}
	default:
		nets = o.networks
	}
	drive := o.drive
	opts := servers.CreateOpts{Name: o.name, ImageRef: o.image, FlavorRef: flavorID(t, u, o.flavor), Networks: nets, UserData: []byte(o.userData),
		Metadata: o.metadata, SecurityGroups: o.groups, ConfigDrive: &drive, Personality: o.files, AvailabilityZone: o.zone}
	if o.count > 1 {
		opts.Min, opts.Max = o.count, o.count
	}
	c := *u.compute
	if o.files != nil {
		c.Microversion = "2.56"
	}
	var b servers.CreateOptsBuilder = opts
	if o.key != "" {
		b = keypairs.CreateOptsExt{CreateOptsBuilder: opts, KeyName: o.key}
	}
	if o.trusted != nil {
		b = trusting{b, o.trusted}
	}
	s, err := servers.Create(t.Context(), &c, b, nil).Extract()
	if err != nil {
		return nil, err
	}
	if o.count <= 1 {
		t.Cleanup(func() { remove(t, u, s.ID) })
	}
	return s, nil
}

// boot creates a server and waits for ACTIVE.
func boot(t testing.TB, u *user, o bootOpts) *servers.Server {
	t.Helper()
	return waitStatus(t, u, create(t, u, o).ID, "ACTIVE")
}

// waitStatus waits until the server has a status and no task, and fails at ERROR unless that is what is wanted.
func waitStatus(t testing.TB, u *user, id, status string) *servers.Server {
	t.Helper()
	var last *servers.Server
	eventually(t, long, "server "+id+" becomes "+status, func() error {
		s, err := servers.Get(t.Context(), u.compute, id).Extract()
		if err != nil {
			return err
		}
		last = s
		if s.Status == "ERROR" && status != "ERROR" {
			t.Fatalf("server %s is in ERROR: %s", s.Name, s.Fault.Message)
		}
		if s.Status != status || s.TaskState != "" {
			return fmt.Errorf("status %s, task %q", s.Status, s.TaskState)
		}
		return nil
	})
	return last
}

// waitGone waits until there is no such server any more.
func waitGone(t testing.TB, u *user, id string) {
	t.Helper()
	eventually(t, long, "server "+id+" goes", func() error {
		s, err := servers.Get(t.Context(), u.compute, id).Extract()
		switch {
		case gophercloud.ResponseCodeIs(err, http.StatusNotFound):
			return nil
		case err != nil:
			return err
		}
		return fmt.Errorf("status %s, task %q", s.Status, s.TaskState)
	})
}

// remove deletes a server and waits until it is gone. It may be called twice.
func remove(t testing.TB, u *user, id string) {
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	if err := servers.Delete(ctx, u.compute, id).ExtractErr(); err != nil && !gophercloud.ResponseCodeIs(err, http.StatusNotFound) {
		t.Errorf("delete server %s: %v", id, err)
		return
	}
	for {
		s, err := servers.Get(ctx, u.compute, id).Extract()
		if gophercloud.ResponseCodeIs(err, http.StatusNotFound) {
			return
		}
		if err != nil {
			t.Errorf("delete server %s: still there (%v)", id, err)
			return
		}
		if s.Status == "ERROR" && s.TaskState == "" {
			t.Errorf("delete server %s: it went to ERROR: %s", id, s.Fault.Message)
			return
		}
		select {
		case <-ctx.Done():
			t.Errorf("delete server %s: still %s/%s after %v", id, s.Status, s.TaskState, long)
			return
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// fixedIP is the server's first address on its first port.
func fixedIP(t testing.TB, u *user, id string) (ip, port string) {
	t.Helper()
	p, err := ports.List(u.network, ports.ListOpts{DeviceID: id}).AllPages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := ports.ExtractPorts(p)
	if err != nil || len(l) == 0 || len(l[0].FixedIPs) == 0 {
		t.Fatalf("ports of server %s: %v, %v", id, l, err)
	}
	return l[0].FixedIPs[0].IPAddress, l[0].ID
}

// privateNet names the user's own network.
func privateNet(u *user) string {
	if u.name == "demo2" {
		return "private2"
	}
	return "private"
}

func networkID(t testing.TB, u *user, name string) string {
	t.Helper()
	p, err := networks.List(u.network, networks.ListOpts{Name: name}).AllPages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := networks.ExtractNetworks(p)
	if err != nil || len(l) != 1 {
		t.Fatalf("network %s: %v, %v", name, l, err)
	}
	return l[0].ID
}

// consoleLog reads the console log through the API.
func consoleLog(t testing.TB, u *user, id string) string {
	t.Helper()
	s, err := servers.ShowConsoleOutput(t.Context(), u.compute, id, servers.ShowConsoleOutputOpts{}).Extract()
	if err != nil {
		t.Fatalf("console log of %s: %v", id, err)
	}
	return s
}

// waitLog waits until the console log holds a text.
func waitLog(t testing.TB, u *user, id, want string, limit time.Duration) string {
	t.Helper()
	var log string
	eventually(t, limit, fmt.Sprintf("console log shows %q", want), func() error {
		log = consoleLog(t, u, id)
		if !strings.Contains(log, want) {
			return fmt.Errorf("its end: %q", tail(log, 300))
		}
		return nil
	})
	return log
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// wantConflict checks that the API refused something as it does in a wrong state.
func wantConflict(t testing.TB, what string, err error) {
	t.Helper()
	if !gophercloud.ResponseCodeIs(err, http.StatusConflict) {
		t.Errorf("%s: want 409, got %v", what, err)
	}
}

// sh runs a command on the host.
func sh(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, tail(string(out), 500))
	}
	return string(out), nil
}

// devstack runs one of the cloud's scripts.
func devstack(t testing.TB, script string, args ...string) string {
	t.Helper()
	out, err := sh(context.Background(), "bash", append([]string{filepath.Join("..", "..", "devstack", script)}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
