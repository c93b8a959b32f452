package oslomsg

import (
	"encoding/json"
	"fmt"
	"strings"
)

// Failure is an exception as it travels in a reply. nova-api raises it as the
// class itself only if Module is "nova.exception" or "builtins"; anything else
// becomes a RemoteError there, and an HTTP 500.
type Failure struct {
	Module  string
	Class   string
	Message string
	// Args are the constructor's positional arguments; nil means [Message].
	Args []any
	// Kwargs are its keyword arguments: the format variables and, for a
	// NovaException, "code".
	Kwargs map[string]any
	Tb     []string // traceback lines; may be empty
}

// Error makes a Failure usable as an error of the handler's side.
func (f *Failure) Error() string { return f.Module + "." + f.Class + ": " + f.Message }

// NotImplemented is the failure that nova-api turns into HTTP 501.
func NotImplemented(message string) *Failure {
	return &Failure{Module: "builtins", Class: "NotImplementedError", Message: message}
}

// Modules of the failures that the dispatcher itself sends.
const dispatcherModule = "oslo_messaging.rpc.dispatcher"

func unsupportedVersion(method, version string) *Failure {
	return &Failure{
		Module: dispatcherModule, Class: "UnsupportedVersion",
		Message: fmt.Sprintf("Endpoint does not support RPC version %s. Attempted method: %s", version, method),
	}
}

func noSuchMethod(method string) *Failure {
	return &Failure{
		Module: dispatcherModule, Class: "NoSuchMethod",
		Message: "Endpoint does not support RPC method " + method,
	}
}

// failureJSON is the third level of encoding: the text inside "failure".
type failureJSON struct {
	Class   string         `json:"class"`
	Module  string         `json:"module"`
	Message string         `json:"message"`
	Tb      []string       `json:"tb"`
	Args    []any          `json:"args"`
	Kwargs  map[string]any `json:"kwargs"`
}

func (f *Failure) encode() (string, error) {
	j := failureJSON{Class: f.Class, Module: f.Module, Message: f.Message, Tb: f.Tb, Args: f.Args, Kwargs: f.Kwargs}
	if j.Tb == nil {
		j.Tb = []string{}
	}
	if j.Args == nil {
		j.Args = []any{f.Message}
	}
	if j.Kwargs == nil {
		j.Kwargs = map[string]any{}
	}
	b, err := marshal(j)
	if err != nil {
		return "", fmt.Errorf("encode failure %s: %w", f.Class, err)
	}
	return string(b), nil
}

// RemoteError is a failure that the other side answered with. Class and Module
// are the bare names: a "_Remote" added by a re-sender is taken off.
type RemoteError struct {
	Module    string
	Class     string
	Message   string
	Args      []json.RawMessage
	Kwargs    map[string]json.RawMessage
	Traceback []string // never logged by this package
}

// Error names class and message.
func (e *RemoteError) Error() string { return e.Class + ": " + e.Message }

// Is reports whether the failure is class of module, for the two forms of
// module name that occur.
func (e *RemoteError) Is(target error) bool {
	t, ok := target.(*RemoteError)
	return ok && t.Class == e.Class && (t.Module == "" || t.Module == e.Module)
}

// NovaError is a target for errors.Is: a failure of class in nova.exception.
func NovaError(class string) error { return &RemoteError{Module: "nova.exception", Class: class} }

// decodeFailure reads the value of "failure" in a reply: a text holding JSON.
// A value of another shape still gives an error, so that a failed call never
// looks like one that went well.
func decodeFailure(raw json.RawMessage) *RemoteError {
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		text = string(raw) // some senders do not encode the third level
	}
	var top map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &top); err != nil {
		return &RemoteError{Class: "RemoteError", Message: "unreadable failure: " + clip(text, 200)}
	}
	e := &RemoteError{
		Module:  strings.TrimSuffix(rawString(top["module"]), "_Remote"),
		Class:   strings.TrimSuffix(rawString(top["class"]), "_Remote"),
		Message: rawString(top["message"]),
	}
	// Members of an unexpected type are left empty: class and message decide.
	_ = json.Unmarshal(top["args"], &e.Args)
	_ = json.Unmarshal(top["kwargs"], &e.Kwargs)
	_ = json.Unmarshal(top["tb"], &e.Traceback)
	if e.Class == "" {
		e.Class = "RemoteError"
	}
	return e
}
