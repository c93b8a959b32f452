package cloud_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/layer3/routers"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/security/rules"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/networks"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/ports"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/subnets"
)

// dualStack makes a network of IPv4 and IPv6 behind the user's router, which announces the IPv6 subnet in that mode:
// "slaac" or "dhcpv6-stateful". Its subnets are 10.66.0.0/24 and fd66::/64; the router's address in the latter is gateway.
func dualStack(t testing.TB, u *user, mode string) (network, gateway string) {
	t.Helper()
	name := strings.ReplaceAll(strings.ToLower(t.Name()), "/", "-")
	n, err := networks.Create(t.Context(), u.network, networks.CreateOpts{Name: name}).Extract()
	if err != nil {
		t.Fatalf("create network: %v", err)
	}
	t.Cleanup(func() {
		// Ports of its DHCP server may be on their way.
		retry(t, "delete network "+name, func(ctx context.Context) error { return networks.Delete(ctx, u.network, n.ID).ExtractErr() })
	})
	router := routerID(t, u)
	for _, o := range []subnets.CreateOpts{
		{NetworkID: n.ID, IPVersion: gophercloud.IPv4, CIDR: "10.66.0.0/24"},
		{NetworkID: n.ID, IPVersion: gophercloud.IPv6, CIDR: "fd66::/64", IPv6RAMode: mode, IPv6AddressMode: mode},
	} {
		s, err := subnets.Create(t.Context(), u.network, o).Extract()
		if err != nil {
			t.Fatalf("create subnet %s: %v", o.CIDR, err)
		}
		gateway = s.GatewayIP
		if _, err := routers.AddInterface(t.Context(), u.network, router, routers.AddInterfaceOpts{SubnetID: s.ID}).Extract(); err != nil {
			t.Fatalf("join router and subnet %s: %v", o.CIDR, err)
		}
		t.Cleanup(func() {
			retry(t, "part router and subnet "+o.CIDR, func(ctx context.Context) error {
				_, err := routers.RemoveInterface(ctx, u.network, router, routers.RemoveInterfaceOpts{SubnetID: s.ID}).Extract()
				return err
			})
		})
	}
	return n.ID, gateway
}

// retry does, at the end of a test, what the way out of something else may still hold up.
func retry(t testing.TB, what string, fn func(ctx context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	for {
		err := fn(ctx)
		if err == nil || gophercloud.ResponseCodeIs(err, 404) {
			return
		}
		select {
		case <-ctx.Done():
			t.Errorf("%s: %v", what, err)
			return
		case <-time.After(time.Second):
		}
	}
}

// addressOf is the address of that version of a server's only port.
func addressOf(t testing.TB, u *user, id string, version gophercloud.IPVersion) (ip, port string) {
	t.Helper()
	p, err := ports.List(u.network, ports.ListOpts{DeviceID: id}).AllPages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := ports.ExtractPorts(p)
	if err != nil || len(l) != 1 {
		t.Fatalf("ports of server %s: %v, %v", id, l, err)
	}
	for _, a := range l[0].FixedIPs {
		if strings.Contains(a.IPAddress, ":") == (version == gophercloud.IPv6) {
			return a.IPAddress, l[0].ID
		}
	}
	t.Fatalf("port %s has no address of IPv%d: %v", l[0].ID, version, l[0].FixedIPs)
	return "", ""
}

// allow6 opens a group for ICMPv6 and some TCP ports over IPv6.
func allow6(t testing.TB, u *user, group string, tcp ...int) {
	t.Helper()
	opts := []rules.CreateOpts{{Protocol: rules.ProtocolIPv6ICMP}}
	for _, p := range tcp {
		opts = append(opts, rules.CreateOpts{Protocol: rules.ProtocolTCP, PortRangeMin: p, PortRangeMax: p})
	}
	for _, o := range opts {
		o.SecGroupID, o.Direction, o.EtherType = group, rules.DirIngress, rules.EtherType6
		if _, err := rules.Create(t.Context(), u.network, o).Extract(); err != nil {
			t.Fatalf("allow %s %d over IPv6: %v", o.Protocol, o.PortRangeMin, err)
		}
	}
}

// TestGuestsIPv6: a machine takes its IPv6 address itself, as its network offers it: by router advertisement, or by DHCPv6.
func TestGuestsIPv6(t *testing.T) {
	u := as(t, "demo")
	if !netTests() {
		t.Skip("one of `make test-net` (NOVALET_NET_TESTS=1)")
	}
	image := debianImage.id(t, u)
	for _, mode := range []string{"slaac", "dhcpv6-stateful"} {
		t.Run(mode, func(t *testing.T) {
			network, gateway := dualStack(t, u, mode)
			s := create(t, u, bootOpts{name: "six", image: image, flavor: "m1.small", networks: []servers.Network{{UUID: network}}})
			waitStatus(t, u, s.ID, "ACTIVE")
			six, _ := addressOf(t, u, s.ID, gophercloud.IPv6)
			eventually(t, long, "eth0 has "+six, func() error {
				out, err := novalet("exec", s.ID, "/bin/sh", "-c", "ip -6 -o addr show dev eth0 scope global; ip -6 route")
				if err == nil && !strings.Contains(out, " "+six+"/") {
					err = fmt.Errorf("it has %s", out)
				}
				return err
			})
			eventually(t, long, "the router answers", func() error {
				_, err := novalet("exec", s.ID, "/bin/ping", "-6", "-c", "1", "-W", "2", gateway)
				return err
			})
			if out := inside(t, s.ID, "/sbin/ip", "-6", "route", "show", "default"); !strings.Contains(out, "via fe80::") {
				t.Errorf("no default route by the router's advertisement: %q", out)
			}
		})
	}
}
