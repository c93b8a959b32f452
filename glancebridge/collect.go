package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Collect implements novalet.ImageStore. It holds the store only while it decides; deleting goes on beside it.
func (s *Store) Collect(ctx context.Context) (int64, error) {
	s.mu.Lock()
	victims, freed, err := s.sweepLocked()
	s.mu.Unlock()
	for _, p := range victims {
		if ctx.Err() != nil {
			return freed, context.Cause(ctx) // the rest lies in ingest and goes at the next Open
		}
		if e := removeTree(p); e != nil {
			err = errors.Join(err, fmt.Errorf("remove layer: %w", e))
		}
	}
	return freed, err
}

// sweepLocked forgets images and layers that nothing needs and moves their trees aside. s.mu is held.
func (s *Store) sweepLocked() (victims []string, freed int64, err error) {
	leasedImages, needed := map[string]bool{}, map[string]bool{}
	for _, l := range s.leases {
		for _, id := range l.Images {
			leasedImages[id] = true
		}
		for _, id := range l.Layers {
			needed[id] = true
		}
	}
	var unused []*imageRecord
	for _, rec := range s.images {
		if !leasedImages[rec.ID] {
			unused = append(unused, rec)
		}
	}
	slices.SortFunc(unused, func(a, b *imageRecord) int { return a.LastUsed.Compare(b.LastUsed) })
	total := int64(0)
	for _, m := range s.layers {
		total += m.Data
	}
	high, low := s.o.HighWater, s.o.LowWater
	over := high > 0 && total > high
	now := time.Now()
	for _, rec := range unused {
		old := !s.o.KeepUnused && now.Sub(rec.LastUsed) > s.o.MinAge
		if !old && !(over && total > low) {
			continue
		}
		if e := removeRecord(s.path("images", rec.ID+".json")); e != nil {
			err = errors.Join(err, e)
			continue
		}
		delete(s.images, rec.ID)
		total -= s.soleBytesLocked(rec, needed)
		s.log.Info("image dropped from the cache", "image", rec.ID, "last_used", rec.LastUsed.Format(time.RFC3339))
	}
	for _, rec := range s.images {
		for _, id := range rec.Layers {
			needed[id] = true
		}
	}
	// A layer published a moment ago belongs to a fetch that has not written its image's record yet.
	if s.fetching > 0 {
		return nil, 0, err
	}
	for id, m := range s.layers {
		if needed[id] {
			continue
		}
		aside := s.path("ingest", "gone-"+strings.TrimPrefix(id, "sha256:"))
		if e := os.Rename(s.layerDir(id), aside); e != nil && !errors.Is(e, unix.ENOENT) {
			err = errors.Join(err, fmt.Errorf("remove layer: %w", e))
			continue
		}
		delete(s.layers, id)
		victims = append(victims, aside)
		freed += m.Data
	}
	return victims, freed, err
}

// soleBytesLocked is what removing an image would free. s.mu is held.
func (s *Store) soleBytesLocked(rec *imageRecord, leased map[string]bool) int64 {
	var n int64
	for _, id := range rec.Layers {
		shared := leased[id]
		for _, o := range s.images {
			shared = shared || slices.Contains(o.Layers, id)
		}
		if m := s.layers[id]; m != nil && !shared {
			n += m.Data
		}
	}
	return n
}
