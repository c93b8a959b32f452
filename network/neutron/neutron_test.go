package neutron

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
)

func TestAllocateAsksOnceWhenEverythingIsKnown(t *testing.T) {
	f := newFake(t)
	a := newAPI(t, f)
	info, err := a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netB}, novalet.NetworkRequest{NetworkID: netA}))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"A GET extensions", "A GET networks", "A GET ports", "A GET subnets", "A POST ports", "U GET networks"}
	if got := f.requests(); !slices.Equal(got, want) {
		t.Errorf("first boot: %q", got)
	}
	if len(info) != 2 || info[0].Network.ID != netB || info[1].Network.ID != netA {
		t.Fatalf("not in request order: %+v", info)
	}
	p := f.ports[info[0].ID]
	if p["device_owner"] != "compute:nova" || p["device_id"] != instUUID || p["binding:host_id"] != hostName || p["tenant_id"] != projectID {
		t.Errorf("port %v", p)
	}
	if info[0].PreserveOnDelete || info[0].Active {
		t.Errorf("vif %+v", info[0])
	}
	if _, err := a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netB})); err != nil {
		t.Fatal(err)
	}
	if got := f.requests(); !slices.Equal(got, []string{"A POST ports"}) {
		t.Errorf("second boot: %q", got)
	}
	// The network gets another subnet while the old ones are remembered.
	delete(f.subnets, subnetB)
	f.subnet("58c14c15-153a-4fd5-91a8-917c9120d2ab", netB, "10.79.0.0/22", "10.79.0.1")
	info, err = a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netB}))
	if err != nil || len(info[0].Network.Subnets) != 1 || info[0].Network.Subnets[0].CIDR != "10.79.0.0/22" {
		t.Errorf("new subnet: %+v, %v", info, err)
	}
	f.requests()
	a.Invalidate(netB)
	if _, err := a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netB})); err != nil {
		t.Fatal(err)
	}
	if got := f.requests(); len(got) != 5 {
		t.Errorf("after a change: %q", got)
	}
}

func TestAllocateWhereThePolicyForbidsBindingAtOnce(t *testing.T) {
	f := newFake(t)
	f.bindForbidden = true
	a := newAPI(t, f)
	info, err := a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netB}))
	if err != nil {
		t.Fatal(err)
	}
	if info[0].Type != "bridge" || f.ports[info[0].ID]["device_owner"] != "compute:nova" {
		t.Errorf("vif %+v", info[0])
	}
	f.requests()
	if info, err = a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netB})); err != nil {
		t.Fatal(err)
	}
	// The policy is asked about once.
	if got := f.requests(); !slices.Equal(got, []string{"A PUT ports/" + info[0].ID, "U POST ports"}) {
		t.Errorf("second boot: %q", got)
	}
}

func TestChosenAddressIsAskedForByTheUser(t *testing.T) {
	f := newFake(t)
	a := newAPI(t, f)
	info, err := a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netB, Address: "10.77.0.50"}))
	if err != nil || info[0].Network.Subnets[0].IPs[0].Address != "10.77.0.50" {
		t.Fatalf("%+v, %v", info, err)
	}
	// On somebody else's network only its owner may choose.
	_, err = a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netA, Address: "10.78.0.50"}))
	assertFault(t, err, novalet.ErrAbort, "Forbidden")
	if f.count() != 1 {
		t.Errorf("%d ports left, want the first", f.count())
	}
}

