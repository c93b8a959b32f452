package main

import (
	"context"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A few hundred operations leave nothing: no record, no goroutine, no memory. How long they take is make bench-load's.
func TestNothingIsLeft(t *testing.T) {
	r, err := newRig(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.close(); err != nil {
			t.Error(err)
		}
	})
	r.userData = make([]byte, 9<<10)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	first, err := r.run(ctx, 10, 10)
	if err != nil {
		t.Fatal(err)
	}
	last, err := r.run(ctx, 40, 10)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("first %+v, last %+v", first, last)
	// The agent may be ending a goroutine of the last operation.
	if last.goroutines > first.goroutines+3 {
		t.Errorf("%d goroutines, %d before", last.goroutines, first.goroutines)
	}
	if last.heap > first.heap+0.5 {
		t.Errorf("heap is %.1f MiB, %.1f before", last.heap, first.heap)
	}
}
