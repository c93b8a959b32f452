package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
)

func TestCheck(t *testing.T) {
	p := &Plugger{}
	for _, c := range []struct {
		name   string
		change func(v *novalet.VIF)
		kind   error
		class  string
	}{
		{"bridge", func(*novalet.VIF) {}, nil, ""},
		{"ovs", func(v *novalet.VIF) { v.Type, v.Network.Bridge = "ovs", "br-int" }, nil, ""},
		{"tap", func(v *novalet.VIF) { v.Type, v.Network.Bridge = "tap", "" }, nil, ""},
		{"macvtap", macvtapWith("macvtap_source", `"eno1.7"`), nil, ""},
		{"macvtap on a bad name", macvtapWith("macvtap_source", `"../x"`), novalet.ErrAbort, "PortBindingFailed"},
		{"macvtap on nothing", macvtapWith("macvtap_source", "null"), novalet.ErrAbort, "PortBindingFailed"},
		{"macvtap on a list", macvtapWith("macvtap_source", "[]"), novalet.ErrAbort, "PortBindingFailed"},
		{"macvtap that owns the interface", macvtapWith("macvtap_mode", `"passthru"`), novalet.ErrAbort, "PortBindingFailed"},
		{"macvtap of no VLAN", macvtapWith("vlan", "4095"), novalet.ErrAbort, "PortBindingFailed"},
		{"binding failed", func(v *novalet.VIF) { v.Type = "binding_failed" }, novalet.ErrReschedule, "PortBindingFailed"},
		{"unbound", func(v *novalet.VIF) { v.Type = "unbound" }, novalet.ErrReschedule, "PortBindingFailed"},
		{"vhostuser", func(v *novalet.VIF) { v.Type = "vhostuser" }, novalet.ErrAbort, "PortBindingFailed"},
		{"unknown", func(v *novalet.VIF) { v.Type = "quantum" }, novalet.ErrAbort, "PortBindingFailed"},
		{"direct", func(v *novalet.VIF) { v.VNICType = "direct" }, novalet.ErrAbort, "PortBindingFailed"},
		{"bridge of a bad name", func(v *novalet.VIF) { v.Network.Bridge = "../x" }, novalet.ErrAbort, "PortBindingFailed"},
		{"bridge without name", func(v *novalet.VIF) { v.Network.Bridge = "" }, novalet.ErrAbort, "PortBindingFailed"},
		{"bad id", func(v *novalet.VIF) { v.ID = "../../etc" }, errAny, ""},
		{"group address", func(v *novalet.VIF) { v.Address = "01:00:5e:00:00:01" }, errAny, ""},
		{"no address", func(v *novalet.VIF) { v.Address = "" }, errAny, ""},
		{"mtu", func(v *novalet.VIF) { v.Network.Meta.MTU = 10 }, errAny, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10")
			c.change(v)
			err := p.Check(v)
			var f *novalet.Fault
			switch {
			case c.kind == nil:
				if err != nil {
					t.Error(err)
				}
			case c.kind == errAny:
				if err == nil {
					t.Error("accepted")
				}
			case !errors.As(err, &f) || f.Class != c.class || !errors.Is(err, c.kind):
				t.Errorf("error %v, want %s of kind %v", err, c.class, c.kind)
			}
		})
	}
}

var errAny = errors.New("any")

// lines writes a plan as text.
func (a *addressing) lines() []string {
	var out []string
	for _, n := range a.addrs {
		out = append(out, n.String())
	}
	for _, r := range a.routes {
		s := r.dst.String()
		if r.via.IsValid() {
			s += " via " + r.via.String()
		}
		if r.onlink {
			s += " onlink"
		}
		out = append(out, s)
	}
	return out
}

