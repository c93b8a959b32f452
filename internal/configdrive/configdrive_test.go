package configdrive

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
)

func input() *Input {
	dns, gw, four := "10.0.0.2", "10.0.0.1", 4
	return &Input{
		Instance: &novalet.Instance{ID: 26, UUID: "1cea4390-9b4a-4426-9da8-c13866ef9990", Hostname: "web", DisplayName: "Web", ProjectID: "p",
			AvailabilityZone: "nova", LaunchIndex: 2, Metadata: map[string]string{"role": "web"},
			UserData: base64.StdEncoding.EncodeToString([]byte("#!/bin/sh\n")), Flavor: novalet.Flavor{Name: "m1.tiny"},
			KeyPairs: []novalet.KeyPair{{Name: "k", Type: "ssh", Data: "ssh-ed25519 AAAA me"}}},
		Network: novalet.NetworkInfo{{ID: "port-1", Address: "fa:16:3e:00:00:01", DevName: "tapport-1", Type: "ovs",
			Network: novalet.VIFNetwork{ID: "net-1", Meta: novalet.NetworkMeta{MTU: 1450}, Subnets: []novalet.Subnet{
				{CIDR: "10.0.0.0/20", Version: 4, DNS: []novalet.IP{{Address: &dns, Version: &four}}, Gateway: novalet.IP{Address: &gw},
					IPs:    []novalet.FixedIP{{Address: "10.0.0.17", Version: 4, FloatingIPs: []novalet.FixedIP{{Address: "203.0.113.9"}}}},
					Routes: []novalet.Route{{CIDR: "192.168.5.0/25", Gateway: novalet.IP{Address: &dns}}}},
				{CIDR: "10.9.0.0/24", Version: 4, IPs: []novalet.FixedIP{{Address: "10.9.0.9", Version: 4}}},
				{CIDR: "fd00::/64", Version: 6, IPs: []novalet.FixedIP{{Address: "fd00::5", Version: 6}}, Meta: novalet.SubnetMeta{IPv6AddressMode: "slaac"}},
			}}}},
		Files:         []novalet.InjectedFile{{Path: "/etc/motd", Data: novalet.Secret(base64.StdEncoding.EncodeToString([]byte("hi\n")))}},
		AdminPassword: "hunter2", Seed: "c2VlZA==", DHCPDomain: "novalocal", DedicatedCPUs: []int{3},
	}
}

func build(t *testing.T, in *Input) map[string]string {
	t.Helper()
	files, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, f := range files {
		out[f.Path] = string(f.Data)
	}
	return out
}

func TestTree(t *testing.T) {
	files := build(t, input())
	for _, v := range []string{"2012-08-10", "latest"} {
		for _, name := range []string{"meta_data.json", "user_data"} {
			if _, ok := files["openstack/"+v+"/"+name]; !ok {
				t.Errorf("openstack/%s/%s is missing", v, name)
			}
		}
	}
	if _, ok := files["openstack/2012-08-10/network_data.json"]; ok {
		t.Error("network_data.json is there before its time")
	}
	if got := files["openstack/latest/user_data"]; got != "#!/bin/sh\n" {
		t.Errorf("user data %q is not decoded", got)
	}
	if got := files["openstack/content/0000"]; got != "hi\n" {
		t.Errorf("injected file %q", got)
	}
	if files["openstack/latest/vendor_data2.json"] != `{"static": {}}` || files["openstack/latest/vendor_data.json"] != "{}" {
		t.Error("vendor data differ from Nova's")
	}
}

