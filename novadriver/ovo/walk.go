package ovo

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// errTooDeep: JSON nests deeper than MaxDepth.
var errTooDeep = fmt.Errorf("JSON nests deeper than %d levels", MaxDepth)

// errStop ends a walk early.
var errStop = errors.New("stop")

// Walk calls fn for every object inside raw, outermost first, wherever it
// hides: in dicts, arrays and other objects. fn returns false to end the walk.
// It returns an error when raw is no JSON, nests too deep, or holds a damaged
// object.
func Walk(raw json.RawMessage, fn func(*Object) bool) error {
	if err := checkDepth(raw, MaxDepth); err != nil {
		return fmt.Errorf("walk objects: %w", err)
	}
	if !json.Valid(raw) {
		return fmt.Errorf("walk objects: invalid JSON")
	}
	if err := walk(raw, fn); err != nil && !errors.Is(err, errStop) {
		return fmt.Errorf("walk objects: %w", err)
	}
	return nil
}

func walk(raw []byte, fn func(*Object) bool) error {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 {
		return nil
	}
	switch raw[0] {
	case '[':
		var elems []json.RawMessage
		if err := json.Unmarshal(raw, &elems); err != nil {
			return err
		}
		for _, e := range elems {
			if err := walk(e, fn); err != nil {
				return err
			}
		}
	case '{':
		o, err := decode(raw)
		if errors.Is(err, ErrNotObject) {
			var m map[string]json.RawMessage
			if err := json.Unmarshal(raw, &m); err != nil {
				return err
			}
			return walkMap(m, fn)
		}
		if err != nil {
			return err
		}
		if !fn(o) {
			return errStop
		}
		return walkMap(o.Data, fn)
	}
	return nil
}

func walkMap(m map[string]json.RawMessage, fn func(*Object) bool) error {
	for _, v := range m {
		if err := walk(v, fn); err != nil {
			return err
		}
	}
	return nil
}

// checkDepth scans raw without decoding it, so that what follows may recurse.
// Damaged JSON is left to the decoder.
func checkDepth(raw []byte, limit int) error {
	depth := 0
	for i := 0; i < len(raw); i++ {
		switch raw[i] {
		case '"':
			for i++; i < len(raw) && raw[i] != '"'; i++ {
				if raw[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			if depth++; depth > limit {
				return errTooDeep
			}
		case '}', ']':
			depth--
		}
	}
	return nil
}

// unmarshal is json.Unmarshal that does not take null or nothing for a value.
func unmarshal(raw []byte, dst any) error {
	if isNull(raw) {
		return errors.New("null")
	}
	return json.Unmarshal(raw, dst)
}

func isNull(raw []byte) bool {
	t := bytes.TrimSpace(raw)
	return len(t) == 0 || string(t) == "null"
}

// marshal encodes without escaping <, > and &, as Python does.
func marshal(v any) (json.RawMessage, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// clip shortens foreign text for a message.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
