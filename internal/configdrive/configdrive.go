// Package configdrive builds the tree of files that a guest finds on its config drive, as nova/api/metadata/base.py and
// nova/virt/netutils.py build it. It does no I/O.
package configdrive

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path"
	"strings"

	"github.com/novalet/novalet"
)

// Label is the file-system label that guests look the drive up by.
const Label = "config-2"

// The versions of the OpenStack metadata, oldest first. Names sort by age.
var versions = []string{
	"2012-08-10", "2013-04-04", "2013-10-17", "2015-10-15", "2016-06-30", "2016-10-06", "2017-02-22", "2018-08-27",
	"2020-10-14", "latest",
}

// The versions from which on something is there.
const (
	sinceSeed        = "2013-04-04"
	sinceVendorData  = "2013-10-17"
	sinceNetworkData = "2015-10-15"
	sinceDevices     = "2016-06-30"
	sinceVendorData2 = "2016-10-06"
	sinceTrustedVF   = "2018-08-27"
	sinceDedicated   = "2020-10-14"
)

// Input is what the drive tells of an instance.
type Input struct {
	Instance      *novalet.Instance
	Network       novalet.NetworkInfo
	Files         []novalet.InjectedFile
	AdminPassword novalet.Secret
	// Seed is base64 of random bytes, the same at every start of the instance.
	Seed       string
	DHCPDomain string
	// Devices are those that were given a tag.
	Devices       []novalet.TaggedDevice
	DedicatedCPUs []int
	// Ephemerals is how many ephemeral disks the instance has, Swap whether it has swap space.
	Ephemerals int
	Swap       bool
}

// Build returns the files of the drive by path. User data or injected files that are not base64 are ErrAbort.
func Build(in *Input) ([]novalet.File, error) {
	userData, err := decode("user data", in.Instance.UserData)
	if err != nil {
		return nil, err
	}
	network, err := json.Marshal(networkData(in.Network))
	if err != nil {
		return nil, fmt.Errorf("encode network data: %w", err)
	}
	var files []novalet.File
	add := func(p string, data []byte) { files = append(files, novalet.File{Path: p, Mode: 0o644, Data: data}) }
	var contents []contentFile
	for i, f := range in.Files {
		data, err := decode("injected file", f.Data.Reveal())
		if err != nil {
			return nil, err
		}
		c := contentFile{Path: f.Path, ContentPath: fmt.Sprintf("/content/%04d", i)}
		contents = append(contents, c)
		add(path.Join("openstack", c.ContentPath), data)
	}
	for _, v := range versions {
		meta, err := json.Marshal(metaData(in, v, contents))
		if err != nil {
			return nil, fmt.Errorf("encode metadata: %w", err)
		}
		dir := path.Join("openstack", v)
		add(path.Join(dir, "meta_data.json"), meta)
		if len(userData) > 0 {
			add(path.Join(dir, "user_data"), userData)
		}
		if v >= sinceVendorData {
			add(path.Join(dir, "vendor_data.json"), []byte("{}"))
		}
		if v >= sinceNetworkData {
			add(path.Join(dir, "network_data.json"), network)
		}
		if v >= sinceVendorData2 {
			add(path.Join(dir, "vendor_data2.json"), []byte(`{"static": {}}`))
		}
	}
	ec2, err := json.Marshal(ec2Data(in))
	if err != nil {
		return nil, fmt.Errorf("encode ec2 metadata: %w", err)
	}
	for _, v := range []string{"2009-04-04", "latest"} {
		add(path.Join("ec2", v, "meta-data.json"), ec2)
		if len(userData) > 0 {
			add(path.Join("ec2", v, "user-data"), userData)
		}
	}
	return files, nil
}

type contentFile struct {
	ContentPath string `json:"content_path"`
	Path        string `json:"path"`
}

type key struct {
	Name string `json:"name"`
	Type string `json:"type"`
	Data string `json:"data"`
}

// Hostname is the host name the metadata tells.
func Hostname(inst *novalet.Instance, domain string) string {
	if domain == "" || strings.Contains(inst.Hostname, ".") {
		return inst.Hostname
	}
	return inst.Hostname + "." + domain
}

// Keys returns the public keys of the instance; older senders leave the list out and give name and data alone.
func Keys(inst *novalet.Instance) []novalet.KeyPair {
	if len(inst.KeyPairs) > 0 {
		return inst.KeyPairs
	}
	if inst.KeyName == "" || inst.KeyData == "" {
		return nil
	}
	return []novalet.KeyPair{{Name: inst.KeyName, Type: "ssh", Data: inst.KeyData}}
}

