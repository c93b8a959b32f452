package novadriver

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
)

// FuzzArgs feeds foreign arguments to every decoder of casts: none may panic, and what is handed on has a usable uuid.
func FuzzArgs(f *testing.F) {
	files, err := filepath.Glob("testdata/2026.1/*.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range append(files, "testdata/zed/rebuild_instance.json", "testdata/zed/build_and_run_instance.json") {
		if strings.Contains(name, ".operation.") || strings.Contains(name, "conductor") {
			continue
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		var m struct {
			Message struct {
				Args json.RawMessage `json:"args"`
			} `json:"message"`
		}
		if err := json.Unmarshal(raw, &m); err != nil {
			f.Fatal(err)
		}
		f.Add([]byte(m.Message.Args))
	}
	f.Add([]byte(`{"instance":{"nova_object.name":"Instance","nova_object.version":"2.7","nova_object.data":{"uuid":"../x"}}}`))
	f.Add([]byte(`{"instances":[],"events":[null]}`))
	d := &Driver{notes: newNotes(), o: Options{Host: "h", InstanceNameTemplate: "instance-%08x", now: time.Now}}
	agent := &fakeAgent{}
	d.SetCompute(agent)
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, name := range []string{
			"build_and_run_instance", "rebuild_instance", "reboot_instance", "rescue_instance", "backup_instance", "detach_interface", "external_instance_event",
		} {
			m := methodByName[name]
			dl := &oslomsg.Delivery{Method: m.name, Args: raw, UniqueID: "u"}
			r, err := readRequest(dl)
			if err != nil {
				return
			}
			switch {
			case m.record != nil:
				_ = m.record(context.Background(), d, r)
			case m.operation != nil:
				op, err := d.operationOf(m, r, dl)
				if err != nil {
					continue
				}
				if !isUUID(op.Instance.UUID) {
					t.Fatalf("%s: uuid %q", m.name, op.Instance.UUID)
				}
				b, err := json.Marshal(op)
				if err != nil {
					t.Fatalf("%s: the operation cannot be recorded: %v", m.name, err)
				}
				var back novalet.Operation
				if err := json.Unmarshal(b, &back); err != nil {
					t.Fatalf("%s: the record cannot be read: %v", m.name, err)
				}
			}
			_ = instanceUUID(dl)
		}
		for _, e := range agent.events {
			if !isUUID(e.InstanceUUID) {
				t.Fatalf("event for %q", e.InstanceUUID)
			}
		}
		agent.events = nil
	})
}
