package ovo

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// TimeLayout is how a DateTime field is written: UTC, whole seconds.
const TimeLayout = "2006-01-02T15:04:05Z"

// timeLayouts are the forms of ISO 8601 that are read.
var timeLayouts = []string{
	time.RFC3339Nano,
	"2006-01-02T15:04:05.999999999Z0700",
	"2006-01-02T15:04:05.999999999", // no zone: UTC
	"2006-01-02 15:04:05.999999999Z07:00",
	"2006-01-02 15:04:05.999999999",
}

// ParseTime reads a time in any form of ISO 8601 that occurs on the bus.
// Without a zone it is UTC.
func ParseTime(s string) (time.Time, error) {
	for _, l := range timeLayouts {
		if t, err := time.Parse(l, s); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("parse time %q: not ISO 8601", clip(s))
}

// FormatTime writes t as a DateTime field; fractions of a second are dropped,
// as Nova does.
func FormatTime(t time.Time) string { return t.UTC().Format(TimeLayout) }

// Raw returns the JSON of a field, nil when it is unset.
func (o *Object) Raw(field string) json.RawMessage {
	if o == nil {
		return nil
	}
	return o.Data[field]
}

// Has reports whether the field is set, be it to null.
func (o *Object) Has(field string) bool {
	if o == nil {
		return false
	}
	_, ok := o.Data[field]
	return ok
}

// IsNull reports whether the field is unset or null.
func (o *Object) IsNull(field string) bool {
	return isNull(o.Raw(field))
}

// Require returns an error that names the first of the fields that is unset or
// null.
func (o *Object) Require(fields ...string) error {
	for _, f := range fields {
		if o.IsNull(f) {
			if o == nil {
				return fmt.Errorf("object is missing (field %s is needed)", f)
			}
			return fmt.Errorf("%s has no %s", o.Name, f)
		}
	}
	return nil
}

// Get decodes a field into dst as encoding/json does, and fails where the
// other getters fall back to the zero value.
func (o *Object) Get(field string, dst any) error {
	if err := o.Require(field); err != nil {
		return err
	}
	if err := unmarshal(o.Data[field], dst); err != nil {
		return fmt.Errorf("%s.%s: %w", o.Name, field, err)
	}
	return nil
}

// String returns a text field.
func (o *Object) String(field string) string {
	var s string
	if unmarshal(o.Raw(field), &s) != nil {
		return ""
	}
	return s
}

// Int returns an integer field. Numeric texts and whole floats count, as they
// do in Nova.
func (o *Object) Int(field string) int64 {
	raw := o.Raw(field)
	var n int64
	if unmarshal(raw, &n) == nil {
		return n
	}
	var f float64
	if unmarshal(raw, &f) == nil {
		if f == math.Trunc(f) && math.Abs(f) < 1<<53 {
			return int64(f)
		}
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(o.String(field)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// Float returns a number field.
func (o *Object) Float(field string) float64 {
	raw := o.Raw(field)
	var f float64
	if unmarshal(raw, &f) == nil {
		return f
	}
	f, err := strconv.ParseFloat(strings.TrimSpace(o.String(field)), 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return 0
	}
	return f
}

// Bool returns a truth value. The numbers and texts that Nova takes for true
// count (1, "true", "yes", "on", …).
func (o *Object) Bool(field string) bool {
	raw := o.Raw(field)
	var b bool
	if unmarshal(raw, &b) == nil {
		return b
	}
	switch strings.ToLower(strings.TrimSpace(o.String(field))) {
	case "1", "t", "true", "on", "y", "yes":
		return true
	}
	return string(bytes.TrimSpace(raw)) == "1"
}

// Time returns a DateTime field, the zero time when there is none.
func (o *Object) Time(field string) time.Time {
	t, err := ParseTime(o.String(field))
	if err != nil {
		return time.Time{}
	}
	return t
}

// Object returns a nested object, nil when there is none.
func (o *Object) Object(field string) *Object {
	n, err := Decode(o.Raw(field))
	if err != nil {
		return nil
	}
	return n
}

// List returns the objects of a field that is an XxxList object or an array of
// objects. Elements that are no objects are left out.
func (o *Object) List(field string) []*Object { return list(o.Raw(field)) }

// Objects returns the elements of an XxxList object.
func (o *Object) Objects() []*Object { return list(o.Raw("objects")) }

func list(raw json.RawMessage) []*Object {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 || checkDepth(raw, MaxDepth) != nil {
		return nil
	}
	if raw[0] == '{' {
		o, err := decode(raw)
		if err != nil {
			return nil
		}
		raw = bytes.TrimSpace(o.Data["objects"])
	}
	var elems []json.RawMessage
	if unmarshal(raw, &elems) != nil {
		return nil
	}
	out := make([]*Object, 0, len(elems))
	for _, e := range elems {
		if o, err := decode(e); err == nil {
			out = append(out, o)
		}
	}
	return out
}

// Strings returns an array of texts. Elements of other types are left out.
func (o *Object) Strings(field string) []string {
	var elems []json.RawMessage
	if unmarshal(o.Raw(field), &elems) != nil {
		return nil
	}
	out := make([]string, 0, len(elems))
	for _, e := range elems {
		var s string
		if unmarshal(e, &s) == nil {
			out = append(out, s)
		}
	}
	return out
}

// StringMap returns a dict of texts, such as metadata; it is never nil. Nulls
// and values of other types are left out.
func (o *Object) StringMap(field string) map[string]string {
	var m map[string]json.RawMessage
	if unmarshal(o.Raw(field), &m) != nil {
		return map[string]string{}
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		var s string
		if unmarshal(v, &s) == nil {
			out[k] = s
		}
	}
	return out
}

// Set stores v and marks the field as changed. Times are written as DateTime;
// *Object and []*Object as primitives; a nil pointer as null. A value that
// cannot be encoded leaves the field alone and makes MarshalJSON fail.
func (o *Object) Set(field string, v any) {
	if o.Put(field, v) && !slices.Contains(o.Changes, field) {
		o.Changes = append(o.Changes, field)
	}
}

// Put stores v without marking a change: for key fields, and for what was
// loaded later. It reports whether v could be encoded.
func (o *Object) Put(field string, v any) bool {
	raw, err := encodeField(v)
	if err != nil {
		if o.err == nil {
			o.err = fmt.Errorf("encode %s.%s: %w", o.Name, field, err)
		}
		return false
	}
	if o.Data == nil {
		o.Data = map[string]json.RawMessage{}
	}
	o.Data[field] = raw
	return true
}

// Key is Put for the fields that identify the row; it returns o, to follow
// Minimal.
func (o *Object) Key(field string, v any) *Object {
	o.Put(field, v)
	return o
}

// Unset removes the field, also from the changes.
func (o *Object) Unset(field string) {
	delete(o.Data, field)
	o.Changes = slices.DeleteFunc(o.Changes, func(c string) bool { return c == field })
	if len(o.Changes) == 0 {
		o.Changes = nil
	}
}

// Changed reports whether the field is marked as changed.
func (o *Object) Changed(field string) bool { return o != nil && slices.Contains(o.Changes, field) }

// ResetChanges forgets all marks, as after a save. Objects that arrive may
// carry marks of their sender: those are not ours to send.
func (o *Object) ResetChanges() { o.Changes = nil }

func encodeField(v any) (json.RawMessage, error) {
	switch t := v.(type) {
	case json.RawMessage:
		if !json.Valid(t) {
			return nil, fmt.Errorf("invalid JSON")
		}
		if err := checkDepth(t, MaxDepth); err != nil {
			return nil, err
		}
		return bytes.Clone(t), nil
	case time.Time:
		return marshal(FormatTime(t))
	case *time.Time:
		if t == nil {
			return json.RawMessage("null"), nil
		}
		return marshal(FormatTime(*t))
	}
	return marshal(v)
}
