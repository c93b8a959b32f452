// Package shim carries the second program, cmd/novalet-shim, and puts it into a sealed memory file, from which
// every keeper, init and exec helper runs: nothing that runs can write to it (CVE-2019-5736), and a package upgrade
// under running instances changes nothing for them.
package shim

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/sealed"
)

// Open returns a read-only descriptor of the sealed program, close-on-exec. With an empty path it is the program
// built into this binary (build tag shim).
func Open(path string) (*os.File, error) {
	var src io.Reader
	switch {
	case path != "":
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("open shim: %w", err)
		}
		defer f.Close()
		src = f
	case len(embedded) > 0:
		src = strings.NewReader(embedded)
	default:
		return nil, errors.New("open shim: this binary was built without it (make build sets the tag shim); name one with the option shim_path")
	}
	return sealed.Program("novalet-shim", unix.O_RDONLY, func(w *os.File) error {
		_, err := io.Copy(w, src)
		return err
	})
}

// Embedded tells whether the program is built in.
func Embedded() bool { return len(embedded) > 0 }
