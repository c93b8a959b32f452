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
	excess := s.excessLocked()
	now := time.Now()
	for _, rec := range unused {
		old := !s.o.KeepUnused && now.Sub(rec.LastUsed) > s.o.MinAge
		if !old && (excess <= 0 || now.Sub(rec.LastUsed) < s.grace) {
			continue
		}
		if e := removeRecord(s.path("images", rec.ID+".json")); e != nil {
			err = errors.Join(err, e)
			continue
		}
		delete(s.images, rec.ID)
		excess -= s.soleBytesLocked(rec, needed)
		s.log.Info("image dropped from the cache", "image", rec.ID, "last_used", rec.LastUsed.Format(time.RFC3339))
	}
	for _, rec := range s.images {
		for _, id := range rec.Layers {
			needed[id] = true
		}
	}
	victims = s.sweepReplacedLocked()
	// A layer published a moment ago belongs to a fetch that has not written its image's record yet.
	if s.fetching > 0 {
		return victims, 0, err
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

// excessLocked is how many bytes have to go, 0 when no high mark is crossed. s.mu is held.
func (s *Store) excessLocked() int64 {
	var total, excess int64
	for _, m := range s.layers {
		total += m.Data
	}
	if s.o.HighWater > 0 && total > s.o.HighWater {
		excess = total - s.o.LowWater
	}
	if s.o.HighPercent > 0 {
		size, used, err := s.usage()
		if err != nil {
			s.log.Warn("ask for the disk's usage", "err", err)
			return excess
		}
		if used > size/100*int64(s.o.HighPercent) {
			excess = max(excess, used-size/100*int64(s.o.LowPercent))
		}
	}
	return excess
}

// diskUsage asks for the size of the store's file system and what of it is used, in bytes, as df counts: what is kept
// for root is neither.
func (s *Store) diskUsage() (size, used int64, err error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(s.dir.Fd()), &st); err != nil {
		return 0, 0, fmt.Errorf("statfs: %w", err)
	}
	used = int64(st.Blocks-st.Bfree) * st.Bsize
	return used + int64(st.Bavail)*st.Bsize, used, nil
}

// collectSoonLocked makes room in the background when a fetch has crossed a high mark. s.mu is held.
func (s *Store) collectSoonLocked() {
	if s.closed || s.excessLocked() <= 0 {
		return
	}
	s.wg.Go(func() {
		freed, err := s.Collect(s.ctx)
		if err != nil {
			s.log.Warn("make room for images", "err", err)
		}
		s.log.Info("room made for images", "freed", freed)
	})
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
