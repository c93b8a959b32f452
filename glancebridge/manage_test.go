package glancebridge

import (
	"errors"
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