func TestRequestedPort(t *testing.T) {
	const id = "7ed59832-79d2-4d5a-922b-37f4f21d695a"
	for _, c := range []struct {
		name   string
		change func(p object)
		kind   error
		class  string
	}{
		{"usable", func(object) {}, nil, ""},
		{"ours from an earlier try", func(p object) { p["device_id"] = instUUID }, nil, ""},
		{"of another project", func(p object) { p["tenant_id"] = otherID }, novalet.ErrAbort, "PortNotUsable"},
		{"in use", func(p object) { p["device_id"] = "7ed59832-79d2-4d5a-922b-37f4f21d6900" }, novalet.ErrAbort, "PortInUse"},
		{"named otherwise", func(p object) { p["dns_name"] = "db1" }, novalet.ErrAbort, "PortNotUsableDNS"},
		{"named alike", func(p object) { p["dns_name"] = "web1" }, nil, ""},
		{"direct", func(p object) { p["binding:vnic_type"] = "direct" }, novalet.ErrAbort, "PortNotUsable"},
		{"with guaranteed bandwidth", func(p object) { p["resource_request"] = object{"request_groups": []any{1}} }, novalet.ErrAbort, "PortNotUsable"},
		{"with a broken mac", func(p object) { p["mac_address"] = "x" }, errAny, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t)
			p := f.port(id, netB, projectID)
			c.change(p)
			before, _ := json.Marshal(p)
			a := newAPI(t, f)
			info, err := a.Allocate(t.Context(), request(novalet.NetworkRequest{PortID: id}))
			switch {
			case c.kind == nil:
				if err != nil {
					t.Fatal(err)
				}
				if !info[0].PreserveOnDelete || f.ports[id]["binding:host_id"] != hostName {
					t.Errorf("vif %+v, port %v", info[0], f.ports[id])
				}
				return
			case c.kind == errAny:
				if err == nil {
					t.Error("accepted")
				}
			default:
				assertFault(t, err, c.kind, c.class)
			}
			if after, _ := json.Marshal(f.ports[id]); string(after) != string(before) {
				t.Errorf("the port was changed: %s", after)
			}
		})
	}
	f := newFake(t)
	_, err := newAPI(t, f).Allocate(t.Context(), request(novalet.NetworkRequest{PortID: id}))
	assertFault(t, err, novalet.ErrAbort, "PortNotFound")
}

var errAny = errors.New("any")

func assertFault(t *testing.T, err, kind error, class string) {
	t.Helper()
	var f *novalet.Fault
	if !errors.As(err, &f) || f.Class != class || !errors.Is(err, kind) {
		t.Fatalf("error %v, want class %s of kind %v", err, class, kind)
	}
	if f.Text == "" || len(f.Text) > 255 {
		t.Errorf("text for the tenant: %q", f.Text)
	}
}

