package cleanup

import (
	"context"
	"errors"
	"slices"
	"testing"
)

func TestUnwindRunsAllLastFirst(t *testing.T) {
	var s Stack
	var ran []string
	boom := errors.New("boom")
	add := func(name string, err error) {
		s.Add(name, func(ctx context.Context) error {
			if _, ok := ctx.Deadline(); !ok {
				t.Errorf("%s: no deadline", name)
			}
			ran = append(ran, name)
			return err
		})
	}
	add("a", nil)
	add("b", boom)
	add("c", nil)
	add("a", nil) // replaced, not added
	ctx := context.Background()
	failed, err := s.Unwind(ctx)
	if want := []string{"c", "b", "a"}; !slices.Equal(ran, want) {
		t.Errorf("ran %v, want %v", ran, want)
	}
	if !slices.Equal(failed, []string{"b"}) || !errors.Is(err, boom) {
		t.Errorf("failed %v, %v; want b, boom", failed, err)
	}
	if failed, err := s.Unwind(ctx); failed != nil || err != nil || len(ran) != 3 {
		t.Errorf("a second Unwind did something: %v, %v, ran %v", failed, err, ran)
	}
}

func TestDrop(t *testing.T) {
	var s Stack
	s.Add("a", func(context.Context) error { t.Error("ran"); return nil })
	s.Drop()
	if _, err := s.Unwind(context.Background()); err != nil {
		t.Error(err)
	}
}
