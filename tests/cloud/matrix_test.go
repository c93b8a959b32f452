package cloud_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// mechanism is the NET that the cloud was brought up with.
func mechanism(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(state(t), "settings"))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`SAVED_NET=(\S+)`).FindSubmatch(text)
	if m == nil {
		t.Fatalf("no SAVED_NET in %q", text)
	}
	return string(m[1])
}

// netTests says that this is a run of `make test-net`, which has the time for networks of the tests' own.
func netTests() bool { return os.Getenv("NOVALET_NET_TESTS") != "" }

// l2Service is what wires ports on this host.
func l2Service(net string) string {
	switch net {
	case "ovs", "ovs-hybrid":
		return "neutron-openvswitch-agent"
	case "ovn":
		return "ovn-controller"
	case "macvtap":
		return "neutron-macvtap-agent"
	}
	return "neutron-linuxbridge-agent"
}

// TestMatrix: who could reach whom after the boot can afterwards, too, whatever was done to the instance, to the agent
// and to the service that wires its port; and who could not still cannot.
func TestMatrix(t *testing.T) {
	u := as(t, "demo")
	net := mechanism(t)
	image := appImage.id(t, u)
	leavesNothing(t)
	group := openGroup(t, u, 80)
	network, router6 := networkID(t, u, "private"), ""
	// Tenants of a cloud of the macvtap mechanism can make no networks.
	if netTests() && net != "macvtap" {
		allow6(t, u, group, 80)
		network, router6 = dualStack(t, u, "slaac")
	}
	on := []servers.Network{{UUID: network}}
	a := create(t, u, bootOpts{name: "matrix-a", image: image, groups: []string{group}, networks: on})
	b := create(t, u, bootOpts{name: "matrix-b", image: image, groups: []string{group}, networks: on})
	waitStatus(t, u, a.ID, "ACTIVE")
	waitStatus(t, u, b.ID, "ACTIVE")
	ipA, portA := addressOf(t, u, a.ID, gophercloud.IPv4)
	ipB, _ := addressOf(t, u, b.ID, gophercloud.IPv4)
	fip := floating(t, u, portA)
	mtu := mtuOf(t, u, network)
	full := fmt.Sprint(mtu - 28)
	in := func(id string, args ...string) func() error {
		return func() error {
			_, err := novalet(append([]string{"exec", id}, args...)...)
			return err
		}
	}
	ping := func(from, to string, more ...string) func() error {
		return in(from, append(append([]string{"/bin/ping", "-c", "1", "-W", "2"}, more...), to)...)
	}
	type way struct {
		what string
		try  func() error
	}
	reach := []way{
		{"from a to b", ping(a.ID, ipB)},
		{"from b to a", ping(b.ID, ipA)},
		{"packets as large as the network takes", ping(a.ID, ipB, "-s", full)},
		{"packets that must be cut", ping(b.ID, ipA, "-s", "4000")},
		{"port 80, which the group opens", in(b.ID, "/bin/timeout", "3", "/bin/wget", "-q", "-O", "/dev/null", "http://"+ipA+"/")},
		{"the world behind the router", ping(a.ID, "172.24.4.1")},
		{"the floating address", func() error { _, err := get("", fip); return err }},
		{"metadata", in(a.ID, "/bin/timeout", "10", "/bin/wget", "-q", "-O", "/dev/null", "http://169.254.169.254/openstack/latest/meta_data.json")},
	}
	hosts := []string{ipA}
	if router6 != "" {
		sixA, _ := addressOf(t, u, a.ID, gophercloud.IPv6)
		sixB, _ := addressOf(t, u, b.ID, gophercloud.IPv6)
		ping6 := func(from, to string, more ...string) func() error {
			return in(from, append(append([]string{"/bin/ping6", "-c", "1", "-W", "2"}, more...), to)...)
		}
		hosts = append(hosts, "["+sixA+"]")
		reach = append(reach,
			way{"IPv6 from a to b", ping6(a.ID, sixB)},
			way{"IPv6 from b to a", ping6(b.ID, sixA)},
			way{"IPv6, the router", ping6(a.ID, router6)},
			way{"IPv6, packets as large as the network takes", ping6(a.ID, sixB, "-s", fmt.Sprint(mtu-48))},
			way{"IPv6, port 80, which the group opens", in(b.ID, "/bin/timeout", "3", "/bin/wget", "-q", "-O", "/dev/null", "http://["+sixA+"]/")})
		// Open vSwitch 3.1 with its datapath in user space loses fragments of IPv6 in its connection tracking.
		if net == "linuxbridge" {
			reach = append(reach, way{"IPv6, packets that must be cut", ping6(b.ID, sixA, "-s", "4000")})
		}
	}
	check := func(t *testing.T, limit time.Duration, meanwhile func(*testing.T)) {
		t.Helper()
		for _, r := range reach {
			eventually(t, limit, r.what, func() error {
				err := r.try()
				if err != nil && meanwhile != nil {
					meanwhile(t)
				}
				return err
			})
		}
		if net == "macvtap" {
			return // that mechanism knows no security groups
		}
		// Nothing listens there: an open port would refuse at once, a closed one swallows the packet.
		for _, host := range hosts {
			out, err := novalet("exec", b.ID, "/bin/timeout", "3", "/bin/wget", "-q", "-O", "-", "http://"+host+":81/")
			if err == nil || strings.Contains(out+err.Error(), "refused") {
				t.Errorf("port 81 of %s is open without a rule: %v, %s", host, err, out)
			}
		}
	}
	active := func(t *testing.T) { t.Helper(); waitStatus(t, u, a.ID, "ACTIVE") }
	// A virtual machine that is paused answers nobody, although the kernel of a container could.
	silent := func(t *testing.T) {
		t.Helper()
		if err := ping(b.ID, ipA)(); err == nil {
			t.Error("it answers its neighbour while it is paused")
		}
		if out, err := sh(t.Context(), "ping", "-n", "-c", "2", "-W", "1", fip); err == nil {
			t.Errorf("it answers at its floating address while it is paused: %s", out)
		}
	}
	type step struct {
		name string
		do   func(t *testing.T)
		// After it Neutron wires everything again, which takes minutes on a machine that has other work.
		service bool
		// meanwhile, if any, is done until all is wired.
		meanwhile func(t *testing.T)
	}
	steps := []step{
		{name: "boot", do: func(*testing.T) {}},
		{name: "stop and start", do: func(t *testing.T) {
			must(t, servers.Stop(t.Context(), u.compute, a.ID).ExtractErr())
			waitStatus(t, u, a.ID, "SHUTOFF")
			must(t, servers.Start(t.Context(), u.compute, a.ID).ExtractErr())
			active(t)
		}},
		{name: "soft reboot", do: func(t *testing.T) {
			must(t, servers.Reboot(t.Context(), u.compute, a.ID, servers.RebootOpts{Type: servers.SoftReboot}).ExtractErr())
			active(t)
		}},
		{name: "hard reboot", do: func(t *testing.T) {
			must(t, servers.Reboot(t.Context(), u.compute, a.ID, servers.RebootOpts{Type: servers.HardReboot}).ExtractErr())
			active(t)
		}},
		{name: "pause", do: func(t *testing.T) {
			must(t, servers.Pause(t.Context(), u.compute, a.ID).ExtractErr())
			waitStatus(t, u, a.ID, "PAUSED")
			silent(t)
			must(t, servers.Unpause(t.Context(), u.compute, a.ID).ExtractErr())
			active(t)
		}},
		{name: "suspend and resume", do: func(t *testing.T) {
			must(t, servers.Suspend(t.Context(), u.compute, a.ID).ExtractErr())
			waitStatus(t, u, a.ID, "SUSPENDED")
			silent(t)
			must(t, servers.Resume(t.Context(), u.compute, a.ID).ExtractErr())
			active(t)
		}},
		{name: "restart of the agent", do: func(t *testing.T) { devstack(t, "compute.sh", "restart", "novalet") }},
		{name: "restart of " + l2Service(net), service: true, do: func(t *testing.T) {
			script := `. ../../devstack/vars.sh; . ../../devstack/lib.sh; stop ` + l2Service(net)
			if out, err := sh(t.Context(), "bash", "-c", script); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			devstack(t, "up.sh")
		}},
	}
	if net != "linuxbridge" && net != "macvtap" {
		steps = append(steps, step{name: "restart of Open vSwitch", service: true, do: func(t *testing.T) {
			devstack(t, "ovs.sh", "restart")
			devstack(t, "up.sh")
		}, meanwhile: func(t *testing.T) {
			// Neutron's agent ends where the switch does not answer for ovsdb_timeout; systemd would start it again.
			script := `. ../../devstack/vars.sh; . ../../devstack/lib.sh; running ` + l2Service(net) + ` || ../../devstack/up.sh`
			if out, err := sh(t.Context(), "bash", "-c", script); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}})
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			step.do(t)
			limit := long
			if step.service {
				limit = 4 * long
			}
			check(t, limit, step.meanwhile)
		})
	}
}

