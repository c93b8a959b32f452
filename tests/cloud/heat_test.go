package cloud_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/orchestration/v1/stacks"
)

// twoServers: the second server waits for the first one's address and fetches a page from it.
const twoServers = `heat_template_version: 2018-08-31
parameters:
  image: {type: string}
  group: {type: string}
  color: {type: string}
resources:
  first:
    type: OS::Nova::Server
    properties: {name: heat-first, image: {get_param: image}, flavor: m1.tiny, networks: [{network: private}], security_groups: [{get_param: group}], metadata: {color: {get_param: color}}}
  second:
    type: OS::Nova::Server
    properties:
      name: heat-second
      image: {get_param: image}
      flavor: m1.tiny
      networks: [{network: private}]
      metadata: {peer: {get_attr: [first, first_address]}}
outputs:
  first: {value: {get_attr: [first, first_address]}}
  first_id: {value: {get_resource: first}}
  second_id: {value: {get_resource: second}}
`

// TestHeat: a stack of two servers is created, updated and deleted.
func TestHeat(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	group := openGroup(t, u, 80)
	leavesNothing(t)
	template := new(stacks.Template)
	template.Bin = []byte(twoServers)
	params := map[string]any{"image": image, "group": group, "color": "red"}
	made, err := stacks.Create(t.Context(), u.orches, stacks.CreateOpts{Name: "novalet-heat", TemplateOpts: template, Parameters: params}).Extract()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		_ = stacks.Delete(ctx, u.orches, "novalet-heat", made.ID).ExtractErr()
		eventually(t, long, "the stack is deleted", func() error {
			s, err := stacks.Get(ctx, u.orches, "novalet-heat", made.ID).Extract()
			if gophercloud.ResponseCodeIs(err, http.StatusNotFound) || err == nil && s.Status == "DELETE_COMPLETE" {
				return nil
			}
			return fmt.Errorf("status %v, %w", s, err)
		})
	})
	wait := func(want string) *stacks.RetrievedStack {
		var s *stacks.RetrievedStack
		eventually(t, long, "the stack is "+want, func() error {
			var err error
			if s, err = stacks.Get(t.Context(), u.orches, "novalet-heat", made.ID).Extract(); err != nil {
				return err
			}
			if strings.HasSuffix(s.Status, "_FAILED") {
				t.Fatalf("stack: %s: %s", s.Status, s.StatusReason)
			}
			if s.Status != want {
				return fmt.Errorf("status %s", s.Status)
			}
			return nil
		})
		return s
	}
	s := wait("CREATE_COMPLETE")
	out := map[string]string{}
	for _, o := range s.Outputs {
		out[fmt.Sprint(o["output_key"])] = fmt.Sprint(o["output_value"])
	}
	second, err := servers.Get(t.Context(), u.compute, out["second_id"]).Extract()
	if err != nil {
		t.Fatal(err)
	}
	if second.Metadata["peer"] == "" || second.Metadata["peer"] != out["first"] {
		t.Errorf("the second server's peer is %q, the first one's address %q", second.Metadata["peer"], out["first"])
	}
	eventually(t, long, "the second server reaches the first", func() error {
		got, err := novalet("exec", out["second_id"], "/bin/wget", "-q", "-O", "-", "http://"+out["first"]+"/")
		if err == nil && got != "served by an instance\n" {
			err = fmt.Errorf("answer %q", got)
		}
		return err
	})
	params["color"] = "green"
	must(t, stacks.Update(t.Context(), u.orches, "novalet-heat", made.ID, stacks.UpdateOpts{TemplateOpts: template, Parameters: params}).ExtractErr())
	wait("UPDATE_COMPLETE")
	first, err := servers.Get(t.Context(), u.compute, out["first_id"]).Extract()
	if err != nil || first.Metadata["color"] != "green" {
		t.Errorf("after the update: %v, %v", first, err)
	}
}
