package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/novalet/novalet"
)

// DeleteImage implements novalet.ImageStore.
func (s *Store) DeleteImage(ctx context.Context, rc novalet.RequestContext, imageID string) error {
	if !validID(imageID) {
		return fmt.Errorf("delete image: %q is no image id", imageID)
	}
	if err := s.o.Glance.Delete(ctx, rc, imageID); err != nil {
		return fmt.Errorf("delete image %s: %w", imageID, err)
	}
	return nil
}

// RotateBackups implements novalet.ImageStore. Nova-api has given the images these properties. Only images of the
// request's own project count: an image that somebody else shows to it must not push out one of its own.
func (s *Store) RotateBackups(ctx context.Context, rc novalet.RequestContext, instanceUUID, backupType string, keep int64) error {
	if !validID(instanceUUID) {
		return fmt.Errorf("rotate backups: %q is no instance id", instanceUUID)
	}
	list, err := s.o.Glance.Find(ctx, rc, rc.ProjectID,
		map[string]string{"image_type": "backup", "backup_type": backupType, "instance_uuid": instanceUUID})
	if err != nil {
		return fmt.Errorf("rotate backups: %w", err)
	}
	slices.SortFunc(list, func(a, b ImageRecord) int {
		if c := b.CreatedAt.Compare(a.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(b.ID, a.ID)
	})
	var errs []error
	for _, r := range list[min(max(keep, 0), int64(len(list))):] {
		// Gone is as good as deleted: the user may be tidying up too.
		if err := s.o.Glance.Delete(ctx, rc, r.ID); err != nil && !errors.Is(err, novalet.ErrNotFound) {
			errs = append(errs, fmt.Errorf("rotate backups: delete image %s: %w", r.ID, err))
			continue
		}
		s.log.Info("old backup deleted", "image", r.ID, "instance", instanceUUID, "backup_type", backupType, "request_id", rc.RequestID)
	}
	return errors.Join(errs...)
}