func TestNetworkFaults(t *testing.T) {
	hidden := "0b16df38-d1df-4694-9552-d11ebc386200"
	attach := func(r *novalet.AllocateRequest) { r.Attach = true }
	for _, c := range []struct {
		name   string
		change func(f *fakeNeutron, r *novalet.AllocateRequest)
		nets   []novalet.NetworkRequest
		kind   error
		class  string
	}{
		{"unknown", nil, []novalet.NetworkRequest{{NetworkID: hidden}}, novalet.ErrAbort, "NetworkNotFound"},
		{"no id", nil, []novalet.NetworkRequest{{NetworkID: "../ports"}}, novalet.ErrAbort, "NetworkNotFound"},
		{"hidden from the project", func(f *fakeNeutron, r *novalet.AllocateRequest) {
			f.network(hidden, "x", otherID, false, false)
			attach(r)
		},
			[]novalet.NetworkRequest{{NetworkID: hidden}}, novalet.ErrAbort, "NetworkNotFound"},
		{"hidden, and the token has expired", func(f *fakeNeutron, r *novalet.AllocateRequest) {
			f.network(hidden, "x", otherID, false, false)
			r.Context.AuthToken = "expired"
			attach(r)
		}, []novalet.NetworkRequest{{NetworkID: hidden}}, novalet.ErrAbort, "NetworkNotFound"},
		{"external", func(f *fakeNeutron, r *novalet.AllocateRequest) {
			f.network(netExt, "public", otherID, false, true)
			f.subnet("58c14c15-153a-4fd5-91a8-917c9120d200", netExt, "172.24.4.0/24", "172.24.4.1")
		}, []novalet.NetworkRequest{{NetworkID: netExt}}, novalet.ErrAbort, "ExternalNetworkAttachForbidden"},
		{"two possible", nil, nil, novalet.ErrAbort, "NetworkAmbiguous"},
		{"none to attach", func(f *fakeNeutron, r *novalet.AllocateRequest) { clear(f.networks); attach(r) }, nil,
			novalet.ErrAbort, "InterfaceAttachFailedNoNetwork"},
		{"no subnet", func(f *fakeNeutron, r *novalet.AllocateRequest) { f.networks[netB]["subnets"] = []string{} },
			[]novalet.NetworkRequest{{NetworkID: netB}}, novalet.ErrAbort, "SecurityGroupCannotBeApplied"},
		{"group unknown", func(f *fakeNeutron, r *novalet.AllocateRequest) { r.SecurityGroups = []string{"web"} },
			[]novalet.NetworkRequest{{NetworkID: netB}}, novalet.ErrAbort, "SecurityGroupNotFound"},
		{"group of another project", func(f *fakeNeutron, r *novalet.AllocateRequest) {
			r.SecurityGroups = []string{"web"}
			f.groups = []object{{"id": "1", "name": "web", "tenant_id": otherID}}
		}, []novalet.NetworkRequest{{NetworkID: netB}}, novalet.ErrAbort, "SecurityGroupNotFound"},
		{"two groups of a name", func(f *fakeNeutron, r *novalet.AllocateRequest) {
			r.SecurityGroups = []string{"web"}
			f.groups = []object{{"id": "1", "name": "web", "tenant_id": projectID}, {"id": "2", "name": "web", "tenant_id": projectID}}
		}, []novalet.NetworkRequest{{NetworkID: netB}}, novalet.ErrAbort, "NoUniqueMatch"},
		{"quota", func(f *fakeNeutron, r *novalet.AllocateRequest) { f.quota = 0 },
			[]novalet.NetworkRequest{{NetworkID: netB}}, novalet.ErrAbort, "PortLimitExceeded"},
		{"no address left", post(http.StatusConflict, "IpAddressGenerationFailure"),
			[]novalet.NetworkRequest{{NetworkID: netB}}, novalet.ErrAbort, "NoMoreFixedIps"},
		{"address taken", post(http.StatusConflict, "IpAddressAlreadyAllocated"),
			[]novalet.NetworkRequest{{NetworkID: netB, Address: "10.77.0.50"}}, novalet.ErrAbort, "FixedIpAlreadyInUse"},
		{"address of another subnet", post(http.StatusBadRequest, "InvalidIpForNetwork"),
			[]novalet.NetworkRequest{{NetworkID: netB, Address: "10.99.0.50"}}, novalet.ErrAbort, "InvalidInput"},
		{"no address at all", nil, []novalet.NetworkRequest{{NetworkID: netB, Address: "x"}}, novalet.ErrAbort, "InvalidInput"},
		{"no agent on the host", func(f *fakeNeutron, r *novalet.AllocateRequest) { f.bindFails = true },
			[]novalet.NetworkRequest{{NetworkID: netB}}, novalet.ErrReschedule, "PortBindingFailed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t)
			r := request(c.nets...)
			if c.change != nil {
				c.change(f, r)
			}
			_, err := newAPI(t, f).Allocate(t.Context(), r)
			assertFault(t, err, c.kind, c.class)
			if f.count() != 0 {
				t.Errorf("%d ports left behind", f.count())
			}
		})
	}
}

