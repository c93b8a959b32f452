package neutron

import (
	"fmt"
	"net/http"
	"testing"

	"github.com/novalet/novalet"
)

// fixed lists a port's addresses.
func fixed(p object) []string {
	var out []string
	for _, ip := range p["fixed_ips"].([]object) {
		out = append(out, fmt.Sprint(ip["ip_address"]))
	}
	return out
}

func TestAddresses(t *testing.T) {
	const id = "7ed59832-79d2-4d5a-922b-37f4f21d695a"
	f := newFake(t)
	a := newAPI(t, f)
	p := f.port(id, netB, projectID)
	p["device_id"], p["device_owner"] = instUUID, "compute:nova"
	first := fixed(p)[0]
	f.requests()
	if err := a.AddAddress(t.Context(), userContext(), instance(), netB); err != nil {
		t.Fatal(err)
	}
	got := fixed(p)
	if len(got) != 2 || got[0] != first {
		t.Fatalf("addresses %v, want %s and one more", got, first)
	}
	for _, r := range f.requests() {
		if r == "A PUT ports/"+id {
			t.Error("the agent chose an address in the user's place")
		}
	}
	if err := a.RemoveAddress(t.Context(), userContext(), instance(), first); err != nil {
		t.Fatal(err)
	}
	if left := fixed(p); len(left) != 1 || left[0] != got[1] {
		t.Errorf("addresses %v, want %s", left, got[1])
	}
	// What is left is asked for by its address, so that it stays.
	assertFault(t, a.RemoveAddress(t.Context(), userContext(), instance(), first), novalet.ErrNotFound, "FixedIpNotFoundForInstance")
	assertFault(t, a.RemoveAddress(t.Context(), userContext(), instance(), "no address"), novalet.ErrNotFound, "FixedIpNotFoundForInstance")
	assertFault(t, a.AddAddress(t.Context(), userContext(), instance(), netA), novalet.ErrNotFound, "NetworkNotFoundForInstance")
	assertFault(t, a.AddAddress(t.Context(), userContext(), instance(), "../x"), novalet.ErrNotFound, "NetworkNotFoundForInstance")
}

// A subnet that gives none is no reason to stop, and a Neutron that is away no reason to try the next one.
func TestAddressOfTheNextSubnet(t *testing.T) {
	const id = "7ed59832-79d2-4d5a-922b-37f4f21d695a"
	f := newFake(t)
	a := newAPI(t, f)
	p := f.port(id, netB, projectID)
	p["device_id"] = instUUID
	f.subnet("68c14c15-153a-4fd5-91a8-917c9120d222", netB, "10.76.0.0/22", "10.76.0.1")
	puts := 0
	status, kind := http.StatusConflict, "IpAddressGenerationFailure"
	f.fail = func(method, _ string) (int, string) {
		if method != http.MethodPut {
			return 0, ""
		}
		if puts++; puts == 1 {
			return status, kind
		}
		return 0, ""
	}
	if err := a.AddAddress(t.Context(), userContext(), instance(), netB); err != nil || puts != 2 || len(fixed(p)) != 2 {
		t.Errorf("%d requests, addresses %v, %v", puts, fixed(p), err)
	}
	f.fail = func(method, _ string) (int, string) {
		if method == http.MethodPut {
			return status, kind
		}
		return 0, ""
	}
	assertFault(t, a.AddAddress(t.Context(), userContext(), instance(), netB), novalet.ErrAbort, "NoMoreFixedIps")
}
