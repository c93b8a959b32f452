package agent

import (
	"context"
	"maps"

	"github.com/novalet/novalet"
)

// taggedDevices lists the devices of an instance that their owner gave a name, interfaces first, in their order.
func taggedDevices(r *record) []novalet.TaggedDevice {
	var out []novalet.TaggedDevice
	for i := range r.Instance.NetworkInfo {
		v := &r.Instance.NetworkInfo[i]
		if t := r.Tags[v.ID]; t != "" {
			out = append(out, novalet.TaggedDevice{MAC: v.Address, Tag: t})
		}
	}
	if r.Build == nil {
		return out
	}
	for i := range r.Build.BlockDevices {
		d := &r.Build.BlockDevices[i]
		if d.Tag == "" {
			continue
		}
		path := d.DeviceName
		if path == "" && d.BootIndex != nil && *d.BootIndex == 0 {
			path = "/dev/vda"
		}
		out = append(out, novalet.TaggedDevice{Path: path, Tag: d.Tag})
	}
	return out
}

// knowTags reads the tags of an instance that comes from another host, or was shelved. Without them only the names of
// devices are missing in its metadata.
func (a *Agent) knowTags(ctx context.Context, in *instance, rc novalet.RequestContext) {
	if len(in.view().NetworkInfo) == 0 {
		return
	}
	var tags map[string]string
	err := a.insist(ctx, in.log, "read tags", func(ctx context.Context) (err error) {
		tags, err = a.conductor.VIFTags(ctx, rc, in.uuid)
		return err
	})
	if err != nil {
		if ctx.Err() == nil {
			in.log.Warn("tags of devices are not read", "err", err)
		}
		return
	}
	in.set(func(r *record) { r.Tags = tags })
}

// setTag names an interface, or takes its name. It says whether that changed anything.
func (in *instance) setTag(port, tag string) bool {
	changed := false
	in.note(func(r *record) {
		if changed = r.Tags[port] != tag; !changed {
			return
		}
		tags := maps.Clone(r.Tags)
		if tags == nil {
			tags = map[string]string{}
		}
		tags[port] = tag
		if tag == "" {
			delete(tags, port)
		}
		r.Tags = tags
	})
	return changed
}

// saveTags writes the names where nova-api's metadata service reads them. A guest without them still has its devices.
func (a *Agent) saveTags(ctx context.Context, in *instance, rc novalet.RequestContext) {
	var list []novalet.TaggedDevice
	in.read(func(r *record) { list = taggedDevices(r) })
	if err := a.save(ctx, in, rc, nil, map[string]any{"device_metadata": list}); err != nil && ctx.Err() == nil {
		in.log.Warn("tags of devices are not recorded", "err", err)
	}
}
