package fake

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/novalet/novalet"
)

type imageState struct {
	imu     sync.Mutex
	images  map[string]*novalet.Image
	leases  map[string]bool
	uploads map[string]string      // image id → instance
	whole   map[string]bool        // images that were asked to be self-contained
	backups map[[2]string][]string // instance and backup_type → image ids, oldest first
	gone    []string               // images deleted in Glance
	trusted []string               // certificates of the last request
}

func newImageState() *imageState {
	return &imageState{images: map[string]*novalet.Image{}, leases: map[string]bool{}, uploads: map[string]string{}, whole: map[string]bool{},
		backups: map[[2]string][]string{}}
}

// AddBackup puts a backup of an instance into the fake Glance, newer than those before it, as nova-api does.
func (s *imageState) AddBackup(imageID, uuid, backupType string) {
	s.imu.Lock()
	defer s.imu.Unlock()
	s.images[imageID] = &novalet.Image{ID: imageID}
	kind := [2]string{uuid, backupType}
	s.backups[kind] = append(s.backups[kind], imageID)
}

// HasImage reports whether the fake Glance has an image.
func (s *imageState) HasImage(imageID string) bool {
	s.imu.Lock()
	defer s.imu.Unlock()
	return s.images[imageID] != nil
}

// AddImage puts an image into the fake Glance.
func (s *imageState) AddImage(img *novalet.Image) {
	s.imu.Lock()
	defer s.imu.Unlock()
	s.images[img.ID] = img
}

// Leased lists the instances that lease an image.
func (s *imageState) Leased() []string {
	s.imu.Lock()
	defer s.imu.Unlock()
	return slices.Sorted(maps.Keys(s.leases))
}

// Uploaded returns the instance whose snapshot an image holds, or "".
func (s *imageState) Uploaded(imageID string) string {
	s.imu.Lock()
	defer s.imu.Unlock()
	return s.uploads[imageID]
}

// Whole reports whether an image that was uploaded had to be self-contained.
func (s *imageState) Whole(imageID string) bool {
	s.imu.Lock()
	defer s.imu.Unlock()
	return s.whole[imageID]
}

// DeletedImages returns the ids handed to DeleteImage.
func (s *imageState) DeletedImages() []string {
	s.imu.Lock()
	defer s.imu.Unlock()
	return slices.Clone(s.gone)
}

// TrustedCertificates returns those that the last image was asked for with.
func (s *imageState) TrustedCertificates() []string {
	s.imu.Lock()
	defer s.imu.Unlock()
	return s.trusted
}

// Images is a fake novalet.ImageStore.
type Images struct {
	*imageState
	f *Faults
}

var _ novalet.ImageStore = (*Images)(nil)

// Prepare implements novalet.ImageStore.
func (s *Images) Prepare(ctx context.Context, r *novalet.ImageRequest) (*novalet.Image, error) {
	if err := s.f.enter(ctx, "ImageStore.Prepare"); err != nil {
		return nil, err
	}
	s.imu.Lock()
	s.trusted = r.TrustedCertificates
	img, ok := s.images[r.ImageID]
	if ok && (r.MaxBytes == 0 || img.Size <= r.MaxBytes) {
		s.leases[r.InstanceUUID] = true
	}
	s.imu.Unlock()
	if !ok {
		return nil, novalet.Faultf(novalet.ErrAbort, "ImageNotFound", "Image %s could not be found.", r.ImageID)
	}
	if r.MaxBytes > 0 && img.Size > r.MaxBytes {
		return nil, novalet.Faultf(novalet.ErrAbort, "FlavorDiskSmallerThanImage", "The image does not fit into the flavor's disk.")
	}
	c := *img
	return &c, s.f.leave(ctx, "ImageStore.Prepare")
}

// Release implements novalet.ImageStore.
func (s *Images) Release(ctx context.Context, uuid string) error {
	if err := s.f.enter(ctx, "ImageStore.Release"); err != nil {
		return err
	}
	s.imu.Lock()
	delete(s.leases, uuid)
	s.imu.Unlock()
	return s.f.leave(ctx, "ImageStore.Release")
}

