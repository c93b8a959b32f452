package glancebridge

import (
	"bufio"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/statefile"
)

const (
	// uploadTries is how often a snapshot's upload is begun.
	uploadTries = 3
	// keepNotes is how long a note of an upload is kept when nobody asks for it: requests are not repeated later.
	keepNotes = 30 * 24 * time.Hour
)

// uploadNote is one file in uploads/: that data was being sent to an image, and how much. It stays until the upload has
// ended one way or the other, so that after a crash an image that Glance took for whole too early is known.
type uploadNote struct {
	Version  int       `json:"version"`
	Image    string    `json:"image"`
	Instance string    `json:"instance"`
	Size     int64     `json:"size"` // bytes
	Begun    time.Time `json:"begun"`
}

func (s *Store) notePath(imageID string) string { return s.path("uploads", imageID+".json") }

// readNote gives nil when there is none; a damaged one counts as a note of no size.
func (s *Store) readNote(imageID string) *uploadNote {
	n := &uploadNote{}
	err := statefile.Read(s.notePath(imageID), n)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		s.log.Warn("read the note of an upload", "image", imageID, "err", err)
	}
	return n
}

// cleanNotes removes the notes of uploads that nobody has come back to.
func (s *Store) cleanNotes() error {
	return readRecords(s.path("uploads"), func(name string, n *uploadNote) bool {
		return n.Version <= recordVersion && n.Image+".json" == name && validID(n.Image) && time.Since(n.Begun) < keepNotes
	}, func(path string) { _ = os.Remove(path) })
}

// uploadedBefore looks at the image of a snapshot before anything is done. done: an earlier try of the same request has
// uploaded it.
func (s *Store) uploadedBefore(ctx context.Context, r *novalet.SnapshotRequest) (rec *ImageRecord, done bool, err error) {
	rec, err = s.settled(ctx, r.Context, r.ImageID)
	if err != nil {
		return nil, false, fmt.Errorf("snapshot instance: %w", glanceFault(r.ImageID, err))
	}
	switch note := s.readNote(r.ImageID); {
	case rec.Status == "queued":
		return rec, false, nil
	case rec.Status == "saving":
		return nil, false, snapshotFault(r.ImageID, "Glance still holds an earlier, broken upload of the snapshot; take the snapshot again")
	case rec.Status != "active":
		return nil, false, snapshotFault(r.ImageID, fmt.Sprintf("the image of the snapshot is in status %q and takes no data; take the snapshot again", cut(rec.Status)))
	case note != nil && rec.Size != note.Size:
		return nil, false, snapshotFault(r.ImageID, fmt.Sprintf("the upload of the snapshot was cut after %d of %d bytes; take the snapshot again", rec.Size, note.Size))
	case note == nil && (rec.ContainerFormat != "docker" || rec.DiskFormat != "raw"):
		return nil, false, snapshotFault(r.ImageID, "the image of the snapshot holds other data; take the snapshot again")
	}
	s.log.Info("snapshot was uploaded by an earlier try", "instance", r.InstanceUUID, "image", r.ImageID, "bytes", rec.Size,
		"request_id", r.Context.RequestID)
	if r.Captured != nil {
		if err := r.Captured(ctx); err != nil {
			return nil, false, fmt.Errorf("snapshot instance: %w", err)
		}
	}
	return rec, true, nil
}

func snapshotFault(imageID, text string) *novalet.Fault {
	return &novalet.Fault{Kind: novalet.ErrAbort, Class: "ImageUnacceptable", Text: text,
		Details: map[string]any{"image_id": imageID, "reason": text}}
}

