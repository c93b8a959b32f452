package oslomsg

import (
	"encoding/json"
	"log/slog"
	"maps"
	"time"
)

// Context is a request context as it travels on the bus, with the prefix
// "_context_" removed from the keys: request_id, user_id, project_id,
// auth_token and so on. Values are kept as received, so that echoing a context
// loses nothing. It holds the user's token: it is never logged whole.
type Context map[string]json.RawMessage

// String returns the text under key, or "" when it is absent or no text.
func (c Context) String(key string) string {
	var s string
	if json.Unmarshal(c[key], &s) != nil {
		return ""
	}
	return s
}

// Bool returns the truth value under key; absent and other types are false.
func (c Context) Bool(key string) bool {
	var b bool
	return json.Unmarshal(c[key], &b) == nil && b
}

// Strings returns the list of texts under key; absent and other types are nil.
func (c Context) Strings(key string) []string {
	var l []string
	if json.Unmarshal(c[key], &l) != nil {
		return nil
	}
	return l
}

// RequestID is the id that ties action events and log lines to a request.
func (c Context) RequestID() string { return c.String("request_id") }

// Clone returns a copy that may be changed with Set.
func (c Context) Clone() Context {
	out := make(Context, len(c)+1)
	maps.Copy(out, c)
	return out
}

// Set stores v under key. v must be encodable as JSON; anything else is stored
// as null.
func (c Context) Set(key string, v any) {
	raw, err := json.Marshal(v)
	if err != nil {
		raw = json.RawMessage("null")
	}
	c[key] = raw
}

// contextTime is the layout of a context's timestamp: UTC, microseconds, no
// zone.
const contextTime = "2006-01-02T15:04:05.999999"

// Timestamp is when the request began, by the clock of the host that took it;
// zero when the context does not tell.
func (c Context) Timestamp() time.Time {
	t, err := time.ParseInLocation(contextTime, c.String("timestamp"), time.UTC)
	if err != nil {
		return time.Time{}
	}
	return t
}

// AdminContext is the context of work nobody asked for, such as periodic
// tasks: every id null and is_admin true, as Nova's get_admin_context makes it.
func AdminContext(now time.Time) Context {
	c := Context{}
	for _, k := range []string{
		"auth_token", "domain", "global_request_id", "project", "project_domain", "project_id", "project_name",
		"quota_class", "remote_address", "resource_uuid", "system_scope", "user", "user_domain", "user_id", "user_name",
	} {
		c[k] = json.RawMessage("null")
	}
	c.Set("is_admin", true)
	c.Set("is_admin_project", true)
	c.Set("read_deleted", "no")
	c.Set("read_only", false)
	c.Set("show_deleted", false)
	c.Set("roles", []string{})
	c.Set("service_catalog", []string{})
	c.Set("user_identity", "- - - - -")
	c.Set("request_id", "req-"+newUUID())
	c.Set("timestamp", now.UTC().Format(contextTime))
	return c
}

// LogValue shows who asked and for what request, and no token.
func (c Context) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("request_id", c.RequestID()),
		slog.String("user_id", c.String("user_id")),
		slog.String("project_id", c.String("project_id")),
	)
}