// Snapshot implements novalet.ImageStore.
func (s *Images) Snapshot(ctx context.Context, r *novalet.SnapshotRequest) error {
	if err := s.f.enter(ctx, "ImageStore.Snapshot"); err != nil {
		return err
	}
	if r.Freeze != nil {
		thaw, err := r.Freeze(ctx)
		if err != nil {
			return err
		}
		thaw()
	}
	if r.Captured != nil {
		if err := r.Captured(ctx); err != nil {
			return err
		}
	}
	s.imu.Lock()
	s.uploads[r.ImageID], s.whole[r.ImageID] = r.InstanceUUID, r.Whole
	if r.Base != nil {
		img := *r.Base
		img.ID = r.ImageID
		s.images[r.ImageID] = &img
	}
	s.imu.Unlock()
	return s.f.leave(ctx, "ImageStore.Snapshot")
}

// DeleteImage implements novalet.ImageStore.
func (s *Images) DeleteImage(ctx context.Context, _ novalet.RequestContext, imageID string) error {
	if err := s.f.enter(ctx, "ImageStore.DeleteImage"); err != nil {
		return err
	}
	s.imu.Lock()
	_, uploaded := s.uploads[imageID]
	known := uploaded || s.images[imageID] != nil
	s.gone = append(s.gone, imageID)
	delete(s.images, imageID)
	delete(s.uploads, imageID)
	s.imu.Unlock()
	if !known {
		return fmt.Errorf("image %s: %w", imageID, novalet.ErrNotFound)
	}
	return s.f.leave(ctx, "ImageStore.DeleteImage")
}

// RotateBackups implements novalet.ImageStore.
func (s *Images) RotateBackups(ctx context.Context, _ novalet.RequestContext, uuid, backupType string, keep int64) error {
	if err := s.f.enter(ctx, "ImageStore.RotateBackups"); err != nil {
		return err
	}
	s.imu.Lock()
	kind := [2]string{uuid, backupType}
	for list := s.backups[kind]; int64(len(list)) > keep; list = s.backups[kind] {
		s.gone = append(s.gone, list[0])
		delete(s.images, list[0])
		delete(s.uploads, list[0])
		s.backups[kind] = list[1:]
	}
	s.imu.Unlock()
	return s.f.leave(ctx, "ImageStore.RotateBackups")
}

// Cache implements novalet.ImageStore.
func (s *Images) Cache(ctx context.Context, _ novalet.RequestContext, imageID string) (string, error) {
	if err := s.f.enter(ctx, "ImageStore.Cache"); err != nil {
		return "error", err
	}
	s.imu.Lock()
	defer s.imu.Unlock()
	if s.images[imageID] == nil {
		return "error", fmt.Errorf("image %s: %w", imageID, novalet.ErrNotFound)
	}
	return "cached", nil
}

// List implements novalet.ImageStore.
func (s *Images) List(ctx context.Context) ([]novalet.ImageStatus, error) {
	if err := s.f.enter(ctx, "ImageStore.List"); err != nil {
		return nil, err
	}
	s.imu.Lock()
	defer s.imu.Unlock()
	var out []novalet.ImageStatus
	for _, id := range slices.Sorted(maps.Keys(s.images)) {
		out = append(out, novalet.ImageStatus{ID: id, Size: s.images[id].Size})
	}
	return out, nil
}

// Verify implements novalet.ImageStore: nothing here can rot.
func (s *Images) Verify(ctx context.Context, _ bool) ([]novalet.LayerCheck, error) {
	if err := s.f.enter(ctx, "ImageStore.Verify"); err != nil {
		return nil, err
	}
	s.imu.Lock()
	defer s.imu.Unlock()
	byLayer := map[string]*novalet.LayerCheck{}
	for _, id := range slices.Sorted(maps.Keys(s.images)) {
		for _, l := range s.images[id].Layers {
			if byLayer[l.DiffID] == nil {
				byLayer[l.DiffID] = &novalet.LayerCheck{DiffID: l.DiffID, Size: l.Size}
			}
			byLayer[l.DiffID].Images = append(byLayer[l.DiffID].Images, id)
		}
	}
	var out []novalet.LayerCheck
	for _, id := range slices.Sorted(maps.Keys(byLayer)) {
		out = append(out, *byLayer[id])
	}
	return out, nil
}

// Collect implements novalet.ImageStore.
func (s *Images) Collect(ctx context.Context) (int64, error) {
	return 0, s.f.enter(ctx, "ImageStore.Collect")
}
