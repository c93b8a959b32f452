package engine

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/novalet/novalet"
)

func TestParseSignal(t *testing.T) {
	for s, want := range map[string]int{"": 0, "SIGTERM": 15, "term": 15, "15": 15, "SIGRTMIN+3": 37, "RTMIN": 34, "sigquit": 3, "64": 64} {
		if got, err := parseSignal(s); err != nil || got != want {
			t.Errorf("%q: %d %v", s, got, err)
		}
	}
	for _, s := range []string{"0", "-9", "65", "SIGNOTHING", "SIGRTMIN+31", "SIGRTMIN+x", "9 9"} {
		if _, err := parseSignal(s); !errors.Is(err, novalet.ErrAbort) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestTail(t *testing.T) {
	p := filepath.Join(t.TempDir(), "log")
	if b, err := tail(p, 10); err != nil || len(b) != 0 {
		t.Fatal(b, err)
	}
	if err := os.WriteFile(p, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	for n, want := range map[int]string{3: "789", 10: "0123456789", 99: "0123456789"} {
		if b, err := tail(p, n); err != nil || string(b) != want {
			t.Errorf("%d: %q %v", n, b, err)
		}
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{"9d2b7f3c-0c43-4b43-8d63-1c5f7e1f2a11": true, "one": true, "": false, ".": false, "..": false, "../x": false, "a/b": false, "a\x00": false, "-x": false} {
		if validID.MatchString(id) != want {
			t.Errorf("%q", id)
		}
	}
}

func TestSlots(t *testing.T) {
	e := &Engine{slots: map[int]string{0: "a"}}
	e.o.fill()
	e.o.UIDMax = e.o.UIDBase + 3*e.o.UIDCount - 1
	slot, base, err := e.takeSlot("b")
	if err != nil || slot != 1 || base != e.o.UIDBase+e.o.UIDCount {
		t.Fatal(slot, base, err)
	}
	if _, _, err := e.takeSlot("c"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := e.takeSlot("d"); !errors.Is(err, novalet.ErrReschedule) {
		t.Fatal(err)
	}
	delete(e.slots, 0)
	if slot, _, err := e.takeSlot("e"); err != nil || slot != 0 {
		t.Fatal(slot, err)
	}
}
