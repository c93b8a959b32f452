package layer

import (
	"fmt"
	"strings"
)

// RefusedError is an image at fault: its text may be shown to the tenant.
type RefusedError struct{ Text string }

// Error implements error.
func (e *RefusedError) Error() string { return e.Text }

// Refuse makes a RefusedError.
func Refuse(format string, args ...any) error {
	return &RefusedError{Text: fmt.Sprintf(format, args...)}
}

// CleanName turns a member's name into a path relative to the root without empty and "." elements: "" is the root
// itself. A name with "..", a NUL byte or beyond the bounds is refused: no tool that makes images writes one, and
// refusing leaves no question of where it would have gone.
func CleanName(name string) (string, error) {
	if len(name) > MaxPath {
		return "", Refuse("the image has a path of more than %d bytes", MaxPath)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", Refuse("the image has a file name with a NUL byte")
	}
	// As tar names what it was given as ".".
	if short := strings.TrimSuffix(strings.TrimPrefix(name, "./"), "/"); isClean(short) {
		return short, nil
	}
	var out []string
	for _, el := range strings.Split(name, "/") {
		switch {
		case el == "" || el == ".":
			continue
		case el == "..":
			return "", Refuse("the image has the path %q, which leads out of its root", short(name))
		case len(el) > MaxName:
			return "", Refuse("the image has a file name of more than %d bytes", MaxName)
		}
		out = append(out, el)
	}
	if len(out) > MaxDepth {
		return "", Refuse("the image has a path of more than %d elements", MaxDepth)
	}
	return strings.Join(out, "/"), nil
}

// isClean reports whether nothing has to be changed or refused.
func isClean(name string) bool {
	start, depth := 0, 0
	for i := 0; i <= len(name); i++ {
		if i < len(name) && name[i] != '/' {
			continue
		}
		el := name[start:i]
		if el == "" || el == "." || el == ".." || len(el) > MaxName {
			return false
		}
		if depth++; depth > MaxDepth {
			return false
		}
		start = i + 1
	}
	return true
}

// splitName splits a clean name into its parent ("" is the root) and its last element.
func splitName(name string) (dir, base string) {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i], name[i+1:]
	}
	return "", name
}

// short cuts a name for an error text.
func short(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
