package cloud_test

import (
	"sync"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/flavors"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/extensions/layer3/routers"
)

// projectOf is the project a login is for.
func projectOf(t testing.TB, p *gophercloud.ProviderClient) string {
	t.Helper()
	r, ok := p.GetAuthResult().(tokens.CreateResult)
	if !ok {
		t.Fatal("the login is not Keystone v3's")
	}
	project, err := r.ExtractProject()
	if err != nil || project == nil {
		t.Fatalf("project of the login: %v", err)
	}
	return project.ID
}

var flavorIDs sync.Map

func flavorID(t testing.TB, u *user, name string) string {
	t.Helper()
	if id, ok := flavorIDs.Load(name); ok {
		return id.(string)
	}
	p, err := flavors.ListDetail(u.compute, nil).AllPages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := flavors.ExtractFlavors(p)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range l {
		flavorIDs.Store(f.Name, f.ID)
	}
	id, ok := flavorIDs.Load(name)
	if !ok {
		t.Fatalf("no flavor %s in the cloud", name)
	}
	return id.(string)
}

// besideNS is a network namespace of Neutron's on a user's network, from which the tests look at instances: that of the
// router, or of the metadata agent where routers are flows of OVN.
func besideNS(t testing.TB, u *user) string {
	t.Helper()
	if mechanism(t) == "ovn" {
		return "ovnmeta-" + networkID(t, u, privateNet(u))
	}
	return "qrouter-" + routerID(t, u)
}

// routerID is the router of a user's project.
func routerID(t testing.TB, u *user) string {
	t.Helper()
	p, err := routers.List(u.network, routers.ListOpts{ProjectID: u.project}).AllPages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := routers.ExtractRouters(p)
	if err != nil || len(l) == 0 {
		t.Fatalf("routers of %s: %v, %v", u.name, l, err)
	}
	return l[0].ID
}
