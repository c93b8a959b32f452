package novadriver

import (
	"encoding/json"
	"os"
	"testing"
	"time"

	"github.com/novalet/novalet/novadriver/oslomsg"
)

// BenchmarkBuildRequest is what a build costs between the broker and the agent.
func BenchmarkBuildRequest(b *testing.B) {
	raw, err := os.ReadFile("testdata/zed/build_and_run_instance.json")
	if err != nil {
		b.Fatal(err)
	}
	var f struct {
		Message struct {
			Args json.RawMessage `json:"args"`
		} `json:"message"`
	}
	if err := json.Unmarshal(raw, &f); err != nil {
		b.Fatal(err)
	}
	d := &Driver{notes: newNotes(), o: Options{Host: "h", InstanceNameTemplate: "instance-%08x", now: time.Now}}
	m := methodByName["build_and_run_instance"]
	dl := &oslomsg.Delivery{Method: m.name, Args: f.Message.Args, UniqueID: "u"}
	b.ReportAllocs()
	for b.Loop() {
		r, err := readRequest(dl)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := d.operationOf(m, r, dl); err != nil {
			b.Fatal(err)
		}
	}
}