// TestCancelledAllocation: a boot that ends while Neutron makes its port takes the port back by itself.
func TestCancelledAllocation(t *testing.T) {
	f := newFake(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	gone := errors.New("the image cannot be had")
	f.fail = func(method, path string) (int, string) {
		if method == http.MethodGet && strings.Contains(path, "subnets") {
			cancel(gone)
			// Even if this answer is still read, it is none of a success.
			return http.StatusServiceUnavailable, ""
		}
		return 0, ""
	}
	if _, err := newAPI(t, f).Allocate(ctx, request(novalet.NetworkRequest{NetworkID: netB})); err == nil {
		t.Error("an allocation whose context ended reports success")
	}
	if f.count() != 0 {
		t.Errorf("%d ports left behind", f.count())
	}
}

func post(status int, kind string) func(*fakeNeutron, *novalet.AllocateRequest) {
	return func(f *fakeNeutron, _ *novalet.AllocateRequest) {
		f.fail = func(method, path string) (int, string) {
			if method == http.MethodPost {
				return status, kind
			}
			return 0, ""
		}
	}
}

func TestNoNetworks(t *testing.T) {
	f := newFake(t)
	a := newAPI(t, f)
	info, err := a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: "none"}))
	if err != nil || len(info) != 0 || len(f.requests()) != 0 {
		t.Errorf("none: %v, %v", info, err)
	}
	clear(f.networks)
	if info, err = a.Allocate(t.Context(), request()); err != nil || info == nil || len(info) != 0 {
		t.Errorf("nothing asked for and nothing there: %v, %v", info, err)
	}
	f.network(netB, "private", projectID, false, false)
	f.subnet("58c14c15-153a-4fd5-91a8-917c9120d2ff", netB, "10.77.0.0/22", "10.77.0.1")
	if info, err = a.Allocate(t.Context(), request()); err != nil || len(info) != 1 {
		t.Errorf("the only one: %v, %v", info, err)
	}
}

func TestSecurityGroupsByNameAndID(t *testing.T) {
	f := newFake(t)
	f.groups = []object{{"id": "1", "name": "web", "tenant_id": projectID}, {"id": "2", "name": "db", "tenant_id": projectID}}
	r := request(novalet.NetworkRequest{NetworkID: netB})
	r.SecurityGroups = []string{"2", "web", "db"}
	info, err := newAPI(t, f).Allocate(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if got := f.ports[info[0].ID]["security_groups"]; cmp.Diff(got, []any{"2", "1"}) != "" {
		t.Errorf("groups %v", got)
	}
	if got := f.requests(); !slices.Contains(got, "U GET security-groups") {
		t.Errorf("requests %q", got)
	}
	r.Context.AuthToken = "expired"
	if info, err = newAPI(t, f).Allocate(t.Context(), r); err != nil || len(f.ports[info[0].ID]["security_groups"].([]any)) != 2 {
		t.Errorf("with an expired token: %v", err)
	}
}

func TestDNSNameWhereNeutronHasIt(t *testing.T) {
	f := newFake(t)
	f.exts = append(f.exts, "dns-integration")
	a := newAPI(t, f)
	info, err := a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netB}))
	if err != nil || f.ports[info[0].ID]["dns_name"] != "web1" {
		t.Fatalf("port %v, %v", f.ports, err)
	}
	f.requests()
	f.networks[netB]["dns_domain"] = "example.org."
	a.Invalidate("")
	if info, err = a.Allocate(t.Context(), request(novalet.NetworkRequest{NetworkID: netB})); err != nil {
		t.Fatal(err)
	}
	// The record goes to the user's zone, so the user asks.
	if got := f.requests(); !slices.Contains(got, "U PUT ports/"+info[0].ID) || f.ports[info[0].ID]["dns_name"] != "web1" {
		t.Errorf("requests %q", got)
	}
}

func TestAnswerLostAfterThePortsWereMade(t *testing.T) {
	f := newFake(t)
	inst := instance()
	old := f.port("7ed59832-79d2-4d5a-922b-37f4f21d695a", netA, projectID)
	old["device_id"], old["device_owner"] = instUUID, "compute:nova"
	inst.NetworkInfo = novalet.NetworkInfo{{ID: "7ed59832-79d2-4d5a-922b-37f4f21d695a"}}
	f.hangUp = http.MethodPost
	r := request(novalet.NetworkRequest{NetworkID: netB})
	r.Instance, r.Attach = inst, true
	_, err := newAPI(t, f).Allocate(t.Context(), r)
	if !errors.Is(err, novalet.ErrTryAgain) {
		t.Fatalf("error %v, want ErrTryAgain", err)
	}
	if f.count() != 1 || f.ports["7ed59832-79d2-4d5a-922b-37f4f21d695a"] == nil {
		t.Errorf("ports left: %v", f.ports)
	}
}

