package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/novalet/novalet"
)

// flight is one fetch of an image that several callers may wait for.
type flight struct {
	id, key  string
	name     string
	trust    *trust
	maxBytes int64  // the flavor's bound, 0 for none
	depth    int    // how many deltas are being fetched that lie on this image
	leave    func() // gives up the place among the fetches that run
	done     chan struct{}
	err      error // once done
	cancel   context.CancelCauseFunc
	waiters  int // under Store.mu

	progress, total atomic.Int64
}

var errNobodyWaits = errors.New("nobody waits for the image any more")

// Prepare implements novalet.ImageStore.
func (s *Store) Prepare(ctx context.Context, r *novalet.ImageRequest) (*novalet.Image, error) {
	id := r.ImageID
	if id == "" {
		id = r.Meta.ID
	}
	if !validID(id) {
		return nil, fmt.Errorf("prepare image: %q is no image id", id)
	}
	if r.InstanceUUID != "" && !validID(r.InstanceUUID) {
		return nil, fmt.Errorf("prepare image: %q is no instance id", r.InstanceUUID)
	}
	if err := fits(r, id, needs{minDiskGB: r.Meta.MinDiskGB, minRAMMB: r.Meta.MinRAMMB, bytes: r.Meta.Size}); err != nil {
		return nil, err
	}
	t := s.trustOf(r.TrustedCertificates)
	asked := map[baseRef]bool{}
	for {
		if err := s.vouch(ctx, r.Context, id, t); err != nil {
			return nil, err
		}
		if err := s.askBases(ctx, r.Context, id, asked); err != nil {
			return nil, err
		}
		img, f, joined, err := s.lookup(ctx, r, id, t, asked)
		if img != nil || err != nil {
			return img, err
		}
		if f == nil {
			continue // stored meanwhile
		}
		err = s.await(ctx, f)
		if joined && othersFault(err, f, r.MaxBytes) {
			continue
		}
		if err != nil {
			return nil, err
		}
	}
}

// lookup gives the image if the store has it, leased; else the flight that fetches it, and whether that was under way. None
// of both when Glance has to be asked for more than was asked for.
func (s *Store) lookup(ctx context.Context, r *novalet.ImageRequest, id string, t *trust, asked map[baseRef]bool) (img *novalet.Image, f *flight, joined bool, err error) {
	if err := context.Cause(ctx); err != nil {
		return nil, nil, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, false, errClosed
	}
	if rec := s.usableLocked(id, t); rec != nil {
		if img := s.imageLocked(rec); img != nil {
			if slices.ContainsFunc(rec.Bases, func(b baseRef) bool { return !asked[b] }) {
				return nil, nil, false, nil
			}
			img, err := s.finishLocked(r, rec, img)
			return img, nil, false, err
		}
	}
	f = s.flights[t.key(id)]
	if joined = f != nil; !joined {
		f = s.startLocked(r, id, t, 0)
	}
	f.waiters++
	return nil, f, joined, nil
}

// usableLocked is the record of a stored image, nil also for one whose signature was not looked at and has to be. s.mu is
// held.
func (s *Store) usableLocked(id string, t *trust) *imageRecord {
	if rec := s.images[id]; rec != nil && t.serves(rec) {
		return rec
	}
	return nil
}

// finishLocked applies what depends on the request: the size of the disk, how it is run. s.mu is held.
func (s *Store) finishLocked(r *novalet.ImageRequest, rec *imageRecord, img *novalet.Image) (*novalet.Image, error) {
	var data int64
	for _, id := range rec.Layers {
		data += s.layers[id].Data
	}
	if err := fits(r, rec.ID, rec.needs(r, data)); err != nil {
		return nil, err
	}
	props := r.Meta.Properties
	if props == nil {
		props = rec.Properties
	}
	if err := decideKind(img, rec.HasConfig, props); err != nil {
		return nil, err
	}
	if err := s.leaseLocked(r.InstanceUUID, rec); err != nil {
		return nil, err
	}
	s.syncSoonLocked()
	return img, nil
}

