package minicloud

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/novalet/novalet"
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

// TestWait: who waits is asked again at every change of the instance, and an instance that is archived is nowhere.
func TestWait(t *testing.T) {
	bus := membus.New()
	c, err := New(Options{Transport: bus.Connect(), Host: "demo", Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	compute := bus.Connect()
	defer compute.Close()
	if _, err := oslomsg.Serve(compute, oslomsg.ServerOptions{Queues: []string{"compute.demo"}}); err != nil {
		t.Fatal(err)
	}
	asker, err := oslomsg.NewClient(compute, oslomsg.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer asker.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id, err := c.Boot(ctx, BootRequest{Name: "web"})
	if err != nil {
		t.Fatal(err)
	}
	request := oslomsg.AdminContext(time.Now())
	call := func(method string, args map[string]any) {
		t.Helper()
		if _, err := asker.Call(ctx, oslomsg.Target{Topic: "conductor", Version: "3.0"}, method, args, request); err != nil {
			t.Fatal(err)
		}
	}
	action := func(name, method string, fields map[string]any) {
		t.Helper()
		o := c.release.Minimal(name, nil)
		for k, v := range fields {
			o.Set(k, v)
		}
		call("object_action", map[string]any{"objinst": o, "objmethod": method, "args": []any{}, "kwargs": map[string]any{}})
	}
	event := func(method string) {
		t.Helper()
		call("object_class_action_versions", map[string]any{"objname": "InstanceActionEvent", "objmethod": method,
			"object_versions": map[string]string{}, "args": []string{id, "compute_stop_instance"}, "kwargs": map[string]any{}})
	}
	await := func(what string, do func(), seen func(*Server) bool) {
		t.Helper()
		asked, done := make(chan struct{}, 10), make(chan error, 1)
		go func() {
			_, err := c.Wait(ctx, id, func(s *Server) bool {
				asked <- struct{}{}
				return seen(s)
			})
			done <- err
		}()
		<-asked
		do()
		if err := <-done; err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	await("state", func() { action("Instance", "save", map[string]any{"uuid": id, "vm_state": "active"}) },
		func(s *Server) bool { return s.VMState == novalet.VMActive })
	await("addresses", func() {
		action("InstanceInfoCache", "save", map[string]any{"instance_uuid": id, "network_info": `[{"network":{"subnets":[{"ips":[{"address":"192.0.2.7"}]}]}}]`})
	}, func(s *Server) bool { return len(s.Addresses) == 1 })
	await("fault", func() { action("InstanceFault", "create", map[string]any{"instance_uuid": id, "message": "no"}) },
		func(s *Server) bool { return s.Fault == "no" })
	await("task", func() {
		if err := c.Do(ctx, id, novalet.MethodStop, novalet.TaskPoweringOff, nil); err != nil {
			t.Error(err)
		}
	}, func(s *Server) bool { return s.TaskState == novalet.TaskPoweringOff })
	await("start of an event", func() { event("event_start") }, func(s *Server) bool { return len(s.Events) == 1 })
	await("end of an event", func() { event("event_finish_with_failure") }, func(s *Server) bool { return s.Events[0].Result == "Success" })
	if err := c.Archive(id); !errors.Is(err, novalet.ErrInvalidState) {
		t.Errorf("an instance that lives is archived: %v", err)
	}
	await("end", func() { action("Instance", "destroy", map[string]any{"uuid": id}) }, func(s *Server) bool { return s.Deleted })
	for range 2 {
		if err := c.Archive(id); err != nil {
			t.Error(err)
		}
	}
	if _, err := c.Wait(ctx, id, Settled); !errors.Is(err, novalet.ErrNotFound) {
		t.Errorf("archived, and still there: %v", err)
	}
}