func TestFailedBuildGivesBackTheUsersPort(t *testing.T) {
	const id = "7ed59832-79d2-4d5a-922b-37f4f21d695a"
	f := newFake(t)
	f.port(id, netB, projectID)["binding:profile"] = object{"kept": "yes", "pci_slot": "0000:00:01.0"}
	f.fail = func(method, path string) (int, string) {
		if method == http.MethodGet && path == "subnets" {
			return http.StatusServiceUnavailable, ""
		}
		return 0, ""
	}
	_, err := newAPI(t, f).Allocate(t.Context(), request(novalet.NetworkRequest{PortID: id}, novalet.NetworkRequest{NetworkID: netB}))
	if !errors.Is(err, novalet.ErrTryAgain) {
		t.Fatalf("error %v, want ErrTryAgain", err)
	}
	p := f.ports[id]
	if f.count() != 1 || p["device_id"] != "" || p["binding:host_id"] != "" || p["device_owner"] != "" {
		t.Errorf("ports left: %v", f.ports)
	}
	if cmp.Diff(p["binding:profile"], object{"kept": "yes"}) != "" {
		t.Errorf("profile %v", p["binding:profile"])
	}
}

// TestPortTakenMeanwhile: between the look at the user's port and its binding another server got it.
func TestPortTakenMeanwhile(t *testing.T) {
	const id = "7ed59832-79d2-4d5a-922b-37f4f21d695a"
	f := newFake(t)
	p := f.port(id, netB, projectID)
	f.fail = func(method, path string) (int, string) {
		if method == http.MethodPut {
			p["device_id"], p["binding:host_id"] = "another", "compute2"
			return http.StatusConflict, "MacAddressInUse"
		}
		return 0, ""
	}
	_, err := newAPI(t, f).Allocate(t.Context(), request(novalet.NetworkRequest{PortID: id}))
	assertFault(t, err, novalet.ErrAbort, "PortInUse")
	f.fail = nil
	if p["device_id"] != "another" || p["binding:host_id"] != "compute2" {
		t.Errorf("the other server lost its port: %v", p)
	}
	puts := 0
	for _, r := range f.requests() {
		if strings.HasPrefix(r, "A PUT") {
			puts++
		}
	}
	if puts != 1 {
		t.Errorf("%d updates, want the one that failed", puts)
	}
}

func TestCacheForgetsWhatWasReadBeforeAChange(t *testing.T) {
	c := newCache[int](time.Hour)
	fetched := 0
	get := func(during func()) int {
		t.Helper()
		m, err := c.get(t.Context(), []string{"a"}, func(context.Context, []string) (map[string]int, error) {
			fetched++
			n := fetched
			if during != nil {
				during()
			}
			return map[string]int{"a": n}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return m["a"]
	}
	// The change comes while the answer is on its way: the answer may be of before it.
	if n := get(func() { c.forget("a") }); n != 1 {
		t.Errorf("%d", n)
	}
	if n := get(nil); n != 2 {
		t.Errorf("an answer from before the change was kept: %d", n)
	}
	if n := get(nil); n != 2 {
		t.Errorf("asked again without need: %d", n)
	}
	c.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	if n := get(nil); n != 3 {
		t.Errorf("out of date and kept: %d", n)
	}
}

func TestCacheSharesOneFetch(t *testing.T) {
	c := newCache[string](time.Hour)
	var mu sync.Mutex
	var asked []string
	start := make(chan struct{})
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			m, err := c.get(t.Context(), []string{"a", "b"}, func(_ context.Context, missing []string) (map[string]string, error) {
				<-start
				mu.Lock()
				asked = append(asked, missing...)
				mu.Unlock()
				return map[string]string{"a": "1", "b": "2"}, nil
			})
			if err != nil || m["a"] != "1" || m["b"] != "2" {
				t.Errorf("%v, %v", m, err)
			}
		})
	}
	close(start)
	wg.Wait()
	if len(asked) != 2 {
		t.Errorf("asked for %q", asked)
	}
}

