// Package netfiles writes the contents of /etc/resolv.conf, /etc/hosts and /etc/hostname of an instance from its
// network info. Its functions are pure.
package netfiles

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/novalet/novalet"
)

// maxServers is how many name servers the C library reads (MAXNS).
const maxServers = 3

var nameRE = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`)

// ResolvConf names the servers of the subnets in which the instance has addresses, in the order of its interfaces; a
// subnet that names none is served by its DHCP server, which answers for the network's names too. domain, if it
// is a valid one, is searched.
func ResolvConf(info novalet.NetworkInfo, domain string) []byte {
	var b bytes.Buffer
	if domain = strings.Trim(domain, "."); nameRE.MatchString(domain) {
		fmt.Fprintf(&b, "search %s\n", domain)
	}
	for _, s := range Servers(info) {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	return b.Bytes()
}

// Servers are the name servers of ResolvConf.
func Servers(info novalet.NetworkInfo) []netip.Addr {
	var out []netip.Addr
	add := func(text string) {
		a, err := netip.ParseAddr(text)
		if err == nil && !a.IsUnspecified() && a.Zone() == "" && len(out) < maxServers && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for i := range info {
		for _, s := range info[i].Network.Subnets {
			if len(s.IPs) == 0 {
				continue
			}
			for _, d := range s.DNS {
				if d.Address != nil {
					add(*d.Address)
				}
			}
			if len(s.DNS) == 0 && (s.Meta.DHCPServer != gateway(s) || byOVN(&info[i])) {
				// Where no DHCP server is known, network info has the gateway in its place; only OVN, which answers at
				// any address, answers there.
				add(s.Meta.DHCPServer)
			}
		}
	}
	return out
}

func gateway(s novalet.Subnet) string {
	if s.Gateway.Address == nil {
		return ""
	}
	return *s.Gateway.Address
}

func byOVN(v *novalet.VIF) bool {
	var drivers map[string]string
	_ = json.Unmarshal(v.Details["bound_drivers"], &drivers)
	for _, d := range drivers {
		if strings.HasPrefix(d, "ovn") {
			return true
		}
	}
	return false
}

// Hosts names localhost and the instance by its first address of each family, or by 127.0.1.1 when it has none.
func Hosts(info novalet.NetworkInfo, hostname, domain string) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	if !nameRE.MatchString(hostname) {
		return b.Bytes()
	}
	names := hostname
	if domain = strings.Trim(domain, "."); nameRE.MatchString(domain) && !strings.Contains(hostname, ".") {
		names = hostname + "." + domain + " " + hostname
	}
	var four, six netip.Addr
	for i := range info {
		for _, s := range info[i].Network.Subnets {
			for _, ip := range s.IPs {
				a, err := netip.ParseAddr(ip.Address)
				switch {
				case err != nil:
				case a.Is4() && !four.IsValid():
					four = a
				case a.Is6() && !six.IsValid():
					six = a
				}
			}
		}
	}
	if !four.IsValid() {
		four = netip.AddrFrom4([4]byte{127, 0, 1, 1})
	}
	fmt.Fprintf(&b, "%s\t%s\n", four, names)
	if six.IsValid() {
		fmt.Fprintf(&b, "%s\t%s\n", six, names)
	}
	return b.Bytes()
}

// Hostname is the name with its newline, or nil when it is none.
func Hostname(hostname string) []byte {
	if !nameRE.MatchString(hostname) {
		return nil
	}
	return []byte(hostname + "\n")
}
