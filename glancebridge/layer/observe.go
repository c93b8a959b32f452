package layer

import (
	"encoding/binary"
	"io"
	"path"
	"slices"
	"strings"
)

// Observed is what the entries of a layer tell about the image as a whole.
type Observed struct {
	// Inits are the paths of a machine's init found, without the leading slash.
	Inits []string `json:"inits,omitempty"`
	// Machines counts the ELF machine numbers of programs in the usual folders.
	Machines map[uint16]int `json:"machines,omitempty"`
	// Top are the first elements of the paths, bounded.
	Top []string `json:"-"`
	// Whiteouts reports a name that would be a deletion in a container image's layer.
	Whiteouts bool `json:"-"`
	// Bytes is the sum of the file sizes.
	Bytes int64 `json:"-"`
}

// InitPaths are where a machine's init may lie, best first.
var InitPaths = []string{
	"sbin/init", "usr/sbin/init", "bin/init", "usr/bin/init", "lib/systemd/systemd", "usr/lib/systemd/systemd",
}

// Observe returns a sink that takes notes and passes everything to next.
func (o *Observed) Observe(next Sink) Sink {
	pk := &peeker{}
	return func(e *Entry, content io.Reader) error {
		top, _, _ := strings.Cut(e.Name, "/")
		if top != "" && len(o.Top) < 256 && !slices.Contains(o.Top, top) {
			o.Top = append(o.Top, top)
		}
		if !o.Whiteouts && strings.HasPrefix(path.Base(e.Name), whiteoutPrefix) {
			o.Whiteouts = true
		}
		if e.Type != TypeRegular {
			if (e.Type == TypeSymlink || e.Type == TypeHardlink) && slices.Contains(InitPaths, e.Name) {
				o.Inits = append(o.Inits, e.Name)
			}
			return next(e, content)
		}
		o.Bytes += e.Size
		if slices.Contains(InitPaths, e.Name) && !slices.Contains(o.Inits, e.Name) {
			o.Inits = append(o.Inits, e.Name)
		}
		if e.Mode&0111 != 0 && e.Size >= 20 && isProgramDir(path.Dir(e.Name)) {
			b := []byte(nil)
			if c, ok := content.(*tarContent); ok {
				b = c.peek(20)
			}
			if b == nil {
				pk.reset(content)
				b, content = pk.peek(20), pk
			}
			if len(b) >= 20 && string(b[:4]) == "\x7fELF" {
				m := binary.LittleEndian.Uint16(b[18:])
				if b[5] == 2 {
					m = binary.BigEndian.Uint16(b[18:])
				}
				if o.Machines == nil {
					o.Machines = make(map[uint16]int)
				}
				if len(o.Machines) < 16 {
					o.Machines[m]++
				}
			}
		}
		return next(e, content)
	}
}

func isProgramDir(dir string) bool {
	switch dir {
	case "bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin", "lib/systemd", "usr/lib/systemd", ".":
		return true
	}
	return false
}
