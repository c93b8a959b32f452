package novalet

import (
	"fmt"
	"log/slog"
)

// redacted is what every formatter prints in the place of a secret.
const redacted = "[redacted]"

// Secret is a token, password or other text that must not reach a log, a fault or a command line.
// fmt and slog print a placeholder. It marshals to JSON as its value, since the instance record (a file
// only root can read) has to hold it across a restart: never hand a struct holding one to a JSON log.
type Secret string

// Reveal returns the text itself, for the one place that sends it.
func (s Secret) Reveal() string { return string(s) }

// String implements fmt.Stringer without showing the text.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return redacted
}

// Format implements fmt.Formatter, so that no verb, not even %#v or %x, shows the text.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(s.String())) }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }
