package osloconf

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/novalet/novalet"
)

// SetDefault gives an option the value it has when no file sets it, for the
// typed getters and for references to it. It may hold references itself.
func (c *Config) SetDefault(section, name, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.defaults[option{normalize(section), name}] = text
}

// Has reports whether a file sets the option.
func (c *Config) Has(section, name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.values[option{normalize(section), name}]) > 0
}

// Where tells where the option is set, as "nova.conf:41", or "" if it is not.
func (c *Config) Where(section, name string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.where(option{normalize(section), name})
}

func (c *Config) where(o option) string {
	vs := c.values[o]
	if len(vs) == 0 {
		return ""
	}
	v := vs[len(vs)-1]
	return fmt.Sprintf("%s:%d", filepath.Base(v.file), v.line)
}

// Errorf adds a complaint about the value of an option, for checks that only
// the caller can make. The text must not show secrets.
func (c *Config) Errorf(section, name, format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.complainAbout(option{normalize(section), name}, fmt.Sprintf(format, args...))
}

func (c *Config) complainAbout(o option, text string) {
	where := c.where(o)
	if where == "" {
		where = "not set"
		if len(c.files) > 0 {
			where += " in " + strings.Join(c.files, ", ")
		}
	}
	msg := fmt.Sprintf("option [%s] %s: %s (%s)", o.section, o.name, text, where)
	if !slices.Contains(c.complain, msg) {
		c.complain = append(c.complain, msg)
	}
}

// Err returns every complaint so far, one a line, or nil.
func (c *Config) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	errs := make([]error, len(c.complain))
	for i, m := range c.complain {
		errs[i] = errors.New(m)
	}
	return errors.Join(errs...)
}

// Unread returns the options of a section that files set and nobody asked for,
// as "name (nova.conf:41)", sorted: misspelt ones, in a section that this
// program alone reads.
func (c *Config) Unread(section string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for o := range c.values {
		if o.section == normalize(section) && !c.read[o] {
			out = append(out, fmt.Sprintf("%s (%s)", o.name, c.where(o)))
		}
	}
	slices.Sort(out)
	return out
}

// Options returns the names of the options that files set in a section, sorted.
func (c *Config) Options(section string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for o := range c.values {
		if o.section == normalize(section) {
			out = append(out, o.name)
		}
	}
	slices.Sort(out)
	return out
}

// get returns the text of an option with its references resolved, and whether
// there is one. A reference that leads nowhere is a complaint.
func (c *Config) get(section, name string) (option, string, bool) {
	o := option{normalize(section), name}
	c.read[o] = true
	text, ok := c.raw(o)
	if !ok {
		return o, "", false
	}
	text, err := c.expand(o, text)
	if err != nil {
		c.complainAbout(o, err.Error())
		return o, "", false
	}
	return o, text, true
}

// typed reads an option with a type of its own. Where blank is true a value of
// spaces only is as if the option were not set, as in oslo's numbers.
func typed[T any](c *Config, section, name string, def T, blank bool, parse func(string) (T, error)) T {
	c.mu.Lock()
	defer c.mu.Unlock()
	o, text, ok := c.get(section, name)
	if !ok || blank && strings.TrimSpace(text) == "" {
		return def
	}
	v, err := parse(text)
	if err != nil {
		c.complainAbout(o, err.Error())
		return def
	}
	return v
}

// String returns a text, def when the option is not set.
func (c *Config) String(section, name, def string) string {
	return typed(c, section, name, def, false, func(s string) (string, error) { return s, nil })
}

// Required returns a text; that it is missing or empty is a complaint.
func (c *Config) Required(section, name string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := len(c.complain)
	o, text, ok := c.get(section, name)
	if strings.TrimSpace(text) == "" && len(c.complain) == before {
		if ok {
			c.complainAbout(o, "must not be empty")
		} else {
			c.complainAbout(o, "is required")
		}
	}
	return text
}

// Secret returns a password or token, "" when the option is not set.
func (c *Config) Secret(section, name string) novalet.Secret {
	return novalet.Secret(c.String(section, name, ""))
}

