package network

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"

	"github.com/novalet/novalet"
)

// TestManyAtOnce plugs and unplugs twenty ports of one network side by side; the first of them make its bridge.
func TestManyAtOnce(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	const n = 20
	var spaces [n]*os.File
	var requests [n]*novalet.PlugRequest
	for i := range n {
		spaces[i] = newNS(t)
		requests[i] = &novalet.PlugRequest{InstanceUUID: fmt.Sprintf("%08d-d062-498e-bf9e-b1bba14ab194", i), NetNS: nsPath(spaces[i]), Static: true,
			VIF: vif(fmt.Sprintf("%08d-69de-4955-aaf9-201e78582de8", i), fmt.Sprintf("fa:16:3e:00:01:%02x", i), fmt.Sprintf("10.78.1.%d", 1+i))}
	}
	all := func(do func(i int) error) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				if err := do(i); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	for range 2 {
		all(func(i int) error { return p.Plug(t.Context(), requests[i]) })
		for _, pair := range [][2]int{{0, 19}, {7, 12}} {
			if err := ping(spaces[pair[0]], fmt.Sprintf("10.78.1.%d", 1+pair[1])); err != nil {
				t.Errorf("from %d to %d: %v", pair[0], pair[1], err)
			}
		}
		all(func(i int) error { return p.Unplug(t.Context(), requests[i].InstanceUUID, requests[i].VIF) })
		// The names are free at once, though the devices are not.
		for i := range n {
			if l, err := p.link(tapName(requests[i].VIF.ID)); l != nil || err != nil {
				t.Fatalf("port %d: %v, %v", i, l, err)
			}
		}
	}
	eventually(t, "the devices are freed", func() bool { return slices.Equal(hostLinks(t, p), []string{"brq20607cf5-81"}) })
}

// TestIPv6Only: a network without IPv4. Nobody waits for duplicate address detection.
func TestIPv6Only(t *testing.T) {
	hostNS(t)
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
		t.Skip("the kernel has no IPv6")
	}
	p := newPlugger(t, Options{})
	a, b := newNS(t), newNS(t)
	for i, ns := range []*os.File{a, b} {
		v := vif([]string{portA, portB}[i], fmt.Sprintf("fa:16:3e:00:00:%02x", i), "")
		six := 6
		v.Network.Subnets = []novalet.Subnet{{CIDR: "fd00:78::/64", Version: 6, Gateway: novalet.IP{Address: text("fd00:78::1"), Version: &six},
			IPs: []novalet.FixedIP{{Address: fmt.Sprintf("fd00:78::%d", 10+i), Version: 6}}}}
		if err := p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: nsPath(ns), Static: true}); err != nil {
			t.Fatal(err)
		}
	}
	if err := inNetNS(a, func() error {
		out, err := exec.Command("ping", "-6", "-c", "1", "-W", "10", "fd00:78::11").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	// The host's ends have no address to discover anybody with.
	for _, id := range []string{portA, portB} {
		l, err := p.h.LinkByName(tapName(id))
		if err != nil {
			t.Fatal(err)
		}
		if addrs, err := p.h.AddrList(l, 0); err != nil || len(addrs) != 0 {
			t.Errorf("%s: %v, %v", tapName(id), addrs, err)
		}
	}
}
