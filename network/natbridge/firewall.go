package natbridge

import (
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"

	"github.com/coreos/go-iptables/iptables"

	"github.com/novalet/novalet"
)

// iptablesRunner is what is used of go-iptables.
type iptablesRunner interface {
	AppendUnique(table, chain string, rulespec ...string) error
	InsertUnique(table, chain string, pos int, rulespec ...string) error
	DeleteIfExists(table, chain string, rulespec ...string) error
	ClearChain(table, chain string) error
	ChainExists(table, chain string) (bool, error)
	ClearAndDeleteChain(table, chain string) error
}

// firewall keeps the rules of one bridge, in chains named after it.
type firewall struct {
	ipt    iptablesRunner
	bridge string
	subnet netip.Prefix
}

func newFirewall(bridge string, subnet netip.Prefix, command string) (*firewall, error) {
	// Seconds to wait for the lock that other users of iptables may hold.
	const patience = 30
	if command == "" {
		command = "iptables"
		if _, err := exec.LookPath(command); err != nil {
			command = "/usr/sbin/iptables" // not on the path of every service
		}
	}
	ipt, err := iptables.New(iptables.IPFamily(iptables.ProtocolIPv4), iptables.Timeout(patience), iptables.Path(command))
	if err != nil {
		return nil, fmt.Errorf("find iptables: %w", err)
	}
	return &firewall{ipt: ipt, bridge: bridge, subnet: subnet}, nil
}

// chain is one of ours and the built-in chain that leads to it.
type chain struct {
	table, parent, name string
	jump                []string // condition of the rule in parent
}

func (f *firewall) chains() []chain {
	up := strings.ToUpper(f.bridge)
	return []chain{
		{"nat", "POSTROUTING", up + "-POST", nil},
		{"nat", "PREROUTING", up + "-PUBLISH", []string{"-m", "addrtype", "--dst-type", "LOCAL"}},
		{"nat", "OUTPUT", up + "-PUBLISH", []string{"-m", "addrtype", "--dst-type", "LOCAL", "!", "-d", "127.0.0.0/8"}},
		{"filter", "FORWARD", up + "-FORWARD", nil},
		{"filter", "INPUT", up + "-INPUT", []string{"-i", f.bridge}},
	}
}

func (f *firewall) name(of string) string { return strings.ToUpper(f.bridge) + "-" + of }