// spoofer is a machine of busybox: its root may do to its network what it likes.
func spoofer(t testing.TB, u *user) string {
	t.Helper()
	script := "#!/bin/sh\ncase $1 in bound|renew) ip addr flush dev $interface; ip addr add $ip/$mask dev $interface; ip route add default via $router; echo address $ip;; esac\n"
	root := append(busyboxRoot(t), member{name: "sbin/", mode: 0o755}, member{name: "sbin/init", link: "/bin/busybox", mode: 0o777},
		member{name: "etc/dhcp.sh", mode: 0o755, data: []byte(script)},
		member{name: "etc/inittab", mode: 0o644, data: []byte("::sysinit:/bin/ip link set eth0 up\n::respawn:/bin/udhcpc -f -i eth0 -s /etc/dhcp.sh\n")})
	return upload(t, u, imageSpec{name: "novalet-test-spoofer", container: "bare", disk: "raw"}, bytes.NewReader(gzipped(t, makeTar(t, root))))
}

// TestSpoofing: with port security on, an instance cannot speak under another's IPv4 or MAC address, cannot take the
// gateway's place in a neighbour's ARP table, and cannot be a DHCP server.
func TestSpoofing(t *testing.T) {
	u := as(t, "demo")
	group := openGroup(t, u, 80)
	evil := boot(t, u, bootOpts{name: "spoofer", image: spoofer(t, u), groups: []string{group}})
	victim := boot(t, u, bootOpts{name: "victim", image: appImage.id(t, u), groups: []string{group}})
	waitLog(t, u, evil.ID, "address ", long)
	ipVictim, _ := fixedIP(t, u, victim.ID)
	ipEvil, _ := fixedIP(t, u, evil.ID)
	run := func(id, command string) (string, error) { return novalet("exec", id, "/bin/sh", "-c", command) }
	honest := func(t *testing.T) {
		t.Helper()
		eventually(t, long, "the spoofer reaches its neighbour as itself", func() error {
			_, err := run(evil.ID, "ping -c 1 -W 2 "+ipVictim)
			return err
		})
	}
	honest(t)
	t.Run("IPv4 address", func(t *testing.T) {
		const foreign = "10.77.3.250"
		if out, err := run(evil.ID, "ip addr add "+foreign+"/22 dev eth0"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for range 3 {
			if out, err := run(evil.ID, "ping -c 1 -W 1 -I "+foreign+" "+ipVictim); err == nil {
				t.Fatalf("answered under a foreign address: %s", out)
			}
		}
		if out, err := run(evil.ID, "ip addr del "+foreign+"/22 dev eth0"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		honest(t)
	})
	t.Run("ARP", func(t *testing.T) {
		gateway := func() string {
			t.Helper()
			out, err := run(victim.ID, "ping -c 1 -W 2 10.77.0.1 >/dev/null; cat /proc/net/arp")
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			m := regexp.MustCompile(`(?m)^10\.77\.0\.1 +\S+ +\S+ +(\S+)`).FindStringSubmatch(out)
			if m == nil {
				t.Fatalf("no entry of the gateway: %s", out)
			}
			return m[1]
		}
		was := gateway()
		if out, err := run(evil.ID, "ip addr add 10.77.0.1/32 dev eth0; arping -c 5 -U -I eth0 -s 10.77.0.1 "+ipVictim+"; arping -c 5 -A -I eth0 10.77.0.1; ip addr del 10.77.0.1/32 dev eth0"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if now := gateway(); now != was {
			t.Errorf("the gateway was %s for the neighbour, is %s", was, now)
		}
	})
	t.Run("MAC address", func(t *testing.T) {
		out, err := run(evil.ID, "cat /sys/class/net/eth0/address")
		if err != nil {
			t.Fatal(err)
		}
		own := strings.TrimSpace(out)
		if out, err := run(evil.ID, "ip link set eth0 down; ip link set eth0 address 02:00:00:00:be:ef; ip link set eth0 up; ip route add default via 10.77.0.1; true"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for range 3 {
			if out, err := run(evil.ID, "ping -c 1 -W 1 "+ipVictim); err == nil {
				t.Fatalf("answered under a foreign MAC address: %s", out)
			}
		}
		if out, err := run(evil.ID, "ip link set eth0 down; ip link set eth0 address "+own+"; ip link set eth0 up"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		honest(t)
	})
	t.Run("DHCP server", func(t *testing.T) {
		conf := "start 10.77.3.200\nend 10.77.3.210\ninterface eth0\nmax_leases 10\nlease_file /tmp/leases\npidfile /tmp/udhcpd.pid\n"
		if out, err := run(evil.ID, "printf '"+strings.ReplaceAll(conf, "\n", `\n`)+"' >/tmp/udhcpd.conf; : >/tmp/leases; (udhcpd -f /tmp/udhcpd.conf >/tmp/udhcpd.log 2>&1 &) ; sleep 1; pidof udhcpd"); err != nil {
			t.Fatalf("no server: %v: %s", err, out)
		}
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
			// Whose offer it was is printed; the answer of the network's own may come first or be all there is.
			out, _ := novalet("exec", victim.ID, "/bin/sh", "-c", "udhcpc -n -q -f -t 2 -T 1 -i eth0 -s /bin/true 2>&1")
			if regexp.MustCompile(`(server|from) ` + regexp.QuoteMeta(ipEvil) + `\b`).MatchString(out) {
				t.Fatalf("the instance's own server answered: %s", out)
			}
		}
		_, _ = run(evil.ID, "kill $(cat /tmp/udhcpd.pid)")
	})
}
