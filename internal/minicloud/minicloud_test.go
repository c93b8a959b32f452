package minicloud

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/oslomsg/membus"
)

// TestCloseWithoutAsker: a compute service that ends with a question under way does not make the end of the controller fail.
func TestCloseWithoutAsker(t *testing.T) {
	bus := membus.New()
	c, err := New(Options{Transport: bus.Connect(), Host: "demo", Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	conn := bus.Connect()
	asker, err := oslomsg.NewClient(conn, oslomsg.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// The handler has the question and waits.
	c.mu.Lock()
	asked := make(chan error, 1)
	go func() {
		_, err := asker.Call(ctx, oslomsg.Target{Topic: "conductor", Version: "3.0"}, "object_class_action_versions",
			map[string]any{"objname": "Instance", "objmethod": "get_by_uuid", "object_versions": map[string]string{"Instance": "2.7"},
				"args": []string{"00000000-0000-4000-8000-000000000001"}, "kwargs": map[string]any{}}, oslomsg.AdminContext(time.Now()))
		asked <- err
	}()
	time.Sleep(300 * time.Millisecond)
	if err := errors.Join(asker.Close(), conn.Close()); err != nil {
		t.Error(err)
	}
	if err := <-asked; err == nil {
		t.Fatal("the question was answered before")
	}
	c.mu.Unlock()
	if err := c.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}