func TestDeallocate(t *testing.T) {
	const own, users = "7ed59832-79d2-4d5a-922b-37f4f21d695a", "7ed59832-79d2-4d5a-922b-37f4f21d695b"
	f := newFake(t)
	a := newAPI(t, f)
	for _, id := range []string{own, users} {
		f.port(id, netB, projectID)["device_id"] = instUUID
	}
	foreign := f.port("7ed59832-79d2-4d5a-922b-37f4f21d695c", netA, otherID)
	foreign["device_id"] = instUUID // anybody may write that into a port of theirs
	other := f.port("7ed59832-79d2-4d5a-922b-37f4f21d695d", netB, projectID)
	other["device_id"] = "someone else"
	info := novalet.NetworkInfo{{ID: users, PreserveOnDelete: true}, {ID: "7ed59832-79d2-4d5a-922b-37f4f21d695d"}}
	f.noFilters = true // what is answered is not believed
	for range 2 {
		if err := a.Deallocate(t.Context(), userContext(), instance(), info); err != nil {
			t.Fatal(err)
		}
	}
	if f.ports[own] != nil || f.ports[users] == nil || f.ports[users]["device_id"] != "" {
		t.Errorf("ports left: %v", f.ports)
	}
	if foreign["device_id"] != instUUID || f.ports["7ed59832-79d2-4d5a-922b-37f4f21d695d"] == nil {
		t.Errorf("ports of others were touched: %v", f.ports)
	}
	for _, r := range f.requests() {
		if strings.HasPrefix(r, "U ") {
			t.Errorf("%s: the user's token may have ended long ago", r)
		}
	}
	f.Close()
	if err := a.Deallocate(t.Context(), userContext(), instance(), nil); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("neutron away: %v, want ErrTryAgain", err)
	}
}

func TestRelease(t *testing.T) {
	const id = "7ed59832-79d2-4d5a-922b-37f4f21d695a"
	f := newFake(t)
	a := newAPI(t, f)
	p := f.port(id, netB, projectID)
	p["device_id"] = "taken by another since"
	if err := a.Release(t.Context(), userContext(), instance(), &novalet.VIF{ID: id}); err != nil || f.ports[id] == nil {
		t.Errorf("a port of another instance: %v", err)
	}
	p["device_id"] = instUUID
	if err := a.Release(t.Context(), userContext(), instance(), &novalet.VIF{ID: id, PreserveOnDelete: true}); err != nil || p["device_id"] != "" {
		t.Errorf("the user's port: %v %v", p, err)
	}
	p["device_id"] = instUUID
	for range 2 {
		if err := a.Release(t.Context(), userContext(), instance(), &novalet.VIF{ID: id}); err != nil || f.ports[id] != nil {
			t.Errorf("our port: %v", err)
		}
	}
	if err := a.Release(t.Context(), userContext(), instance(), &novalet.VIF{ID: "../networks/x"}); err == nil {
		t.Error("a path was taken for a port")
	}
}

func TestUnbindAndBind(t *testing.T) {
	const here, moved = "7ed59832-79d2-4d5a-922b-37f4f21d695a", "7ed59832-79d2-4d5a-922b-37f4f21d695b"
	f := newFake(t)
	a := newAPI(t, f)
	for id, host := range map[string]string{here: hostName, moved: "compute2"} {
		p := f.port(id, netB, projectID)
		f.update(p, object{"device_id": instUUID, "device_owner": "compute:nova", "binding:host_id": host})
	}
	f.ports[moved]["binding:profile"] = object{"migrating_to": hostName}
	if err := a.Unbind(t.Context(), userContext(), instance(), nil); err != nil {
		t.Fatal(err)
	}
	if f.ports[here]["binding:host_id"] != "" || f.ports[here]["device_id"] != instUUID {
		t.Errorf("not unbound: %v", f.ports[here])
	}
	if f.ports[moved]["binding:host_id"] != "compute2" {
		t.Errorf("another host's binding was broken: %v", f.ports[moved])
	}
	cached := novalet.NetworkInfo{{ID: moved, PreserveOnDelete: true}, {ID: here}}
	info, err := a.Bind(t.Context(), userContext(), instance(), cached)
	if err != nil {
		t.Fatal(err)
	}
	if len(info) != 2 || info[0].ID != moved || !info[0].PreserveOnDelete || info[1].PreserveOnDelete || info[1].Type != "bridge" {
		t.Errorf("info %+v", info)
	}
	if f.ports[moved]["binding:host_id"] != hostName || len(f.ports[moved]["binding:profile"].(object)) != 0 {
		t.Errorf("port %v", f.ports[moved])
	}
	f.bindFails = true
	_, err = a.Bind(t.Context(), userContext(), instance(), cached)
	assertFault(t, err, novalet.ErrReschedule, "PortBindingFailed")
}

