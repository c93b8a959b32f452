package osloconf

import (
	"fmt"
	"regexp"
	"strings"
)

// reference is a $ and what follows it, as in oslo.config's Template: an
// escape, a name, a name in braces, or nothing that counts.
var reference = regexp.MustCompile(`(?i)\$(?:(\$)|([_a-z][._a-z0-9]*)|\{([_a-z][._a-z0-9]*)\})?`)

// maxReferences and maxExpanded bound what one value may refer to, directly and
// through others, and its length then.
const (
	maxReferences = 200
	maxExpanded   = 1 << 20
)

var errTooManyReferences = fmt.Errorf("refers to more than %d options, or is longer than %d bytes then", maxReferences, maxExpanded)

// expand resolves the references in the text of an option.
func (c *Config) expand(o option, text string) (string, error) {
	left := maxReferences
	return c.substitute(o.section, text, []option{o}, &left)
}

// substitute is expand for one level; section is the one of the option that
// text belongs to, seen holds the options being resolved, and left is how many
// more references may be.
func (c *Config) substitute(section, text string, seen []option, left *int) (string, error) {
	if !strings.Contains(text, "$") {
		return text, nil
	}
	text = strings.ReplaceAll(text, `\$`, "$$")
	var out strings.Builder
	last := 0
	for _, m := range reference.FindAllStringSubmatchIndex(text, -1) {
		out.WriteString(text[last:m[0]])
		last = m[1]
		switch {
		case m[2] >= 0:
			out.WriteByte('$')
		case m[4] >= 0, m[6] >= 0:
			name := text[max(m[4], m[6]):max(m[5], m[7])]
			if *left--; *left < 0 {
				return "", errTooManyReferences
			}
			v, err := c.resolve(section, name, seen, left)
			if err != nil {
				return "", err
			}
			out.WriteString(v)
		default:
			out.WriteByte('$') // a lone $ stands for itself
		}
		if out.Len() > maxExpanded {
			return "", errTooManyReferences
		}
	}
	out.WriteString(text[last:])
	return out.String(), nil
}

// resolve finds the value of a reference: an option of the same section, else
// of DEFAULT; or section.option.
func (c *Config) resolve(section, name string, seen []option, left *int) (string, error) {
	candidates := []option{{section, name}, {DefaultSection, name}}
	if group, rest, ok := strings.Cut(name, "."); ok {
		candidates = []option{{normalize(group), rest}}
	}
	for _, o := range candidates {
		text, ok := c.raw(o)
		if !ok {
			continue
		}
		for _, s := range seen {
			if s == o {
				return "", fmt.Errorf("refers to itself through $%s", name)
			}
		}
		c.read[o] = true
		return c.substitute(o.section, text, append(seen[:len(seen):len(seen)], o), left)
	}
	return "", fmt.Errorf("refers to $%s, which is not set (write $$ for a dollar sign)", name)
}

// raw is the text of an option: the last one read, else its default.
func (c *Config) raw(o option) (string, bool) {
	if vs := c.values[o]; len(vs) > 0 {
		return vs[len(vs)-1].text, true
	}
	d, ok := c.defaults[o]
	return d, ok
}