func metaData(in *Input, version string, contents []contentFile) map[string]any {
	inst := in.Instance
	m := map[string]any{
		"uuid": inst.UUID, "hostname": Hostname(inst, in.DHCPDomain), "name": inst.DisplayName,
		"launch_index": inst.LaunchIndex, "availability_zone": inst.AvailabilityZone,
	}
	if len(inst.Metadata) > 0 {
		m["meta"] = inst.Metadata
	}
	if len(contents) > 0 {
		m["files"] = contents
	}
	if in.AdminPassword != "" {
		m["admin_pass"] = in.AdminPassword.Reveal()
	}
	if keys := Keys(inst); len(keys) > 0 {
		public, list := map[string]string{}, []key{}
		for _, k := range keys {
			public[k.Name] = k.Data
			list = append(list, key{k.Name, k.Type, k.Data})
		}
		m["public_keys"], m["keys"] = public, list
	}
	if version >= sinceSeed {
		m["random_seed"] = in.Seed
	}
	if version >= sinceNetworkData {
		m["project_id"] = inst.ProjectID
	}
	if version >= sinceDevices {
		m["devices"] = devices(in.Devices, version)
	}
	if version >= sinceDedicated {
		cpus := in.DedicatedCPUs
		if cpus == nil {
			cpus = []int{}
		}
		m["dedicated_cpus"] = cpus
	}
	return m
}

// devices tells the guest which of its devices its owner means by which tag. They sit on no bus that it sees.
func devices(list []novalet.TaggedDevice, version string) []map[string]any {
	out := []map[string]any{}
	for _, t := range list {
		d := map[string]any{"type": "disk", "path": t.Path, "bus": "none", "address": "none", "tags": []string{t.Tag}}
		if t.MAC != "" {
			delete(d, "path")
			d["type"], d["mac"] = "nic", t.MAC
			if version >= sinceTrustedVF {
				d["vf_trusted"] = false
			}
		}
		out = append(out, d)
	}
	return out
}

func ec2Data(in *Input) map[string]any {
	inst := in.Instance
	fixed, floating := "", ""
	for i := range in.Network {
		for _, s := range in.Network[i].Network.Subnets {
			for _, ip := range s.IPs {
				if ip.Version != 4 {
					continue
				}
				if fixed == "" {
					fixed = ip.Address
				}
				if floating == "" && len(ip.FloatingIPs) > 0 {
					floating = ip.FloatingIPs[0].Address
				}
			}
		}
	}
	host := Hostname(inst, in.DHCPDomain)
	m := map[string]any{
		// "FIXME" is the very value that Nova serves here (nova/api/metadata/base.py); nothing of ours is unfinished.
		"ami-launch-index": inst.LaunchIndex, "ami-manifest-path": "FIXME", "hostname": host, "instance-action": "none",
		"instance-id": fmt.Sprintf("i-%08x", inst.ID), "instance-type": inst.Flavor.Name, "local-hostname": host,
		"local-ipv4": fixed, "public-hostname": host, "public-ipv4": floating,
		"placement":            map[string]string{"availability-zone": inst.AvailabilityZone},
		"block-device-mapping": blockMapping(in),
	}
	if keys := Keys(inst); len(keys) > 0 {
		m["public-keys"] = map[string]any{"0": map[string]string{"_name": "0=" + keys[0].Name, "openssh-key": keys[0].Data}}
	}
	return m
}

// blockMapping names the disks as Nova does (nova/block_device.py, instance_block_mapping), in the order in which the
// libvirt driver gives out letters.
func blockMapping(in *Input) map[string]string {
	m := map[string]string{"ami": "vda", "root": "/dev/vda"}
	next := 'b'
	for i := range in.Ephemerals {
		m[fmt.Sprintf("ephemeral%d", i)] = "/dev/vd" + string(next)
		next++
	}
	if in.Swap && next <= 'z' {
		m["swap"] = "/dev/vd" + string(next)
	}
	return m
}

// decode takes base64 as Python's decoder takes it: with line breaks.
func decode(what, text string) ([]byte, error) {
	clean := strings.NewReplacer("\n", "", "\r", "", " ", "", "\t", "").Replace(text)
	data, err := base64.StdEncoding.DecodeString(clean)
	if err != nil {
		// The text itself may be a secret; the error names no byte of it.
		return nil, novalet.Faultf(novalet.ErrAbort, "", "The %s is not base64. Create the server again with encoded data.", what)
	}
	return data, nil
}