func TestRefreshKeepsOrderAndFlags(t *testing.T) {
	f := newFake(t)
	a := newAPI(t, f)
	ids := []string{"7ed59832-79d2-4d5a-922b-37f4f21d695c", "7ed59832-79d2-4d5a-922b-37f4f21d695a", "7ed59832-79d2-4d5a-922b-37f4f21d695b"}
	for _, id := range ids {
		p := f.port(id, netB, projectID)
		p["device_id"], p["device_owner"] = instUUID, "compute:nova"
	}
	f.ports[ids[0]]["status"] = "ACTIVE"
	f.ports[ids[1]]["admin_state_up"] = false
	f.port("7ed59832-79d2-4d5a-922b-37f4f21d6900", netB, projectID)["device_id"] = instUUID // being made
	f.fips = []object{{"port_id": ids[0], "floating_ip_address": "172.24.4.9", "fixed_ip_address": "10.77.0.99"}}
	cached := novalet.NetworkInfo{{ID: "7ed59832-79d2-4d5a-922b-37f4f21d6901"}, {ID: ids[0], PreserveOnDelete: true}, {ID: ids[1]}}
	info, err := a.Refresh(t.Context(), novalet.RequestContext{}, instance(), cached)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range info {
		got = append(got, v.ID)
	}
	if !slices.Equal(got, ids) {
		t.Fatalf("ports %q", got)
	}
	if !info[0].PreserveOnDelete || info[1].PreserveOnDelete || !info[0].Active || !info[1].Active || info[2].Active {
		t.Errorf("info %+v", info)
	}
	if fl := info[0].Network.Subnets[0].IPs[0].FloatingIPs; len(fl) != 1 || fl[0].Address != "172.24.4.9" {
		t.Errorf("floating %v", fl)
	}
	// A subnet that came after the network's were read.
	f.subnet("58c14c15-153a-4fd5-91a8-917c9120d2aa", netB, "10.79.0.0/22", "10.79.0.1")
	f.ports[ids[2]]["fixed_ips"] = []object{{"subnet_id": "58c14c15-153a-4fd5-91a8-917c9120d2aa", "ip_address": "10.79.0.9"}}
	if info, err = a.Refresh(t.Context(), novalet.RequestContext{}, instance(), cached); err != nil || info[2].Network.Subnets[0].CIDR != "10.79.0.0/22" {
		t.Errorf("new subnet: %+v, %v", info[2].Network.Subnets, err)
	}
}

func TestPortActive(t *testing.T) {
	const id = "7ed59832-79d2-4d5a-922b-37f4f21d695a"
	f := newFake(t)
	a := newAPI(t, f)
	if _, err := a.PortActive(t.Context(), id); !errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("gone: %v", err)
	}
	p := f.port(id, netB, projectID)
	if ok, err := a.PortActive(t.Context(), id); ok || err != nil {
		t.Errorf("down: %v, %v", ok, err)
	}
	p["status"] = "ACTIVE"
	if ok, err := a.PortActive(t.Context(), id); !ok || err != nil {
		t.Errorf("active: %v, %v", ok, err)
	}
}

