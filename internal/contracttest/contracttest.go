// Package contracttest holds one suite for each contract of the root package that several things serve. A part runs the
// suite on the real thing, internal/fake on the fake, so that both keep the same promises: what a nil error means, which
// kinds of error come back, and what may be repeated.
//
// A suite asks for a new fixture per test. What a fixture cannot provide it leaves empty; the tests that need it say so
// and are skipped.
package contracttest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// patience bounds what a suite waits for; nothing asserts how fast something is.
const patience = 60 * time.Second

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// twice calls what may be repeated.
func twice(t *testing.T, what string, f func() error) {
	t.Helper()
	for i := range 2 {
		if err := f(); err != nil {
			t.Fatalf("%s, call %d: %v", what, i+1, err)
		}
	}
}

// is asserts the kind of an error.
func is(t *testing.T, what string, err, kind error) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%s: %v, want %v", what, err, kind)
	}
}

// aborts asserts an ErrAbort with a text for the tenant.
func aborts(t *testing.T, what string, err error) {
	t.Helper()
	is(t, what, err, novalet.ErrAbort)
	if err != nil && novalet.FaultText(err) == "" {
		t.Errorf("%s: %v has no text for the tenant", what, err)
	}
}

// eventually polls with patience.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}
