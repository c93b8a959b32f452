package cloud_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/networks"
)

// TestNetwork: an application instance is reachable as its security groups say, and sees its network right.
func TestNetwork(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	group := openGroup(t, u) // ICMP alone
	s := boot(t, u, bootOpts{image: image, groups: []string{group}})
	ns := besideNS(t, u)
	ip, port := fixedIP(t, u, s.ID)

	t.Run("security group", func(t *testing.T) {
		ping(t, ns, ip)
		if body, err := get(ns, ip); err == nil {
			t.Errorf("port 80 is open without a rule: %q", body)
		}
		allow(t, u, group, "tcp", 80)
		eventually(t, long, "port 80 opens", func() error { _, err := get(ns, ip); return err })
	})
	t.Run("floating ip", func(t *testing.T) {
		fip := floating(t, u, port)
		ping(t, "", fip)
		eventually(t, long, "port 80 of the floating ip", func() error {
			body, err := get("", fip)
			if err == nil && body != "served by an instance\n" {
				err = fmt.Errorf("body %q", body)
			}
			return err
		})
		eventually(t, long, "the server shows its floating ip", func() error {
			got := waitStatus(t, u, s.ID, "ACTIVE")
			if !strings.Contains(fmt.Sprint(got.Addresses), fip) {
				return fmt.Errorf("addresses %v", got.Addresses)
			}
			return nil
		})
	})
	inside := func(t *testing.T, args ...string) string {
		t.Helper()
		out, err := novalet(append([]string{"exec", s.ID}, args...)...)
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return out
	}
	t.Run("inside", func(t *testing.T) {
		if out := inside(t, "/bin/ip", "-4", "addr", "show", "eth0"); !strings.Contains(out, ip+"/") {
			t.Errorf("eth0 lacks %s: %s", ip, out)
		}
		n, err := networks.Get(t.Context(), u.network, networkID(t, u, "private")).Extract()
		if err != nil {
			t.Fatal(err)
		}
		mtu := mtuOf(t, u, n.ID)
		if out := inside(t, "/bin/ip", "link", "show", "eth0"); !strings.Contains(out, fmt.Sprintf("mtu %d", mtu)) {
			t.Errorf("mtu is not the network's %d: %s", mtu, out)
		}
		if out := inside(t, "/bin/ip", "route"); !strings.Contains(out, "default via ") {
			t.Errorf("no default route: %s", out)
		}
		if out := inside(t, "/bin/cat", "/etc/resolv.conf"); !strings.Contains(out, "nameserver ") {
			t.Errorf("no name server: %s", out)
		}
		if out := inside(t, "/bin/hostname"); strings.TrimSpace(out) != "testnetwork" {
			t.Errorf("host name %q", out)
		}
		if out := inside(t, "/bin/cat", "/etc/hosts"); !strings.Contains(out, "testnetwork") {
			t.Errorf("/etc/hosts lacks the own name: %s", out)
		}
	})
	t.Run("name look-up", func(t *testing.T) {
		// Neutron's DHCP server knows each port by this name, OVN by that of the server.
		name := "host-" + strings.ReplaceAll(ip, ".", "-") + ".openstacklocal"
		if mechanism(t) == "ovn" {
			name = "testnetwork.cloud.internal"
		}
		eventually(t, long, "the resolver knows "+name, func() error {
			// Its answer for an IPv6 address is a refusal, which nslookup ends with.
			out, err := novalet("exec", s.ID, "/bin/sh", "-c", "nslookup "+name+"; true")
			if err == nil && !strings.Contains(out, "Address: "+ip+"\n") {
				err = fmt.Errorf("answer %q", out)
			}
			return err
		})
	})
	t.Run("metadata", func(t *testing.T) {
		eventually(t, long, "metadata service", func() error {
			out, err := novalet("exec", s.ID, "/bin/wget", "-q", "-O", "-", "http://169.254.169.254/openstack/latest/meta_data.json")
			if err == nil && !strings.Contains(out, s.ID) {
				err = fmt.Errorf("answer %q", out)
			}
			return err
		})
	})
	t.Run("outside", func(t *testing.T) {
		eventually(t, long, "the host's address on the external network answers", func() error {
			_, err := novalet("exec", s.ID, "/bin/ping", "-c", "1", "-W", "2", "172.24.4.1")
			return err
		})
	})
}

// mtuOf reads an attribute that needs the net-mtu extension.
func mtuOf(t testing.TB, u *user, id string) int {
	t.Helper()
	var body struct {
		Network struct {
			MTU int `json:"mtu"`
		} `json:"network"`
	}
	if _, err := u.network.Get(t.Context(), u.network.ServiceURL("networks", id), &body, nil); err != nil {
		t.Fatal(err)
	}
	return body.Network.MTU
}

// TestIsolation: instances of two tenants' networks do not see each other, not even with everything allowed.
func TestIsolation(t *testing.T) {
	a, b := as(t, "demo"), as(t, "demo2")
	sa := create(t, a, bootOpts{name: "isolated-a", image: appImage.id(t, a), groups: []string{openGroup(t, a, 80)}})
	sb := create(t, b, bootOpts{name: "isolated-b", image: appImage.id(t, b), groups: []string{openGroup(t, b, 80)}})
	waitStatus(t, a, sa.ID, "ACTIVE")
	waitStatus(t, b, sb.ID, "ACTIVE")
	ipa, _ := fixedIP(t, a, sa.ID)
	ipb, _ := fixedIP(t, b, sb.ID)
	// Each is there for its own side …
	ping(t, besideNS(t, a), ipa)
	ping(t, besideNS(t, b), ipb)
	// … and absent for the other.
	for _, c := range []struct{ from, to string }{{sa.ID, ipb}, {sb.ID, ipa}} {
		for range 3 {
			if out, err := novalet("exec", c.from, "/bin/ping", "-c", "1", "-W", "1", c.to); err == nil {
				t.Fatalf("instance %s reaches %s of the other tenant: %s", c.from, c.to, out)
			}
		}
	}
}

// TestTwenty: twenty servers of one request, each with port 80 of its own; their deletion leaves nothing.
func TestTwenty(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	group := openGroup(t, u, 80)
	before := snapshot(t)
	const n = 20
	create(t, u, bootOpts{name: "twenty", image: image, count: n, groups: []string{group}})
	ids := serversNamed(t, u, "twenty")
	if len(ids) != n {
		t.Errorf("%d servers, want %d", len(ids), n)
	}
	t.Cleanup(func() {
		deleteAll(t, u, ids)
		unchanged(t, before)
	})
	ns := besideNS(t, u)
	for _, id := range ids {
		waitStatus(t, u, id, "ACTIVE")
	}
	for _, id := range ids {
		ip, _ := fixedIP(t, u, id)
		eventually(t, long, ip+" serves", func() error { _, err := get(ns, ip); return err })
	}
	if out, err := novalet("ps", "-q"); err != nil || strings.Count(out, "\n") < n {
		t.Errorf("ps: %v: %s", err, out)
	}
}