// TestGuardWhereNobodyFilters: the host is asked to keep a port of the macvtap mechanism to its addresses, unless the
// port may have others.
func TestGuardWhereNobodyFilters(t *testing.T) {
	const id = "7ed59832-79d2-4d5a-922b-37f4f21d695a"
	pair := []any{object{"ip_address": "192.0.2.0/24", "mac_address": "fa:16:3e:00:00:01"}}
	for _, c := range []struct {
		name   string
		change func(p object)
		want   bool
	}{
		{"macvtap", func(p object) { p["binding:vif_type"] = "macvtap" }, true},
		{"macvtap without details", func(p object) { p["binding:vif_type"], p["binding:vif_details"] = "macvtap", nil }, true},
		{"port security on", func(p object) { p["binding:vif_type"], p["port_security_enabled"] = "macvtap", true }, true},
		{"port security off", func(p object) { p["binding:vif_type"], p["port_security_enabled"] = "macvtap", false }, false},
		{"more addresses", func(p object) { p["binding:vif_type"], p["allowed_address_pairs"] = "macvtap", pair }, false},
		{"a mechanism that filters", func(p object) { p["binding:vif_type"] = "bridge" }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t)
			p := f.port(id, netB, projectID)
			p["device_id"], p["device_owner"], p["binding:host_id"] = instUUID, "compute:nova", "node1"
			c.change(p)
			info, err := newAPI(t, f).Refresh(t.Context(), novalet.RequestContext{}, instance(), nil)
			if err != nil || len(info) != 1 {
				t.Fatal(info, err)
			}
			if got := string(info[0].Details[guardKey]) == "true"; got != c.want {
				t.Errorf("guarded is %v", got)
			}
		})
	}
}

// TestNetworkInfoIsNovas builds the network info of a port recorded from a Zed cloud and compares it with what Nova
// itself wrote for a port of that network.
func TestNetworkInfoIsNovas(t *testing.T) {
	read := func(name string, into any) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join("testdata", "zed", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, into); err != nil {
			t.Fatal(err)
		}
	}
	var rec struct {
		Networks struct{ Networks []object }
		Ports    struct{ Ports []object }
		Subnets  struct{ Subnets []object }
		DHCP     struct{ Ports []object }
		Exts     struct{ Extensions []struct{ Alias string } } `json:"extensions"`
		Create   struct{ Port object }                         `json:"create_request"`
		Bind     struct{ Port object }                         `json:"bind_request"`
	}
	read("boot.json", &rec)
	var want any
	read("network_info.json", &want)

	f := newFake(t)
	f.exts = nil
	for _, e := range rec.Exts.Extensions {
		f.exts = append(f.exts, e.Alias)
	}
	for _, n := range rec.Networks.Networks {
		f.networks[n["id"].(string)] = n
	}
	for _, s := range rec.Subnets.Subnets {
		f.subnets[s["id"].(string)] = s
	}
	for _, p := range append(rec.Ports.Ports, rec.DHCP.Ports...) {
		f.ports[p["id"].(string)] = p
	}
	inst := instance()
	inst.ProjectID = otherID
	info, err := newAPI(t, f).Refresh(t.Context(), novalet.RequestContext{}, inst, nil)
	if err != nil {
		t.Fatal(err)
	}
	// Nova has had enable_dhcp since 2023.1.
	for i := range info {
		for j := range info[i].Network.Subnets {
			info[i].Network.Subnets[j].Meta.EnableDHCP = nil
		}
	}
	text, err := json.Marshal(info)
	if err != nil {
		t.Fatal(err)
	}
	var got any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("network info (-nova +novalet):\n%s", d)
	}

	// The one request asks for what Nova's two ask for together.
	all := object{}
	for _, part := range []object{rec.Create.Port, rec.Bind.Port} {
		for k, v := range part {
			all[k] = v
		}
	}
	a := newAPI(t, f)
	a.o.Host = all["binding:host_id"].(string)
	b := &binder{a: a, r: &novalet.AllocateRequest{Instance: inst}}
	body := b.body(&network{ID: all["network_id"].(string)})
	body["network_id"], body["admin_state_up"], body["tenant_id"] = all["network_id"], true, otherID
	if d := cmp.Diff(all, object(body)); d != "" {
		t.Errorf("port request (-nova +novalet):\n%s", d)
	}
}
