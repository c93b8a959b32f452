package novalet

import (
	"encoding/json"
	"log/slog"
)

// RequestContext says on whose behalf something is done. It comes with each message of the bus and is echoed
// on every conductor call made for it: the request_id ties the instance's action events together.
type RequestContext struct {
	RequestID string `json:"request_id"`
	UserID    string `json:"user_id,omitempty"`
	ProjectID string `json:"project_id,omitempty"`
	// AuthToken is the user's Keystone token. It may have expired by the time it is used.
	AuthToken Secret `json:"auth_token,omitempty"`
	// Wire is the whole context as it came, keys without the _context_ prefix; nil for a context of our own.
	Wire map[string]json.RawMessage `json:"wire,omitempty"`
}

// LogValue implements slog.LogValuer: the request id alone.
func (c RequestContext) LogValue() slog.Value { return slog.StringValue(c.RequestID) }
