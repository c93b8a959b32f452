package agent

import (
	"encoding/base64"
	"path"
	"strings"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/configdrive"
)

// networkFiles are the files by which an application finds its name and name servers: nobody inside would write them.
func networkFiles(cfg *Config, inst *novalet.Instance) []novalet.File {
	name := hostname(inst)
	full := configdrive.Hostname(inst, cfg.DHCPDomain)
	var hosts strings.Builder
	hosts.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	names := name
	if full != "" && full != name {
		names = full + " " + name
	}
	addresses := fixedIPs(inst.NetworkInfo)
	for _, ip := range addresses {
		hosts.WriteString(ip + "\t" + names + "\n")
	}
	if len(addresses) == 0 {
		hosts.WriteString("127.0.1.1\t" + names + "\n")
	}
	return []novalet.File{
		{Path: "/etc/hostname", Data: []byte(name + "\n")},
		{Path: "/etc/hosts", Data: []byte(hosts.String())},
		{Path: "/etc/resolv.conf", Data: []byte(resolvConf(cfg, inst.NetworkInfo))},
	}
}

func fixedIPs(info novalet.NetworkInfo) []string {
	var out []string
	for i := range info {
		for _, s := range info[i].Network.Subnets {
			for _, ip := range s.IPs {
				out = append(out, ip.Address)
			}
		}
	}
	return out
}

// resolvConf lists the subnets' name servers, at most three, which is what libc reads.
func resolvConf(cfg *Config, info novalet.NetworkInfo) string {
	var servers []string
	seen := map[string]bool{}
	add := func(a string) {
		if a != "" && !seen[a] && len(servers) < 3 {
			seen[a] = true
			servers = append(servers, a)
		}
	}
	for i := range info {
		for _, s := range info[i].Network.Subnets {
			for _, d := range s.DNS {
				if d.Address != nil {
					add(*d.Address)
				}
			}
		}
	}
	if len(servers) == 0 {
		for _, d := range cfg.DefaultDNS {
			add(d)
		}
	}
	var b strings.Builder
	if cfg.DHCPDomain != "" {
		b.WriteString("search " + cfg.DHCPDomain + "\n")
	}
	for _, s := range servers {
		b.WriteString("nameserver " + s + "\n")
	}
	return b.String()
}

// machineFiles makes a disk image's root fit a container, once: no file systems to wait for, and an identity that its
// first boot makes itself.
func machineFiles(inst *novalet.Instance) []novalet.File {
	return []novalet.File{
		{Path: "/etc/hostname", Data: []byte(hostname(inst) + "\n")},
		// systemd waits 90 s for each device that fstab names, and drops to emergency mode without it.
		{Path: "/etc/fstab", Data: []byte("# The root file system is mounted by the host.\n")},
		{Path: "/etc/machine-id", Mode: 0o444, Data: []byte{}},
	}
}

// authorizedKeys lets the key pair in where no cloud-init does it.
func authorizedKeys(inst *novalet.Instance) *novalet.File {
	var b strings.Builder
	for _, k := range configdrive.Keys(inst) {
		if k.Type == "x509" || strings.TrimSpace(k.Data) == "" {
			continue
		}
		b.WriteString(strings.TrimSpace(k.Data) + "\n")
	}
	if b.Len() == 0 {
		return nil
	}
	return &novalet.File{Path: "/root/.ssh/authorized_keys", Mode: 0o600, Data: []byte(b.String()), Append: true}
}

// injectedFiles are the personality of the request.
func injectedFiles(files []novalet.InjectedFile) ([]novalet.File, error) {
	var out []novalet.File
	for _, f := range files {
		data, err := base64.StdEncoding.DecodeString(strings.NewReplacer("\n", "", "\r", "", " ", "").Replace(f.Data.Reveal()))
		if err != nil {
			return nil, novalet.Faultf(novalet.ErrAbort, "", "An injected file is not base64. Create the server again with encoded files.")
		}
		p := path.Clean("/" + f.Path)
		if p == "/" || strings.ContainsRune(p, 0) || len(p) > 4096 {
			return nil, novalet.Faultf(novalet.ErrAbort, "", "An injected file has no usable path. Create the server again with an absolute path.")
		}
		out = append(out, novalet.File{Path: p, Data: data})
	}
	return out, nil
}
