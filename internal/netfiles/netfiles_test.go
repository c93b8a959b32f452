package netfiles

import (
	"encoding/json"
	"testing"

	"github.com/novalet/novalet"
)

func vif(subnets ...novalet.Subnet) novalet.VIF {
	return novalet.VIF{Network: novalet.VIFNetwork{Subnets: subnets}}
}

func subnet(addr, gateway, dhcp string, dns ...string) novalet.Subnet {
	s := novalet.Subnet{Gateway: novalet.IP{Address: &gateway}, Meta: novalet.SubnetMeta{DHCPServer: dhcp}}
	if addr != "" {
		s.IPs = []novalet.FixedIP{{Address: addr}}
	}
	for _, d := range dns {
		s.DNS = append(s.DNS, novalet.IP{Address: &d})
	}
	return s
}

func TestResolvConf(t *testing.T) {
	ovn := vif(subnet("10.0.0.5", "10.0.0.1", "10.0.0.1"))
	ovn.Details = map[string]json.RawMessage{"bound_drivers": json.RawMessage(`{"0":"ovn"}`)}
	for _, c := range []struct {
		name   string
		info   novalet.NetworkInfo
		domain string
		want   string
	}{
		{"nothing", nil, "", ""},
		{"the subnet's", novalet.NetworkInfo{vif(subnet("10.0.0.5", "10.0.0.1", "10.0.0.2", "9.9.9.9", "1.1.1.1"))}, "novalocal",
			"search novalocal\nnameserver 9.9.9.9\nnameserver 1.1.1.1\n"},
		{"the DHCP server", novalet.NetworkInfo{vif(subnet("10.0.0.5", "10.0.0.1", "10.0.0.2"))}, "example.org.",
			"search example.org\nnameserver 10.0.0.2\n"},
		{"no DHCP server", novalet.NetworkInfo{vif(subnet("10.0.0.5", "10.0.0.1", "10.0.0.1"))}, "", ""},
		{"ovn", novalet.NetworkInfo{ovn}, "", "nameserver 10.0.0.1\n"},
		{"no address there", novalet.NetworkInfo{vif(subnet("", "10.0.0.1", "10.0.0.2", "9.9.9.9"))}, "", ""},
		{"many, some twice", novalet.NetworkInfo{
			vif(subnet("10.0.0.5", "", "", "9.9.9.9", "2620:fe::fe"), subnet("10.1.0.5", "", "", "9.9.9.9")),
			vif(subnet("10.2.0.5", "", "", "1.1.1.1", "8.8.8.8"))}, "",
			"nameserver 9.9.9.9\nnameserver 2620:fe::fe\nnameserver 1.1.1.1\n"},
		{"hostile", novalet.NetworkInfo{vif(subnet("10.0.0.5", "", "", "9.9.9.9\nnameserver 6.6.6.6", "fe80::1%x", "0.0.0.0"))}, "a b\nc", ""},
	} {
		if got := string(ResolvConf(c.info, c.domain)); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestHosts(t *testing.T) {
	const local = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
	info := novalet.NetworkInfo{vif(subnet("10.0.0.5", "", ""), subnet("fd00::5", "", "")), vif(subnet("10.1.0.5", "", ""))}
	for _, c := range []struct {
		name         string
		info         novalet.NetworkInfo
		host, domain string
		want         string
	}{
		{"both families", info, "web1", "novalocal", "10.0.0.5\tweb1.novalocal web1\nfd00::5\tweb1.novalocal web1\n"},
		{"no domain", info, "web1", "", "10.0.0.5\tweb1\nfd00::5\tweb1\n"},
		{"full name", info, "web1.example.org", "novalocal", "10.0.0.5\tweb1.example.org\nfd00::5\tweb1.example.org\n"},
		{"no address", nil, "web1", "", "127.0.1.1\tweb1\n"},
		{"hostile", info, "web1\n6.6.6.6 bank", "", ""},
	} {
		if got := string(Hosts(c.info, c.host, c.domain)); got != local+c.want {
			t.Errorf("%s: %q", c.name, got)
		}
	}
	if string(Hostname("web1")) != "web1\n" || Hostname("-x") != nil || Hostname("") != nil {
		t.Error("hostname")
	}
}