// settled reads a record once it is no longer in saving, or after SavingTimeout as it is. A Glance that is away for a
// moment is asked again.
func (s *Store) settled(ctx context.Context, rc novalet.RequestContext, id string) (*ImageRecord, error) {
	end := time.Now().Add(s.o.SavingTimeout)
	wait := s.o.RetryDelay
	for away := 0; ; {
		rec, err := s.o.Glance.Get(ctx, rc, id)
		switch {
		case errors.Is(err, novalet.ErrTryAgain) && away < uploadTries:
			away++
		case err != nil || rec.Status != "saving" || !time.Now().Before(end):
			return rec, err
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
		wait = min(2*wait, 5*time.Second)
	}
}

// upload sends an archive until Glance has the whole of it: an answer of success is not believed, the record is.
func (s *Store) upload(ctx context.Context, r *novalet.SnapshotRequest, a *archive) error {
	note := &uploadNote{Version: recordVersion, Image: r.ImageID, Instance: r.InstanceUUID, Size: a.size, Begun: time.Now().UTC()}
	if err := statefile.Write(s.notePath(r.ImageID), note); err != nil {
		return diskError(fmt.Errorf("note the upload: %w", err))
	}
	var last error
	for try := range uploadTries {
		if try > 0 {
			if err := sleep(ctx, s.o.RetryDelay<<try); err != nil {
				return err
			}
		}
		h := sha512.New()
		pr, pw := io.Pipe()
		done := make(chan error, 1)
		go func() {
			bw := bufio.NewWriterSize(io.MultiWriter(pw, h), 256<<10)
			err := a.write(bw)
			if err == nil {
				err = bw.Flush()
			}
			pw.CloseWithError(err)
			done <- err
		}()
		sent := s.o.Glance.Upload(ctx, r.Context, r.ImageID, pr)
		pr.CloseWithError(errors.New("the upload ended"))
		wrote := <-done
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		rec, err := s.settled(ctx, r.Context, r.ImageID)
		if err != nil {
			return errors.Join(glanceFault(r.ImageID, err), sent)
		}
		whole := wrote == nil && rec.Status == "active" && rec.Size == a.size &&
			(rec.HashValue == "" || rec.HashAlgo != "sha512" || strings.EqualFold(rec.HashValue, hex.EncodeToString(h.Sum(nil))))
		last = errors.Join(sent, wrote)
		switch {
		case whole:
			return nil
		case rec.Status != "queued":
			f := snapshotFault(r.ImageID, fmt.Sprintf("the upload of the snapshot was cut or damaged (%d of %d bytes arrived, status %s); take the snapshot again",
				rec.Size, a.size, cut(rec.Status)))
			f.Err = last
			return f
		}
		s.log.Warn("snapshot upload cut, trying again", "image", r.ImageID, "try", try+1, "err", last)
	}
	return fmt.Errorf("%w: upload snapshot: %w", novalet.ErrTryAgain, last)
}

// endUpload leaves no image behind that looks whole and is not. A request that was interrupted may be repeated after a
// restart, so its image and the note stay for that.
func (s *Store) endUpload(ctx context.Context, r *novalet.SnapshotRequest, err error) {
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if err != nil {
		note := s.readNote(r.ImageID)
		rec, gerr := s.o.Glance.Get(undo, r.Context, r.ImageID)
		empty := gerr == nil && (rec.Status == "queued" || rec.Status == "saving")
		whole := gerr == nil && note != nil && rec.Status == "active" && rec.Size == note.Size
		switch {
		case note == nil && !empty:
			return // nothing of ours is in it
		case context.Cause(ctx) != nil && (empty || whole):
			return
		}
		// Nova deletes the image of a snapshot that failed; where its request is gone too, nobody else would.
		if e := s.o.Glance.Delete(undo, r.Context, r.ImageID); e != nil && !errors.Is(e, novalet.ErrNotFound) {
			s.log.Warn("delete the image of a failed snapshot", "image", r.ImageID, "instance", r.InstanceUUID, "err", e)
			return
		}
	}
	if e := removeRecord(s.notePath(r.ImageID)); e != nil {
		s.log.Warn("remove the note of an upload", "image", r.ImageID, "err", e)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
