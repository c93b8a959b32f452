package agent

import (
	"context"
	"maps"

	"github.com/novalet/novalet"
)

// imageDeleter is what an ImageStore that can delete images in Glance has beside the contract.
type imageDeleter interface {
	DeleteImage(ctx context.Context, rc novalet.RequestContext, imageID string) error
}

// shelvedKeys are what shelving leaves in system_metadata.
var shelvedKeys = []string{"shelved_at", "shelved_image_id", "shelved_host"}

// dropShelved puts the system_metadata without the shelved keys among the fields to save, and returns the id of the shelved
// image, "" when the instance was not shelved.
func (a *Agent) dropShelved(in *instance, fields map[string]any) string {
	old := in.view().SystemMetadata
	image := old["shelved_image_id"]
	if image == "" {
		return ""
	}
	meta := maps.Clone(old)
	for _, k := range shelvedKeys {
		delete(meta, k)
	}
	fields["system_metadata"] = meta
	return image
}

// deleteImage deletes a snapshot that has served its purpose. Its loss is no failure of the operation.
func (a *Agent) deleteImage(ctx context.Context, in *instance, rc novalet.RequestContext, imageID string) {
	if imageID == "" {
		return
	}
	d, ok := a.images.(imageDeleter)
	if !ok {
		in.log.Warn("snapshot stays: the image store cannot delete images", "image", imageID)
		return
	}
	if err := d.DeleteImage(ctx, rc, imageID); err != nil {
		in.log.Warn("snapshot stays", "image", imageID, "err", err)
	}
}

func (a *Agent) offloadShelved(context.Context) error { return nil }
