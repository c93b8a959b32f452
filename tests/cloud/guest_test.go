package cloud_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/keypairs"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/layer3/floatingips"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/security/groups"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/security/rules"
)

// ping waits until an address answers from a namespace ("" is the host).
func ping(t testing.TB, ns, ip string) {
	t.Helper()
	eventually(t, long, "ping "+ip, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		args := []string{"ping", "-n", "-c", "1", "-W", "2", ip}
		if ns != "" {
			args = append([]string{"ip", "netns", "exec", ns}, args...)
		}
		_, err := sh(ctx, args[0], args[1:]...)
		return err
	})
}

// get fetches http://ip/ from a namespace; "" is the host.
func get(ns, ip string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	args := []string{"curl", "-sS", "-m", "5", "http://" + ip + "/"}
	if ns != "" {
		args = append([]string{"ip", "netns", "exec", ns}, args...)
	}
	return sh(ctx, args[0], args[1:]...)
}

// newKey makes a key pair in Nova and returns its name and the file with the private half.
func newKey(t testing.TB, u *user) (name, file string) {
	t.Helper()
	name = strings.ReplaceAll(strings.ToLower(t.Name()), "/", "-")
	file = filepath.Join(t.TempDir(), "id")
	if _, err := sh(t.Context(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file); err != nil {
		t.Fatal(err)
	}
	pub, err := os.ReadFile(file + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	_ = keypairs.Delete(t.Context(), u.compute, name, nil).ExtractErr()
	if _, err := keypairs.Create(t.Context(), u.compute, keypairs.CreateOpts{Name: name, PublicKey: string(pub), Type: "ssh"}).Extract(); err != nil {
		t.Fatalf("create key pair: %v", err)
	}
	t.Cleanup(func() { _ = keypairs.Delete(context.Background(), u.compute, name, nil).ExtractErr() })
	return name, file
}

// ssh runs a command in a guest.
func ssh(ns, key, login, ip, command string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	args := []string{"ssh", "-i", key, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
		"-o", "ConnectTimeout=10", "-o", "BatchMode=yes", login + "@" + ip, command}
	if ns != "" {
		args = append([]string{"ip", "netns", "exec", ns}, args...)
	}
	return sh(ctx, args[0], args[1:]...)
}

// waitSSH waits until the guest lets us in.
func waitSSH(t testing.TB, ns, key, login, ip string) {
	t.Helper()
	eventually(t, long, "ssh "+login+"@"+ip, func() error {
		_, err := ssh(ns, key, login, ip, "true")
		return err
	})
}

// openGroup makes a security group that lets ICMP and some TCP ports in.
func openGroup(t testing.TB, u *user, tcp ...int) string {
	t.Helper()
	g, err := groups.Create(t.Context(), u.network, groups.CreateOpts{Name: strings.ReplaceAll(strings.ToLower(t.Name()), "/", "-")}).Extract()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The port that uses it may be on its way out.
		for range 60 {
			if err := groups.Delete(context.Background(), u.network, g.ID).ExtractErr(); err == nil {
				return
			}
			time.Sleep(500 * time.Millisecond)
		}
		t.Errorf("security group %s cannot be deleted", g.Name)
	})
	allow(t, u, g.ID, "icmp", 0)
	for _, p := range tcp {
		allow(t, u, g.ID, "tcp", p)
	}
	return g.ID
}

// allow adds an ingress rule to a group.
func allow(t testing.TB, u *user, group, protocol string, port int) {
	t.Helper()
	if _, err := rules.Create(t.Context(), u.network, rules.CreateOpts{SecGroupID: group, Direction: rules.DirIngress, EtherType: rules.EtherType4,
		Protocol: rules.RuleProtocol(protocol), PortRangeMin: port, PortRangeMax: port}).Extract(); err != nil {
		t.Fatalf("allow %s %d: %v", protocol, port, err)
	}
}

// floating gives a port a floating IP and registers its release.
func floating(t testing.TB, u *user, port string) string {
	t.Helper()
	f, err := floatingips.Create(t.Context(), u.network, floatingips.CreateOpts{FloatingNetworkID: networkID(t, u, "public"), PortID: port}).Extract()
	if err != nil {
		t.Fatalf("floating ip: %v", err)
	}
	t.Cleanup(func() { _ = floatingips.Delete(context.Background(), u.network, f.ID).ExtractErr() })
	return f.FloatingIP
}