// install writes the rules anew: what a crash left of another state is gone afterwards.
func (f *firewall) install(ports []*port) error {
	for _, c := range f.chains() {
		if err := f.ipt.ClearChain(c.table, c.name); err != nil {
			return fmt.Errorf("make chain %s: %w", c.name, err)
		}
	}
	net := f.subnet.String()
	// In front of the closing rule of FORWARD there is a chain for published ports.
	if err := f.ipt.ClearChain("filter", f.name("OPEN")); err != nil {
		return fmt.Errorf("make chain %s: %w", f.name("OPEN"), err)
	}
	for _, r := range []struct {
		table, chain string
		rule         []string
	}{
		{"nat", f.name("POST"), []string{"-s", net, "!", "-o", f.bridge, "-j", "MASQUERADE"}},
		{"filter", f.name("FORWARD"), []string{"-i", f.bridge, "-j", "ACCEPT"}},
		{"filter", f.name("FORWARD"), []string{"-o", f.bridge, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"}},
		{"filter", f.name("FORWARD"), []string{"-o", f.bridge, "-j", f.name("OPEN")}},
		// Nobody from outside reaches what is not published.
		{"filter", f.name("FORWARD"), []string{"-o", f.bridge, "-j", "DROP"}},
		{"filter", f.name("INPUT"), []string{"-p", "udp", "--dport", "67", "-j", "ACCEPT"}},
		// Answers to what the host asks its instances.
		{"filter", f.name("INPUT"), []string{"-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"}},
	} {
		if err := f.ipt.AppendUnique(r.table, r.chain, r.rule...); err != nil {
			return fmt.Errorf("add rule to %s: %w", r.chain, err)
		}
	}
	for _, c := range f.chains() {
		if err := f.ipt.InsertUnique(c.table, c.parent, 1, append(c.jump, "-j", c.name)...); err != nil {
			return fmt.Errorf("lead %s to %s: %w", c.parent, c.name, err)
		}
	}
	for _, p := range ports {
		if err := f.publish(p); err != nil {
			return err
		}
	}
	return nil
}

// remove takes rules and chains away. It may be repeated.
func (f *firewall) remove() error {
	var errs []error
	for _, c := range f.chains() {
		if ok, err := f.ipt.ChainExists(c.table, c.name); err != nil || !ok {
			errs = append(errs, err)
			continue
		}
		if err := f.ipt.DeleteIfExists(c.table, c.parent, append(c.jump, "-j", c.name)...); err != nil {
			errs = append(errs, fmt.Errorf("remove the way from %s to %s: %w", c.parent, c.name, err))
		}
	}
	for _, c := range []struct{ table, name string }{
		{"nat", f.name("POST")}, {"nat", f.name("PUBLISH")}, {"filter", f.name("FORWARD")}, {"filter", f.name("OPEN")}, {"filter", f.name("INPUT")},
	} {
		ok, err := f.ipt.ChainExists(c.table, c.name)
		if err == nil && ok {
			err = f.ipt.ClearAndDeleteChain(c.table, c.name)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove chain %s: %w", c.name, err))
		}
	}
	return errors.Join(errs...)
}

// publish is one port of an instance on the host.
type publish struct {
	Host     netip.Addr `json:"host"` // invalid: every address of the host
	HostPort uint16     `json:"host_port"`
	Port     uint16     `json:"port"`
	Proto    string     `json:"proto"`
}

func (p publish) String() string {
	s := fmt.Sprintf("%d:%d/%s", p.HostPort, p.Port, p.Proto)
	if p.Host.IsValid() {
		s = p.Host.String() + ":" + s
	}
	return s
}

// parsePublish reads a list of [address:]hostport:port[/proto].
func parsePublish(text string) ([]publish, error) {
	bad := func(item, why string) error {
		return novalet.Faultf(novalet.ErrAbort, "InvalidInput", "Metadata %s: %.60q: %s.", PublishKey, item, why)
	}
	var out []publish
	for _, item := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' }) {
		p := publish{Proto: "tcp"}
		rest, proto, ok := strings.Cut(item, "/")
		if ok {
			p.Proto = proto
		}
		if p.Proto != "tcp" && p.Proto != "udp" {
			return nil, bad(item, "the protocol is tcp or udp")
		}
		parts := strings.Split(rest, ":")
		if len(parts) == 3 {
			a, err := netip.ParseAddr(parts[0])
			if err != nil || !a.Is4() || a.IsLoopback() {
				return nil, bad(item, "the host's address is an IPv4 address that is not 127.…")
			}
			if !a.IsUnspecified() {
				p.Host = a
			}
			parts = parts[1:]
		}
		if len(parts) != 2 {
			return nil, bad(item, "it is [address:]hostport:port[/tcp|udp]")
		}
		for i, to := range []*uint16{&p.HostPort, &p.Port} {
			n, err := strconv.ParseUint(parts[i], 10, 16)
			if err != nil || n == 0 {
				return nil, bad(item, "a port is a number from 1 to 65535")
			}
			*to = uint16(n)
		}
		if err := conflict(p, out); err != nil {
			return nil, err
		}
		if out = append(out, p); len(out) > 64 {
			return nil, bad(item, "at most 64 ports")
		}
	}
	return out, nil
}

// conflict says whether one of the list has the host's port already.
func conflict(p publish, list []publish) error {
	for _, o := range list {
		if o.Proto == p.Proto && o.HostPort == p.HostPort && (!o.Host.IsValid() || !p.Host.IsValid() || o.Host == p.Host) {
			return novalet.Faultf(novalet.ErrAbort, "InvalidInput", "Metadata %s: port %d/%s of the host is published already.", PublishKey, p.HostPort, p.Proto)
		}
	}
	return nil
}

// publishable compares with what other instances publish. The caller holds mu.
func (b *Bridge) publishable(list []publish) error {
	for _, p := range list {
		for _, o := range b.st.Ports {
			if err := conflict(p, o.Publish); err != nil {
				return err
			}
		}
	}
	return nil
}

type rule struct {
	table, chain string
	spec         []string
}

// rules of the published ports of a port.
func (f *firewall) rules(p *port) []rule {
	var out []rule
	note := []string{"-m", "comment", "--comment", "novalet:" + p.ID}
	addr := p.Addr.String()
	for _, pub := range p.Publish {
		dport := strconv.Itoa(int(pub.Port))
		dnat := []string{"-p", pub.Proto, "--dport", strconv.Itoa(int(pub.HostPort))}
		if pub.Host.IsValid() {
			dnat = append([]string{"-d", pub.Host.String() + "/32"}, dnat...)
		}
		dnat = append(append(dnat, note...), "-j", "DNAT", "--to-destination", addr+":"+dport)
		open := append(append([]string{"-d", addr + "/32", "-p", pub.Proto, "--dport", dport}, note...), "-j", "ACCEPT")
		// An instance that asks for the host's address gets its answer through the host: both are on one bridge.
		hairpin := append(append([]string{"-s", f.subnet.String(), "-d", addr + "/32", "-p", pub.Proto, "--dport", dport}, note...), "-j", "MASQUERADE")
		out = append(out,
			rule{"nat", f.name("PUBLISH"), dnat},
			rule{"filter", f.name("OPEN"), open},
			rule{"nat", f.name("POST"), hairpin})
	}
	return out
}

func (f *firewall) publish(p *port) error {
	for _, r := range f.rules(p) {
		if err := f.ipt.AppendUnique(r.table, r.chain, r.spec...); err != nil {
			return fmt.Errorf("add rule to %s: %w", r.chain, err)
		}
	}
	return nil
}

func (f *firewall) unpublish(p *port) error {
	for _, r := range f.rules(p) {
		if err := f.ipt.DeleteIfExists(r.table, r.chain, r.spec...); err != nil {
			return fmt.Errorf("remove rule from %s: %w", r.chain, err)
		}
	}
	return nil
}
