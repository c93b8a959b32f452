package novadriver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// This file turns what travels on the bus into novalet's types. Everything here is foreign: a value of the wrong type
// is taken for absent, except where the operation makes no sense without it.

// args are the named arguments of a request.
type args map[string]json.RawMessage

func decodeArgs(raw json.RawMessage) (args, error) {
	var a args
	if err := json.Unmarshal(raw, &a); err != nil {
		return nil, errors.New("the arguments are no JSON object")
	}
	return a, nil
}

// str returns a text argument, "" when it is null or absent.
func (a args) str(name string) string {
	var s string
	_ = json.Unmarshal(a[name], &s)
	return s
}

// number returns an integer that may come as a text; ok is false when there is none.
func (a args) number(name string) (n int64, ok bool) {
	var v json.Number
	raw := bytes.Trim(bytes.TrimSpace(a[name]), `"`)
	if json.Unmarshal(raw, &v) != nil {
		return 0, false
	}
	n, err := v.Int64()
	return n, err == nil
}

func (a args) flag(name string, absent bool) bool {
	b := absent
	_ = json.Unmarshal(a[name], &b)
	return b
}

func isNull(raw json.RawMessage) bool {
	t := bytes.TrimSpace(raw)
	return len(t) == 0 || string(t) == "null"
}

func orNull(raw json.RawMessage) json.RawMessage {
	if len(raw) == 0 {
		return json.RawMessage("null")
	}
	return raw
}

// instance returns the instance the request is about.
func (d *Driver) argInstance(a args) (*novalet.Instance, error) {
	return d.decodeInstance(a["instance"])
}

// decodeInstance reads an Instance object. Only the uuid has to be there: senders leave lazy fields out.
func (d *Driver) decodeInstance(raw json.RawMessage) (*novalet.Instance, error) {
	o, err := ovo.Decode(raw)
	if err != nil {
		return nil, fmt.Errorf("read the instance: %w", err)
	}
	if o == nil || o.Name != "Instance" {
		return nil, errors.New("read the instance: there is none")
	}
	return d.instanceOf(o, raw)
}

func (d *Driver) instanceOf(o *ovo.Object, raw json.RawMessage) (*novalet.Instance, error) {
	i := &novalet.Instance{
		ID: o.Int("id"), UUID: strings.ToLower(o.String("uuid")), ProjectID: o.String("project_id"), UserID: o.String("user_id"),
		Hostname: o.String("hostname"), DisplayName: o.String("display_name"), ImageRef: o.String("image_ref"),
		KeyName: o.String("key_name"), KeyData: o.String("key_data"), UserData: o.String("user_data"),
		Host: o.String("host"), Node: o.String("node"), VMState: novalet.VMState(o.String("vm_state")),
		TaskState: novalet.TaskState(o.String("task_state")), PowerState: novalet.PowerState(o.Int("power_state")),
		AvailabilityZone: o.String("availability_zone"), LaunchIndex: o.Int("launch_index"),
		LaunchedAt: timePtr(o.Time("launched_at")), DeletedAt: timePtr(o.Time("deleted_at")), Deleted: o.Bool("deleted"),
		RootDeviceName: o.String("root_device_name"), ConfigDrive: o.String("config_drive"),
		AccessIPv4: o.String("access_ip_v4"), AccessIPv6: o.String("access_ip_v6"),
		Flavor: flavorOf(o.Object("flavor")), Wire: bytes.Clone(raw),
	}
	// The uuid becomes part of paths and names on this host.
	if !isUUID(i.UUID) {
		return nil, fmt.Errorf("read the instance: uuid %q is none", shorten(i.UUID, 64))
	}
	if o.Has("metadata") {
		i.Metadata = o.StringMap("metadata")
	}
	if o.Has("system_metadata") {
		i.SystemMetadata = o.StringMap("system_metadata")
	}
	if o.Has("trusted_certs") {
		i.TrustedCertificates = append([]string{}, o.Object("trusted_certs").Strings("ids")...)
	}
	if i.ID > 0 {
		i.Name = instanceName(d.o.InstanceNameTemplate, i.ID)
	}
	if text := o.Object("info_cache").String("network_info"); text != "" {
		if err := json.Unmarshal([]byte(text), &i.NetworkInfo); err != nil {
			return nil, fmt.Errorf("read the network info of instance %s: %w", i.UUID, err)
		}
	}
	for _, k := range o.Object("keypairs").Objects() {
		i.KeyPairs = append(i.KeyPairs, novalet.KeyPair{Name: k.String("name"), Type: k.String("type"), Data: k.String("public_key")})
	}
	i.PCIRequests = pciRequestsOf(o.Object("pci_requests"))
	return i, nil
}

func instanceName(template string, id int64) string {
	return fmt.Sprintf(strings.Replace(template, "%(id)", "%", 1), id)
}

