package fake

import (
	"context"
	"maps"

	"github.com/novalet/novalet"
)

// SaveNetworkInfo implements novalet.Conductor.
func (c *Conductor) SaveNetworkInfo(ctx context.Context, _ novalet.RequestContext, uuid string, info novalet.NetworkInfo) error {
	return c.onRow(ctx, "Conductor.SaveNetworkInfo", uuid, func(r *Row) error { r.Info = info; return nil })
}

// CreateVIF implements novalet.Conductor.
func (c *Conductor) CreateVIF(ctx context.Context, _ novalet.RequestContext, uuid string, vif *novalet.VIF, tag string) error {
	return c.onRow(ctx, "Conductor.CreateVIF", uuid, func(r *Row) error {
		r.VIFRows[vif.ID] = vif.Address
		if tag != "" {
			r.VIFTags = maps.Clone(r.VIFTags)
			if r.VIFTags == nil {
				r.VIFTags = map[string]string{}
			}
			r.VIFTags[vif.ID] = tag
		}
		return nil
	})
}

// VIFTags implements novalet.Conductor.
func (c *Conductor) VIFTags(ctx context.Context, _ novalet.RequestContext, uuid string) (map[string]string, error) {
	var tags map[string]string
	err := c.onRow(ctx, "Conductor.VIFTags", uuid, func(r *Row) error { tags = maps.Clone(r.VIFTags); return nil })
	return tags, err
}

// DeleteVIFs implements novalet.Conductor.
func (c *Conductor) DeleteVIFs(ctx context.Context, _ novalet.RequestContext, uuid string) error {
	return c.onRow(ctx, "Conductor.DeleteVIFs", uuid, func(r *Row) error { clear(r.VIFRows); return nil })
}

// DeleteVIF implements novalet.Conductor.
func (c *Conductor) DeleteVIF(ctx context.Context, _ novalet.RequestContext, uuid, vifID string) error {
	return c.onRow(ctx, "Conductor.DeleteVIF", uuid, func(r *Row) error { delete(r.VIFRows, vifID); return nil })
}