// startLocked begins to fetch an image. s.mu is held.
func (s *Store) startLocked(r *novalet.ImageRequest, id string, t *trust, depth int) *flight {
	ctx, cancel := context.WithCancelCause(s.ctx)
	f := &flight{id: id, key: t.key(id), name: r.Meta.Name, trust: &trust{signed: t.signed, ids: t.ids, nobody: t.nobody}, maxBytes: r.MaxBytes, depth: depth,
		done: make(chan struct{}), cancel: cancel}
	s.flights[f.key] = f
	s.fetching++
	rc := r.Context
	meta := r.Meta
	s.wg.Go(func() {
		err := s.fetch(ctx, f, rc, meta)
		cancel(nil)
		s.mu.Lock()
		if s.flights[f.key] == f {
			delete(s.flights, f.key)
		}
		s.fetching--
		s.collectSoonLocked()
		s.mu.Unlock()
		f.err = err
		close(f.done)
	})
	return f
}

// await waits for a flight; the last one to lose patience ends it.
func (s *Store) await(ctx context.Context, f *flight) error {
	var err error
	select {
	case <-f.done:
		err = f.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.waiters--; f.waiters == 0 {
		f.cancel(errNobodyWaits)
		if s.flights[f.key] == f {
			// Who asks next shall not join a fetch that is ending.
			delete(s.flights, f.key)
		}
	}
	return err
}

// Release implements novalet.ImageStore.
func (s *Store) Release(_ context.Context, instanceUUID string) error {
	if !validID(instanceUUID) {
		return fmt.Errorf("release images: %q is no instance id", instanceUUID)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.leases[instanceUUID]
	if l == nil {
		return nil
	}
	if err := removeRecord(s.path("leases", instanceUUID+".json")); err != nil {
		return fmt.Errorf("release images: %w", err)
	}
	delete(s.leases, instanceUUID)
	for _, id := range l.Images {
		if rec := s.images[id]; rec != nil {
			rec.LastUsed = time.Now()
			if err := s.writeRecord(s.path("images", id+".json"), rec); err != nil {
				s.log.Warn("note the last use of an image", "image", id, "err", err)
			}
		}
	}
	return nil
}

// Cache implements novalet.ImageStore.
func (s *Store) Cache(ctx context.Context, rc novalet.RequestContext, imageID string) (string, error) {
	if !validID(imageID) {
		return "error", fmt.Errorf("cache image: %q is no image id", imageID)
	}
	t := s.trustOf(nil)
	if err := s.vouch(ctx, rc, imageID, t); err != nil {
		return "error", err
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return "error", errClosed
	}
	if rec := s.usableLocked(imageID, t); rec != nil && s.imageLocked(rec) != nil {
		rec.LastUsed = time.Now()
		s.mu.Unlock()
		return "existing", nil
	}
	f := s.flights[t.key(imageID)]
	if f == nil {
		f = s.startLocked(&novalet.ImageRequest{Context: rc}, imageID, t, 0)
	}
	f.waiters++
	s.mu.Unlock()
	if err := s.await(ctx, f); err != nil {
		return "error", err
	}
	return "cached", nil
}

// List implements novalet.ImageStore.
func (s *Store) List(context.Context) ([]novalet.ImageStatus, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []novalet.ImageStatus
	for _, rec := range s.images {
		st := novalet.ImageStatus{ID: rec.ID, Name: rec.Name, Format: rec.Format,
			LastUsed: rec.LastUsed, Progress: rec.Download, Total: rec.Download}
		if img := s.imageLocked(rec); img != nil {
			st.Layers, st.Size = img.Layers, img.Size
		} else {
			st.Format += ", corrupt"
		}
		for _, l := range s.leases {
			if slices.Contains(l.Images, rec.ID) {
				st.UsedBy = append(st.UsedBy, l.Instance)
			}
		}
		slices.Sort(st.UsedBy)
		out = append(out, st)
	}
	for _, f := range s.flights {
		if rec := s.images[f.id]; rec == nil || s.imageLocked(rec) == nil {
			out = append(out, novalet.ImageStatus{ID: f.id, Name: f.name, Progress: f.progress.Load(), Total: f.total.Load()})
		}
	}
	slices.SortFunc(out, func(a, b novalet.ImageStatus) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return out, nil
}
