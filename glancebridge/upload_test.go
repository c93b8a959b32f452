package glancebridge

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

const snapID = "22222222-0000-4000-8000-000000000001"

// snapshotOf is a request for a small root.
func snapshotOf(t *testing.T, token string) *novalet.SnapshotRequest {
	t.Helper()
	upper := t.TempDir()
	if err := os.WriteFile(filepath.Join(upper, "file"), bytes.Repeat([]byte("x"), 300_000), 0o644); err != nil {
		t.Fatal(err)
	}
	return &novalet.SnapshotRequest{Context: as(token), ImageID: snapID, InstanceUUID: "inst-1", Root: novalet.RootDirs{Upper: upper}}
}

func liveStore(t *testing.T, g *liveGlance, change func(*Options)) *Store {
	t.Helper()
	return openStore(t, "", func(o *Options) {
		o.Glance = NewGlance(plainCloud{g.URL})
		o.SavingTimeout = 20 * time.Millisecond
		if change != nil {
			change(o)
		}
	})
}

// whole reports that the service has the snapshot, and that it is the one of the request.
func whole(t *testing.T, g *liveGlance) {
	t.Helper()
	rec, data := g.get(snapID)
	if rec == nil || rec["status"] != "active" || rec["container_format"] != "docker" {
		t.Fatalf("record %v", rec)
	}
	images := t.TempDir()
	id := addImage(t, images, data, nil)
	img, err := openStore(t, images, nil).Prepare(t.Context(), &novalet.ImageRequest{ImageID: id,
		Meta: novalet.ImageMeta{Properties: map[string]string{"os_command_line": "/x"}}})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(img.Layers[0].Path, "file")); err != nil || st.Size() != 300_000 {
		t.Errorf("the snapshot's file: %v, %v", st, err)
	}
}

// notes counts the uploads that are not known to have ended.
func notes(t *testing.T, s *Store) int {
	t.Helper()
	l, err := os.ReadDir(s.path("uploads"))
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

// TestUploadCut: whatever cuts an upload, the image is whole in the end or gone.
func TestUploadCut(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(g *liveGlance)
		ok   bool
		puts int
	}{
		{"nothing", func(*liveGlance) {}, true, 1},
		{"connection reset once", func(g *liveGlance) { g.put = first(putFault{after: 100_000}) }, true, 2},
		{"connection reset before a byte", func(g *liveGlance) { g.put = first(putFault{}) }, true, 2},
		{"connection always reset", func(g *liveGlance) { g.put = always(putFault{after: 100_000}) }, false, uploadTries},
		{"503 once", func(g *liveGlance) { g.put = first(putFault{after: 100_000, status: 503}) }, true, 2},
		{"503 always", func(g *liveGlance) { g.put = always(putFault{after: 10, status: 503}) }, false, uploadTries},
		{"413", func(g *liveGlance) { g.put = always(putFault{after: 10, status: 413}) }, false, uploadTries},
		{"token ends in the middle", func(g *liveGlance) {
			g.put = func(n int, r *http.Request) putFault {
				if r.Header.Get("X-Auth-Token") == "alice" {
					g.mu.Lock()
					delete(g.tokens, "alice")
					g.mu.Unlock()
					return putFault{after: 100_000, status: 401}
				}
				return putFault{after: -1}
			}
		}, true, 2},
		{"reset and taken for whole", func(g *liveGlance) { g.lenient, g.put = true, first(putFault{after: 100_000}) }, false, 1},
		{"stuck in saving", func(g *liveGlance) { g.put = first(putFault{after: 100_000, hang: true}) }, false, 1},
		{"in saving for a while", func(g *liveGlance) {
			g.put = first(putFault{after: 100_000, hang: true})
			seen := 0
			g.settle = func(id string) {
				g.mu.Lock()
				defer g.mu.Unlock()
				if im := g.images[id]; im != nil && im.rec["status"] == "saving" {
					if seen++; seen == 3 {
						im.rec["status"] = "queued"
					}
				}
			}
		}, true, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newLiveGlance(t)
			g.tokens["alice"] = "project-a"
			g.add(snapID, "project-a", nil, nil)
			c.set(g)
			s := liveStore(t, g, func(o *Options) {
				if strings.HasPrefix(c.name, "in saving") {
					o.SavingTimeout = time.Minute
				}
			})
			err := s.Snapshot(t.Context(), snapshotOf(t, "alice"))
			if g.uploads() != c.puts {
				t.Errorf("%d uploads, want %d", g.uploads(), c.puts)
			}
			if n := notes(t, s); n != 0 {
				t.Errorf("%d notes are left", n)
			}
			if c.ok {
				if err != nil {
					t.Fatal(err)
				}
				whole(t, g)
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			if rec, _ := g.get(snapID); rec != nil {
				t.Errorf("the image is left: %v", rec)
			}
		})
	}
}

func first(f putFault) func(int, *http.Request) putFault {
	return func(n int, _ *http.Request) putFault {
		if n == 1 {
			return f
		}
		return putFault{after: -1}
	}
}

