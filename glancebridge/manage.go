package glancebridge

import (
	"context"
	"fmt"

	"github.com/novalet/novalet"
)

// DeleteImage removes an image from Glance, such as that of a server that is no longer shelved. ErrNotFound when there
// is none.
func (s *Store) DeleteImage(ctx context.Context, rc novalet.RequestContext, imageID string) error {
	if !validID(imageID) {
		return fmt.Errorf("delete image: %q is no image id", imageID)
	}
	if err := s.o.Glance.Delete(ctx, rc, imageID); err != nil {
		return fmt.Errorf("delete image %s: %w", imageID, err)
	}
	return nil
}
