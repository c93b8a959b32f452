package glancebridge

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/novalet/novalet"
)

func TestDeleteImage(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, nil)
	g := NewFileGlance(dir)
	const id = "11111111-0000-4000-8000-000000000001"
	if err := g.Create(ImageRecord{ImageMeta: novalet.ImageMeta{ID: id, Name: "shelved"}}); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteImage(t.Context(), novalet.RequestContext{}, id); err != nil {
		t.Fatal(err)
	}
	if l, err := g.List(); err != nil || len(l) != 0 {
		t.Errorf("images left: %v, %v", l, err)
	}
	if err := s.DeleteImage(t.Context(), novalet.RequestContext{}, id); !errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	if err := s.DeleteImage(t.Context(), novalet.RequestContext{}, "../x"); err == nil || errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("a path as id: %v", err)
	}
}

// TestRotateBackupsOverHTTP: with more backups than a page holds, some of them not the request's own.
func TestRotateBackupsOverHTTP(t *testing.T) {
	g := newLiveGlance(t)
	g.page = 7
	g.tokens["alice"] = "project-a"
	const inst = "0f0c2d8a-0000-4000-8000-00000000aaaa"
	backup := func(n int, owner, instance, kind string, fields map[string]any) string {
		id := fmt.Sprintf("b%03d-%s-%s-%s", n, owner, kind, instance[:4])
		f := map[string]any{"image_type": "backup", "backup_type": kind, "instance_uuid": instance}
		maps.Copy(f, fields)
		g.add(id, owner, nil, f)
		return id
	}
	var daily, others []string
	for n := range 30 {
		daily = append(daily, backup(n, "project-a", inst, "daily", nil))
		others = append(others, backup(n, "project-a", inst, "weekly", nil), backup(n, "project-a", "another", "daily", nil),
			// Newer, of the same name and open to all, but somebody else's.
			backup(n, "project-b", inst, "daily", map[string]any{"visibility": "community"}))
	}
	s := openStore(t, t.TempDir(), func(o *Options) { o.Glance = NewGlance(plainCloud{g.URL}) })
	rc := as("alice")
	rc.ProjectID = "project-a"
	check := func(kept []string) {
		t.Helper()
		for _, id := range slices.Concat(daily, others) {
			rec, _ := g.get(id)
			if want := slices.Contains(kept, id) || slices.Contains(others, id); (rec != nil) != want {
				t.Errorf("image %s exists: %v", id, rec != nil)
			}
		}
	}
	if err := s.RotateBackups(t.Context(), rc, inst, "daily", 4); err != nil {
		t.Fatal(err)
	}
	check(daily[26:])
	// A protected one stays, and does not save the others.
	g.set(daily[27], "protected", true)
	if err := s.RotateBackups(t.Context(), rc, inst, "daily", 1); err == nil {
		t.Error("a backup that could not be deleted is not told")
	}
	check([]string{daily[27], daily[29]})
	// A token that says nothing of the images finds none.
	if err := s.RotateBackups(t.Context(), novalet.RequestContext{AuthToken: "nobody", ProjectID: "project-c"}, inst, "daily", 0); err != nil {
		t.Error(err)
	}
	check([]string{daily[27], daily[29]})
}