func always(f putFault) func(int, *http.Request) putFault {
	return func(int, *http.Request) putFault { return f }
}

// TestUploadHasNoLength: an upload that ends early must be told from one that ends.
func TestUploadHasNoLength(t *testing.T) {
	g := newLiveGlance(t)
	g.add(snapID, "p", nil, map[string]any{"disk_format": "raw"})
	var length int64
	g.put = func(_ int, r *http.Request) putFault { length = r.ContentLength; return putFault{after: -1} }
	if err := NewGlance(plainCloud{g.URL}).Upload(t.Context(), novalet.RequestContext{}, snapID, strings.NewReader("data")); err != nil {
		t.Fatal(err)
	}
	if length != -1 {
		t.Errorf("length %d", length)
	}
	// A source that fails must not come out as an upload that ended.
	g.add("other", "p", nil, map[string]any{"disk_format": "raw"})
	err := NewGlance(plainCloud{g.URL}).Upload(t.Context(), novalet.RequestContext{}, "other",
		io.MultiReader(strings.NewReader("data"), failingReader{}))
	if rec := g.idle("other"); err == nil || rec["status"] == "active" {
		t.Errorf("upload of a source that fails: %v, %v", err, rec)
	}
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errors.New("disk error") }

// TestSnapshotInterrupted: the agent stops in the middle of an upload; the request comes again.
func TestSnapshotInterrupted(t *testing.T) {
	for _, c := range []struct {
		name string
		// between is what Glance made of it by the time the request comes again.
		between func(g *liveGlance, data []byte)
		ok      bool
		puts    int
	}{
		{"queued again", func(*liveGlance, []byte) {}, true, 2},
		{"still in saving", func(g *liveGlance, _ []byte) { g.images[snapID].rec["status"] = "saving" }, false, 1},
		{"arrived whole", func(g *liveGlance, data []byte) { g.images[snapID].store(data) }, true, 1},
		{"a part was taken for whole", func(g *liveGlance, data []byte) { g.images[snapID].store(data[:5000]) }, false, 1},
		{"deleted by the user", func(g *liveGlance, _ []byte) { delete(g.images, snapID) }, false, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newLiveGlance(t)
			g.tokens["alice"] = "project-a"
			g.add(snapID, "project-a", nil, nil)
			ctx, stop := context.WithCancelCause(t.Context())
			// What is sent is read whole, then the connection is cut and nothing is stored.
			var data []byte
			g.put = func(n int, r *http.Request) putFault {
				if n > 1 {
					return putFault{after: -1}
				}
				var err error
				if data, err = io.ReadAll(r.Body); err != nil {
					t.Error(err)
				}
				stop(errors.New("the agent stops"))
				return putFault{}
			}
			dir := filepath.Join(t.TempDir(), "store")
			s := liveStore(t, g, func(o *Options) { o.Dir = dir })
			r := snapshotOf(t, "alice")
			if err := s.Snapshot(ctx, r); err == nil {
				t.Fatal("an interrupted snapshot ends well")
			}
			if rec := g.idle(snapID); rec == nil || rec["status"] != "queued" {
				t.Fatalf("after the interruption the record is %v", rec)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			g.mu.Lock()
			c.between(g, data)
			g.mu.Unlock()
			s = liveStore(t, g, func(o *Options) { o.Dir = dir })
			if notes(t, s) != 1 {
				t.Error("the note of the upload did not survive")
			}
			captured := false
			r.Captured = func(context.Context) error { captured = true; return nil }
			err := s.Snapshot(t.Context(), r)
			if g.uploads() != c.puts {
				t.Errorf("%d uploads, want %d", g.uploads(), c.puts)
			}
			if n := notes(t, s); n != 0 {
				t.Errorf("%d notes are left", n)
			}
			rec, _ := g.get(snapID)
			if !c.ok {
				if err == nil || novalet.FaultText(err) == "" || rec != nil {
					t.Fatalf("got %v, and the record %v", err, rec)
				}
				return
			}
			if err != nil || !captured {
				t.Fatalf("got %v, captured %v", err, captured)
			}
			whole(t, g)
			// Once more, as after a crash between the last answer and the agent's own note of it.
			if err := s.Snapshot(t.Context(), r); err != nil || g.uploads() != c.puts {
				t.Errorf("repeated after its end: %v, %d uploads", err, g.uploads())
			}
			whole(t, g)
		})
	}
}

// TestSnapshotIntoForeignData: an image that somebody else filled meanwhile is neither taken for ours nor deleted.
func TestSnapshotIntoForeignData(t *testing.T) {
	g := newLiveGlance(t)
	g.add(snapID, "project-a", []byte("data"), nil)
	g.set(snapID, "container_format", "bare")
	s := liveStore(t, g, nil)
	if err := s.Snapshot(t.Context(), snapshotOf(t, "service")); novalet.FaultText(err) == "" {
		t.Errorf("got %v", err)
	}
	if rec, _ := g.get(snapID); rec == nil {
		t.Error("the image was deleted")
	}
}
