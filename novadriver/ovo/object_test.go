package ovo

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// decodeAny reads JSON for a comparison by meaning; numbers keep their digits.
func decodeAny(t *testing.T, raw []byte) any {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%v in %.200s", err, raw)
	}
	return v
}

// samples returns JSON documents with objects in them: those of this package
// and those of the driver's tests.
func samples(t *testing.T) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob("testdata/*.json")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("../testdata/*/*.json")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for _, f := range append(files, more...) {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if json.Valid(raw) {
			out[f] = raw
		}
	}
	if len(out) == 0 {
		t.Fatal("no samples")
	}
	return out
}

// Every object that a real cloud sent goes through unharmed, down to the
// innermost.
func TestRoundTrip(t *testing.T) {
	names := map[string]bool{}
	check := func(where string, raw []byte) {
		err := Walk(raw, func(o *Object) bool {
			names[o.Name] = true
			roundTrip(t, where, o)
			return true
		})
		if err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
	for name, raw := range samples(t) {
		check(name, raw)
	}
	if len(names) < 40 {
		t.Errorf("only %d classes of objects were seen", len(names))
	}
	// A directory of captures, one message a line, adds to the samples.
	captures, err := filepath.Glob(filepath.Join(os.Getenv("NOVALET_WIRE_CAPTURES"), "*.jsonl"))
	if err != nil || os.Getenv("NOVALET_WIRE_CAPTURES") == "" {
		return
	}
	for _, f := range captures {
		file, err := os.Open(f)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(file)
		lines.Buffer(nil, 16<<20)
		for lines.Scan() {
			check(f, lines.Bytes())
		}
		if err := lines.Err(); err != nil {
			t.Error(err)
		}
		file.Close()
	}
}

func roundTrip(t *testing.T, where string, o *Object) {
	t.Helper()
	raw, err := json.Marshal(o)
	if err != nil {
		t.Errorf("%s: %s: %v", where, o.Name, err)
		return
	}
	again, err := Decode(raw)
	if err != nil {
		t.Errorf("%s: %s: %v", where, o.Name, err)
		return
	}
	if again.Name != o.Name || again.Version != o.Version || again.Namespace != "nova" || !slices.Equal(again.Changes, o.Changes) {
		t.Errorf("%s: %s became %+v", where, o.Name, again)
	}
	if top := decodeAny(t, raw).(map[string]any); (top[keyChanges] != nil) != (o.Changes != nil) || len(top) != 4+min(len(o.Changes), 1) {
		t.Errorf("%s: %s has other keys than before: %.200s", where, o.Name, raw)
	}
	for f, v := range o.Data {
		if diff := cmp.Diff(decodeAny(t, v), decodeAny(t, again.Data[f])); diff != "" {
			t.Errorf("%s: %s.%s (-before +after):\n%s", where, o.Name, f, diff)
		}
		if IsObject(v) != (o.Object(f) != nil) {
			t.Errorf("%s: %s.%s is an object: %v", where, o.Name, f, IsObject(v))
		}
	}
	if len(again.Data) != len(o.Data) {
		t.Errorf("%s: %s has %d fields, had %d", where, o.Name, len(again.Data), len(o.Data))
	}
}

const sample = `{"nova_object.name": "Instance", "nova_object.namespace": "nova", "nova_object.version": "2.9",
 "nova_object.data": {"uuid": "u", "id": 17, "big": 9007199254740993, "text": "<&>", "null": null, "yes": true, "no": false,
  "numeric": "42", "whole": 3.0, "half": 1.5, "when": "2026-03-01T12:00:00Z", "offset": "2026-03-01T13:00:00.5+01:00",
  "meta": {"a": "1", "b": null, "c": 3}, "words": ["x", 1, "y"],
  "flavor": {"nova_object.name": "Flavor", "nova_object.namespace": "nova", "nova_object.version": "1.2", "nova_object.data": {"vcpus": 2}},
  "tags": {"nova_object.name": "TagList", "nova_object.namespace": "nova", "nova_object.version": "1.1",
   "nova_object.data": {"objects": [{"nova_object.name": "Tag", "nova_object.namespace": "nova", "nova_object.version": "1.1", "nova_object.data": {"tag": "t"}}, 5]}},
  "specs": [{"nova_object.name": "HVSpec", "nova_object.namespace": "nova", "nova_object.version": "1.2", "nova_object.data": {"arch": "x86_64"}}],
  "from the future": {"x": [1, {"y": null}]}},
 "nova_object.changes": ["tags"], "nova_object.tomorrow": [1]}`

func TestGetters(t *testing.T) {
	o, err := Decode(json.RawMessage(sample))
	if err != nil {
		t.Fatal(err)
	}
	when := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var none *Object
	for _, c := range []struct {
		name      string
		got, want any
	}{
		{"text", o.String("text"), "<&>"},
		{"no text", o.String("id"), ""},
		{"int", o.Int("id"), int64(17)},
		{"big int", o.Int("big"), int64(9007199254740993)},
		{"numeric text", o.Int("numeric"), int64(42)},
		{"whole float", o.Int("whole"), int64(3)},
		{"half", o.Int("half"), int64(0)},
		{"null int", o.Int("null"), int64(0)},
		{"float", o.Float("half"), 1.5},
		{"float of text", o.Float("numeric"), 42.0},
		{"true", o.Bool("yes"), true},
		{"false", o.Bool("no"), false},
		{"bool of text", o.Bool("text"), false},
		{"time", o.Time("when"), when},
		{"zone", o.Time("offset"), when.Add(500 * time.Millisecond)},
		{"no time", o.Time("text"), time.Time{}},
		{"nested", o.Object("flavor").Int("vcpus"), int64(2)},
		{"missing nested", o.Object("none").Object("flavor").Int("vcpus"), int64(0)},
		{"nil", none.String("x") + none.Object("y").String("z"), ""},
		{"list object", o.List("tags")[0].String("tag"), "t"},
		{"length", len(o.List("tags")), 1},
		{"objects", len(o.Object("tags").Objects()), 1},
		{"array", o.List("specs")[0].String("arch"), "x86_64"},
		{"no list", len(o.List("id")), 0},
		{"strings", o.Strings("words"), []string{"x", "y"}},
		{"map", o.StringMap("meta"), map[string]string{"a": "1"}},
		{"no map", o.StringMap("id"), map[string]string{}},
		{"has null", o.Has("null"), true},
		{"has not", o.Has("none"), false},
		{"null", o.IsNull("null"), true},
		{"unset", o.IsNull("none"), true},
		{"not null", o.IsNull("id"), false},
		{"raw", string(o.Raw("id")), "17"},
		{"changed", o.Changed("tags"), true},
		{"not changed", o.Changed("id"), false},
	} {
		if diff := cmp.Diff(c.want, c.got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
	if err := o.Require("uuid", "id"); err != nil {
		t.Error(err)
	}
	for _, f := range []string{"null", "none"} {
		if err := o.Require("uuid", f); err == nil || err.Error() != "Instance has no "+f {
			t.Errorf("require %s: %v", f, err)
		}
	}
	if err := none.Require("uuid"); err == nil {
		t.Error("nil has a uuid")
	}
	var n int
	if err := o.Get("id", &n); err != nil || n != 17 {
		t.Errorf("get: %d, %v", n, err)
	}
	if err := o.Get("text", &n); err == nil {
		t.Error("a text is got as a number")
	}
}

func TestSetAndSave(t *testing.T) {
	o, err := Decode(json.RawMessage(sample))
	if err != nil {
		t.Fatal(err)
	}
	o.ResetChanges() // the sender's
	o.Set("task_state", nil)
	o.Set("launched_at", time.Date(2026, 3, 1, 13, 0, 0, 999, time.FixedZone("", 3600)))
	o.Set("terminated_at", (*time.Time)(nil))
	o.Set("task_state", "spawning")
	o.Set("flavor", Minimal("Flavor", "1.2", map[string]any{"id": 1}))
	o.Set("gone", 1)
	o.Unset("gone")
	o.Put("quiet", 5)

	saved, err := json.Marshal(o.ForSave("uuid", "missing"))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"nova_object.name": "Instance", "nova_object.namespace": "nova", "nova_object.version": "2.9",
	 "nova_object.data": {"uuid": "u", "task_state": "spawning", "launched_at": "2026-03-01T12:00:00Z", "terminated_at": null,
	  "flavor": {"nova_object.name": "Flavor", "nova_object.namespace": "nova", "nova_object.version": "1.2", "nova_object.data": {"id": 1}, "nova_object.changes": ["id"]}},
	 "nova_object.changes": ["task_state", "launched_at", "terminated_at", "flavor"]}`
	if diff := cmp.Diff(decodeAny(t, []byte(want)), decodeAny(t, saved)); diff != "" {
		t.Errorf("save (-want +got):\n%s", diff)
	}
	whole, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	again := decodeAny(t, whole).(map[string]any)
	if diff := cmp.Diff(decodeAny(t, []byte("[1]")), again["nova_object.tomorrow"]); diff != "" {
		t.Errorf("unknown key: %s", diff)
	}
	data := again["nova_object.data"].(map[string]any)
	if diff := cmp.Diff(decodeAny(t, []byte(`{"x": [1, {"y": null}]}`)), data["from the future"]); diff != "" {
		t.Errorf("unknown field: %s", diff)
	}
	if !strings.Contains(string(whole), `"<&>"`) && !strings.Contains(string(whole), `\u003c`) {
		t.Errorf("text got lost: %s", whole)
	}

	clone := o.Clone()
	clone.Set("uuid", "other")
	clone.Set("task_state", "x")
	if o.String("uuid") != "u" || o.Changed("uuid") || o.String("task_state") != "spawning" {
		t.Error("a clone shares state")
	}

	if err := o.Merge(json.RawMessage(`{"id": 18, "compute_id": 4, "obj_what_changed": []}`)); err != nil {
		t.Fatal(err)
	}
	if o.Int("id") != 18 || o.Int("compute_id") != 4 || o.Changes != nil || o.Has("obj_what_changed") {
		t.Errorf("merged %+v", o)
	}
	if err := o.Merge(json.RawMessage(`{"obj_what_changed": ["info_cache"]}`)); err != nil || !o.Changed("info_cache") {
		t.Errorf("changes left: %v, %v", o.Changes, err)
	}
	for _, bad := range []string{"[]", "null5", `{"obj_what_changed": 5}`, strings.Repeat("[", 1000)} {
		if err := o.Merge(json.RawMessage(bad)); err == nil {
			t.Errorf("merged %.20s", bad)
		}
	}
}

func TestMinimal(t *testing.T) {
	o := Minimal("Service", "1.22", map[string]any{"report_count": 5, "version": 64}).Key("id", 1)
	raw, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"nova_object.name":"Service","nova_object.namespace":"nova","nova_object.version":"1.22",
	 "nova_object.data":{"id":1,"report_count":5,"version":64},"nova_object.changes":["report_count","version"]}`
	if diff := cmp.Diff(decodeAny(t, []byte(want)), decodeAny(t, raw)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	raw, err = json.Marshal(NewList("TagList", "1.1", nil))
	if err != nil || !strings.Contains(string(raw), `"objects":[]`) {
		t.Errorf("empty list %s, %v", raw, err)
	}
	for _, v := range []any{func() {}, math.NaN(), json.RawMessage("{"), json.RawMessage(strings.Repeat("[", 200) + strings.Repeat("]", 200))} {
		o := Minimal("Service", "1.22", nil)
		o.Set("id", v)
		if _, err := json.Marshal(o); err == nil || o.Err() == nil || o.Has("id") {
			t.Errorf("%T was taken: %v", v, err)
		}
	}
	if raw, err := json.Marshal((*Object)(nil)); err != nil || string(raw) != "null" {
		t.Errorf("nil object %s, %v", raw, err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, c := range []struct {
		raw string
		not bool // it is no object at all
	}{
		{`5`, true}, {`"x"`, true}, {`[]`, true}, {`{}`, true}, {`{"nova_object.data": {}}`, true},
		{`{`, false}, {`nul`, false},
		{`{"nova_object.name": 5, "nova_object.version": "1.0", "nova_object.data": {}}`, false},
		{`{"nova_object.name": "", "nova_object.version": "1.0", "nova_object.data": {}}`, false},
		{`{"nova_object.name": "X", "nova_object.data": {}}`, false},
		{`{"nova_object.name": "X", "nova_object.version": 1, "nova_object.data": {}}`, false},
		{`{"nova_object.name": "X", "nova_object.version": "1.0", "nova_object.data": []}`, false},
		{`{"nova_object.name": "X", "nova_object.version": "1.0", "nova_object.data": null}`, false},
		{`{"nova_object.name": "X", "nova_object.version": "1.0", "nova_object.data": {}, "nova_object.changes": "x"}`, false},
		{`{"nova_object.name": "X", "nova_object.version": "1.0", "nova_object.data": {"a": ` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + `}}`, false},
		{strings.Repeat(`{"nova_object.data":`, 50000), false},
	} {
		o, err := Decode(json.RawMessage(c.raw))
		if err == nil || errors.Is(err, ErrNotObject) != c.not || o != nil {
			t.Errorf("%.100s: %v, %v", c.raw, o, err)
		}
	}
	for _, raw := range []string{"", " ", "null"} {
		if o, err := Decode(json.RawMessage(raw)); o != nil || err != nil {
			t.Errorf("%q: %v, %v", raw, o, err)
		}
	}
	o, err := Decode(json.RawMessage(`{"nova_object.name": "X", "nova_object.version": "1.0", "nova_object.data": {}, "nova_object.changes": null}`))
	if err != nil || o.Changes != nil {
		t.Errorf("null changes: %+v, %v", o, err)
	}
	var inside struct{ Objects []*Object }
	if err := json.Unmarshal([]byte(`{"Objects": [`+sample+`, null]}`), &inside); err != nil || len(inside.Objects) != 2 || inside.Objects[0].String("uuid") != "u" || inside.Objects[1] != nil {
		t.Errorf("inside a struct: %+v, %v", inside, err)
	}
}

func TestWalk(t *testing.T) {
	var names []string
	args := json.RawMessage(`{"x": [1, {"y": ` + sample + `}], "z": "{\"nova_object.name\": \"text\"}"}`)
	if err := Walk(args, func(o *Object) bool { names = append(names, o.Name); return true }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	if diff := cmp.Diff([]string{"Flavor", "HVSpec", "Instance", "Tag", "TagList"}, names); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	n := 0
	if err := Walk(args, func(*Object) bool { n++; return false }); err != nil || n != 1 {
		t.Errorf("stopped after %d, %v", n, err)
	}
	for _, bad := range []string{"", "{", strings.Repeat("[", 5000), `[{"nova_object.name": 1}]`} {
		if err := Walk(json.RawMessage(bad), func(*Object) bool { return true }); err == nil {
			t.Errorf("%.20q: no error", bad)
		}
	}
	if !IsObject(json.RawMessage(sample)) || IsObject(args) || IsObject(json.RawMessage("5")) || IsObject(nil) {
		t.Error("IsObject is wrong")
	}
}

func TestParseTime(t *testing.T) {
	want := time.Date(2026, 3, 1, 12, 30, 15, 0, time.UTC)
	for _, s := range []string{
		"2026-03-01T12:30:15Z", "2026-03-01T12:30:15+00:00", "2026-03-01T14:30:15+0200", "2026-03-01T12:30:15", "2026-03-01 12:30:15",
		"2026-03-01T12:30:15.000000", "2026-03-01 12:30:15+00:00",
	} {
		got, err := ParseTime(s)
		if err != nil || !got.Equal(want) || got.Location() != time.UTC {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "yesterday", "2026-13-01T00:00:00Z", strings.Repeat("2", 1000)} {
		if _, err := ParseTime(s); err == nil {
			t.Errorf("%.20q is a time", s)
		}
	}
	if s := FormatTime(want.Add(999 * time.Millisecond)); s != "2026-03-01T12:30:15Z" {
		t.Errorf("format %s", s)
	}
}

func FuzzObject(f *testing.F) {
	f.Add([]byte(sample))
	for _, s := range []string{
		`{}`, `[]`, `null`, `{"nova_object.name":"X","nova_object.version":"1.0","nova_object.data":{"a":[[]]}}`,
		`{"nova_object.name":"X","nova_object.version":"1.0","nova_object.data":{},"nova_object.changes":["a","a"],"x":1}`,
		`{"nova_object.name":"L","nova_object.version":"1.0","nova_object.data":{"objects":[{"nova_object.name":"X"}]}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		_ = Walk(raw, func(o *Object) bool { use(o); return true })
		_ = IsObject(raw)
		_ = Minimal("X", "1.0", nil).Merge(raw)
		o, err := Decode(raw)
		if err != nil || o == nil {
			return
		}
		use(o)
		out, err := json.Marshal(o)
		if err != nil {
			t.Fatalf("decoded, but: %v", err)
		}
		again, err := Decode(out)
		if err != nil {
			t.Fatalf("encoded, but: %v: %s", err, out)
		}
		twice, err := json.Marshal(again)
		if err != nil || !bytes.Equal(out, twice) {
			t.Fatalf("%s became %s, %v", out, twice, err)
		}
	})
}

// use calls every getter on every field.
func use(o *Object) {
	for f := range o.Data {
		o.String(f)
		o.Int(f)
		o.Float(f)
		o.Bool(f)
		o.Time(f)
		o.Object(f)
		o.List(f)
		o.Strings(f)
		o.StringMap(f)
		o.IsNull(f)
	}
	o.Objects()
	o.ForSave("uuid")
	o.Clone().Set("x", o)
}
