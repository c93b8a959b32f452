package cloud_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/keypairs"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	openssh "golang.org/x/crypto/ssh"
)

// TestAdminPassword: the password that a user sets is the one inside, and its owner reads it back with the key pair.
func TestAdminPassword(t *testing.T) {
	u := as(t, "demo")
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	public, err := openssh.NewPublicKey(&private.PublicKey)
	must(t, err)
	const key = "novalet-test-password"
	_ = keypairs.Delete(t.Context(), u.compute, key, nil).ExtractErr()
	_, err = keypairs.Create(t.Context(), u.compute, keypairs.CreateOpts{Name: key, PublicKey: string(openssh.MarshalAuthorizedKey(public)), Type: "ssh"}).Extract()
	must(t, err)
	t.Cleanup(func() { must(t, keypairs.Delete(context.Background(), u.compute, key, nil).ExtractErr()) })
	image := debianImage.id(t, u)
	leavesNothing(t)
	said := agentLog(t)
	s := boot(t, u, bootOpts{name: "password", image: image, flavor: "m1.small", key: key, noNet: true})
	for _, password := range []string{"correct horse: battery", "another one"} {
		must(t, servers.ChangeAdminPassword(t.Context(), u.compute, s.ID, password).ExtractErr())
		waitStatus(t, u, s.ID, "ACTIVE")
		hash := strings.Split(inside(t, s.ID, "getent", "shadow", "root"), ":")[1]
		if got := strings.TrimSpace(inside(t, s.ID, "perl", "-e", "print crypt($ARGV[0], $ARGV[1])", password, hash)); got != hash {
			t.Errorf("inside is %q, of %q comes %q", hash, password, got)
		}
		if got, err := servers.GetPassword(t.Context(), u.compute, s.ID).ExtractPassword(private); err != nil || got != password {
			t.Errorf("its owner reads %q: %v", got, err)
		}
	}
	if log := said(); !strings.Contains(log, s.ID) || strings.Contains(log, "horse") {
		t.Error("the password is in the log, or nothing is")
	}
	remove(t, u, s.ID)
}