func TestMetaData(t *testing.T) {
	var got map[string]any
	if err := json.Unmarshal([]byte(build(t, input())["openstack/latest/meta_data.json"]), &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"uuid": "1cea4390-9b4a-4426-9da8-c13866ef9990", "hostname": "web.novalocal", "name": "Web", "launch_index": 2.0,
		"availability_zone": "nova", "meta": map[string]any{"role": "web"}, "random_seed": "c2VlZA==", "project_id": "p",
		"devices": []any{}, "dedicated_cpus": []any{3.0}, "admin_pass": "hunter2",
		"keys":        []any{map[string]any{"name": "k", "type": "ssh", "data": "ssh-ed25519 AAAA me"}},
		"public_keys": map[string]any{"k": "ssh-ed25519 AAAA me"},
		"files":       []any{map[string]any{"content_path": "/content/0000", "path": "/etc/motd"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("meta_data.json (-want +got):\n%s", diff)
	}
}

// A device with a tag is told by it, as Nova tells it; vf_trusted came with a later version.
func TestDevices(t *testing.T) {
	in := input()
	in.Devices = []novalet.TaggedDevice{{MAC: "fa:16:3e:00:00:01", Tag: "mgmt"}, {Path: "/dev/vda", Tag: "root"}}
	files := build(t, in)
	disk := map[string]any{"type": "disk", "path": "/dev/vda", "bus": "none", "address": "none", "tags": []any{"root"}}
	for version, more := range map[string]map[string]any{"2016-06-30": nil, "2017-02-22": nil, "2018-08-27": {"vf_trusted": false}, "latest": {"vf_trusted": false}} {
		nic := map[string]any{"type": "nic", "mac": "fa:16:3e:00:00:01", "bus": "none", "address": "none", "tags": []any{"mgmt"}}
		maps.Copy(nic, more)
		var got map[string]any
		if err := json.Unmarshal([]byte(files["openstack/"+version+"/meta_data.json"]), &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]any{nic, disk}, got["devices"]); diff != "" {
			t.Errorf("%s: devices (-want +got):\n%s", version, diff)
		}
	}
}

func TestNetworkData(t *testing.T) {
	var got map[string]any
	if err := json.Unmarshal([]byte(build(t, input())["openstack/latest/network_data.json"]), &got); err != nil {
		t.Fatal(err)
	}
	dns := []any{map[string]any{"type": "dns", "address": "10.0.0.2"}}
	want := map[string]any{
		"links": []any{map[string]any{"id": "tapport-1", "vif_id": "port-1", "type": "ovs", "mtu": 1450.0, "ethernet_mac_address": "fa:16:3e:00:00:01"}},
		"networks": []any{
			map[string]any{"id": "network0", "type": "ipv4", "link": "tapport-1", "network_id": "net-1", "ip_address": "10.0.0.17",
				"netmask": "255.255.240.0", "services": dns, "routes": []any{
					map[string]any{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.0.1"},
					map[string]any{"network": "192.168.5.0", "netmask": "255.255.255.128", "gateway": "10.0.0.2"}}},
			map[string]any{"id": "network1", "type": "ipv6_slaac", "link": "tapport-1", "network_id": "net-1", "ip_address": "fd00::5",
				"netmask": "ffff:ffff:ffff:ffff::"},
		},
		"services": dns,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("network_data.json (-want +got):\n%s", diff)
	}
}

func TestNetworkDataByDHCP(t *testing.T) {
	in := input()
	in.Network[0].Network.Subnets[0].Meta.DHCPServer = "10.0.0.2"
	in.Network[0].Type = "macvtap"
	d := networkData(in.Network)
	if d.Links[0].MTU != nil {
		t.Errorf("mtu %d, want null: DHCP tells it", *d.Links[0].MTU)
	}
	if d.Links[0].Type != "phy" {
		t.Errorf("link type %q, want phy", d.Links[0].Type)
	}
	if n := d.Networks[0]; n.Type != "ipv4_dhcp" || n.Address != "" {
		t.Errorf("network %+v, want ipv4_dhcp without an address", n)
	}
}

func TestSecretsAreNotInErrors(t *testing.T) {
	in := input()
	in.Files[0].Data = "not base64: hunter2!"
	_, err := Build(in)
	if !errors.Is(err, novalet.ErrAbort) {
		t.Fatalf("Build: %v, want ErrAbort", err)
	}
	if strings.Contains(fmt.Sprint(err), "hunter2") {
		t.Errorf("the error %q tells the file", err)
	}
}
