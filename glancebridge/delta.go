package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge/layer"
)

// maxBases is how many images may lie below a delta: a snapshot that would have more is self-contained.
const maxBases = 8

// propDelta names, for people, the image that a delta lies on. What counts is in the archive.
const propDelta = "novalet_delta_of"

// errBase is behind every fault over the image that a delta lies on: it may hold for one user and not for another.
var errBase = errors.New("base of a delta")

// baseRef names an image that a delta lies on, and the digest that its bytes have.
type baseRef struct {
	ID        string `json:"id"`
	HashAlgo  string `json:"os_hash_algo"`
	HashValue string `json:"os_hash_value"`
}

// deltaBase decides whether a snapshot holds the instance's own layer alone, and on which image it then lies; nil is a
// self-contained one. snap is the record that the snapshot goes to: its owner has to keep the base, or it is open to all.
func (s *Store) deltaBase(ctx context.Context, r *novalet.SnapshotRequest, snap *ImageRecord) *layer.Base {
	if !s.o.DeltaSnapshots || r.Whole || r.Base == nil {
		return nil
	}
	s.mu.Lock()
	rec := s.images[r.Base.ID]
	s.mu.Unlock()
	if rec == nil || len(rec.Bases) >= maxBases || len(rec.Layers) >= maxStack {
		return nil
	}
	if !slices.EqualFunc(r.Root.Layers, rec.Layers, func(l novalet.Layer, id string) bool { return l.DiffID == id }) {
		return nil
	}
	b := &layer.Base{Version: layer.DeltaVersion, Image: rec.ID, HashAlgo: rec.HashAlgo, HashValue: rec.HashValue}
	if !b.Strong() {
		return nil
	}
	now, err := s.o.Glance.Readable(ctx, r.Context, rec.ID)
	if err != nil || !openToAll(now.Visibility) && (now.Owner == "" || now.Owner != snap.Owner) || baseFault(snap.ID, refOf(b), now, nil) != nil {
		return nil
	}
	return b
}

func refOf(b *layer.Base) baseRef {
	return baseRef{ID: b.Image, HashAlgo: b.HashAlgo, HashValue: b.HashValue}
}

// baseFault tells of what Glance says of the base of a delta, nil when it is as it was.
func baseFault(delta string, ref baseRef, rec *ImageRecord, err error) error {
	var ge *GlanceError
	const hint = "; boot a self-contained snapshot instead"
	text := ""
	switch {
	case errors.Is(err, novalet.ErrNotFound), errors.As(err, &ge):
		text = fmt.Sprintf("the image is a delta of image %s, which is gone or may not be read by you", cut(ref.ID)) + hint
	case err != nil:
		return err
	case rec.Status != "active":
		text = fmt.Sprintf("the image is a delta of image %s, which is in status %q", cut(ref.ID), cut(rec.Status)) + hint
	case rec.HashAlgo != ref.HashAlgo || !strings.EqualFold(rec.HashValue, ref.HashValue):
		text = fmt.Sprintf("the image is a delta of image %s, whose data has changed since (another checksum)", cut(ref.ID)) + hint
	default:
		return nil
	}
	return baseRefused(delta, text, err)
}

func baseRefused(delta, text string, cause error) error {
	f := refused(delta, text)
	f.Err = errors.Join(errBase, cause)
	return f
}

// askBases asks Glance, with the user's own token, for all that a stored delta lies on: that the layers are in the store is
// no right to them. asked are those that this request has asked for.
func (s *Store) askBases(ctx context.Context, rc novalet.RequestContext, id string, asked map[baseRef]bool) error {
	s.mu.Lock()
	var bases []baseRef
	if rec := s.images[id]; rec != nil {
		bases = rec.Bases
	}
	s.mu.Unlock()
	for _, b := range bases {
		if asked[b] {
			continue
		}
		rec, err := s.o.Glance.Readable(ctx, rc, b.ID)
		if err := baseFault(id, b, rec, err); err != nil {
			return err
		}
		asked[b] = true
	}
	return nil
}

// fetchBase sees to it that the store has the image that a delta lies on, and gives its record.
func (s *Store) fetchBase(ctx context.Context, f *flight, rc novalet.RequestContext, b *layer.Base) (*imageRecord, error) {
	ref := refOf(b)
	switch {
	case !validID(ref.ID) || !b.Strong():
		return nil, baseRefused(f.id, "the image is a delta that does not name its base", nil)
	case f.depth >= maxBases:
		return nil, baseRefused(f.id, fmt.Sprintf("the image is a delta with more than %d images below it; boot a self-contained snapshot instead", maxBases), nil)
	}
	// With this digest no image can lie on itself by way of others: it would have to hold its own digest.
	rec, err := s.o.Glance.Get(ctx, rc, ref.ID)
	if err := baseFault(f.id, ref, rec, err); err != nil {
		return nil, err
	}
	// Its fetch needs a place among those that run.
	f.leave()
	t := &trust{signed: f.trust.signed, ids: f.trust.ids, nobody: f.trust.nobody}
	r := &novalet.ImageRequest{Context: rc, ImageID: ref.ID, MaxBytes: f.maxBytes}
	for {
		if err := s.vouch(ctx, rc, ref.ID, t); err != nil {
			return nil, err
		}
		rec, of, joined, err := s.joinBase(r, t, f.depth+1)
		if err != nil {
			return nil, err
		}
		if rec != nil {
			if rec.HashAlgo != ref.HashAlgo || !strings.EqualFold(rec.HashValue, ref.HashValue) {
				return nil, baseFault(f.id, ref, &ImageRecord{ImageMeta: novalet.ImageMeta{Status: "active"}}, nil)
			}
			if len(rec.Bases) >= maxBases || len(rec.Layers) >= maxStack {
				return nil, baseRefused(f.id, "the image is a delta of too many others; boot a self-contained snapshot instead", nil)
			}
			return rec, nil
		}
		err = s.await(ctx, of)
		switch {
		case err == nil:
		case joined && othersFault(err, of, f.maxBytes):
		default:
			return nil, err
		}
	}
}

// joinBase gives the record of a stored image; else the flight that fetches it, and whether that was under way.
func (s *Store) joinBase(r *novalet.ImageRequest, t *trust, depth int) (rec *imageRecord, f *flight, joined bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, false, errClosed
	}
	if rec := s.usableLocked(r.ImageID, t); rec != nil && s.imageLocked(rec) != nil {
		rec.LastUsed = time.Now()
		return rec, nil, false, nil
	}
	f = s.flights[t.key(r.ImageID)]
	if joined = f != nil; !joined {
		f = s.startLocked(r, r.ImageID, t, depth)
	}
	f.waiters++
	return nil, f, joined, nil
}

// othersFault reports whether what ended a fetch that somebody else began need not hold for us: that one's flavor was
// smaller, or that one may not read what a delta lies on.
func othersFault(err error, f *flight, maxBytes int64) bool {
	return isTooSmall(err) && f.maxBytes > 0 && (maxBytes == 0 || maxBytes > f.maxBytes) || errors.Is(err, errBase)
}