func TestPlan(t *testing.T) {
	v4 := novalet.Subnet{CIDR: "10.0.0.0/24", Gateway: novalet.IP{Address: text("10.0.0.1")}, IPs: []novalet.FixedIP{{Address: "10.0.0.5"}}}
	v6 := novalet.Subnet{CIDR: "fd00::/64", Gateway: novalet.IP{Address: text("fe80::1")}, IPs: []novalet.FixedIP{{Address: "fd00::5"}}}
	route := func(dst, via string) novalet.Route {
		return novalet.Route{CIDR: dst, Gateway: novalet.IP{Address: text(via)}}
	}
	with := func(s novalet.Subnet, routes ...novalet.Route) novalet.Subnet { s.Routes = routes; return s }
	for _, c := range []struct {
		name    string
		subnets []novalet.Subnet
		details map[string]json.RawMessage
		want    []string
	}{
		{"no address", nil, nil, nil},
		{"one", []novalet.Subnet{v4}, nil, []string{"10.0.0.5/24", "0.0.0.0/0 via 10.0.0.1"}},
		{"both families", []novalet.Subnet{v4, v6}, nil, []string{"10.0.0.5/24", "fd00::5/64", "0.0.0.0/0 via 10.0.0.1", "::/0 via fe80::1"}},
		{"no gateway", []novalet.Subnet{{CIDR: "10.0.0.0/24", IPs: v4.IPs}}, nil, []string{"10.0.0.5/24"}},
		{"gateway elsewhere", []novalet.Subnet{{CIDR: "10.0.0.5/32", IPs: v4.IPs, Gateway: v4.Gateway}}, nil,
			[]string{"10.0.0.5/32", "0.0.0.0/0 via 10.0.0.1 onlink"}},
		{"a host route is the default route", []novalet.Subnet{with(v4, route("0.0.0.0/0", "10.0.0.254"), route("10.9.9.9/16", "10.0.0.3"))}, nil,
			[]string{"10.0.0.5/24", "0.0.0.0/0 via 10.0.0.254", "10.9.0.0/16 via 10.0.0.3"}},
		{"a route on the link", []novalet.Subnet{with(v4, route("10.1.0.0/16", "0.0.0.0"))}, nil,
			[]string{"10.0.0.5/24", "10.1.0.0/16", "0.0.0.0/0 via 10.0.0.1"}},
		{"ovn", []novalet.Subnet{v4}, map[string]json.RawMessage{"bound_drivers": json.RawMessage(`{"0":"ovn"}`)},
			[]string{"10.0.0.5/24", "0.0.0.0/0 via 10.0.0.1", "169.254.169.254/32"}},
		{"ovn with a route of its own", []novalet.Subnet{with(v4, route("169.254.169.254/32", "10.0.0.2"))},
			map[string]json.RawMessage{"bound_drivers": json.RawMessage(`{"0":"ovn"}`)},
			[]string{"10.0.0.5/24", "169.254.169.254/32 via 10.0.0.2", "0.0.0.0/0 via 10.0.0.1"}},
		{"a subnet without an address of the port", []novalet.Subnet{v4, {CIDR: "10.5.0.0/24", Gateway: novalet.IP{Address: text("10.5.0.1")}}}, nil,
			[]string{"10.0.0.5/24", "0.0.0.0/0 via 10.0.0.1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := plan(&novalet.VIF{Network: novalet.VIFNetwork{Subnets: c.subnets}, Details: c.details})
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, a.lines()); d != "" {
				t.Error(d)
			}
		})
	}
	for name, s := range map[string]novalet.Subnet{
		"cidr": {CIDR: "10.0.0.0"}, "address": {CIDR: "10.0.0.0/24", IPs: []novalet.FixedIP{{Address: "x"}}},
		"family":  {CIDR: "10.0.0.0/24", IPs: []novalet.FixedIP{{Address: "fd00::1"}}},
		"gateway": {CIDR: "10.0.0.0/24", Gateway: novalet.IP{Address: text("here")}},
		"zone":    {CIDR: "fd00::/64", Gateway: novalet.IP{Address: text("fe80::1%eth0")}},
		"route":   with(v4, route("there", "10.0.0.1")), "hop": with(v4, route("10.1.0.0/16", "there")),
		"hop of the other family": with(v4, route("10.1.0.0/16", "fd00::1")),
	} {
		if _, err := plan(&novalet.VIF{Network: novalet.VIFNetwork{Subnets: []novalet.Subnet{s}}}); err == nil {
			t.Errorf("a bad %s was accepted", name)
		}
	}
}

func TestVIFLimits(t *testing.T) {
	for _, c := range []struct {
		specs map[string]string
		want  *limits
		fails bool
	}{
		{nil, nil, false},
		{map[string]string{"quota:vif_inbound_burst": "10"}, nil, false},
		{map[string]string{"quota:vif_inbound_average": "1000", "quota:vif_inbound_burst": "500"}, &limits{1000000, 500000}, false},
		{map[string]string{"quota:vif_inbound_average": "100000"}, &limits{100000000, 1000000}, false},
		{map[string]string{"quota:vif_inbound_average": "-1"}, nil, true},
		{map[string]string{"quota:vif_inbound_average": "1", "quota:vif_inbound_burst": "99999999999"}, nil, true},
	} {
		got, err := vifLimits(c.specs, "inbound")
		if (err != nil) != c.fails || fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%v: %v, %v", c.specs, got, err)
		}
	}
}

func TestAlias(t *testing.T) {
	if !mine(alias(instA, portA), instA, portA) || !mine(alias(instA, portA), "", portA) {
		t.Error("our own alias is not known")
	}
	for _, a := range []string{"", goneAlias, alias(instB, portA), alias(instA, portB), "x" + alias(instA, portA), aliasPrefix + instA + ":" + portA + "x"} {
		if mine(a, instA, portA) {
			t.Errorf("%q was taken for ours", a)
		}
	}
	if n := len(tapName(portA)); n != 14 || strings.Contains(qvoName(portA), " ") {
		t.Errorf("name of %d characters", n)
	}
}

func macvtapWith(key, value string) func(*novalet.VIF) {
	return func(v *novalet.VIF) {
		*v = *macvtapVIF(v.ID, v.Address, "10.78.0.10")
		v.Details[key] = json.RawMessage(value)
	}
}
