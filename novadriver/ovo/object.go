package ovo

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Keys of an object's primitive.
const (
	keyName      = "nova_object.name"
	keyNamespace = "nova_object.namespace"
	keyVersion   = "nova_object.version"
	keyData      = "nova_object.data"
	keyChanges   = "nova_object.changes"
)

// MaxDepth is how deep the JSON of an object may nest. A boot request of a
// real cloud has about 20 levels.
const MaxDepth = 100

// ErrNotObject: the JSON is not the primitive of a versioned object.
var ErrNotObject = errors.New("not a versioned object")

// Object is one versioned object. The zero value is not useful: see Decode and
// Minimal. An Object is not safe for use by several goroutines while one
// changes it.
//
// The getters (String, Int, …) treat an absent field, a null and a value of
// another type alike and return the zero value; they also do so on a nil
// *Object, so that inst.Object("flavor").Int("vcpus") needs no checks. Where
// the difference matters use Has, IsNull, Get or Require.
type Object struct {
	Name      string
	Namespace string // always "nova" in practice
	Version   string // as received: it goes back unchanged
	// Data holds the fields that are set, as JSON. Absent is "unset" and
	// differs from null.
	Data map[string]json.RawMessage
	// Changes names the fields changed since the last save. Nil leaves the key
	// out of the primitive.
	Changes []string
	// Extra holds top-level keys this package does not know.
	Extra map[string]json.RawMessage

	err error // the first value that could not be encoded
}

// Minimal makes a new object for a save or create: the fields given are set
// and marked as changed. Name the key fields of a save (uuid, id) with Key.
func Minimal(name, version string, fields map[string]any) *Object {
	o := &Object{Name: name, Namespace: "nova", Version: version, Data: map[string]json.RawMessage{}}
	for _, f := range slices.Sorted(maps.Keys(fields)) {
		o.Set(f, fields[f])
	}
	return o
}

// NewList makes an XxxList object of the objects given.
func NewList(name, version string, objects []*Object) *Object {
	if objects == nil {
		objects = []*Object{}
	}
	return Minimal(name, version, map[string]any{"objects": objects})
}

// Decode reads one primitive. It returns ErrNotObject for JSON of another
// shape, and another error for an object that is damaged. null gives nil
// without an error.
func Decode(raw json.RawMessage) (*Object, error) {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	if err := checkDepth(raw, MaxDepth); err != nil {
		return nil, fmt.Errorf("decode object: %w", err)
	}
	return decode(raw)
}

// decode is Decode without the check of the depth, which covers what is nested.
func decode(raw []byte) (*Object, error) {
	var top map[string]json.RawMessage
	if err := json.Unmarshal(raw, &top); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			return nil, fmt.Errorf("decode object: %w", err)
		}
		return nil, ErrNotObject
	}
	name, ok := top[keyName]
	if !ok {
		return nil, ErrNotObject
	}
	o := &Object{Data: map[string]json.RawMessage{}}
	if err := unmarshal(name, &o.Name); err != nil || o.Name == "" {
		return nil, fmt.Errorf("decode object: %s is no text", keyName)
	}
	for key, dst := range map[string]any{
		keyNamespace: &o.Namespace, keyVersion: &o.Version, keyData: &o.Data, keyChanges: &o.Changes,
	} {
		if v, ok := top[key]; ok && !(key == keyChanges && isNull(v)) {
			if err := unmarshal(v, dst); err != nil {
				return nil, fmt.Errorf("decode %s: %s: %w", clip(o.Name), key, err)
			}
		}
		delete(top, key)
	}
	delete(top, keyName)
	if o.Version == "" {
		return nil, fmt.Errorf("decode %s: no version", clip(o.Name))
	}
	if o.Data == nil {
		return nil, fmt.Errorf("decode %s: data is null", clip(o.Name))
	}
	if len(top) > 0 {
		o.Extra = top
	}
	return o, nil
}

// IsObject reports whether raw looks like the primitive of an object.
func IsObject(raw json.RawMessage) bool {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 || raw[0] != '{' || checkDepth(raw, MaxDepth) != nil {
		return false
	}
	var top map[string]json.RawMessage
	if json.Unmarshal(raw, &top) != nil {
		return false
	}
	_, ok := top[keyName]
	return ok
}

// UnmarshalJSON implements json.Unmarshaler. null leaves o unchanged.
func (o *Object) UnmarshalJSON(raw []byte) error {
	d, err := Decode(raw)
	if err != nil {
		return err
	}
	if d != nil {
		*o = *d
		// The decoder reuses raw after this call.
		for k, v := range o.Data {
			o.Data[k] = bytes.Clone(v)
		}
	}
	return nil
}

// MarshalJSON implements json.Marshaler. It returns the error of a Set whose
// value could not be encoded.
func (o *Object) MarshalJSON() ([]byte, error) {
	if o == nil {
		return []byte("null"), nil
	}
	if o.err != nil {
		return nil, o.err
	}
	top := make(map[string]any, 5+len(o.Extra))
	for k, v := range o.Extra {
		top[k] = v
	}
	top[keyName], top[keyVersion] = o.Name, o.Version
	if o.Namespace != "" {
		top[keyNamespace] = o.Namespace
	}
	data := o.Data
	if data == nil {
		data = map[string]json.RawMessage{}
	}
	top[keyData] = data
	if o.Changes != nil {
		top[keyChanges] = o.Changes
	}
	return marshal(top)
}

// Clone returns a copy that shares no state with o.
func (o *Object) Clone() *Object {
	if o == nil {
		return nil
	}
	c := *o
	c.Data = maps.Clone(o.Data) // values are replaced, never written into
	c.Changes = slices.Clone(o.Changes)
	c.Extra = maps.Clone(o.Extra)
	return &c
}

// Err is the error of the first Set whose value could not be encoded.
func (o *Object) Err() error {
	if o == nil {
		return nil
	}
	return o.err
}

// ForSave returns what a save of o has to send: the key fields named, not as
// changes, and the changed ones. Nested objects and everything unchanged stay
// away: the conductor would send them back whole, and rewrite some.
func (o *Object) ForSave(keys ...string) *Object {
	s := &Object{Name: o.Name, Namespace: o.Namespace, Version: o.Version, Data: map[string]json.RawMessage{}, err: o.err}
	for _, k := range keys {
		if v, ok := o.Data[k]; ok {
			s.Data[k] = v
		}
	}
	for _, k := range o.Changes {
		if v, ok := o.Data[k]; ok {
			s.Data[k] = v
			s.Changes = append(s.Changes, k)
		}
	}
	return s
}

// Merge takes over the updates that the conductor's object_action answers
// with: fields by name, and the changes left in "obj_what_changed". Fields
// unknown here are kept too.
func (o *Object) Merge(updates json.RawMessage) error {
	if err := checkDepth(updates, MaxDepth); err != nil {
		return fmt.Errorf("merge into %s: %w", o.Name, err)
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(updates, &m); err != nil {
		return fmt.Errorf("merge into %s: %w", o.Name, err)
	}
	var changes []string
	if raw, ok := m["obj_what_changed"]; ok {
		if err := unmarshal(raw, &changes); err != nil {
			return fmt.Errorf("merge into %s: obj_what_changed: %w", o.Name, err)
		}
		delete(m, "obj_what_changed")
	}
	if o.Data == nil {
		o.Data = map[string]json.RawMessage{}
	}
	maps.Copy(o.Data, m)
	o.Changes = nil
	if len(changes) > 0 {
		o.Changes = changes
	}
	return nil
}
