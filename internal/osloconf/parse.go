package osloconf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

// DefaultSection is the section of options without a section of their own. No
// other section inherits from it.
const DefaultSection = "DEFAULT"

// Config is what was read from the files. Its methods may be called from many
// goroutines.
type Config struct {
	files []string

	mu       sync.Mutex
	values   map[option][]value // in the order read
	defaults map[option]string
	read     map[option]bool
	complain []string // each complaint once, in the order found
}

// option names an option; section is normalized.
type option struct{ section, name string }

// value is one assignment.
type value struct {
	text string
	file string
	line int
}

// normalize makes the names of sections comparable: oslo.config ignores their
// case, but for DEFAULT.
func normalize(section string) string {
	if section == DefaultSection {
		return section
	}
	return strings.ToLower(section)
}

// New returns a Config with nothing read, to which Add adds.
func New() *Config {
	return &Config{values: map[option][]value{}, defaults: map[option]string{}, read: map[option]bool{}}
}

// Load reads the files in their order, then the *.conf files of each directory
// in the order of their names (--config-file and --config-dir). A file or
// directory that is missing is an error. All files are tried: the error names
// every one that is damaged.
func Load(files, dirs []string) (*Config, error) {
	c := New()
	var errs []error
	all := slices.Clone(files)
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir) // sorted by name
		if err != nil {
			errs = append(errs, fmt.Errorf("read config directory: %w", err))
			continue
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".conf") && !e.IsDir() {
				all = append(all, filepath.Join(dir, e.Name()))
			}
		}
	}
	for _, f := range all {
		text, err := os.ReadFile(f)
		if err == nil {
			err = c.Add(f, text)
		} else {
			err = fmt.Errorf("read config file: %w", err)
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return c, nil
}

// Add reads the text of one more file, which wins over those before. name is
// used in messages. After an error nothing of the file counts.
func (c *Config) Add(name string, text []byte) error {
	if !utf8.Valid(text) {
		return fmt.Errorf("%s: not UTF-8", name)
	}
	p := parser{file: name, values: map[option][]value{}}
	for _, line := range splitLines(string(text)) {
		p.line++
		if err := p.feed(line); err != nil {
			return fmt.Errorf("%s:%d: %w", name, p.line, err)
		}
	}
	if err := p.flush(); err != nil {
		return fmt.Errorf("%s:%d: %w", name, p.start, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.files = append(c.files, name)
	for o, vs := range p.values {
		c.values[o] = append(c.values[o], vs...)
	}
	return nil
}

// splitLines splits as Python's universal newlines do.
func splitLines(text string) []string {
	text = strings.ReplaceAll(text, "\r\n", "\n")
	return strings.Split(strings.ReplaceAll(text, "\r", "\n"), "\n")
}

// parser follows oslo_config.iniparser line by line.
type parser struct {
	file    string
	line    int
	section string
	values  map[option][]value

	key   string // of the assignment being read, "" between assignments
	parts []string
	start int
}

func (p *parser) feed(line string) error {
	line = strings.TrimRightFunc(line, unicode.IsSpace)
	switch {
	case line == "":
		return p.flush()
	case line[0] == ' ' || line[0] == '\t':
		// Even a comment is a part of the value when it is indented.
		if p.key == "" {
			return errors.New("unexpected continuation line")
		}
		p.parts = append(p.parts, strings.TrimLeftFunc(line, unicode.IsSpace))
		return nil
	}
	if err := p.flush(); err != nil {
		return err
	}
	switch line[0] {
	case '[':
		if !strings.HasSuffix(line, "]") {
			return errors.New("section does not end with ]")
		}
		if len(line) == 2 {
			return errors.New("section without a name")
		}
		p.section = line[1 : len(line)-1]
	case '#', ';':
	default:
		i := strings.IndexAny(line, "=:")
		if i < 0 {
			return errors.New("neither a section nor an assignment: it has no = and no colon")
		}
		if p.key = strings.TrimSpace(line[:i]); p.key == "" {
			return errors.New("assignment without a name")
		}
		p.parts, p.start = []string{unquote(strings.TrimSpace(line[i+1:]))}, p.line
	}
	return nil
}

// unquote takes off quotes when the first and last character are the same one.
func unquote(s string) string {
	if s == "" || s[0] != s[len(s)-1] || s[0] != '"' && s[0] != '\'' {
		return s
	}
	if len(s) == 1 {
		return ""
	}
	return s[1 : len(s)-1]
}

// flush ends the assignment being read.
func (p *parser) flush() error {
	if p.key == "" {
		return nil
	}
	if p.section == "" {
		return errors.New("assignment before the first section")
	}
	o := option{normalize(p.section), p.key}
	p.values[o] = append(p.values[o], value{text: strings.Join(p.parts, "\n"), file: p.file, line: p.start})
	p.key, p.parts = "", nil
	return nil
}