// decodeInstances reads an InstanceList.
func (d *Driver) decodeInstances(raw json.RawMessage) ([]novalet.Instance, error) {
	l, err := ovo.Decode(raw)
	if err != nil {
		return nil, fmt.Errorf("read the list of instances: %w", err)
	}
	if l == nil || l.Name != "InstanceList" {
		return nil, errors.New("read the list of instances: there is none")
	}
	var out []novalet.Instance
	for _, o := range l.Objects() {
		wire, err := json.Marshal(o)
		if err != nil {
			return nil, fmt.Errorf("read the list of instances: %w", err)
		}
		i, err := d.instanceOf(o, wire)
		if err != nil {
			// One bad row must not keep the others from being seen.
			d.log.Error("an instance of the list is unreadable", "err", err)
			continue
		}
		out = append(out, *i)
	}
	return out, nil
}

func flavorOf(o *ovo.Object) novalet.Flavor {
	f := novalet.Flavor{
		ID: o.Int("id"), FlavorID: o.String("flavorid"), Name: o.String("name"), MemoryMB: o.Int("memory_mb"), VCPUs: o.Int("vcpus"),
		RootGB: o.Int("root_gb"), EphemeralGB: o.Int("ephemeral_gb"), Swap: o.Int("swap"),
	}
	if o.Has("extra_specs") {
		f.ExtraSpecs = o.StringMap("extra_specs")
	}
	return f
}

func timePtr(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// decodeImage reads the image dict of a request; null gives an empty one.
func decodeImage(raw json.RawMessage) novalet.ImageMeta {
	var m args
	_ = json.Unmarshal(raw, &m)
	num := func(k string) int64 { n, _ := m.number(k); return n }
	return novalet.ImageMeta{
		ID: m.str("id"), Name: m.str("name"), Status: m.str("status"), Size: num("size"), DiskFormat: m.str("disk_format"),
		ContainerFormat: m.str("container_format"), MinDiskGB: num("min_disk"), MinRAMMB: num("min_ram"), Owner: m.str("owner"),
		Properties: decodeProperties(m["properties"]),
	}
}

// decodeProperties makes texts of the values, which are texts in most releases and typed in some.
func decodeProperties(raw json.RawMessage) map[string]string {
	var m map[string]any
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	if dec.Decode(&m) != nil {
		return nil
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		switch v := v.(type) {
		case string:
			out[k] = v
		case bool, json.Number:
			out[k] = fmt.Sprint(v)
		}
	}
	return out
}

// decodeFiles reads injected_files: pairs of path and base64.
func decodeFiles(raw json.RawMessage) []novalet.InjectedFile {
	var pairs [][]string
	if json.Unmarshal(raw, &pairs) != nil {
		return nil
	}
	var out []novalet.InjectedFile
	for _, p := range pairs {
		if len(p) == 2 {
			out = append(out, novalet.InjectedFile{Path: p[0], Data: novalet.Secret(p[1])})
		}
	}
	return out
}

// decodeNetworks reads a NetworkRequestList; null is nil. Single elements of a list are objects, in old forms tuples.
func decodeNetworks(raw json.RawMessage) ([]novalet.NetworkRequest, error) {
	if isNull(raw) {
		return nil, nil
	}
	l, err := ovo.Decode(raw)
	if err != nil {
		return nil, fmt.Errorf("read the requested networks: %w", err)
	}
	out := []novalet.NetworkRequest{}
	for _, o := range l.Objects() {
		out = append(out, novalet.NetworkRequest{
			NetworkID: o.String("network_id"), Address: o.String("address"), PortID: o.String("port_id"), Tag: o.String("tag"),
		})
	}
	return out, nil
}

// decodeBDMs reads a BlockDeviceMappingList.
func decodeBDMs(raw json.RawMessage) ([]novalet.BlockDevice, error) {
	l, err := ovo.Decode(raw)
	if err != nil {
		return nil, fmt.Errorf("read the block devices: %w", err)
	}
	var out []novalet.BlockDevice
	for _, o := range l.Objects() {
		wire, err := json.Marshal(o)
		if err != nil {
			return nil, fmt.Errorf("read the block devices: %w", err)
		}
		b := novalet.BlockDevice{
			SourceType: o.String("source_type"), DestinationType: o.String("destination_type"), GuestFormat: o.String("guest_format"),
			DeviceName: o.String("device_name"), VolumeID: o.String("volume_id"), VolumeSize: o.Int("volume_size"),
			Tag: o.String("tag"), Wire: wire,
		}
		if !o.IsNull("boot_index") {
			n := o.Int("boot_index")
			b.BootIndex = &n
		}
		out = append(out, b)
	}
	return out, nil
}

// requestContext of a delivery.
func contextOf(c oslomsg.Context) novalet.RequestContext {
	return novalet.RequestContext{
		RequestID: c.RequestID(), UserID: c.String("user_id"), ProjectID: c.String("project_id"),
		AuthToken: novalet.Secret(c.String("auth_token")), Wire: c,
	}
}

// isUUID accepts the canonical form only.
func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, r := range s {
		switch {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if r != '-' {
				return false
			}
		case r >= '0' && r <= '9' || r >= 'a' && r <= 'f':
		default:
			return false
		}
	}
	return true
}

// marshalPlain encodes without escaping <, > and &, as Python does.
func marshalPlain(v any) (json.RawMessage, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSpace(b.Bytes()), nil
}