// Bool returns a truth value: true, 1, on, yes or their opposites, in any case.
func (c *Config) Bool(section, name string, def bool) bool {
	return typed(c, section, name, def, false, func(s string) (bool, error) {
		switch strings.ToLower(s) {
		case "true", "1", "on", "yes":
			return true, nil
		case "false", "0", "off", "no":
			return false, nil
		}
		return false, fmt.Errorf("%q is neither true nor false", clip(s))
	})
}

// Int returns a whole number.
func (c *Config) Int(section, name string, def int) int {
	return typed(c, section, name, def, true, func(s string) (int, error) {
		n, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil {
			return 0, fmt.Errorf("%q is no whole number", clip(s))
		}
		return n, nil
	})
}

// IntRange returns a whole number from low to high; another one is a complaint.
func (c *Config) IntRange(section, name string, def, low, high int) int {
	n := c.Int(section, name, def)
	if n < low || n > high {
		c.Errorf(section, name, "%d is not from %d to %d", n, low, high)
		return def
	}
	return n
}

// Float returns a number.
func (c *Config) Float(section, name string, def float64) float64 {
	return typed(c, section, name, def, true, parseFloat)
}

func parseFloat(s string) (float64, error) {
	f, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return 0, fmt.Errorf("%q is no number", clip(s))
	}
	return f, nil
}

// Seconds returns a duration, which the file gives as a number of seconds.
func (c *Config) Seconds(section, name string, def time.Duration) time.Duration {
	return typed(c, section, name, def, true, func(s string) (time.Duration, error) {
		f, err := parseFloat(s)
		if err != nil {
			return 0, err
		}
		if limit := float64(math.MaxInt64 / int64(time.Second)); f > limit || f < -limit {
			return 0, fmt.Errorf("%q seconds are too many", clip(s))
		}
		return time.Duration(f * float64(time.Second)), nil
	})
}

// List returns the items of a list separated by commas, without the spaces
// around them. An option that is set but empty is an empty list.
func (c *Config) List(section, name string, def []string) []string {
	return typed(c, section, name, def, false, func(s string) ([]string, error) {
		s = strings.TrimRight(strings.TrimSpace(s), ",")
		if s == "" {
			return []string{}, nil
		}
		items := strings.Split(s, ",")
		for i := range items {
			items[i] = strings.TrimSpace(items[i])
		}
		return items, nil
	})
}

// Dict returns pairs "key:value" separated by commas. A part without a colon
// belongs to the key after it, as in oslo.config.
func (c *Config) Dict(section, name string, def map[string]string) map[string]string {
	return typed(c, section, name, def, false, func(s string) (map[string]string, error) {
		out := map[string]string{}
		s = strings.TrimSpace(s)
		if s == "" {
			return out, nil
		}
		pair := ""
		for part := range strings.SplitSeq(s, ",") {
			pair += part
			k, v, ok := strings.Cut(pair, ":")
			if !ok {
				pair += ","
				continue
			}
			out[strings.TrimSpace(k)] = strings.TrimSpace(v)
			pair = ""
		}
		if pair != "" {
			return nil, fmt.Errorf("%q is no pair key:value", clip(strings.TrimSuffix(pair, ",")))
		}
		return out, nil
	})
}

// Choice returns a text that must be one of those allowed.
func (c *Config) Choice(section, name, def string, allowed ...string) string {
	return typed(c, section, name, def, false, func(s string) (string, error) {
		if !slices.Contains(allowed, s) {
			return "", fmt.Errorf("%q is none of %s", clip(s), strings.Join(allowed, ", "))
		}
		return s, nil
	})
}

// Multi returns every value of an option that may be given several times, in
// the order read; nil when there is none.
func (c *Config) Multi(section, name string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := option{normalize(section), name}
	c.read[o] = true
	var out []string
	for _, v := range c.values[o] {
		text, err := c.expand(o, v.text)
		if err != nil {
			c.complainAbout(o, err.Error())
			continue
		}
		out = append(out, text)
	}
	return out
}

// clip shortens a value for a message.
func clip(s string) string {
	if len(s) > 60 {
		return s[:60] + "…"
	}
	return s
}
